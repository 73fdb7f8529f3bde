"""Defines how a frozen weight is stored: each format is one class, which answers for itself.

Everything above holds a `PackedWeight` and asks it (base.py says what). A format is added
by its file here, a line in `FORMATS`, and a line in the tests' table
(tests/format_cases.py).
"""

from collections.abc import Collection

from pallas_kernels.formats.absmax4 import QuantizedTensor as QuantizedTensor
from pallas_kernels.formats.base import FormatError as FormatError
from pallas_kernels.formats.base import PackedWeight as PackedWeight
from pallas_kernels.formats.int8_rows import Int8Rows as Int8Rows
from pallas_kernels.formats.mxfp4 import Mxfp4

FORMATS: dict[str, type[PackedWeight]] = {
    "absmax4": QuantizedTensor,
    "int8_rows": Int8Rows,
    "mxfp4": Mxfp4,
}
"""Every format that files are searched for, by name."""


def stored_format(keys: Collection[str], name: str) -> type[PackedWeight] | None:
    """Returns the format that a file with these keys has a weight in; None if dense."""
    found = (one for one in FORMATS.values() if one.is_stored(keys, name))
    return next(found, None)


def weight_of(key: str) -> str:
    """Returns the key of the weight that an entry belongs to; of a weight, itself."""
    parsed = filter(None, (one.parsed(key) for one in FORMATS.values()))
    return next(parsed, (key, ""))[0]


def renamed(key: str, weight: str) -> str:
    """Returns the key that an entry has when its weight is called `weight`."""
    for one in FORMATS.values():
        if parsed := one.parsed(key):
            return one.part(weight, parsed[1])
    return weight
