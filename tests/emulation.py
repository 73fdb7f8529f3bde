"""Runs the register code of 'decode' in numpy: what it builds is what is computed.

The functions below stand in for the MLIR builders that decode/warp.py calls; a value is a
numpy array with one element a thread (vectors: one row a thread). One bytearray is all
memory, so pointers are numbers. Inline PTX is emulated by its text.
"""

import contextlib
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

THREADS = 128


class Memory:
    """Flat bytes; refs are addresses in it."""

    def __init__(self):
        self.bytes = bytearray(1024)  # no ref is at 0

    def put(self, array: np.ndarray, align: int = 1024):
        """Copies an array in; returns its ref."""
        self.bytes += bytes(-len(self.bytes) % align)
        at = len(self.bytes)
        self.bytes += np.ascontiguousarray(array).tobytes()
        return SimpleNamespace(at=at, shape=array.shape, type=None, dtype=array.dtype)

    def read(self, ref) -> np.ndarray:
        count = int(np.prod(ref.shape)) * ref.dtype.itemsize
        data = np.frombuffer(bytes(self.bytes[ref.at : ref.at + count]), ref.dtype)
        return data.reshape(ref.shape)

    def load(self, dtype, count: int, at: np.ndarray) -> np.ndarray:
        size = dtype.itemsize * count
        assert (at % size == 0).all(), "misaligned"
        raw = np.frombuffer(self.bytes, np.uint8)
        data = raw[at[:, None].astype(np.int64) + np.arange(size)]
        out = np.ascontiguousarray(data).view(dtype)
        return out if count > 1 else out[:, 0]

    def store(self, at: np.ndarray, values: np.ndarray, where: np.ndarray) -> None:
        for a, v in zip(at[where], values[where], strict=True):
            self.bytes[a : a + v.nbytes] = v.tobytes()


def _kind(ty) -> tuple[np.dtype, int]:
    """numpy dtype and vector length of an MLIR type (0: no vector)."""
    text = str(ty)
    count = 0
    if m := re.fullmatch(r"vector<(\d+)x(\w+)>", text):
        count, text = int(m.group(1)), m.group(2)
    named = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
    named |= {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64)}
    if text not in named:
        return np.dtype(f"u{int(text[1:]) // 8}"), count
    return named[text], count


def _bits(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).astype(np.uint32)


def _prmt(a, b, selector: int) -> np.ndarray:
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a, np.uint32)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        assert nibble < 8
        byte = source >> np.uint64(8 * nibble) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c: int, table: int) -> np.ndarray:
    c, out = np.uint32(c), np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0)))
            out |= x & y & z
    return out


