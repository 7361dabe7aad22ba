"""What checks shapes and types at run time in tests: beartype, with whole numbers taken as floats, as in PEP 484.

Checking a call costs more than a tiny layer's work. So what every layer runs at every call is left out here, and has a
test of its own, `test_shapes.py`.
"""

from pathlib import Path

from beartype import BeartypeConf, beartype

HOT = (
    "gateskip_compress.gating.block",
    "gateskip_compress.gating.dial",
    "gateskip_compress.gating.gate",
    "gateskip_compress.model.attention",
)
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked():
    """Names of all modules of the package but the hot ones."""
    root = Path(__file__).parents[1]
    files = [file.relative_to(root).with_suffix("") for file in sorted(root.glob("gateskip_compress/**/*.py"))]
    names = [".".join(file.parts) for file in files if file.name != "__init__"]
    return [name for name in names if name not in HOT]
