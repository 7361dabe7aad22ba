"""Weights in few bits by group: numerics in `groups`, `gptq`, `allocate`, the module in `linear`, the step in `transform`."""
