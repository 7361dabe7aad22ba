"""Self-speculative decoding.

`accept` holds the rules, `draft` and `lookup` where drafted tokens come from, `control` whether and how far to draft,
`rows` the cache, `scores` the logits processors, `decode` the loop over them, `acceptance` its counts, `transform` the
step.
"""
