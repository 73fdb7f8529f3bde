"""merge: what the merged model says is what base and adapter said together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.adapters import LoRAConfig, attach, merge, merge_corrected
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.nn import Linear, LoRA, QuantizedLinear, quantize
from qlora_jax.nn.packing import quantize_tensor

SUM_ORDER = 2e-5
"""float32 logits of (W + scale a b) x against W x + scale a (b x), of size about 1."""


def kinds(model: nnx.Module) -> set[type]:
    wanted = (Linear, QuantizedLinear, LoRA)
    return {type(node) for _, node in nnx.iter_graph(model) if isinstance(node, wanted)}


@pytest.mark.parametrize(
    ("base", "bias", "targets"),
    [
        (tiny.decoder, False, "all-linear"),
        (tiny.quantized, False, "all-linear"),
        (tiny.quantized, True, "all-linear"),
        (tiny.quantized, True, "up_proj,lm_head"),
    ],
)
def test_the_merged_model_says_what_base_and_adapter_said(base, bias, targets):
    x = tiny.tokens()
    model = tiny.adapted(base(bias=bias), targets=targets)
    merged = merge(model, dtype="float32")
    assert kinds(merged) == {Linear}
    said, wanted = tiny.logits(merged, x), tiny.logits(model, x)
    np.testing.assert_allclose(said, wanted, atol=SUM_ORDER, rtol=0)
    plain = tiny.logits(base(bias=bias), x)
    assert np.abs(wanted - plain).max() > 100 * SUM_ORDER


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    *(st.integers(0, 2**32 - 1), st.booleans(), st.booleans()),
    *(st.booleans(), st.sampled_from([0.5, 8.0])),
)
def test_a_merged_linear_is_base_and_adapter(seed, four_bit, dora, rslora, alpha):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    model = One(Linear(draw(24, 64), draw(24)))
    model = quantize(model) if four_bit else model
    config = LoRAConfig(rank=3, alpha=alpha, dora=dora, rslora=rslora)
    model = attach(model, config, key=jax.random.key(0))
    model.linear.lora_b.set_value(draw(3, 24))
    if dora:
        model.linear.magnitude.set_value(1 + jnp.abs(draw(24)))
    x = draw(5, 64)
    wanted = np.asarray(model.linear(x), np.float64)
    merged = merge(model, dtype="float32").linear
    assert type(merged) is Linear
    np.testing.assert_allclose(merged(x), wanted, atol=2e-5 * np.abs(wanted).max())


class One(nnx.Module):
    def __init__(self, linear: Linear):
        self.linear = linear


def test_merge_leaves_the_model_it_was_given_as_it_was():
    model = tiny.adapted(tiny.quantized())
    before = nnx.split(model)
    merge(model, dtype="float32")
    after = nnx.split(model)
    assert before[0] == after[0]
    leaves = zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True)
    assert all(one is other for one, other in leaves)


def test_merge_of_zero_lora_b_is_identity():
    merged = merge(tiny.adapted(tiny.decoder(), zero=True), dtype="float32")
    for one, other in zip(
        tiny.frozen(merged), tiny.frozen(tiny.decoder()), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_folded_in_float32_and_rounded_once(dtype):
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    q, rounded = (merge(model, dtype=d).layers.attn.q_proj for d in ("float32", dtype))
    assert rounded.kernel[...].dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(q.kernel[...].astype(dtype), np.float32),
        np.asarray(rounded.kernel[...], np.float32),
    )


def test_requantize_rounds_the_merged_weights_to_4_bits_again():
    config = QuantConfig(block_size=128, double_quant=False)
    model = tiny.adapted(tiny.quantized(), targets="q_proj,down_proj")
    merged = merge(model, requantize=config)
    assert kinds(merged) == {Linear, QuantizedLinear}  # the head stays dense
    dense = merge(model, dtype="float32")
    for name, part in (("q_proj", "attn"), ("down_proj", "mlp")):
        ours = getattr(getattr(merged.layers, part), name)
        kernel = getattr(getattr(dense.layers, part), name).kernel[...]
        assert ours.quantized.block_size == 128 and ours.stack == (2,)
        wanted = [quantize_tensor(w, config) for w in kernel]
        for i, one in enumerate(wanted):
            np.testing.assert_array_equal(ours.quantized.codes[i], one.codes)
            np.testing.assert_array_equal(ours.quantized.absmax[i], one.absmax)
    untouched = merged.layers.attn.k_proj.quantized
    np.testing.assert_array_equal(
        untouched.codes, tiny.quantized().layers.attn.k_proj.quantized.codes
    )
    assert tiny.logits(merged, tiny.tokens()).shape == (2, 7, 272)


@pytest.mark.parametrize("base", [tiny.decoder, tiny.quantized])
def test_requantize_keeps_the_dtype_of_the_base(base):
    model = tiny.adapted(base("bfloat16"), targets="q_proj,down_proj")
    merged = merge(model, requantize=QuantConfig(double_quant=False))
    for linear in (merged.layers.attn.q_proj, merged.layers.mlp.down_proj):
        assert linear.quantized.dtype == linear.weight().dtype.name == "bfloat16"
    # Quantized from float32, not from values that were rounded before.
    wide = merge(model, dtype="float32").layers.attn.q_proj.kernel[...][1]
    codes = quantize_tensor(wide, QuantConfig(double_quant=False)).codes
    found = merged.layers.attn.q_proj.quantized.codes[1]
    np.testing.assert_array_equal(found, codes)


def test_requantize_keeps_a_dense_head_that_is_adapted_dense():
    model = tiny.adapted(tiny.quantized(), targets="q_proj,lm_head")
    merged = merge(model, requantize=QuantConfig())
    wanted = merge(model, dtype="float32").lm_head.kernel[...]
    np.testing.assert_array_equal(merged.lm_head.kernel[...], wanted)
    assert isinstance(merged.layers.attn.q_proj, QuantizedLinear)
    corrected = merge_corrected(model, QuantConfig(), rank=4)
    assert isinstance(corrected.lm_head, Linear)
    assert isinstance(corrected.layers.attn.q_proj, LoRA)


def test_a_corrected_merge_of_nothing_is_refused():
    model = tiny.adapted(tiny.quantized(), targets="lm_head")
    with pytest.raises(AdapterMismatchError, match="no linear .* became 4-bit"):
        merge_corrected(model, QuantConfig(), rank=4)
    with pytest.raises(AdapterMismatchError, match="no adapter to merge"):
        merge_corrected(tiny.quantized(), QuantConfig(), rank=4)


class Two(nnx.Module):
    """A module that has nothing stacked."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.second = nnx.Linear(32, 16, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.relu(self.first(x)))


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"requantize": QuantConfig()}])
def test_merge_of_a_strangers_unstacked_module(how):
    model = tiny.adapted(quantize(Two(nnx.Rngs(0))), targets="first")
    x = jax.random.normal(jax.random.key(0), (5, 64))
    merged = merge(model, **how)
    assert LoRA not in kinds(merged)
    close = 1e-5 if "dtype" in how else 0.5  # 4 bits are coarse
    np.testing.assert_allclose(merged(x), model(x), atol=close, rtol=0)


