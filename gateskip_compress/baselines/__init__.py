"""What GateSkip is measured against: other ways to decide which tokens skip, on the same blocks.

    random_skip         a seeded hash decides
    early_exit          a token that is confident leaves for good                    CALM, arXiv 2207.07061
    mixture_of_depths   a router before every second block, tuned after the fact     arXiv 2404.02258
    batch_quantile      the quantile of the batch decides, as in GateSkip's reference code; not deployable

Each overrides `GatedBlock.decide`; running compact or masked, thresholds, budgets, training and the accounting of
multiply-adds are the product's own. `apply` changes a model in place, as a pipeline's step does, but these are no
steps: pipelines and recipes refuse them, and they cannot be saved. Dropping whole blocks is `Prune` itself.
"""
