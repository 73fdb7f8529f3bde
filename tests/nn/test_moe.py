"""Experts: grouped products against every expert applied to every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from format_cases import Float8Rows

from pallas_kernels.formats import QuantizedTensor
from qlora_jax.adapters import LoRAConfig, attach, join, merge, split
from qlora_jax.adapters.compensate import compensate
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.nn import grouped, quantize
from qlora_jax.nn.grouped import combine, dispatch, group, over_blocks
from qlora_jax.nn.linear import Linear, QuantizedLinear
from qlora_jax.nn.lora import LoRA, project

SUM_ORDER = 1e-5
HIDDEN = 16


def routed(tokens: int, k: int, count: int, seed: int = 0, skew: bool = False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    weights = rng.random((tokens, k)).astype(np.float32)
    if skew:  # all to the same experts, others get nothing
        chosen = np.tile(np.arange(k), (tokens, 1))
    else:
        chosen = np.stack([rng.permutation(count)[:k] for _ in range(tokens)])
    matrices = rng.standard_normal((count, HIDDEN, HIDDEN)).astype(np.float32)
    return map(jnp.asarray, (x, weights, chosen.astype(np.int32), matrices))


class Wide(nnx.Module):
    """Experts of one linear, with a bias."""

    def __init__(self, linear):
        self.up_proj = linear

    def __call__(self, rows, key=None):
        return project(self.up_proj, rows, key, 0)


def experts_of(matrices, kind):
    """Returns the experts, and what each multiplies by."""
    bias = jnp.linspace(-1, 1, matrices.shape[0] * HIDDEN).reshape(-1, HIDDEN)
    if kind == "dense":
        linear, dense = Linear(matrices, bias), matrices
    else:
        packed = jax.vmap(functools.partial(pack, kind=kind))(matrices)
        linear, dense = QuantizedLinear(packed, bias), packed.decode("float32")
    lora = LoRA(linear, rank=2, alpha=4, dropout=0.0, key=jax.random.key(0))
    lora.lora_b[...] = jax.random.normal(jax.random.key(1), lora.lora_b.shape)
    return Wide(lora), dense, bias


def pack(matrix, kind):
    if kind == "nf4":
        return QuantizedTensor.quantize(matrix)
    return Float8Rows.quantize(matrix)


@pytest.mark.slow
@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize(("tokens", "k", "count"), [(1, 2, 8), (37, 2, 4), (300, 3, 5)])
@pytest.mark.parametrize("kind", ["dense", "nf4", "float8"])
def test_nothing_is_dropped_and_each_token_meets_its_experts(
    tokens, k, count, skew, kind
):
    x, weights, chosen, matrices = routed(tokens, k, count, skew=skew)
    experts, dense, bias = experts_of(matrices, kind)
    graphdef, lora, frozen = nnx.split(experts, nnx.LoRAParam, ...)

    def ours(x, weights, lora):
        groups = group(chosen, count)
        module = nnx.merge(graphdef, lora, frozen)
        apply = over_blocks(module, groups, lambda one, i, rows: one(rows))
        return combine(apply(dispatch(x, groups)), weights, groups)

    def plain(x, weights, lora):
        a, b = (lora["up_proj"][name][...] for name in ("lora_a", "lora_b"))
        whole = dense + 2 * jnp.einsum("ehr,erk->ekh", a, b)
        every = jnp.einsum("th,ekh->tek", x, whole) + bias
        picked = jnp.take_along_axis(every, chosen[..., None], axis=1)
        return jnp.sum(picked * weights[..., None], axis=1)

    args = (x, weights, lora)
    want = plain(*args)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(jax.jit(ours)(*args), want, atol=SUM_ORDER * scale)

    def gradients(f):
        grads = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))
        return jax.tree.leaves(jax.jit(grads)(*args))

    for got, want in zip(gradients(ours), gradients(plain), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=SUM_ORDER * scale)


@pytest.mark.parametrize("kind", ["nf4", "float8"])
def test_one_expert_is_decoded_at_a_time_forward_and_backward(kind):
    count, wide = 16, 1024
    x, weights, chosen, _ = routed(64, 2, count)
    matrices = jax.random.normal(jax.random.key(0), (count, HIDDEN, wide))
    experts, _, _ = experts_of(matrices, kind)
    graphdef, lora, frozen = nnx.split(experts, nnx.LoRAParam, ...)
    rows = jnp.tile(x, (1, wide // HIDDEN))

    def loss(lora, frozen):
        groups = group(chosen, count)
        module = nnx.merge(graphdef, lora, frozen)
        apply = over_blocks(module, groups, lambda one, i, rows: one(rows))
        return jnp.sum(combine(apply(dispatch(rows, groups)), weights, groups) ** 2)

    text = jax.jit(jax.grad(loss)).lower(lora, frozen).compile().as_text()
    assert text is not None and f"f32[{HIDDEN},{wide}]" in text
    assert f"f32[{count},{HIDDEN},{wide}]" not in text


def test_experts_without_tokens_are_passed_over(monkeypatch):
    """A token's experts alone are decoded: the loop's count is a number of the data."""
    decoded = []
    ready = grouped._ready

    def counted(w, dtype, name):
        jax.debug.callback(lambda: decoded.append(1))
        return ready(w, dtype, name)

    monkeypatch.setattr(grouped, "_ready", counted)
    x, _, _, matrices = routed(1, 2, 8)
    experts, _, _ = experts_of(matrices, "nf4")

    def run(x, experts, chosen):
        groups = group(chosen, 8)
        apply = over_blocks(experts, groups, lambda one, i, rows: one(rows))
        return apply(dispatch(x, groups))

    jax.block_until_ready(jax.jit(run)(x, experts, jnp.asarray([[5, 2]])))
    jax.effects_barrier()
    assert len(decoded) == 2


@functools.cache
def mixture() -> Decoder:
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        num_experts=4,
    )
    return Decoder(config, key=jax.random.key(0), dtype="float32")


@functools.cache
def adapted():
    return tiny.adapted(quantize(mixture()))


def test_experts_are_quantized_and_adapted_and_the_router_is_neither():
    experts = adapted().layers.mlp.experts
    assert experts.gate_proj.base.quantized.codes.shape[:2] == (2, 4)
    assert experts.down_proj.lora_a[...].shape == (2, 4, 32, 4)
    assert adapted().layers.mlp.router.weight[...].shape == (2, 4, 64)
    _, lora, _ = split(adapted())
    assert not any("router" in map(str, path) for path, _ in nnx.to_flat_state(lora))


@pytest.mark.slow
def test_gradients_of_experts_adapters_are_the_differences_of_the_loss():
    graphdef, lora, base = split(adapted())
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)

    @jax.jit
    def loss(lora):
        return jnp.sum(join(graphdef, lora, base)(tokens) ** 2)

    grads = jax.jit(jax.grad(loss))(lora)
    factors = grads["layers"]["mlp"]["experts"]["up_proj"]
    assert (jnp.abs(factors["lora_b"].get_value()).max((2, 3)) > 0).all()

    def moved(step: float) -> float:
        """The last layer's experts moved; no router follows that could choose anew."""

        def move(path, p, g):
            if "experts" not in jax.tree_util.keystr(path):
                return p
            return p.at[1].add(step * jnp.sign(g[1]))

        return float(loss(jax.tree_util.tree_map_with_path(move, lora, grads)))

    experts = jax.tree.leaves(grads["layers"]["mlp"]["experts"])
    want = sum(float(jnp.abs(g[1]).sum()) for g in experts)
    step = 1e-3
    difference = (moved(step) - moved(-step)) / (2 * step)
    assert difference == pytest.approx(want, rel=5e-3)


def test_names_on_disk_number_layer_and_expert():
    _, lora, _ = split(adapted())
    flat = flatten(lora)
    assert flat["layers.1.mlp.experts.3.up_proj.lora_a"].shape == (64, 4)
    assert flat["layers.0.attn.q_proj.lora_b"].shape == (4, 64)
    back = unflatten(flat, lora)
    for one, other in zip(tiny.arrays(back), tiny.arrays(lora), strict=True):
        np.testing.assert_array_equal(one, other)


def test_merging_experts_says_what_the_adapter_said():
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)
    said = tiny.logits(merge(adapted(), dtype="float32"), tokens)
    want = tiny.logits(adapted(), tokens)
    np.testing.assert_allclose(said, want, atol=SUM_ORDER * np.abs(want).max())


@pytest.mark.slow
def test_experts_adapters_can_make_up_for_quantization():
    model = quantize(mixture())
    plain = attach(model, LoRAConfig(rank=8), key=jax.random.key(0))
    made, errors = compensate(plain, mixture(), key=jax.random.key(0))
    assert made.layers.mlp.experts.up_proj.lora_b[...].any((2, 3)).all()
    said = errors["layers.mlp.experts.up_proj"]
    assert said.after < 0.9 * said.before
