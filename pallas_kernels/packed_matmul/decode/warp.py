"""What a warp of the decode kernel does in registers, built as MLIR and PTX.

A warp decodes 16 rows of a word group (four planes of 64 elements, so four blocks) by a
table in shared memory that gives two neighbours of a plane at once, and multiplies by
mma.sync m16n8k16 with the rows as its m and eight tokens as its n. Values enter it
unscaled: a plane is one block, so its absmax multiplies the float32 sum of its 64
products.

A row of the table is 256 bytes: for row `code e | code e+1 << 4` the pair in 16 bits, 32
copies, one a lane, so that no two lanes meet in a bank; then, for row r, 32 copies of
value r of the dynamic map, by which absmax is decoded. With rows of 256 bytes the byte
of codes, put in byte 1, is the offset: one byte permute and one load give two weights.

The functions take `kernel`, a forward._Kernel, for its shapes; fragments of mma are those
of the PTX ISA, lane 4g+t having rows g and g+8.
"""

from typing import Any

import numpy as np
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

Value = Any  # an ir.Value; tests/emulation.py puts numpy arrays in its place


def _i32(value: int) -> Value:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _times(value: Value, factor: int) -> Value:
    return arith.muli(value, _i32(factor))


def _flat(array: Any) -> list[Value]:
    return list(array.registers.flat)


class _Lane:
    """Says where a thread stands in its warpgroup: its warp, and row g and quarter t of its
    lane."""

    def __init__(self):
        thread = utils.thread_idx()
        self.index = arith.remui(thread, _i32(32))
        self.warp = arith.remui(arith.divui(thread, _i32(32)), _i32(4))
        self.row = arith.divui(self.index, _i32(4))
        self.quarter = arith.remui(self.index, _i32(4))


def _asm(asm: str, *operands: Value) -> Value:
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(i32, list(operands), asm + ";", constraints)


def fill_table(source: Value, target: Value, wg: Value, wgs: int) -> None:
    """Fills the table (256, 64) from one value a half row, (2, 256), in global memory.

    A warp stores two rows at once: 8 lanes, of four copies each, a half.
    """
    thread, i32 = (
        arith.remui(utils.thread_idx(), _i32(128)),
        ir.IntegerType.get_signless(32),
    )
    lane = arith.remui(thread, _i32(32))
    warp = arith.addi(_times(wg, 4), arith.divui(thread, _i32(32)))
    half = arith.remui(arith.divui(lane, _i32(8)), _i32(2))
    first = arith.addi(_times(warp, 2), arith.divui(lane, _i32(16)))
    source, target = _global(source), utils.memref_ptr(target)
    rows, values = [], []
    for start in range(0, 256, 8 * wgs):
        # Too many warps begin again at row 0, with the same values.
        row = arith.remui(arith.addi(first, _i32(start)), _i32(256))
        rows.append(row)
        values.append(_load(source, arith.addi(_times(half, 256), row), i32, 1))
    for row, value in zip(rows, values, strict=True):
        copies = vector.from_elements(
            ir.VectorType.get((4,), i32), [llvm.extractelement(value, _i32(0))] * 4
        )
        at = arith.addi(_times(row, 64), _times(arith.remui(lane, _i32(16)), 4))
        llvm.store(copies, utils.getelementptr(target, [at], i32))


def keep(target: Value, sums: Any, add: Any | None = None) -> None:
    """Stores a warpgroup's sums, each (64, 8), one behind the other in shared memory.

    Args:
      target: The place in shared memory that they go to.
      sums: The fragments.
      add: Whether to add to what is there (int32 scalar).
    """
    lane, f32x2 = _Lane(), ir.VectorType.get((2,), ir.F32Type.get())
    row = arith.addi(_times(lane.warp, 16), lane.row)
    first = arith.addi(_times(row, 4), lane.quarter)  # in pairs of floats
    pointer = utils.memref_ptr(target)
    for number, of_block in enumerate(sums):
        for half, value in enumerate(_flat(of_block)):
            at = arith.addi(first, _i32(256 * number + 32 * half))
            address = utils.getelementptr(pointer, [at], f32x2)
            if add is not None:
                old = llvm.load(f32x2, address)
                none = vector.broadcast(f32x2, utils.c(0.0, ir.F32Type.get()))
                there = arith.cmpi(arith.CmpIPredicate.ne, _flat(add)[0], _i32(0))
                value = arith.addf(value, arith.select(there, old, none))
            llvm.store(value, address)


