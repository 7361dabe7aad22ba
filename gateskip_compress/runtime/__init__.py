"""The native CPU runtime: a Llama-family model, compressed or not, lowered to C++ kernels that really skip.

`lower(model)` packs the weights and returns a `Session`; `session.generate` takes what `model.generate` takes.
"""

from .doctor import doctor as doctor
from .extension import RuntimeUnavailable as RuntimeUnavailable
from .lower import lower as lower
from .session import Session as Session
