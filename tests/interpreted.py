"""Runs the fused kernels behind nf4_matmul on a CPU, in Mosaic GPU's interpreter.

Choice, padding, tiles, copies, barriers and sums are those of the card that is pretended.
The interpreter knows no inline PTX: decoding in registers is plain jax.numpy here, from the
shared table where the kernel has one; test_registers.py and test_decode.py run that PTX
itself. It knows neither mma.sync nor cp.async: Ampere's have stand-ins, too.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.device import Device
from pallas_kernels.packed_matmul import IMPLEMENTATIONS, choice, registers
from pallas_kernels.packed_matmul.ampere import backward as ampere_backward
from pallas_kernels.packed_matmul.ampere import forward as ampere_forward
from pallas_kernels.packed_matmul.ampere import pipeline
from pallas_kernels.packed_matmul.decode import forward as decode_forward
from pallas_kernels.packed_matmul.hopper import backward as hopper_backward
from pallas_kernels.packed_matmul.hopper import forward as hopper_forward
from pallas_kernels.packed_matmul.mosaic import decodes_exactly

# A few cores, so that each walks over some tiles.
_H200 = Device("gpu", "NVIDIA H200", (9, 0), 3)
_A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 3)
_KERNELS = (
    (hopper_forward, "forward"),
    (hopper_backward, "backward"),
    (decode_forward, "forward"),
    (ampere_forward, "forward"),
    (ampere_backward, "backward"),
)


def install(
    monkeypatch: pytest.MonkeyPatch, name: str, detect_races: bool, **fields: Any
) -> None:
    """Makes nf4_matmul run the kernels of a card here, some fields of one changed."""
    device = _A100 if name == "ampere" else _H200
    params = plgpu.InterpretGPUParams(
        detect_races=detect_races, uninitialized_memory="nan"
    )
    for module, product in _KERNELS:
        interpreted = functools.partial(getattr(module, product), interpret=params)
        monkeypatch.setattr(module, product, interpreted)
    one = IMPLEMENTATIONS[name]
    changed = dataclasses.replace(
        one, configure=lambda *args: one.configure(*args) | fields
    )
    monkeypatch.setitem(IMPLEMENTATIONS, name, changed)
    monkeypatch.setattr(choice, "current_device", lambda: device)
    monkeypatch.setattr(registers, "fill_table", _fill_table)
    monkeypatch.setattr(registers, "decode_pair", _decode_pair)
    monkeypatch.setattr(registers, "decode_one", _decode_one)
    if name == "ampere":
        monkeypatch.setattr(pipeline, "copy", _copy)
        monkeypatch.setattr(pipeline, "wait", lambda left=0: None)
        monkeypatch.setattr(plgpu, "mma", _mma)


def _fill_table(words, table) -> None:
    warpgroup = lax.axis_index("wg")
    rows = pl.ds(warpgroup * 128, 128)

    @pl.when(warpgroup < 2)
    def _():
        table[rows, :] = jnp.tile(words[rows, :], (1, 32))


def _decode_pair(
    words, half, *, decoder, codebook, dtype, layout, table=None, shift=None
):
    del layout
    if shift is not None:
        words = words >> shift.astype(jnp.uint16)
    planes = registers.plane_pair(decoder, half)
    if table is not None:
        return [
            _looked_up(words, np.uint16(4 * p), decoder, dtype, table) for p in planes
        ]
    values = [registers.select_plane(words, p, codebook) for p in planes]
    exact = decodes_exactly(decoder)
    return values if exact else [v.astype(dtype) for v in values]


def _decode_one(words, shift, *, decoder, dtype, layout, table):
    del layout
    return _looked_up(words, shift.astype(jnp.uint16), decoder, dtype, table)


def _looked_up(words, shift, decoder, dtype, table):
    """Values of a plane by the table's rows of a code and code 0."""
    code = (words >> shift & np.uint16(15)).astype(jnp.int32)
    found = jnp.take(table[:, 0], code)
    if decodes_exactly(decoder):
        return lax.bitcast_convert_type(found, jnp.float32)
    return lax.bitcast_convert_type(found.astype(jnp.uint16), dtype)


def _copy(source, target) -> None:
    target[...] = source[...]


def _mma(sums, a, b):
    return sums + jnp.dot(a, b, preferred_element_type=jnp.float32)
