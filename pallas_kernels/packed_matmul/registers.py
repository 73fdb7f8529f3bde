"""Decoding packed words in the registers of a Mosaic GPU kernel.

A register of a planar word tile holds two neighbouring uint16 words, so eight codes: the
nibble planes 0 to 3 of element e (low half) and of e + 1 (high half). Each decoder turns
it into one register a plane with the values of (e, e + 1): the operand that tensor cores
take. Three ways, by what a weight costs and how exact it is:

  select   A tree of selects in float32, in plain Pallas: exact, about 20 instructions a
           weight, and the only one that the interpreter runs.
  permute  Byte permutes (PRMT) look up four codes at a time in the two bytes of the
           16-bit codebook: about 3 instructions a weight. Values are the codebook rounded
           to the 16-bit type; the product with a 16-bit scale rounds again.
  table    A pair of codes indexes a table in shared memory, one copy a lane, so that no
           two lanes meet in a bank: 1.4 integer instructions and half a load a weight. In
           16 bits as 'permute', or in float32, which is exact.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul.mosaic import Decoder

TABLE_SHAPE = (256, 64)
"""Words of the shared table: 256 pairs of codes, 64 words of 32 bits each (64 KiB)."""


def plane_pair(decoder: Decoder, half: int) -> tuple[int, int]:
    """Returns the two planes that `decode_pair` gives for a half of the planes."""
    if decoder == "permute":
        return 2 * half, 2 * half + 1
    return half, half + 2


def pair_shift(decoder: Decoder) -> int:
    """Returns the bits to shift words right by to have half 1 where half 0 was."""
    return 8 if decoder == "permute" else 4


def table_words(
    codebook: cb.Codebook, dtype: jnp.dtype, decoder: Decoder
) -> np.ndarray | None:
    """Returns what `fill_table` spreads, uint32 (256, 2), or None without a table.

    Row `low | high << 4` holds the values of the two codes: both in one word, twice, in
    16 bits; one each in float32.
    """
    values = cb.values(codebook).astype(np.float32)
    low, high = (
        codes.reshape(-1) for codes in np.meshgrid(np.arange(16), np.arange(16))
    )
    if decoder == "table":
        bits = values.astype(dtype).view(np.uint16).astype(np.uint32)
        words = bits[low] | bits[high] << 16
        return np.stack([words, words], -1)
    if decoder == "table_exact":
        return np.stack([values[low], values[high]], -1).view(np.uint32)
    return None


def fill_table(words: Any, table: Any) -> None:
    """Copies each row of `table_words` (GMEM) over the lanes' copies in shared memory.

    Called by all threads that compute, at least 256; they must meet at a barrier after.
    """
    stores = "".join(
        f"add.u32 c,l,{i};\nand.b32 c,c,15;\nshl.b32 c,c,4;\nadd.u32 c,c,a;\n"
        "@p st.shared.v4.b32 [c],{v,w,v,w};\n"
        for i in range(16)
    )
    # Neighbouring threads have rows 256 bytes apart: each starts at a chunk of its own,
    # so that no two meet in a bank.
    asm = (
        "{\n.reg .pred p;\n.reg .b32 v,w,a,c,l;\n.reg .b64 g;\n"
        "setp.lt.u32 p,$0,256;\nmul.wide.u32 g,$0,8;\nadd.s64 g,g,$2;\n"
        "@p ld.global.nc.v2.b32 {v,w},[g];\n"
        "shl.b32 a,$0,8;\nadd.u32 a,a,$1;\nand.b32 l,$0,15;\n" + stores + "}"
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def run(ctx, words, table):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, utils.memref_ptr(table))
        source = llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(words))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [utils.thread_idx(), base, source],
            asm,
            "r,r,l,~{memory}",
            has_side_effects=True,
        )
        return ()

    call: Any = run  # not what its decorator says
    call(words, table)


def select_plane(words: jax.Array, plane: int, codebook: cb.Codebook) -> jax.Array:
    """Decodes one nibble plane of uint16 words to float32 by a tree of selects."""
    leaves = [jnp.full(words.shape, v, jnp.float32) for v in cb.values(codebook)]
    for bit in range(4):
        high = (words & np.uint16(1 << (4 * plane + bit))) != 0
        leaves = [
            jnp.where(high, leaves[2 * i + 1], leaves[2 * i])
            for i in range(len(leaves) // 2)
        ]
    return leaves[0]


def decode_pair(
    words: jax.Array,
    half: int,
    *,
    decoder: Decoder,
    codebook: cb.Codebook,
    dtype: jnp.dtype,
    layout: Any,
    table: Any = None,
    shift: jax.Array | None = None,
) -> list[jax.Array]:
    """Decodes two nibble planes, those of `plane_pair(decoder, half)`.

    Args:
      words: uint16 tile in registers, two neighbours a register (WGMMA, MMA_LHS, ...).
      half: 0 or 1, static.
      decoder: The method that turns codes into values (module docstring).
      codebook: The 16 values that codes stand for: 'nf4', 'fp4' or 'int4'.
      dtype: bfloat16 or float16, of the operand that the values are for.
      layout: The register layout of `words`.
      table: The SMEM ref of TABLE_SHAPE for the table decoders.
      shift: int32 scalar, bits to shift every register right by first, for a half known
        only on the device: pass half 0 and `half * pair_shift(decoder)`.

    Returns:
      Two arrays of words' shape and layout: float32 from exact decoders, else `dtype`.
    """
    if decoder == "select":
        if shift is not None:
            words = words >> shift.astype(jnp.uint16)
        return [select_plane(words, p, codebook) for p in plane_pair(decoder, half)]
    if decoder == "permute":
        asm = _permute_asm(half, codebook, dtype)
        return _inline(words, asm, 2, dtype, layout, shift=shift)
    exact = decoder == "table_exact"
    asm = _table_asm(half, exact)
    out = jnp.float32 if exact else dtype
    return _inline(words, asm, 4 if exact else 2, out, layout, table=table, shift=shift)


def decode_one(
    words: jax.Array,
    shift: jax.Array,
    *,
    decoder: Decoder,
    dtype: jnp.dtype,
    layout: Any,
    table: Any,
) -> jax.Array:
    """Decodes the plane at bit `shift` (int32 scalar), with a table decoder only."""
    exact = decoder == "table_exact"
    asm = _table_asm(0, exact, planes=1)
    out = jnp.float32 if exact else dtype
    outs = 2 if exact else 1
    return _inline(words, asm, outs, out, layout, table=table, shift=shift)[0]


def pin(array: jax.Array, layout: Any) -> jax.Array:
    """Computes the whole array here, none of it later between its uses.

    An instruction that makes one of the operands of a group of wgmmas after the group has
    begun makes the assembler run all products one by one (its message C7513).
    """
    out = plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def run(ctx, array):
        del ctx
        return fragmented_array.optimization_barrier(array)

    call: Any = run  # not what its decorator says
    return call(array)


def store(value: Any, target: Any) -> None:
    """Stores an array to a Ref of its shape and dtype in device memory.

    One store may leave sectors or lines of L2 half written: others fill them while they are
    there. From jax 0.12 on that has to be allowed (optimized=False), or it does not compile.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value


