"""The decode kernel: in the interpreter with race detection, its register code run in
numpy. test_compiled.py compiles it for an H200.

The interpreter has no inline code, so it proves loads, barriers, the split of k and the
sums; what a warp does in registers is proved by tests/emulation.py, which runs the very
code that builds it. On hardware scripts/gpu/suite.py checks the same products.
"""

import dataclasses
import os
import subprocess
import sys

import emulation
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook as cb

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels.packed_matmul.decode import forward, steps, warp  # noqa: E402
from pallas_kernels.packed_matmul.decode.config import Config  # noqa: E402

# The result is rounded once (2^-9 or 2^-12 at most, of an element), the codebook's values
# once (as much, but random signs average over k); sums are float32.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    config: Config
    dtype: str = "bfloat16"
    double_quant: bool = True
    block_size: int = 64
    codebook: cb.Codebook = "nf4"

    def weight(self) -> QuantizedTensor:
        return oracle.quantized(
            (self.n, self.k),
            block_size=self.block_size,
            codebook=self.codebook,
            double_quant=self.double_quant,
        )

    def x(self) -> jax.Array:
        x = np.random.default_rng(1).standard_normal((self.m, self.k))
        return jnp.asarray(x, self.dtype)

    def check(self, y) -> None:
        want = np.asarray(self.x(), np.float64) @ oracle.decoded(self.weight()).T
        error = np.asarray(y, np.float64) - want
        relative = np.linalg.norm(error) / np.linalg.norm(want)
        assert relative < TOLERANCE[self.dtype], f"relative error {relative:.1e}"


# More than two warpgroups at once need more threads than XLA's pool has on two cores.
INTERPRETED = [
    Case(1, 128, 256, Config(team=1)),
    Case(
        3, 192, 768, Config(team=2, ahead=2, batch=3), dtype="float16", block_size=128
    ),
    Case(8, 256, 1024, Config(team=1, rows=32), double_quant=False),
    Case(17, 48, 2048, Config(team=1, teams=2), block_size=256, codebook="fp4"),
    Case(32, 64, 1280, Config(team=1), dtype="float16", codebook="int4"),
    Case(9, 96, 2816, Config(team=1, splits=2)),
    Case(5, 64, 1280, Config(team=1, splits=1, batch=2, hold_x=True), block_size=128),
    Case(2, 144, 2048, Config(team=2, batch=2), double_quant=False),
    Case(3, 208, 2048, Config(team=1, batch=2, hold_x=True), dtype="float16"),
]


