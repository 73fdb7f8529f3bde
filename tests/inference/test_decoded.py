"""A base decoded once for inference: the same logits, where memory suffices."""

import dataclasses
import importlib
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import Adapter, AdapterBank
from qlora_jax.budget.host import available_host_bytes
from qlora_jax.inference import decoded
from qlora_jax.models import Decoder
from qlora_jax.nn import (
    DecodedEmbedding,
    DecodedLinear,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    quantize,
)
from qlora_jax.nn.packing import quantize_rows, quantize_tensor

# Of a float32 sum of 4352 products, taken in another order.
TILED = 2e-5


def mixture() -> Decoder:
    config = dataclasses.replace(tiny.CONFIG, num_experts=3, experts_per_token=2)
    model = jax.jit(
        lambda: nnx.split(Decoder(config, key=jax.random.key(3), dtype="float32"))
    )()
    return tiny.moved(quantize(nnx.merge(*model)), dora=True)


def bank() -> Decoder:
    """Two adapters for the rows of a base with a 4-bit embedding, its head tied to it."""
    base = tiny.quantized("bfloat16")
    table = QuantizedEmbedding(quantize_tensor(base.embed_tokens.weight[...]))

    def replace(path: tuple, node: object) -> object:
        return table if path == ("embed_tokens",) else node

    base = nnx.recursive_map(replace, base)
    base.lm_head = nnx.data(None)
    adapters = {
        name: Adapter.of(tiny.adapted(base, seed=seed, rank=rank))
        for name, seed, rank in (("a", 1, 4), ("b", 2, 2))
    }
    made = AdapterBank.of(base, adapters)
    assert decoded(made).adapters == ("a", "b")
    return made.route(["a", "b"])


@pytest.mark.parametrize("make", [bank, mixture])
def test_logits_equal_the_packed_models_bit_for_bit(make: Callable[[], Decoder]):
    model = make()
    made = decoded(model)
    kinds = {type(node) for _, node in nnx.iter_graph(made)}
    assert DecodedLinear in kinds and (DecodedEmbedding in kinds) == (make is bank)
    assert not kinds & {QuantizedLinear, QuantizedEmbedding}
    assert QuantizedLinear in {type(node) for _, node in nnx.iter_graph(model)}
    np.testing.assert_array_equal(
        tiny.logits(made, tiny.tokens()), tiny.logits(model, tiny.tokens())
    )


def test_a_weight_that_packed_products_tile_differs_by_rounding_alone():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((1024, 4352)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 4352)), jnp.float32)
    packed = QuantizedLinear(quantize_tensor(w))
    y = jax.jit(packed.product)(x)
    made = jax.jit(DecodedLinear.of(packed, "float32").product)(x)
    np.testing.assert_allclose(made, y, atol=TILED * float(jnp.abs(y).max()))


def test_only_what_is_4_bit_and_left_to_choose_is_decoded():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    for kept in (
        Linear(w),
        QuantizedLinear(quantize_rows(w)),
        QuantizedLinear(quantize_tensor(w), implementation="two_pass"),
    ):
        model = tiny.One(kept)
        assert decoded(model) is model
    made = decoded(tiny.One(QuantizedLinear(quantize_tensor(w))))
    assert isinstance(made.linear, DecodedLinear)
    assert decoded(made) is made


def test_without_the_memory_the_base_stays_packed_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    model = tiny.quantized()
    monkeypatch.setattr(module(), "_SAID", set())
    for free in (1000, None, 999):
        monkeypatch.setattr(module(), "available_host_bytes", lambda free=free: free)
        assert decoded(model) is model
    assert caplog.text.count("are decoded again for every token") == 1


def test_other_platforms_keep_their_kernels(monkeypatch: pytest.MonkeyPatch):
    device = module().current_device()
    gpu = dataclasses.replace(device, platform="gpu")
    monkeypatch.setattr(module(), "current_device", lambda: gpu)
    model = tiny.quantized()
    assert decoded(model) is model


def test_a_containers_limit_bounds_the_memory(tmp_path: Path):
    assert available_host_bytes(tmp_path) is None  # not on Linux
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    assert available_host_bytes(tmp_path) == 8192
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000\n")
    (group / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) == 8192
    (group / "memory.max").write_text("5000\n")
    (group / "memory.stat").write_text("anon 2500\ninactive_file 500\n")
    assert available_host_bytes(tmp_path) == 2500


def module():
    return importlib.import_module("qlora_jax.inference.decoded")
