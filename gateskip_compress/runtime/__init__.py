"""The native CPU runtime: a Llama-family model, compressed or not, lowered to C++ kernels that really skip.

`lower(model)` packs the weights and returns a `Session`; `session.generate` takes what `model.generate` takes.
"""

from .choose import choose_runtime as choose_runtime
from .doctor import doctor as doctor
from .lower import lower as lower
from .session import Session as Session
