"""Signatures of the hot modules hold: shapes elsewhere are checked in all tests, theirs only here."""

import inspect
from importlib import import_module

import pytest
import torch
from jaxtyping import TypeCheckError, jaxtyped
from tiny_models import tokens
from typecheck import HOT, typechecker

import gateskip_compress as g
from gateskip_compress.quantization.groups import pack


def check(monkeypatch, owner):
    """Check all calls of the functions that a module or class has; returns their names."""
    found = []
    for name, value in vars(owner).items():
        inner = value.fget if isinstance(value, property) else value
        if not inspect.isfunction(inner) or inner.__module__ not in HOT or hasattr(inner, "__wrapped__"):
            continue  # what a decorator made returns something else than its signature says
        wrapped = jaxtyped(inner, typechecker=typechecker)
        monkeypatch.setattr(owner, name, property(wrapped) if isinstance(value, property) else wrapped)
        found.append(name)
    return found


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_the_hot_modules_keep_their_signatures(gated, kind, monkeypatch):
    modules = [import_module(name) for name in HOT]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    owners = [*modules, *(one for one in classes if one.__module__ in HOT)]
    assert sum(len(check(monkeypatch, owner)) for owner in owners) > 20
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.inference_mode(), g.masked(gated) if kind == "masked" else g.budget(gated, 0.6):
        gated(ids, attention_mask=mask)
        gated.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def test_shapes_elsewhere_are_checked():
    with pytest.raises(TypeCheckError, match="codes"):
        pack(torch.zeros(2, 8), 4)  # floats
