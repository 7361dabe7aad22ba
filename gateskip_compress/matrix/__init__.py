"""The benchmark matrix: many stacks of steps on a model, each measured against the original and against its parts."""