def interpret(case: Case) -> None:
    """Runs a case in the interpreter and checks it."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    w, config = case.weight(), case.config
    case.check(forward.forward(case.x(), w, config=config, num_sms=4, interpret=params))


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_products_without_races(case: Case, capfd: pytest.CaptureFixture):
    interpret(case)
    out = capfd.readouterr()
    assert "RACE" not in out.out + out.err


def test_teams_in_a_cluster_without_races():
    """Runs in a process of its own: eight warpgroups need as many threads of XLA's pool."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import test_decode as t\n"
        "t.interpret(t.Case(3, 96, 4096, t.Config(teams=2, team=2, splits=2, hold_x=True)))\n"
    )
    here = os.path.dirname(__file__)
    tests = os.path.dirname(os.path.dirname(here))
    done = subprocess.run(
        [sys.executable, "-c", code, here, tests],
        env=os.environ | {"NPROC": "12", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "RACE" not in done.stdout + done.stderr


def test_shapes_that_cannot_be_cut_are_refused():
    case = Case(1, 40, 1024, Config(team=1))
    with pytest.raises(ValueError, match="cannot cut n=40"):
        interpret(case)
    two_steps = Case(1, 128, 2048, Config(team=1, hold_x=True, ahead=2))
    with pytest.raises(ValueError, match="cannot cut n=128, k=2048"):
        interpret(two_steps)


class Emulated:
    """A case's kernel with all that its register code reads in memory."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch):
        w = case.weight()
        config, double_quant = case.config, case.double_quant
        self.case = case
        self.kernel = forward._Kernel(
            case.x(), case.n, w, config, double_quant, 4, False
        )
        self.memory = memory = emulation.Memory()
        emulation.install(monkeypatch, warp, memory)
        dtype = self.kernel.dtype
        absmax = [np.asarray(a) for a in forward._absmax_operands(w)]
        self.offset = absmax[2][0] if double_quant else np.float32(0)
        self.tile_refs = [memory.put(a) for a in (np.asarray(w.codes), *absmax[:2])]
        self.rows = memory.put(steps.table_rows(case.codebook, dtype))
        self.table = memory.put(np.zeros((256, 64), np.uint32))
        self.x_global = memory.put(np.asarray(case.x()))
        self.x_shared = []
        width = self.kernel.groups * 256
        for start in range(0, case.k, width):
            padded = np.zeros((case.m, self.kernel.x_width), dtype)
            padded[:, :width] = np.asarray(case.x())[:, start : start + width]
            self.x_shared.append(memory.put(padded))
        self.out = memory.put(np.full((case.m, case.n), np.nan, dtype))
        for wg in range(config.team):
            warp.fill_table(self.rows, self.table, emulation.splat(wg), config.team)

    def warpgroup(self, row: int, split: int, member: int) -> np.ndarray:
        """Sums of one warpgroup, (row tiles, token blocks, 64, 8)."""
        kernel, registers = self.kernel, emulation.registers
        blocks = kernel.row_tiles * kernel.token_blocks
        sums = [[np.zeros((128, 2), np.float32)] * 2 for _ in range(blocks)]
        for step in range(kernel.steps):
            group = (step * kernel.config.team + member) * steps.GROUPS
            inside = min(group, kernel.groups - steps.GROUPS)
            skip = emulation.splat(group - inside)
            start = emulation.splat(split * kernel.groups + inside)
            tile = warp.load_tile(kernel, self.tile_refs, emulation.splat(row), start)
            x = self.x_shared[split]
            if kernel.config.hold_x:
                x = registers(warp.load_x(kernel, self.x_global, start))
            offset = [emulation.splat(self.offset)]
            sums = warp.Product(
                kernel,
                *(registers(values) for values in tile[:2]),
                x,
                self.table,
                *(registers(v) for v in ([emulation.splat(inside)], [skip], offset)),
                *(registers(values) for values in (*sums, *tile[2:])),
            )()
        tile = (kernel.row_tiles, kernel.token_blocks, 64, 8)
        target = self.memory.put(np.full(tile, np.nan, np.float32))
        fragments = [registers(of_block) for of_block in sums]
        for add in (0, 1):
            flag = registers([emulation.splat(add)])
            warp.keep(target, fragments, flag)
        twice = self.memory.read(target).copy()
        warp.keep(target, fragments)
        once = self.memory.read(target)
        np.testing.assert_array_equal(twice, 2 * once)
        return once

    def run(self) -> np.ndarray:
        kernel, config, memory = self.kernel, self.case.config, self.memory
        for row in range(0, self.case.n, config.rows):
            tile = (kernel.row_tiles, kernel.token_blocks, 16, 8)
            gathered = memory.put(np.zeros((config.splits, *tile), np.float32))
            for split in range(config.splits):
                sums = np.stack(
                    [self.warpgroup(row, split, i) for i in range(config.team)]
                )
                totals = warp.totals(sums.shape, memory.put(sums))
                if config.splits > 1:
                    part = int(np.prod(tile)) * 4 * split
                    warp.send(totals, emulation.behind(gathered, part))
            if config.splits > 1:
                totals = warp.totals(gathered.shape, gathered)
            warp.write(kernel, totals, self.out, emulation.splat(row))
        return memory.read(self.out)


EMULATED = [
    Case(1, 32, 1024, Config(team=1, hold_x=True)),
    Case(3, 16, 2816, Config(team=2)),
    Case(8, 32, 1024, Config(team=1, rows=32), "float16", False, 128, "fp4"),
    Case(17, 16, 2048, Config(team=1), "float16", block_size=128, codebook="int4"),
    Case(9, 32, 2048, Config(team=1, splits=2, rows=32)),
    Case(4, 32, 1024, Config(team=1, hold_x=True), "float16", codebook="fp4"),
    Case(8, 32, 2048, Config(team=1, hold_x=True), codebook="int4"),
]


@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_register_code_computes_the_product(case: Case, monkeypatch):
    with emulation.types():
        case.check(Emulated(case, monkeypatch).run())


@pytest.mark.parametrize("codebook", cb.CODEBOOKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_word_is_decoded(codebook: cb.Codebook, dtype: str, monkeypatch):
    case = Case(1, 16, 1024, Config(team=1), dtype, codebook=codebook)
    every = np.arange(65536, dtype=np.uint32).reshape(-1, 128)
    values = cb.values(codebook).astype(getattr(ml_dtypes, dtype, dtype))
    with emulation.types():
        emulated = Emulated(case, monkeypatch)
        (words, *rest) = (emulation.registers([np.zeros((128, 8), np.uint16)] * 4),) * 3
        del rest
        nothing = [emulation.splat(0)]
        product = warp.Product(
            emulated.kernel,
            words,
            words,
            emulated.x_shared[0],
            emulated.table,
            *(emulation.registers(nothing) for _ in range(3)),
            emulation.registers([np.zeros((128, 2), np.float32)] * 2),
            emulation.registers([np.zeros((128, 1), np.float32)] * 2),
        )
        for words in every:
            elements = [words, words[::-1], words ^ 0x5A5A, 65535 - words]
            first = elements[0] | elements[1] << 16
            second = elements[2] | elements[3] << 16
            pairs = product.pairs(first, second)
            for plane in range(4):
                for e in range(2):
                    byte = plane // 2 + 2 * e
                    got = product.look_up(pairs[plane % 2], byte, 0)
                    for i in range(2):
                        codes = elements[2 * e + i] >> 4 * plane & 15
                        bits = got >> 16 * i & 0xFFFF
                        want = values[codes].view(np.uint16)
                        np.testing.assert_array_equal(bits, want)
        for row in range(0, 256, 128):
            code = np.arange(row, row + 128, dtype=np.uint32)
            got = product.look_up(code << 8, 1, 1).view(np.float32)
            np.testing.assert_array_equal(got, cb.dynamic_map()[code])


def test_lookups_and_x_meet_in_no_bank():
    """32 lanes with any 32 codes hit 32 banks; 8 lanes of a 16-byte load of x, too."""
    codes = np.random.default_rng(1).integers(0, 256, 32)
    assert len(set((codes * 256 + np.arange(32) * 4) // 4 % 32)) == 32
    kernel = forward._Kernel(
        jnp.zeros((8, 4096)),
        64,
        oracle.quantized((64, 4096)),
        Config(team=4),
        True,
        4,
        False,
    )
    lane = np.arange(8)
    start = (lane // 4 * kernel.x_width + lane % 4 * 8) * 2 // 4
    banks = (start[:, None] + np.arange(4)) % 32
    assert len(set(banks.reshape(-1))) == 32
