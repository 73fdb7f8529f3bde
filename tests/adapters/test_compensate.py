"""Adapters that start from what quantization lost: against an SVD in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import One

from qlora_jax.adapters import LoRAConfig, attach
from qlora_jax.adapters.attach import split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.compensate import compensate, input_moments
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.nn import LoRA, QuantizedLinear
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.packing import quantize_tensor

KEY = jax.random.key(0)
INITS = ("loftq", "qera-diagonal", "qera")
NEAR_BEST = 0.99
"""At least this part of the energy that the best rank-r matrix takes away must be taken
away."""


@functools.cache
def inputs(features: int, rows: int = 64) -> jax.Array:
    """Correlated, and of very different size along the features."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, features)) * np.geomspace(0.05, 5, features)
    return jnp.asarray(x + x[:, :1] * rng.standard_normal(features), jnp.float32)


@functools.cache
def pair(out: int, features: int) -> tuple[One, One]:
    w = jnp.asarray(np.random.default_rng(0).standard_normal((out, features)) * 0.05)
    w = w.astype(jnp.float32)
    return One(Linear(w)), One(QuantizedLinear(quantize_tensor(w)))


def measured(model: nnx.Module, features: int, init: str):
    if init == "loftq":
        return None
    return input_moments(
        model,
        inputs(features).reshape(4, -1, features),
        diagonal=init == "qera-diagonal",
        outputs=lambda model, x: model(x),
    )