def _words32(values) -> list[str]:
    return [
        f"0x{sum(int(v) << (8 * i) for i, v in enumerate(values[j : j + 4])):08x}"
        for j in range(0, 16, 4)
    ]


def _permute_asm(half: int, codebook: cb.Codebook, dtype: jnp.dtype) -> str:
    """Two planes of one register: $0, $1 from $2.

    PRMT picks bytes of a pair of registers by three bits a nibble of its selector, so a
    16-entry table takes two PRMTs and a third that picks by the codes' top bits.
    """
    bits = cb.values(codebook).astype(dtype).view(np.uint16)
    low, high = _words32(bits & 255), _words32(bits >> 8)
    gather = "0x4420" if half == 0 else "0x4431"

    def lookup(out: str, t: list[str]) -> str:
        return (
            f"prmt.b32 a,{t[0]},{t[1]},ix;\n"
            f"prmt.b32 b,{t[2]},{t[3]},ix;\n"
            f"prmt.b32 {out},a,b,pk;\n"
        )

    return (
        "{\n.reg .b32 s,ix,pk,a,b,lo,hi;\n"
        f"prmt.b32 s,$2,0,{gather};\n"  # nibbles f, f+1 of e, then of e+1
        "and.b32 ix,s,0x7777;\n"
        "shr.u32 pk,s,1;\n"
        "lop3.b32 pk,pk,0x4444,0x3210,0xEA;\n"  # (pk & 0x4444) | 0x3210
        + lookup("lo", low)
        + lookup("hi", high)
        + "prmt.b32 $0,lo,hi,0x6240;\n"
        "prmt.b32 $1,lo,hi,0x7351;\n}"
    )


