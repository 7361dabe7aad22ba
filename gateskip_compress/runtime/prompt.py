"""A checkpoint's tokenizer without transformers, for the usual case, and a sample to tell whether it is one."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

SAMPLE = "Add 12, 3.5 and x_y:\n\n\tnaïve  café – “übung” 漢字 🙂\r\n  <b>It's</b>  "
"""Text that tokenizers which differ at all are likely to take apart differently."""
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Words:
    """Encodes prompts, in the chat template where there is one, and decodes what comes back.

    Args:
        tokenizer: Of the checkpoint.
        template: Of its chats; None where it has none.
        special: Special tokens by their names in templates.
    """

    tokenizer: Tokenizer
    template: str | None
    special: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Words":
        """As transformers saved it.

        Raises:
            OSError: a file is missing.
            ValueError: one cannot be read.
        """
        tokenizer, template = Tokenizer.from_file(str(folder / "tokenizer.json")), folder / _TEMPLATE
        config = json.loads((folder / "tokenizer_config.json").read_text())
        special = {name: token for name, token in config.items() if name.endswith("_token") and isinstance(token, str)}
        return cls(tokenizer, template.read_text() if template.is_file() else None, special)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt.

        Raises:
            TemplateError: the template needs more than a prompt and special tokens.
        """
        if self.template is None:
            return self.tokenizer.encode(prompt).ids
        chat = [{"role": "user", "content": prompt}]
        text = _render(self.template, messages=chat, add_generation_prompt=True, **self.special)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _render(template: str, **given: Any) -> str:
    """A chat template, with what transformers offers to all of them."""
    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.globals["raise_exception"] = _refuse
    world.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return world.from_string(template).render(**given)


def _refuse(message: str) -> None:
    raise TemplateError(message)


@dataclass
class Printer:
    """Prints a text as its tokens come, whole words at a time.

    Args:
        words: Decodes.
        put: Gets pieces of text.
        ids: That came, of the line that is being written.
        shown: Characters of it that were put out.
    """

    words: Words
    put: Callable[[str], object]
    ids: list[int] = field(default_factory=list)
    shown: int = 0

    def add(self, token: int) -> None:
        """One more."""
        self.ids.append(token)
        text = self.words.decode(self.ids)
        if text.endswith("\n"):
            self._show(text, len(text))
            self.ids, self.shown = [], 0
        elif text and "\u2e80" <= text[-1] != "\ufffd":  # writing without spaces; no half of a character
            self._show(text, len(text))
        else:
            self._show(text, text.rfind(" ") + 1)

    def end(self) -> None:
        """The rest, and an end of line."""
        text = self.words.decode(self.ids)
        self._show(text, len(text))
        self.put("\n")

    def _show(self, text: str, upto: int) -> None:
        if upto > self.shown:
            self.put(text[self.shown : upto])
            self.shown = upto
