"""The compiled extension, or the reason why it is not here."""

from importlib import import_module
from types import ModuleType

from ..errors import RuntimeUnavailable


def extension() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeUnavailable: it was not built, or does not load.
    """
    try:
        return import_module("gateskip_compress.runtime._native")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            reason = "the package was installed where no C++17 compiler (g++ or clang++) was found"
        else:
            reason = str(error)
        raise RuntimeUnavailable(
            f"no native runtime here: {reason}; install a compiler and the package again, or use runtime='torch'"
        ) from None


def kernel_names() -> list[str]:
    """Kernels that this processor can run, the fastest first."""
    return [name for name, _ in extension().kernels()]