def test_a_linear_named_base_is_dequantized_too():
    class Odd(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.base = nnx.Linear(64, 32, rngs=rngs)
            self.other = nnx.Linear(64, 32, rngs=rngs)

    model = attach(
        quantize(Odd(nnx.Rngs(0))),
        LoRAConfig(rank=2, targets="other"),
        key=jax.random.key(0),
    )
    merged = merge(model, dtype="float32")
    assert type(merged.base) is type(merged.other) is nnx.Linear
    assert kinds(merged) == set()


@pytest.mark.parametrize(
    "how", [{}, {"dtype": "bfloat16", "requantize": QuantConfig()}]
)
def test_merge_needs_exactly_one_of_dtype_and_requantize(how):
    with pytest.raises(ConfigError, match="exactly one of dtype= .* and requantize="):
        merge(tiny.adapted(tiny.decoder()), **how)


def test_merge_of_a_model_without_adapter_is_refused():
    with pytest.raises(AdapterMismatchError, match="no adapter to merge"):
        merge(tiny.decoder(), dtype="float32")


def test_dropout_has_no_part_in_merging():
    model = tiny.adapted(tiny.decoder(), targets="q_proj", dropout=0.5)
    merged = merge(model, dtype="float32")
    x = tiny.tokens()
    np.testing.assert_allclose(
        tiny.logits(merged, x), tiny.logits(model, x), atol=SUM_ORDER, rtol=0
    )
    assert jnp.isfinite(merged(x)).all()
