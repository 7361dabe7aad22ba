"""Checkpoints that other libraries read and write: GPTQ's (AutoGPTQ, GPTQModel) and compressed-tensors'."""

from .export import export as export
