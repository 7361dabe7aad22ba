"""A packed checkpoint that writes without torch and transformers: the first token comes in a moment.

The packed file has the model, the manifest its dials, and tokenizers and jinja2 read what transformers saved of the
tokenizer. Whatever is not as usual is left to the way through transformers: the text would be the same, the start
slower.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..errors import GateSkipError
from ..gating.dial import Dial
from ..manifest import MANIFEST, check_files, manifest_content
from ..processor import checked_threads
from ..speculation.acceptance import Acceptance
from ..speculation.control import DRAFT_TOKENS, NO_GATES, Control, draft_budgets
from .blueprint import Builder
from .extension import extension, fitting_kernels
from .lowered import Lowered
from .packed import Packed, PackedFile
from .plain import Plain
from .prompt import SAMPLE, Printer, Words
from .sampling import SEEDS, Drawn
from .speculate import Speculator
from .texts import Ends, grow, prompts

_STEPS = {"prune", "recover", "gateskip", "quantize", "self_speculation"}
_GENERATION = "generation_config.json"
_READ = (_GENERATION, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PLAIN = {
    *("_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
    *("output_attentions", "output_hidden_states"),
}
"""What a generation config may say without a say in what is written, as `jobs.generate` asks for it."""


@dataclass(frozen=True, kw_only=True)
class Ready(Lowered):
    """A lowered model with its dials.

    Args:
        gates: The dial of its gates.
        draft_gates: Of those that draft.
    """

    gates: Dial | None
    draft_gates: Dial | None

    def dial(self, *, drafts: bool) -> Dial | None:
        """One of them."""
        return self.draft_gates if drafts else self.gates


def generate_ready(
    source: str,
    prompt: str,
    *,
    new_tokens: int,
    budget: float | None,
    speculate: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    put: Callable[[str], object] | None,
    tell: Callable[[str], object],
) -> tuple[dict[str, Any], Acceptance] | None:
    """What `jobs.generate` would say; None where only that can.

    Args:
        source: A folder.
        prompt: As there, like the next eight.
        new_tokens: As there.
        budget: As there.
        speculate: As there.
        temperature: As there.
        top_k: As there.
        top_p: As there.
        min_p: As there.
        seed: As there.
        put: Gets the text as it comes, in whole words.
        tell: As there.

    Raises:
        ValueError: there is no such budget, or none to draft at.
    """
    try:
        checkpoint = _Checkpoint.of(Path(source))
        ids = checkpoint.words.encode(prompt)
        session = checkpoint.session(len(ids) + new_tokens)
    except (GateSkipError, OSError, ValueError, KeyError, TypeError, TemplateError):  # told by the other way
        return None
    if not ids or new_tokens < 1 or (budget is not None and session.gates is None):
        return None
    limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    drawn = temperature > 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
    greedy = list(limits.values()) == [0, 0, 1, 0]
    if not (drawn or greedy) or not 0 <= seed < SEEDS:  # torch takes other seeds too
        return None
    if budget is not None and session.gates is not None:
        session.gates.set(budget)
    ends, counts = Ends(len(ids) + new_tokens, checkpoint.ends), Acceptance()
    plain = Plain(session, ends)
    chooser = Drawn(session, limits, seed) if drawn else None
    decode = plain.round
    if speculate:
        if session.gates is None:
            tell(NO_GATES)
        decode = Speculator(plain, _control(checkpoint, session), counts).round
    texts = prompts([np.array(ids)], [0], len(ids) + new_tokens, [chooser])
    printer = None if put is None else Printer(checkpoint.words, put)
    (text,) = grow(session, texts, decode, ends, printer.add if printer else lambda _: None)
    if printer:
        printer.end()
    new = text[len(ids) :].tolist()
    return {"text": checkpoint.words.decode(new), "token_ids": new, **counts.facts()}, counts


def is_for(runtime: str, device: str) -> bool:
    """Whether a model would run natively, by what was asked for and what is here."""
    on_cpu = device == "cpu" or (device == "auto" and (runtime == "native" or which("nvidia-smi") is None))
    return on_cpu and runtime in ("auto", "native")


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint with a packed file that belongs, and nothing unusual; `ends` are tokens that end a text."""

    steps: dict[str, dict[str, Any]]
    ends: frozenset[int]
    kernels: str
    packed: Packed
    words: Words

    @classmethod
    def of(cls, folder: Path) -> "_Checkpoint":
        """Out of a folder.

        Raises:
            GateSkipError, OSError, ValueError, KeyError, TypeError, TemplateError: it is none.
        """
        if not (folder / MANIFEST).is_file():
            raise ValueError("no checkpoint of ours")
        content = manifest_content(folder)
        check_files(folder, content, [name for name in _READ if name in content["files"]])
        steps = {step["name"]: step for step in content["steps"]}
        generation = json.loads((folder / _GENERATION).read_text())
        if not steps.keys() <= _STEPS or not generation.keys() <= _PLAIN:
            raise ValueError("something unusual")
        ends = generation.get("eos_token_id")
        ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        kernels, packed = _packed(folder)
        words = Words.of(folder)
        if packed.sample is None or words.encode(SAMPLE) != packed.sample["ids"]:
            raise ValueError("another way to encode")
        if words.decode(packed.sample["ids"]) != packed.sample["text"]:
            raise ValueError("another way to decode")
        return cls(steps, ends, kernels, packed, words)

    def session(self, context_tokens: int) -> Ready:
        """With room for a prompt and its continuation."""
        plan = self.packed.plan
        build, used = Builder(plan, self.packed.arrays, self.kernels), checked_threads(None)
        gates, speculation = self.steps.get("gateskip"), self.steps.get("self_speculation")
        drafts = speculation and speculation["settings"]["gates"]
        return Ready(
            native=build.model(context_tokens=context_tokens, rows=1, threads=used, cache="f16", fine=True),
            context_tokens=context_tokens,
            rows=1,
            kernels=self.kernels,
            vocabulary=plan["sizes"]["vocabulary"],
            bytes_per_token=plan["bytes_per_token"],
            drafts=plan["drafts"],
            gates=_dial(gates["settings"], gates["record"]) if gates else None,
            draft_gates=_dial(drafts, speculation["record"]["gates"]) if speculation and drafts else None,
        )


