import os

os.environ["HF_HUB_OFFLINE"] = "1"

from copy import deepcopy

import pytest
import torch
from jaxtyping import install_import_hook
from typecheck import checked

install_import_hook(checked(), "typecheck.typechecker")  # before anything imports the package

from tiny_models import FAMILY_CONFIGS, compress, tiny

from gateskip_compress import GateSkip

torch.set_num_threads(1)  # tiny products lose more to threads than they gain


@pytest.fixture(scope="session", params=list(FAMILY_CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def gated_once(family):
    return compress(tiny(family), GateSkip(budget=0.6, rank=4))


@pytest.fixture
def gated(gated_once):
    """A gated model of each family at about half of its branch executions."""
    return deepcopy(gated_once)
