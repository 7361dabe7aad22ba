"""Imports that wait until they are needed: torch and transformers take seconds, and not every command needs them."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .manifest import METHOD

_TABLES = "transformers.quantizers.auto"


def late(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: its names by the modules that they come out of, when they are first asked for."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def join_transformers() -> None:
    """Let transformers load our checkpoints: now if it is imported, else as soon as it will be."""
    tables = sys.modules.get(_TABLES)
    if tables is None:
        sys.meta_path.insert(0, _Joining())
    else:
        _join(tables)


class _Joining(MetaPathFinder, Loader):
    """Stands in the way of one import until it was made, and adds us to what comes out of it."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As `sys.meta_path` asks it."""
        del path, target
        if fullname != _TABLES or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The real loader's."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The real loader's, and then ours."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        _join(module)


def _join(tables: Any) -> None:
    """Put us into transformers' tables of what loads quantized checkpoints."""
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


class _Config:
    """Stands for `checkpoint.GateSkipConfig`, whose module imports transformers' own, until one is made."""

    @staticmethod
    def from_dict(*given: Any, **more: Any) -> Any:
        """As the class has it."""
        from .checkpoint import GateSkipConfig

        return GateSkipConfig.from_dict(*given, **more)


def _quantizer(*given: Any, **more: Any) -> Any:
    """Stands for `checkpoint.GateSkipQuantizer`, likewise."""
    from .checkpoint import GateSkipQuantizer

    return GateSkipQuantizer(*given, **more)