def _mma(dtype, a, b, c) -> list[np.ndarray]:
    """m16n8k16, four warps at once: PTX ISA's fragment tables."""
    lane = np.arange(THREADS) % 32
    g, t = lane // 4, lane % 4
    warp = np.arange(THREADS) // 32
    lhs, rhs = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))
    acc = np.zeros((4, 16, 8))
    for i, register in enumerate(a):
        values = np.ascontiguousarray(register).view(dtype).reshape(-1, 2)
        for j in range(2):
            lhs[warp, g + 8 * (i % 2), 2 * t + 8 * (i // 2) + j] = values[:, j]
    for i, register in enumerate(b):
        values = np.ascontiguousarray(register).view(dtype).reshape(-1, 2)
        for j in range(2):
            rhs[warp, 2 * t + 8 * i + j, g] = values[:, j]
    for i, register in enumerate(c):
        acc[warp, g + 8 * (i // 2), 2 * t + i % 2] = register
    out = (acc + lhs @ rhs).astype(np.float32)
    return [out[warp, g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]


def install(monkeypatch, module, memory: Memory) -> None:
    """Replaces the builders that `module` calls."""

    def inline_asm(_type, args, asm, _constraints, has_side_effects=False):
        if m := re.match(r"prmt\.b32 \$0,\$1,\$2,(\w+);", asm):
            return _prmt(args[0], args[1], int(m.group(1), 0))
        if m := re.match(r"lop3\.b32 \$0,\$1,\$2,(\w+),(\w+);", asm):
            return _lop3(args[0], args[1], int(m.group(1), 0), int(m.group(2), 0))
        if asm.startswith("mma."):
            kind = ml_dtypes.bfloat16 if ".bf16." in asm else np.float16
            return _mma(np.dtype(kind), args[:4], args[4:6], args[6:])
        if asm.startswith("fence"):
            return None
        assert "st.global" in asm and has_side_effects, asm
        return memory.store(args[0], args[1], args[2] != 0)

    def bitcast(value, ty):
        dtype, count = _kind(ty)
        out = np.ascontiguousarray(value).reshape(len(value), -1).view(dtype)
        return out if count else out[:, 0]

    def constant(value, ty):
        return np.full(THREADS, value, _kind(ty)[0])

    def load(ty, at):
        dtype, count = _kind(ty)
        out = memory.load(dtype, count or 1, at)
        return out[:, None] if count == 1 else out

    def pointer(ref):
        return np.full(THREADS, ref.at, np.int64)

    def size(ty):
        dtype, count = _kind(ty)
        return dtype.itemsize * max(count, 1)

    def wide(value):
        return value.astype(np.int32).astype(np.int64)

    monkeypatch.setattr(
        module,
        "arith",
        SimpleNamespace(
            addi=lambda a, b: a + b,
            muli=lambda a, b: a * b,
            divui=lambda a, b: a // b,
            remui=lambda a, b: a % b,
            minui=np.minimum,
            shli=lambda a, b: a << b,
            shrui=lambda a, b: a >> b,
            addf=lambda a, b: a + b,
            mulf=lambda a, b: a * b,
            cmpi=lambda p, a, b: {"uge": a >= b, "ult": a < b, "ne": a != b}[p],
            CmpIPredicate=SimpleNamespace(uge="uge", ult="ult", ne="ne"),
            select=lambda p, a, b: np.where(p.reshape(-1, *[1] * (a.ndim - 1)), a, b),
            extui=lambda ty, a: a.astype(np.uint32),
            truncf=lambda ty, a: a.astype(_kind(ty)[0]),
        ),
    )
    monkeypatch.setattr(
        module,
        "llvm",
        SimpleNamespace(
            inline_asm=inline_asm,
            extractelement=lambda v, i: np.ascontiguousarray(v[:, int(i[0])]),
            extractvalue=lambda ty, s, i: s[i[0]],
            load=load,
            store=lambda v, at: memory.store(at, v, np.full(len(at), True)),
            addrspacecast=lambda ty, at: at,
            PointerType=SimpleNamespace(get=lambda space: space),
            ptrtoint=lambda ty, at: at.astype(_kind(ty)[0]),
            inttoptr=lambda ty, at: at.astype(np.int64),
            StructType=SimpleNamespace(get_literal=lambda t: t),
        ),
    )
    monkeypatch.setattr(
        module,
        "vector",
        SimpleNamespace(
            broadcast=lambda ty, v: np.repeat(v[:, None], _kind(ty)[1], 1),
            from_elements=lambda ty, v: np.stack(v, 1),
        ),
    )
    monkeypatch.setattr(module, "math", SimpleNamespace(fma=lambda a, b, c: a * b + c))
    monkeypatch.setattr(
        module,
        "utils",
        SimpleNamespace(
            bitcast=bitcast,
            c=constant,
            bitwidth=lambda ty: 8 * _kind(ty)[0].itemsize,
            memref_ptr=pointer,
            get_cluster_ptr=lambda at, block: at,  # one memory for all blocks
            warpgroup_barrier=lambda: None,
            getelementptr=lambda p, i, ty: p + wide(i[0]) * size(ty),
            dtype_to_ir_type=lambda d: {
                "bfloat16": ir.BF16Type,
                "float16": ir.F16Type,
                "float32": ir.F32Type,
            }[str(d)].get(),
            thread_idx=lambda: np.arange(THREADS, dtype=np.uint32),
        ),
    )


def registers(values: list) -> SimpleNamespace:
    """An array in registers, as decode/warp.py reads it."""
    out = np.empty(len(values), object)
    for i, value in enumerate(values):
        out[i] = value
    return SimpleNamespace(registers=out)


@contextlib.contextmanager
def types():
    """MLIR types can be made inside."""
    with mlir.make_ir_context(), ir.Location.unknown():
        yield


def splat(value) -> np.ndarray:
    """A value that all threads have, uint32 unless it has a dtype."""
    dtype = getattr(value, "dtype", np.uint32)
    return np.full(THREADS, value, dtype)


def behind(ref: SimpleNamespace, count: int) -> SimpleNamespace:
    """A ref to what is so many bytes behind another's begin."""
    return SimpleNamespace(**{**vars(ref), "at": ref.at + count})
