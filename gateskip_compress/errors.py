"""Every error that this package raises on purpose.

    GateSkipError
    ├── UnsupportedModel   the model lacks a part that we need, or its family is unknown
    ├── PipelineError      steps in an order or a combination that cannot work; a recipe that cannot be read
    ├── CalibrationError   text that is missing, too short or not readable
    ├── TrainingError      a loss that is not finite
    ├── RuntimeUnavailable the native runtime was not built here
    └── CheckpointError    a folder that is not a whole, undamaged checkpoint

A single argument out of its range is a `ValueError`. The command line turns all of these into one line and exit code 2.
"""


class GateSkipError(Exception):
    """Root of the tree; catch it to catch all that this package raises on purpose."""


class UnsupportedModel(GateSkipError):
    """The model's family is unknown, or one of its parts is missing; the message names which."""


class PipelineError(GateSkipError):
    """Steps that cannot be stacked so, or a recipe that cannot be read; the message says the reason and the mend."""


class CalibrationError(GateSkipError):
    """Text for calibration or measuring is missing, too short or unreadable."""


class CheckpointError(GateSkipError):
    """A checkpoint folder is incomplete, damaged or written by something else."""


class TrainingError(GateSkipError):
    """Training broke down; the message says at which step, and what the model holds now."""


class RuntimeUnavailable(GateSkipError):
    """The native runtime was asked for where it was not built, or does not load."""