def _packed(folder: Path) -> tuple[str, Packed]:
    """The file for the fastest kernels that fit, as `lower` would take it."""
    for kernels, _ in extension().kernels():
        if not (folder / f"native.{kernels}.packed").is_file():
            continue
        found = PackedFile.beside(folder, kernels, floats="bf16", head="int8").read()
        if found is not None and fitting_kernels(found.plan["sizes"]["head_dim"]) == kernels:
            return kernels, found
    raise ValueError("nothing is packed")


def _dial(settings: dict[str, Any], record: dict[str, Any]) -> Dial:
    """As a GateSkip step left it."""
    return Dial.calibrated(record["table"], settings["budget"])


def _control(checkpoint: _Checkpoint, session: Ready) -> Control:
    """As the checkpoint's own step speculates; else as it is without one."""
    step, drafts = checkpoint.steps.get("self_speculation"), "look-up" if session.gates is None else "both"
    usual = {"drafts": drafts, "draft_budget": None, "draft_tokens": DRAFT_TOKENS, "adapt": True, "gates": None}
    how = step["settings"] if step else usual
    budgets = []
    if how["drafts"] != "look-up" and session.gates is not None:
        given = how["gates"]["budget"] if how["gates"] else how["draft_budget"]
        budgets = draft_budgets(session.gates, session.draft_gates or session.gates, given)
    return Control.over(how["drafts"], budgets, how["draft_tokens"], adapt=how["adapt"])