def totals(shape: tuple[int, ...], sums: Value) -> list[list[Value]]:
    """Adds up sums in shared memory: one float a thread, by row tile and token block.

    They are (parts, row tiles, token blocks, 16 * parts, 8); thread 8r+t of a warpgroup
    gets row r and token t.
    """
    parts, row_tiles, token_blocks, rows, _ = shape
    thread, f32 = arith.remui(utils.thread_idx(), _i32(128)), ir.F32Type.get()
    pointer = utils.memref_ptr(sums)

    def total(tile, block):
        out = None
        for part in range(parts):
            start = ((part * row_tiles + tile) * token_blocks + block) * rows * 8
            for at in range(start, start + rows * 8, 128):
                address = utils.getelementptr(
                    pointer, [arith.addi(thread, _i32(at))], f32
                )
                value = llvm.load(f32, address)
                out = value if out is None else arith.addf(out, value)
        return out

    return [[total(i, j) for j in range(token_blocks)] for i in range(row_tiles)]


def send(values: list[list[Value]], target: Value) -> None:
    """Stores totals in `target` of block 0 of the cluster: (tiles, blocks, 16, 8).

    A cluster barrier may be arrived at behind it: only some threads do that, for all.
    """
    thread, f32 = arith.remui(utils.thread_idx(), _i32(128)), ir.F32Type.get()
    pointer = utils.get_cluster_ptr(utils.memref_ptr(target), _i32(0))
    for number, value in enumerate(v for row in values for v in row):
        at = arith.addi(thread, _i32(128 * number))
        llvm.store(value, utils.getelementptr(pointer, [at], f32))
    void, asm = ir.Type.parse("!llvm.void"), "fence.acq_rel.cluster;"
    llvm.inline_asm(void, [], asm, "~{memory}", has_side_effects=True)
    utils.warpgroup_barrier()


def write(kernel, values: list[list[Value]], out: Value, row: Value) -> None:
    """Rounds totals and stores them in columns row and on of out (m, n)."""
    thread = arith.remui(utils.thread_idx(), _i32(128))
    dtype, i32 = utils.dtype_to_ir_type(kernel.dtype), ir.IntegerType.get_signless(32)
    i16, i64 = (ir.IntegerType.get_signless(b) for b in (16, 64))
    row = arith.addi(row, arith.divui(thread, _i32(8)))
    pointer = utils.memref_ptr(out)
    for tile, of_tile in enumerate(values):
        for block, value in enumerate(of_tile):
            token = arith.addi(arith.remui(thread, _i32(8)), _i32(8 * block))
            column = arith.addi(row, _i32(16 * tile))
            index = arith.addi(_times(token, kernel.n), column)
            address = utils.getelementptr(pointer, [index], dtype)
            real = arith.cmpi(arith.CmpIPredicate.ult, token, _i32(kernel.m))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [
                    llvm.ptrtoint(i64, address),
                    utils.bitcast(arith.truncf(dtype, value), i16),
                    arith.extui(i32, real),
                ],
                "{.reg .pred p; setp.ne.u32 p,$2,0; @p st.global.b16 [$0],$1;}",
                "l,h,r,~{memory}",
                has_side_effects=True,
            )


def load_tile(kernel, refs, row: Value, group: Value) -> list[list[Value]]:
    """Loads a lane's part of a tile at `row` and `group`.

    Args:
      kernel: The kernel, read for its shapes.
      refs: The weight in global memory: words (n, k/4), absmax or its codes (n, k/64) and,
        with codes, absmax_scale (one for every kernel.scale_blocks flat blocks of 64).
      row: First row of the tile.
      group: Word group of the first warp; the others take the next.

    Returns:
      Registers of each: 8 words, by 16 rows, half of them, half of the group; 4 absmax,
      by 16 rows, half of them; their absmax_scale, likewise.
    """
    words, absmax, *scale = (_global(ref) for ref in refs)
    lane, a_row = _Lane(), kernel.k // 64
    row, group = arith.addi(row, lane.row), arith.addi(group, lane.warp)
    block = arith.addi(_times(row, a_row), _times(group, 4))
    word = arith.addi(_times(block, 16), _times(lane.quarter, 8))
    absmax_type = ir.IntegerType.get_signless(8)
    if not scale:
        absmax_type = ir.F32Type.get()
    out: list[list[Value]] = [[], [], []]
    for i in range(2 * kernel.row_tiles):
        at = arith.addi(block, _i32(8 * i * a_row))
        out[1].append(_load(absmax, at, absmax_type, 4))
        if scale:
            at = arith.divui(at, _i32(kernel.scale_blocks))
            out[2].append(_load(scale[0], at, ir.F32Type.get(), 1))
        for half in range(2):
            at = arith.addi(word, _i32(8 * i * a_row * 16 + 32 * half))
            out[0].append(_load(words, at, ir.IntegerType.get_signless(16), 8))
    return out if scale else out[:2]