def test_moments_are_those_of_the_inputs():
    _, model = pair(40, 64)
    x = np.asarray(inputs(64), np.float64)
    full = measured(model, 64, "qera")["linear"]
    np.testing.assert_allclose(full, x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    diagonal = measured(model, 64, "qera-diagonal")["linear"]
    np.testing.assert_allclose(diagonal, (x**2).mean(0), rtol=1e-5)


def test_moments_come_out_of_scanned_layers():
    model, tokens = tiny.quantized(), tiny.tokens(4, 16)
    moments = input_moments(model, [tokens[:2], tokens[2:]])
    assert len(moments) == 7 and "lm_head" not in moments
    # The first layer's attention sees the normed embeddings.
    x = model.embed_tokens.weight[...][tokens].reshape(-1, 64)
    layer = jax.tree.map(lambda leaf: leaf[0], nnx.state(model.layers.attn_norm))
    norm = nnx.merge(nnx.graphdef(model.layers.attn_norm), layer)
    x = np.asarray(norm(x), np.float64)
    for name in "qkv":
        got = moments[f"layers.attn.{name}_proj"]
        assert got.shape == (2, 64, 64)
        np.testing.assert_allclose(got[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert moments["layers.mlp.down_proj"].shape == (2, 128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("out", "features", "rank"), [(96, 64, 8), (40, 256, 4)])
def test_the_adapter_takes_away_what_the_best_of_its_rank_would(
    init, out, features, rank
):
    dense, model = pair(out, features)
    moments = measured(model, features, init)
    config = LoRAConfig(rank=rank, alpha=3.0, init=init)
    made = attach(model, config, key=KEY, original=dense, moments=moments)
    w = np.asarray(dense.linear.kernel[...], np.float64)
    error = w - np.asarray(model.linear.weight("float32"), np.float64)
    c = np.eye(features) if moments is None else np.asarray(moments["linear"], float)
    c = np.diag(c) if c.ndim == 1 else c
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(np.maximum(values, 0))
    singular = np.linalg.svd(error @ root, compute_uv=False)
    a = np.asarray(made.linear.lora_a[...], np.float64)
    b = np.asarray(made.linear.lora_b[...], np.float64)
    left = error - made.linear.scale * (a @ b).T
    taken = np.sum(singular**2) - np.linalg.norm(left @ root) ** 2
    best = np.sum(singular[:rank] ** 2)
    assert NEAR_BEST * best <= taken <= best * (1 + 1e-5)
    # And the figures that it states are these.
    plain = attach(model, LoRAConfig(rank=rank, alpha=3.0), key=KEY)
    _, errors = compensate(plain, dense, moments, key=KEY)
    total = np.linalg.norm(w @ root)
    said = errors["linear"]
    assert said.before == pytest.approx(np.linalg.norm(singular) / total, rel=1e-3)
    assert said.after == pytest.approx(np.linalg.norm(left @ root) / total, rel=1e-2)


def test_one_round_leaves_the_base_and_is_what_an_init_does():
    dense, model = pair(96, 64)
    plain = attach(model, LoRAConfig(rank=8), key=KEY)
    one, _ = compensate(plain, dense, key=KEY, iterations=1)
    made = attach(model, LoRAConfig(rank=8, init="loftq"), key=KEY, original=dense)
    for a, b in zip(
        tiny.arrays(split(one)[1]), tiny.arrays(split(made)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(tiny.frozen(one), tiny.frozen(model), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("init", ["qera", "qera-diagonal"])
def test_more_rounds_with_moments_lose_no_more(init):
    dense, model = pair(96, 64)
    moments = measured(model, 64, init)
    plain = attach(model, LoRAConfig(rank=8), key=KEY)
    after = [
        compensate(plain, dense, moments, key=KEY, iterations=rounds)[1]["linear"].after
        for rounds in (1, 2, 4)
    ]
    assert after == sorted(after, reverse=True) and after[-1] < after[0]


def test_lora_a_has_the_size_of_a_new_one():
    dense, model = pair(96, 64)
    made = attach(model, LoRAConfig(rank=8, init="loftq"), key=KEY, original=dense)
    size = float(jnp.sqrt(jnp.mean(made.linear.lora_a[...] ** 2)))
    assert size == pytest.approx(1 / np.sqrt(3 * 64), rel=1e-4)


def test_a_rank_above_the_outputs_takes_all_away():
    dense, model = pair(8, 64)
    made = attach(model, LoRAConfig(rank=12, init="loftq"), key=KEY, original=dense)
    x = inputs(64)
    np.testing.assert_allclose(made(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_logits_come_nearer_to_the_dense_models():
    dense, model = tiny.decoder(), tiny.quantized()
    tokens = tiny.tokens(8, 32)
    wanted = tiny.logits(dense, tokens)
    config = LoRAConfig(rank=16, alpha=8, init="qera")
    moments = input_moments(model, [tokens])
    made = attach(model, config, key=KEY, original=dense, moments=moments)
    near, far = (
        np.linalg.norm(tiny.logits(one, tokens) - wanted) for one in (made, model)
    )
    assert near < 0.7 * far


def test_what_an_init_needs_is_named():
    dense, model = pair(40, 64)
    with pytest.raises(ConfigError, match="init 'loftq' needs original"):
        attach(model, LoRAConfig(init="loftq"), key=KEY)
    with pytest.raises(ConfigError, match="init 'qera' needs original and moments"):
        attach(model, LoRAConfig(init="qera"), key=KEY)
    with pytest.raises(ConfigError, match="init 'qera' needs original and moments"):
        attach(model, LoRAConfig(init="qera"), key=KEY, original=dense)
    with pytest.raises(ConfigError, match="no batch to measure"):
        input_moments(model, [], outputs=lambda model, x: model(x))


def test_what_cannot_be_compensated_is_refused():
    dense, model = pair(40, 64)
    config = LoRAConfig(rank=4)
    with pytest.raises(AdapterMismatchError, match="linear is dense"):
        compensate(attach(dense, config, key=KEY), dense, key=KEY)
    with pytest.raises(AdapterMismatchError, match="at linear has been trained"):
        compensate(tiny.adapted(model), dense, key=KEY)
    with pytest.raises(AdapterMismatchError, match=r"shape \(96, 64\), the base \(40"):
        compensate(attach(model, config, key=KEY), pair(96, 64)[0], key=KEY)
    with pytest.raises(
        AdapterMismatchError, match="original model has no dense linear"
    ):
        compensate(attach(model, config, key=KEY), model, key=KEY)


@pytest.mark.slow
def test_the_adapter_belongs_to_the_quantized_base_alone(tmp_path):
    dense, model = tiny.decoder(), tiny.quantized()
    config = LoRAConfig(rank=4, init="loftq")
    made = attach(model, config, key=KEY, original=dense)
    assert lora_config(made).init == "loftq"
    save_adapter(tmp_path / "a", split(made)[1], config)
    loaded = load_adapter(tmp_path / "a", model)
    tokens = tiny.tokens()
    np.testing.assert_array_equal(
        tiny.logits(loaded, tokens), tiny.logits(made, tokens)
    )
    assert all(
        node.init == "loftq"
        for _, node in nnx.iter_graph(loaded)
        if isinstance(node, LoRA)
    )
    with pytest.raises(AdapterMismatchError, match="belongs to the 4-bit base"):
        load_adapter(tmp_path / "a", dense)
