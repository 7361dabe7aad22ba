"""4-bit weights by group: `int4` holds the numerics, `linear` the module, `transform` the Quantize step."""