def _global(ref: Value) -> Value:
    """Returns the pointer of a ref, known to be to global memory."""
    return llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))


def _load(pointer: Value, index: Value, dtype: ir.Type, count: int) -> Value:
    """Loads `count` neighbours from `index` on as a vector."""
    address = utils.getelementptr(pointer, [index], dtype)
    return llvm.load(ir.VectorType.get((count,), dtype), address)


def _x_addresses(kernel, x: Value, stride: int, group: Value) -> list[Value]:
    """Returns where a lane's x of `group` + warp begins in rows of x, by token block.

    Tokens behind the last are read from it.
    """
    lane, dtype = _Lane(), utils.dtype_to_ir_type(kernel.dtype)
    word = arith.addi(_times(lane.warp, 256), _times(lane.quarter, 8))
    word = arith.addi(word, _times(group, 256))
    out = []
    for start in range(0, kernel.tokens, 8):
        token = arith.minui(arith.addi(lane.row, _i32(start)), _i32(kernel.m - 1))
        index = arith.addi(_times(token, stride), word)
        out.append(utils.getelementptr(x, [index], dtype))
    return out


def _load_x(address: Value, plane: int, half: int) -> Value:
    """Loads x at 8 words of a plane: 4 registers as a vector."""
    i32 = ir.IntegerType.get_signless(32)
    at = _i32((plane * 64 + half * 32) // 2)
    return llvm.load(
        ir.VectorType.get((4,), i32), utils.getelementptr(address, [at], i32)
    )


def load_x(kernel, x: Value, group: Value) -> list[Value]:
    """Loads a lane's x of `group` + warp, from (m, k) in global memory."""
    vector_type = ir.VectorType.get((8,), utils.dtype_to_ir_type(kernel.dtype))
    return [
        utils.bitcast(_load_x(address, plane, half), vector_type)
        for address in _x_addresses(kernel, _global(x), kernel.k, group)
        for plane in range(4)
        for half in range(2)
    ]


class Product:
    """The product of a tile in registers; made and called while lowering."""

    def __init__(self, kernel, words, absmax, x, table, group, skip, offset, *rest):
        self.kernel, self.lane = kernel, _Lane()
        self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        self.tiles, self.parts = kernel.row_tiles, kernel.token_blocks
        # By 16 rows, half of the rows, half of the group: 4 registers of two words.
        i32x4 = ir.VectorType.get((4,), self.i32)
        self.words = [self._split(utils.bitcast(r, i32x4)) for r in _flat(words)]
        self.absmax = _flat(absmax)  # by 16 rows, half of the rows: 4 planes
        self.sums = rest[: self.tiles * self.parts]
        self.factors = None
        if kernel.double_quant:
            self.factors = [llvm.extractelement(r, _i32(0)) for r in _flat(rest[-1])]
        self.skip, self.offset = _flat(skip)[0], _flat(offset)[0]
        self.table_at = llvm.ptrtoint(self.i32, utils.memref_ptr(table))
        self.lane_bytes = _times(self.lane.index, 4)
        self.held_x = None
        if kernel.config.hold_x:
            self.held_x = [utils.bitcast(r, i32x4) for r in _flat(x)]
        else:
            self.x_at = _x_addresses(
                kernel, utils.memref_ptr(x), kernel.x_width, _flat(group)[0]
            )

    def _split(self, vector):
        return [llvm.extractelement(vector, _i32(i)) for i in range(4)]

    def load_x(self, block: int, plane: int, half: int):
        """Returns x of a lane's 8 words: 4 registers of neighbours."""
        if self.held_x is not None:
            return self._split(self.held_x[8 * block + 2 * plane + half])
        return self._split(_load_x(self.x_at[block], plane, half))

    def look_up(self, codes: Value, byte: int, half: int):
        """Loads the table's word of a byte of codes: the pair (0), or the map (1)."""
        row = _asm(f"prmt.b32 $0,$1,$2,0x76{byte}4", codes, self.lane_bytes)
        at = arith.addi(row, arith.addi(self.table_at, _i32(128 * half)))
        pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), at)
        return llvm.load(self.i32, pointer)

    def pairs(self, a: Value, b: Value):
        """Returns the codes of words (e, e+1) and (e+2, e+3), a byte (e, e+1) a plane.

        Bytes 0 to 3 of the first result: plane 0 of e, plane 2 of e, plane 0 of e+2,
        plane 2 of e+2. Of the second: planes 1 and 3.
        """
        low = _asm("prmt.b32 $0,$1,$2,0x5410", a, b)
        high = _asm("prmt.b32 $0,$1,$2,0x7632", a, b)
        four = _i32(4)
        merge = "lop3.b32 $0,$1,$2,0x0f0f0f0f,0xE4"  # low nibbles of $1, high of $2
        even = _asm(merge, low, arith.shli(high, four))
        odd = _asm(merge, arith.shrui(low, four), high)
        return even, odd

    def scales(self, tile: int, plane: int):
        """The absmax of the two rows of a lane."""
        out = []
        for half in range(2):
            stored = self.absmax[2 * tile + half]
            if self.factors is None:
                value = llvm.extractelement(stored, _i32(plane))
            else:
                codes = utils.bitcast(stored, self.i32)
                value = utils.bitcast(self.look_up(codes, plane, 1), self.f32)
                # One rounding, where quantization has two: a last bit of float32.
                value = math.fma(value, self.factors[2 * tile + half], self.offset)
            if self.kernel.ragged:
                inside = arith.cmpi(arith.CmpIPredicate.uge, self.lane.warp, self.skip)
                value = arith.select(inside, value, utils.c(0.0, self.f32))
            out.append(value)
        return out

    def mma(self, sums, a, b):
        """sums (4 floats) + a (4 registers) times b (2 registers)."""
        kind = "bf16" if self.kernel.dtype == jnp.bfloat16 else "f16"
        asm = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};"
        )
        struct = llvm.StructType.get_literal([self.f32] * 4)
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        out = llvm.inline_asm(struct, [*a, *b, *sums], asm, constraints)
        return [llvm.extractvalue(self.f32, out, [i]) for i in range(4)]

    def __call__(self):
        """Returns the sums with the tile's products added."""
        pairs = {}
        for tile, rows, half, pair in np.ndindex(self.tiles, 2, 2, 2):
            w = self.words[4 * tile + 2 * rows + half][2 * pair : 2 * pair + 2]
            pairs[tile, rows, half, pair] = self.pairs(*w)
        totals = [
            [llvm.extractelement(r, _i32(i)) for r in _flat(s) for i in range(2)]
            for s in self.sums
        ]
        zero = utils.c(0.0, self.f32)
        for plane in range(4):
            block = [[zero] * 4 for _ in self.sums]
            for half in range(2):
                x = [self.load_x(part, plane, half) for part in range(self.parts)]
                for tile, pair in np.ndindex(self.tiles, 2):
                    codes = [pairs[tile, r, half, pair][plane % 2] for r in range(2)]
                    a = [
                        self.look_up(codes[rows], plane // 2 + 2 * second, 0)
                        for second in range(2)
                        for rows in range(2)
                    ]
                    for part in range(self.parts):
                        at = tile * self.parts + part
                        b = x[part][2 * pair : 2 * pair + 2]
                        block[at] = self.mma(block[at], a, b)
            for tile in range(self.tiles):
                scale = self.scales(tile, plane)
                for part, i in np.ndindex(self.parts, 4):
                    at = tile * self.parts + part
                    totals[at][i] = math.fma(block[at][i], scale[i // 2], totals[at][i])
        f32x2 = ir.VectorType.get((2,), self.f32)
        return [
            [vector.from_elements(f32x2, t[i : i + 2]) for i in (0, 2)] for t in totals
        ]
