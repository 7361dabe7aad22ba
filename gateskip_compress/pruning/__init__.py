"""Structured pruning: `influence` scores blocks, `transform` is the Prune step."""
