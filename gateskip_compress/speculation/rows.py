"""A model at work on rows of text of different lengths, with one cache.

All rows end at the cache's last column; shorter ones begin with columns that the attention mask hides. Rows that accept
fewer tokens than others are moved to the right, which copies the cache once, as one more forward pass would (a
`DynamicCache` is copied whenever it grows). Hidden columns cost attention, and nothing else.

Where one sequence is decoded in float32, `clean` says how many leading columns hold exactly what plain decoding would
have put there: those of the prompt, and those that came one by one after clean ones. Kernels for k tokens round in
another order than kernels for one, so what a verify pass writes differs from that in the last bits.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Rows:
    """Feeds tokens to a model, and takes them back.

    Args:
        model: Runs as it stands at each call.
        cache: Changed in place; may hold a part of the prompt.
        mask: The prompts' attention mask, where a part of them is padding.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Int[Tensor, "b t"] | None) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.clean = cache.get_seq_length()

    @property
    def is_clean(self) -> bool:
        """Whether every column is."""
        return self.clean == self.cache.get_seq_length()

    def begin(self, prompts: Int[Tensor, "b t"], places: Int[Tensor, "b t"]) -> Float[Tensor, "b 1 v"]:
        """Read what the cache does not hold of the prompts; logits after them.

        Args:
            prompts: Whole.
            places: Positions of their tokens.
        """
        seen = self.cache.get_seq_length()
        self.place = places[:, -1] + 1
        self.clean = prompts.shape[1]
        return self._run(prompts[:, seen:], places[:, seen:], logits_to_keep=1)

    def feed(self, tokens: Int[Tensor, "b k"], *, full: bool = True) -> Float[Tensor, "b k v"]:
        """Logits after each of the texts' next tokens.

        Args:
            tokens: One or more a row.
            full: The model runs as it verifies, not as it drafts.
        """
        length, k = self.cache.get_seq_length(), tokens.shape[1]
        logits = self._run(tokens, self.place[:, None] + torch.arange(k, device=tokens.device))
        if full and k == 1 and self.clean == length:
            self.clean += 1
        self.place = self.place + k
        return logits

    def _run(self, tokens: Tensor, places: Tensor, **extra: Any) -> Tensor:
        if self.mask is not None:
            missing = self.cache.get_seq_length() + tokens.shape[1] - self.mask.shape[1]
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), missing)), dim=1)
        out = self.model(
            tokens, attention_mask=self.mask, position_ids=places, past_key_values=self.cache, use_cache=True, **extra
        )
        return out.logits

    def take_back(self, counts: Int[Tensor, " b"]) -> None:
        """Forget the last `counts` tokens of each row."""
        least = int(counts.min())
        self.cache.crop(-least)
        if self.mask is not None and least > 0:
            self.mask = self.mask[:, :-least]
        self.place = self.place - counts
        length, shift = self.cache.get_seq_length(), counts - least
        self.clean = min(self.clean, length)
        if not bool(shift.any()):
            return
        moved = torch.arange(length, device=counts.device) - shift[:, None]
        source = moved.clamp_min(0)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                held: Tensor = getattr(layer, name)
                index = source.to(held.device)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                setattr(layer, name, held.gather(2, index))
        mask = counts.new_ones(len(counts), length) if self.mask is None else self.mask
        self.mask = mask.gather(1, source) * (moved >= 0)

    def select(self, kept: Bool[Tensor, " b"]) -> None:
        """Go on with a part of the rows."""
        self.cache.batch_select_indices(kept.nonzero()[:, 0])
        self.mask = None if self.mask is None else self.mask[kept]
        self.place = self.place[kept]
