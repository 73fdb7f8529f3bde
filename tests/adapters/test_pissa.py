"""PiSSA's start: the principal part in the adapter, what it leaves in the 4-bit base."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.adapters import Adapter, LoRAConfig, attach, detach
from qlora_jax.adapters.algebra import difference
from qlora_jax.adapters.attach import split
from qlora_jax.adapters.attached import base_fingerprint
from qlora_jax.adapters.compensate import compensate
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft
from qlora_jax.nn import Linear, QuantizedLinear
from qlora_jax.nn.dora import row_norms
from qlora_jax.nn.packing import quantize_tensor
from qlora_jax.sources.load import load
from qlora_jax.sources.save import save_model

KEY = jax.random.key(0)
CONFIG = LoRAConfig(rank=8, alpha=3.0, targets="q_proj", init="pissa")
ROUNDING = 1e-5
"""Relative, of float32 sums against float64."""


@functools.cache
def pair(config: QuantConfig | None = None) -> tuple[tiny.One, tiny.One]:
    """A dense linear and its 4-bit copy; singular values fall as trained ones do."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 64)))[0] for n in (96, 64))
    w = jnp.asarray((u * np.geomspace(8, 0.2, 64)) @ v.T, jnp.float32)
    return tiny.One(Linear(w)), tiny.One(QuantizedLinear(quantize_tensor(w, config)))


@functools.cache
def made() -> object:
    return attach(tiny.quantized(), CONFIG, key=KEY, original=tiny.decoder())


def left(model, dense) -> float:
    """Returns the part of the weight, in float64, that base and adapter together do not say."""
    node = model.linear
    a, b = (np.asarray(x[...], np.float64) for x in (node.lora_a, node.lora_b))
    said = np.asarray(node.base.weight("float32"), np.float64) + node.scale * (a @ b).T
    return float(np.linalg.norm(np.asarray(dense.linear.kernel[...]) - said))


@pytest.mark.parametrize("principal", [False, True])
def test_rounds_lose_less_and_less(principal):
    dense, model = pair()
    plain = attach(model, LoRAConfig(rank=8), key=KEY)
    losses = []
    for rounds in (1, 2, 3, 5):
        one, errors = compensate(
            plain, dense, key=KEY, iterations=rounds, principal=principal
        )
        losses.append(left(one, dense))
        norm = float(jnp.linalg.norm(dense.linear.kernel[...]))
        assert errors["linear"].after == pytest.approx(losses[-1] / norm, rel=1e-3)
    whole = left(plain, dense)  # lora_b is zero
    assert errors["linear"].before == pytest.approx(whole / norm, rel=1e-3)
    for more, less in zip(losses, losses[1:], strict=False):
        assert less <= more * (1 + ROUNDING)
    assert losses[-1] < 0.98 * losses[0]


def test_pissa_says_more_of_the_weight_than_loftq_and_zero():
    dense, model = pair()
    lost = {
        init: left(
            attach(model, LoRAConfig(rank=8, init=init), key=KEY, original=dense), dense
        )
        for init in ("zero", "loftq", "pissa")
    }
    assert lost["pissa"] < 0.75 * lost["loftq"] < 0.75 * lost["zero"]


def test_the_first_start_is_the_principal_part_and_its_factors_are_of_one_size():
    dense, model = pair()
    plain = attach(model, LoRAConfig(rank=8, alpha=3.0), key=KEY)
    one, _ = compensate(plain, dense, key=KEY, principal=True)
    w = np.asarray(dense.linear.kernel[...], np.float64)
    singular = np.linalg.svd(w, compute_uv=False)
    node = one.linear
    a, b = (np.asarray(x[...], np.float64) for x in (node.lora_a, node.lora_b))
    got = np.linalg.svd(node.scale * (a @ b).T, compute_uv=False)[:8]
    # After one round the adapter is that of W - base, which is nearly that of W.
    np.testing.assert_allclose(got, singular[:8], rtol=0.02)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-3
    )
    assert np.abs(one.linear.base.weight("float32")).max() < 0.8 * np.abs(w).max()


