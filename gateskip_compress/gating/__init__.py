"""GateSkip: gates on the branches of each block, token-wise skipping under a budget.

`closed_form` holds the numerics, `gate` the tensors, `dial` the budget, `turning` that of a model, `block` how a gated
block runs, `fit` and `calibrate` get numbers from text, `transform` puts it all into a model.
"""
