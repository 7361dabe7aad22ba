"""4-bit weights by group: `int4` and `gptq` hold the numerics, `linear` the module, `transform` the Quantize step."""
