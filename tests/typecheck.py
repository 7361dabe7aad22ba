"""What checks shapes and types at run time in tests: beartype, with whole numbers taken as floats, as in PEP 484."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
