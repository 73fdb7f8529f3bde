"""The constants, against those published and those that bitsandbytes stores."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels.formats.absmax4 import codebook as cb

# bitsandbytes csrc/kernels.cu, dQuantizeNF4: a value above one takes the upper code.
NF4_THRESHOLDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)


@pytest.mark.parametrize(
    ("name", "case"), [("nf4", "normal_64x64"), ("fp4", "fp4_64x64")]
)
def test_values_equal_those_that_bitsandbytes_stores(golden, name, case):
    stored = np.load(golden(f"vectors/{case}.npz"))["quant_map"]
    np.testing.assert_array_equal(cb.values(name), stored)


def test_fp4_has_the_signs_and_magnitudes_of_e2m1_in_code_order():
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    np.testing.assert_array_equal(
        cb.values("fp4"), np.concatenate([magnitudes, -magnitudes]).astype(np.float32)
    )


def test_int4_is_evenly_spaced_with_an_exact_zero_and_one():
    table = cb.values("int4")
    assert table[8] == 0 and table[15] == 1 and table[1] == -1
    np.testing.assert_allclose(np.diff(table), 1 / 7, rtol=1e-6)


def test_nf4_thresholds_are_those_of_the_cuda_kernel():
    midpoints, order = cb.thresholds("nf4")
    np.testing.assert_allclose(midpoints, NF4_THRESHOLDS, rtol=0, atol=3e-7)
    np.testing.assert_array_equal(order, np.arange(16))


@pytest.mark.parametrize("name", cb.CODEBOOKS)
def test_thresholds_lie_halfway_between_neighbours_in_value(name):
    midpoints, order = cb.thresholds(name)
    ascending = cb.values(name)[order]
    assert sorted(order) == list(range(16)) and order.dtype == np.uint8
    assert (np.diff(ascending) >= 0).all()
    np.testing.assert_allclose(
        midpoints, (ascending[1:] + ascending[:-1]) / 2, rtol=1e-7
    )


def test_dynamic_map_equals_the_one_that_bitsandbytes_stores_bit_for_bit(golden):
    stored = load_file(golden("vectors/normal_64x64.dq.safetensors"))
    np.testing.assert_array_equal(cb.dynamic_map(), stored["weight.nested_quant_map"])


def test_dynamic_map_has_256_ascending_values_from_above_minus_one_to_one():
    table = cb.dynamic_map()
    assert table.shape == (256,) and table.dtype == np.float32
    assert (np.diff(table) > 0).all()
    assert table[0] > -1 and table[-1] == 1 and 0 in table


def test_tables_are_cached_and_cannot_be_written_to():
    for table in (cb.values("nf4"), cb.dynamic_map()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
    assert cb.values("nf4") is cb.values("nf4")


# Of create_dynamic_map in bitsandbytes 0.50.2, its float32 bytes in little endian.
MAP_SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_bitsandbytes_bit_for_bit(signed):
    table = cb.dynamic_map(signed)
    assert table.dtype == np.float32 and table.shape == (256,)
    assert hashlib.sha256(table.tobytes()).hexdigest() == MAP_SHA256[signed]
