"""The storage contract (C1): each layout is an exact permutation of the others."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.absmax4 import layout

SHAPES = {
    "planar256": (3, 512),
    "planar64": (5, 192),
    "flat": (7, 33),
}


def random_codes(shape: tuple[int, ...], where: str = "planar") -> np.ndarray:
    size = int(np.prod(shape))
    codes = np.random.default_rng(0).integers(0, 16, size).astype(np.uint8)
    # The flat layout pads an odd size with one element.
    return np.append(codes, np.uint8(0)) if where == "flat" and size % 2 else codes


@pytest.mark.parametrize(
    ("shape", "block_size", "expected"),
    [
        ((4096, 4096), 64, "planar256"),
        ((1, 256), 256, "planar256"),
        ((4096, 11008), 64, "planar256"),
        ((3, 512), 512, "planar256"),
        ((576, 576), 64, "planar64"),
        ((2, 640), 128, "planar64"),
        ((7, 64), 64, "planar64"),
        ((288, 288), 64, "flat"),  # no multiple of 64
        ((7, 33), 64, "flat"),
        ((4, 256), 32, "flat"),  # two blocks in a plane
        ((4, 320), 128, "flat"),  # blocks straddle rows
        ((4, 256), 512, "flat"),
        ((1,), 64, "flat"),
        ((), 64, "flat"),
    ],
)
def test_choose_layout_follows_the_last_axis_and_the_block(shape, block_size, expected):
    assert layout.choose_layout(shape, block_size) == expected


def test_planar256_words_hold_elements_64_apart():
    n, k = SHAPES["planar256"]
    codes = random_codes((n, k))
    words = layout.pack(codes, "planar256", (n, k))
    assert words.dtype == np.uint16 and words.shape == (n, k // 4)
    grid = codes.reshape(n, k)
    for row, group, j, f in [(0, 0, 0, 0), (2, 1, 63, 3), (1, 0, 17, 2), (0, 1, 5, 1)]:
        nibble = (words[row, group * 64 + j] >> (4 * f)) & 15
        assert nibble == grid[row, group * 256 + f * 64 + j]


def test_planar64_words_hold_elements_16_apart():
    n, k = SHAPES["planar64"]
    codes = random_codes((n, k))
    words = layout.pack(codes, "planar64", (n, k))
    assert words.dtype == np.uint16 and words.shape == (n, k // 4)
    grid = codes.reshape(n, k)
    for row, group, j, f in [(0, 0, 0, 0), (4, 2, 15, 3), (1, 1, 7, 2), (3, 0, 9, 1)]:
        nibble = (words[row, group * 16 + j] >> (4 * f)) & 15
        assert nibble == grid[row, group * 64 + f * 16 + j]


def test_flat_has_the_first_element_of_a_byte_in_its_high_nibble():
    packed = layout.pack(np.array([1, 2, 15, 0], np.uint8), "flat", (4,))
    np.testing.assert_array_equal(packed, [0x12, 0xF0])


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("where", SHAPES)
def test_unpack_inverts_pack(where, kind):
    shape = SHAPES[where]
    codes = random_codes(shape, where)
    given = codes if kind == "numpy" else jnp.asarray(codes)
    stored = layout.pack(given, where, shape)
    back = layout.unpack(stored, where, shape)
    assert (
        isinstance(stored, np.ndarray)
        == isinstance(back, np.ndarray)
        == (kind == "numpy")
    )
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes[: int(np.prod(shape))])


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("where", SHAPES)
def test_bitsandbytes_bytes_survive_the_way_through_a_layout(where, kind):
    shape = SHAPES[where]
    packed = layout.pack(random_codes(shape, "flat"), "flat", shape)
    given = packed if kind == "numpy" else jnp.asarray(packed)
    stored = layout.from_bitsandbytes(given, where, shape)
    assert isinstance(stored, np.ndarray) == (kind == "numpy")
    back = layout.to_bitsandbytes(stored, where, shape)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, packed)


def test_all_layouts_of_one_tensor_hold_the_same_codes():
    shape = (3, 256)
    packed = layout.pack(random_codes(shape), "flat", shape)
    codes = [
        layout.unpack(layout.from_bitsandbytes(packed, where, shape), where, shape)
        for where in SHAPES
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])