def _table_asm(half: int, exact: bool, planes: int = 2) -> str:
    """One or two planes of one register by as many loads.

    Operands behind the outputs: the register, this lane's offset in a row (below 256), the
    table's shared address. Rows are 256 bytes, so a pair of codes is byte 1 of an offset.
    """
    outs = planes * (2 if exact else 1)
    word, lane, base = (f"${outs + i}" for i in range(3))
    mask = "0x0f0f0f0f" if planes == 2 else "0x000f000f"
    asm = "{\n.reg .b32 e,t,p;\n"
    if half == 0:
        asm += f"and.b32 e,{word},{mask};\n"
    else:
        asm += f"shr.u32 e,{word},4;\nand.b32 e,e,{mask};\n"
    # Byte 0 becomes code e | code e+1 << 4 of the first plane, byte 1 of the second.
    asm += "shr.u32 t,e,12;\nor.b32 e,e,t;\n"
    for plane in range(planes):
        asm += f"prmt.b32 p,e,{lane},0x76{plane}4;\nadd.u32 p,p,{base};\n"
        if exact:
            asm += f"ld.shared.v2.b32 {{${2 * plane},${2 * plane + 1}}},[p];\n"
        else:
            asm += f"ld.shared.b32 ${plane},[p];\n"
    return asm + "}"


def _inline(
    words, asm, outs, dtype, layout, *, table=None, shift=None
) -> list[jax.Array]:
    """Runs `asm` on every register of words; returns one array a plane.

    A plane takes one output of 16-bit dtypes, two of float32.
    """
    out_type = plgpu.ShapeDtypeStruct(words.shape, dtype, layout=layout)
    arg_types: list = [layout]
    args = [words]
    if table is not None:
        arg_types.append(plgpu.RefType())
        args.append(table)
    if shift is not None:
        arg_types.append(plgpu.Layout.WG_SPLAT(()))
        args.append(shift)
    width = jnp.dtype(dtype).itemsize // 2  # outputs a plane
    planes = outs // width

    @plgpu.inline_mgpu(arg_types=tuple(arg_types), return_type=(out_type,) * planes)
    def run(ctx, array, *rest):
        del ctx
        rest = list(rest)
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        extra, constraints = [], ",".join(["=r"] * outs + ["r"])
        if table is not None:
            base = llvm.ptrtoint(i32, utils.memref_ptr(rest.pop(0)))
            lane = arith.remui(utils.thread_idx(), utils.c(32, i32))
            extra = [arith.muli(lane, utils.c(4 * width, i32)), base]
            constraints += ",r,r"
        amount = rest.pop(0).registers.item() if shift is not None else None
        results = [np.empty_like(array.registers) for _ in range(planes)]
        struct = llvm.StructType.get_literal([i32] * outs)
        for index, register in np.ndenumerate(array.registers):
            word = utils.bitcast(register, i32)
            if amount is not None:
                word = arith.shrui(word, amount)
            if outs == 1:
                parts = [llvm.inline_asm(i32, [word, *extra], asm, constraints)]
            else:
                out = llvm.inline_asm(struct, [word, *extra], asm, constraints)
                parts = [llvm.extractvalue(i32, out, [i]) for i in range(outs)]
            for plane in range(planes):
                value = parts[plane * width]
                if width == 2:
                    value = llvm.mlir_undef(ir.VectorType.get((2,), i32))
                    for i in range(2):
                        value = llvm.insertelement(
                            value, parts[2 * plane + i], utils.c(i, i32)
                        )
                results[plane][index] = utils.bitcast(value, pair)
        return tuple(
            fragmented_array.FragmentedArray(
                _registers=r, _layout=array.layout, _is_signed=None
            )
            for r in results
        )

    call: Any = run  # not what its decorator says
    return list(call(*args))
