"""Weights in few bits: numerics in `groups`, `gptq` and `allocate`, the layer in `linear`, the step in `transform`."""