def test_the_base_stays_of_its_kind():
    config = QuantConfig(codebook="fp4", block_size=32, double_quant=False)
    dense, model = pair(config)
    one = attach(model, LoRAConfig(rank=4, init="pissa"), key=KEY, original=dense)
    old, new = model.linear.quantized, one.linear.base.quantized
    assert jax.tree.structure(old) == jax.tree.structure(new)
    assert jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, new)


def test_layers_without_adapter_keep_their_base():
    config = dataclasses.replace(CONFIG, layers=(1,))
    one = attach(tiny.quantized(), config, key=KEY, original=tiny.decoder())
    codes = one.layers.attn.q_proj.base.quantized.codes
    before = tiny.quantized().layers.attn.q_proj.quantized.codes
    np.testing.assert_array_equal(codes[0], before[0])
    assert (codes[1] != before[1]).any()
    np.testing.assert_array_equal(
        one.layers.attn.k_proj.quantized.codes,
        tiny.quantized().layers.attn.k_proj.quantized.codes,
    )


@pytest.mark.slow
def test_dora_begins_at_the_norms_of_base_and_adapter():
    dense, model = pair()
    config = LoRAConfig(rank=8, init="pissa", dora=True)
    node = attach(model, config, key=KEY, original=dense).linear
    a, b = node.lora_a[...], node.lora_b[...]
    np.testing.assert_allclose(
        node.magnitude[...], row_norms(node.base, a, b, node.scale), rtol=1e-6
    )
    np.testing.assert_allclose(
        node.squared_norms[...], row_norms(node.base) ** 2, rtol=1e-6
    )


def test_the_adapter_fits_its_own_base_alone(tmp_path):
    model, x = made(), tiny.tokens()
    config = Adapter.of(model).config
    assert config.init == "pissa"
    save_adapter(tmp_path / "a", split(model)[1], config)
    save_model(detach(model), tmp_path / "base")
    base, _ = load(tmp_path / "base", dtype="float32")
    np.testing.assert_array_equal(
        tiny.logits(load_adapter(tmp_path / "a", base), x), tiny.logits(model, x)
    )
    with pytest.raises(AdapterMismatchError, match="other 4-bit weights.*base/ beside"):
        load_adapter(tmp_path / "a", tiny.quantized())
    with pytest.raises(AdapterMismatchError, match=r"principal part .*init pissa"):
        load_adapter(tmp_path / "a", tiny.decoder())
    with pytest.raises(AdapterMismatchError, match="other 4-bit weights"):
        Adapter.of(model).on(tiny.quantized())
    again = Adapter.of(model).on(base)
    np.testing.assert_array_equal(tiny.logits(again, x), tiny.logits(model, x))


def test_the_mark_is_that_of_the_changed_base():
    mark = base_fingerprint(split(made())[1])
    assert mark == json.loads(fingerprint(detach(made()), scales=True))
    plain = json.loads(fingerprint(tiny.quantized(), scales=True))
    name = "layers.attn.q_proj.kernel"
    assert mark["scales"][name] < 0.95 * plain["scales"][name]
    assert mark["sample"] == plain["sample"]
    assert "scales" not in json.loads(fingerprint(tiny.quantized()))


@pytest.mark.slow
def test_what_two_of_them_differ_by_fits_any_copy_of_the_base():
    one = Adapter.of(made())
    same = difference(one, one)
    assert same.config.init == "zero" and "scales" not in base_fingerprint(same.lora)
    model, x = same.on(tiny.quantized()), tiny.tokens()
    np.testing.assert_allclose(
        tiny.logits(model, x), tiny.logits(tiny.quantized(), x), atol=1e-4
    )


def test_what_it_needs_is_named(tmp_path):
    dense, model = pair()
    with pytest.raises(ConfigError, match="init 'pissa' needs original"):
        attach(model, LoRAConfig(init="pissa"), key=KEY)
    with pytest.raises(ConfigError, match="iterations is 0, expected at least 1"):
        compensate(attach(model, LoRAConfig(), key=KEY), dense, key=KEY, iterations=0)
    with pytest.raises(ConfigError, match="give base=, the folder of RUN/base"):
        export_peft(tmp_path / "p", made())
    export_peft(tmp_path / "p", made(), base="RUN/base")
    settings = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "RUN/base"
