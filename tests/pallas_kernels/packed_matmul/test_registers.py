"""The decoders' PTX, run exactly: every code of every register position."""

import jax
import ml_dtypes
import numpy as np
import pytest
from ptx import run

from pallas_kernels.formats.absmax4 import codebook as cb

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from pallas_kernels.packed_matmul import registers  # noqa: E402

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


def all_words() -> np.ndarray:
    """Registers in whose low half every 16-bit word occurs, and as many random ones."""
    rng = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint32)
    return np.concatenate(
        [
            every | every[::-1] << 16,
            rng.integers(0, 2**32, 65536, dtype=np.uint64).astype(np.uint32),
        ]
    )


def expected(words: np.ndarray, plane: int, values: np.ndarray) -> list[np.ndarray]:
    """Values of a plane's two codes: of the low and of the high half."""
    return [values[words >> (4 * plane + 16 * i) & 15] for i in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("half", [0, 1])
def test_permute_decodes_every_word(half: int, codebook: cb.Codebook, dtype):
    words = all_words()
    asm = registers._permute_asm(half, codebook, dtype)
    out = run(asm, words, outputs=2)
    values = cb.values(codebook).astype(dtype)
    for got, plane in zip(out, registers.plane_pair("permute", half), strict=True):
        pairs = got.view(dtype).reshape(-1, 2)
        for i, want in enumerate(expected(words, plane, values)):
            np.testing.assert_array_equal(pairs[:, i], want)


# One plane is picked by a shift, not by a half.
@pytest.mark.parametrize(("planes", "half"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("decoder", ["table", "table_exact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
def test_table_decodes_every_word(codebook, dtype, decoder, planes, half):
    words = all_words()
    base, lane = 4096, 13
    exact = decoder == "table_exact"
    rows = registers.table_words(codebook, dtype, decoder)
    memory = np.zeros(base // 4 + 256 * 64, np.uint32)
    memory[base // 4 :] = np.tile(rows, (1, 32)).reshape(-1)
    size = 8 if exact else 4
    full = np.full_like(words, base), np.full_like(words, lane * size)
    outputs = planes * size // 4
    asm = registers._table_asm(half, exact, planes)
    out = run(asm, words, full[1], full[0], outputs=outputs, shared=memory)
    values = cb.values(codebook)
    if not exact:
        values = values.astype(dtype)
    for i in range(planes):
        plane = registers.plane_pair(decoder, half)[i]
        if exact:
            pairs = np.stack([o.view(np.float32) for o in out[2 * i : 2 * i + 2]], 1)
        else:
            pairs = out[i].view(dtype).reshape(-1, 2)
        for j, want in enumerate(expected(words, plane, values)):
            np.testing.assert_array_equal(pairs[:, j], want)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("decoder", ["table", "table_exact"])
def test_lanes_read_banks_of_their_own(decoder, half):
    """A warp's lanes look up any codes in 32 banks at once, or 16 in two of each in turn."""
    exact = decoder == "table_exact"
    size = 8 if exact else 4
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    lanes = np.arange(32, dtype=np.uint32) * np.uint32(size)
    memory, loads = np.zeros(256 * 64, np.uint32), []
    asm = registers._table_asm(half, exact, 2)
    outputs, base = 2 * size // 4, np.zeros_like(words)
    run(asm, words, lanes, base, outputs=outputs, shared=memory, loads=loads)
    assert len(loads) == 2
    for at in loads:
        assert len(set(at // 256)) > 8  # the lanes look different codes up
        for lanes_at_once in np.split(at, size // 4):
            banks = lanes_at_once[:, None] // 4 + np.arange(size // 4)
            assert set((banks % 32).ravel()) == set(range(32))


def test_a_shifted_register_gives_the_other_half():
    words = all_words()
    for decoder in ("permute", "table"):
        shift = registers.pair_shift(decoder)
        for first, second in zip(
            registers.plane_pair(decoder, 0),
            registers.plane_pair(decoder, 1),
            strict=True,
        ):
            shifted = words >> np.uint32(shift)
            for i in (0, 1):
                a = shifted >> (4 * first + 16 * i) & 15
                np.testing.assert_array_equal(a, words >> (4 * second + 16 * i) & 15)
