"""Tiny seeded models of each family, and how tests compress them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from gateskip_compress.pipeline import apply, start
from gateskip_compress.step import Context

VOCABULARY = 96
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
FAMILY_CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3_text": Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=16),
}


def tiny(family="llama", **changes):
    """A seeded random model; weights large enough that branches matter."""
    torch.manual_seed(0)
    config = FAMILY_CONFIGS[family]
    config = type(config)(**{**config.to_dict(), "initializer_range": 0.15, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows, columns, seed=1):
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer():
    words = ["<pad>", "<s>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


CALIBRATION = tokens(8, 48)


def compress(model, *steps):
    """Apply steps in place, as a pipeline does."""
    start(model, tiny_tokenizer(), source="tiny")
    for step in steps:
        apply(step, model, Context(CALIBRATION))
    return model
