"""The fingerprint: one base has one, however it is held."""

import json

import jax
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters.fingerprint import difference, fingerprint
from qlora_jax.adapters.merge import merge
from qlora_jax.models import Decoder


def compare(one: nnx.Module, other: nnx.Module) -> str | None:
    a, b = fingerprint(one), fingerprint(other)
    assert a is not None and b is not None
    one_way, other_way = (
        difference(*map(json.loads, pair)) for pair in ((a, b), (b, a))
    )
    # The texts name who has which value, so only the verdict is the same both ways.
    assert (one_way is None) == (other_way is None)
    return one_way


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_copy_has_the_same_fingerprint(bias):
    assert compare(tiny.decoder(bias=bias), tiny.quantized(bias=bias)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_changes_no_fingerprint(dtype):
    assert compare(tiny.decoder(), tiny.quantized(dtype)) is None


def test_another_base_of_the_same_shape_differs():
    text = compare(tiny.decoder(), tiny.decoder(seed=1))
    assert text is not None and "other weights" in text


def test_a_base_of_another_shape_differs():
    text = compare(tiny.decoder(), tiny.decoder(bias=True))
    assert text is not None and "other parameter shapes" in text


def test_an_adapter_that_was_merged_leaves_the_same_fingerprint():
    merged = merge(tiny.adapted(tiny.decoder()), dtype="float32")
    assert compare(tiny.decoder(), merged) is None


def test_an_abstract_model_has_none():
    model = nnx.eval_shape(lambda: Decoder(tiny.CONFIG, key=jax.random.key(0)))
    assert fingerprint(model) is None


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e308])
def test_values_that_are_not_finite_never_agree(value):
    mark = fingerprint(tiny.decoder())
    assert mark is not None
    ours, theirs = json.loads(mark), json.loads(mark)
    theirs["sample"]["norm.weight"][0] = value
    assert difference(ours, theirs) is not None
    ours["sample"]["norm.weight"][0] = -value
    assert difference(ours, theirs) is not None
