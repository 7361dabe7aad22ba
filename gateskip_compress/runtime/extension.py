"""The compiled extension, or the reason why it is not here."""

from importlib import import_module
from types import ModuleType

from ..errors import RuntimeUnavailable, UnsupportedModel
from ..names import check_choice


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


def fitting_kernels(head_dim: int, asked: str | None = None) -> str:
    """The kernels asked for, or the fastest here whose vectors fit into a head.

    Raises:
        ValueError: there are none of that name here.
        UnsupportedModel: none fit.
    """
    usable = dict(extension().kernels())
    if asked is not None:
        check_choice("kernels", asked, tuple(usable))
    fitting = [name for name, lanes in usable.items() if head_dim % lanes == 0 and asked in (None, name)]
    if not fitting:
        raise UnsupportedModel(f"head width {head_dim} is no multiple of what kernels {asked or 'here'} take at once")
    return fitting[0]
