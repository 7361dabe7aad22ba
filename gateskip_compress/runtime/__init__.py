"""The native CPU runtime: a Llama-family model, compressed or not, lowered to C++ kernels that really skip.

`lower(model)` packs the weights and returns a `Session`; `session.generate` takes what `model.generate` takes.
"""

from typing import TYPE_CHECKING

from ..late import late

if TYPE_CHECKING:
    from .choose import choose_runtime as choose_runtime
    from .lowering import lower as lower
    from .machine import doctor as doctor
    from .session import Session as Session

__getattr__ = late(
    __name__, {"Session": ".session", "choose_runtime": ".choose", "doctor": ".machine", "lower": ".lowering"}
)
