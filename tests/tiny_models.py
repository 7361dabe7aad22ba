"""Tiny seeded models of each family, and how tests compress them."""

import os

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from gateskip_compress.model import keep_softcap
from gateskip_compress.pipeline import apply, start
from gateskip_compress.step import Context

DEVICE = os.environ.get("GATESKIP_TEST_DEVICE", "cpu")
"""Where tests' models are: `make test-gpu` says cuda."""
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
EQUAL_HEADS = {**SIZES, "num_key_value_heads": 4}
NEOX = {**EQUAL_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
FAMILY_CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 0, 1]),
    "gemma2": Gemma2Config(**SIZES, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3_text": Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=16),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
    "phi3, partly rotary": Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gpt_neox": GPTNeoXConfig(**NEOX),
    "gpt_neox, sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_inner=128,
        n_layer=4,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        bos_token_id=1,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
}
SLIDING = ("mistral, sliding", "gemma2", "gemma3_text")
"""Their caches forget, so they cannot be rolled back."""
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Left as transformers starts them: other tests' numbers stand on them."""


def tiny(family="llama", **changes):
    """A seeded random model; weights large enough that branches matter, biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    config = FAMILY_CONFIGS[family]
    config = type(config)(**{**config.to_dict(), "initializer_range": 0.15, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    keep_softcap(model)
    if config.model_type not in PLAIN:
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.to(DEVICE)


def tokens(rows, columns, seed=1):
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tiny_tokenizer():
    words = ["<pad>", "<s>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


CALIBRATION = tokens(8, 48)


def compress(model, *steps, calibration=CALIBRATION):
    """Apply steps in place, as a pipeline does."""
    start(model, tiny_tokenizer(), source="tiny")
    return compress_further(model, *steps, calibration=calibration)


def compress_further(model, *steps, calibration=CALIBRATION):
    """The same, after earlier steps."""
    for step in steps:
        apply(step, model, Context(calibration))
    return model
