"""Runs blocks of inline PTX in numpy, by their text: integer logic, PRMT, shared loads."""

import re

import numpy as np


def run(
    asm: str,
    *operands: np.ndarray,
    outputs: int,
    shared: np.ndarray | None = None,
    loads: list[np.ndarray] | None = None,
):
    """Runs a block whose first `outputs` operands ($0, ...) it writes.

    Args:
      asm: Instructions; predicates and branches are not known.
      operands: uint32 arrays of one shape, $outputs and up.
      outputs: How many it writes.
      shared: Shared memory, uint32 words.
      loads: Where the byte addresses of each load from shared memory are added.

    Returns:
      The outputs, uint32.
    """
    names = {f"${outputs + i}": v.astype(np.uint32) for i, v in enumerate(operands)}

    def value(token: str) -> np.ndarray:
        if token in names:
            return names[token]
        return np.uint32(int(token, 0))

    body = asm.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        if line.startswith(".reg"):
            continue
        op, rest = line.split(None, 1)
        if op.startswith("ld.shared"):
            targets, address = re.fullmatch(
                r"\{?([^}\[]*?)\}?,\[(\w+)\]", rest
            ).groups()
            targets = targets.split(",")
            at = value(address)
            assert (at % (4 * len(targets)) == 0).all(), "misaligned"
            if loads is not None:
                loads.append(at)
            for i, target in enumerate(targets):
                names[target] = shared[at // 4 + i]
            continue
        target, *args = (part.strip() for part in rest.split(","))
        a, *more = (value(arg) for arg in args)
        names[target] = _OPERATIONS[op](a, *more)
    return [names[f"${i}"] for i in range(outputs)]


def _prmt(a, b, selector):
    source = a.astype(np.uint64) | np.uint64(b) << np.uint64(32)
    out = np.uint32(0)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = source >> (8 * (nibble & 7)).astype(np.uint64) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & 8, sign, byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    assert table == 0xEA, "only (a & b) | c is known"
    return (a & b) | c


_OPERATIONS = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
    "add.u32": np.add,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}
