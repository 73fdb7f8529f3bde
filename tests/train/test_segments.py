"""Train steps of layers of several kinds, wherever they rest and whatever is recomputed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from models import unlike

import qlora_jax as qlora
from qlora_jax.models import Decoder
from qlora_jax.models.spec import AttentionSpec, DeltaSpec, LayerSpec
from qlora_jax.nn import quantize
from qlora_jax.objectives import SFT
from qlora_jax.train.step import make_train_step


@pytest.fixture(autouse=True)
def known(monkeypatch):
    unlike.known(monkeypatch)


@functools.cache
def quantized():
    return quantize(unlike.decoder())


def losses(model, checkpoint, stream, memory_kind, micro=1, seq=12):
    graphdef, lora, base = qlora.split(model)
    lora = jax.tree.map(jnp.copy, lora)  # which the step donates
    base = qlora.stream(base) if stream else base
    # Not Adam, whose first step is as large for a gradient that is mere rounding.
    tx = qlora.offload(optax.sgd(0.05, momentum=0.9), memory_kind)
    step = make_train_step(graphdef, tx, checkpoint=checkpoint)
    ids = tiny.tokens(2, seq)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape, jnp.float32)}
    if micro > 1:
        batch = {name: x.reshape(micro, -1, seq) for name, x in batch.items()}
    state, found = tx.init(lora), []
    for _ in range(2):
        lora, state, metrics = step(lora, base, state, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return found


@pytest.mark.slow
def test_streamed_paged_and_checkpointed_steps_are_the_same():
    model = tiny.adapted(quantized(), layers=(0, 1, 3, 5, 6))
    plain = losses(model, "layer", False, "device")
    assert plain[1] < plain[0]
    assert losses(model, "host", True, "pinned_host") == plain
    assert losses(model, "attention", True, "device") == plain
    together = losses(model, "attention", True, "device", micro=2)
    np.testing.assert_allclose(together, plain, rtol=1e-5)


@pytest.mark.slow
def test_a_recurrent_mixer_gives_the_same_however_its_step_is_made():
    """Rows are longer than a chunk, so that states and what they forget are made again."""
    mixers = (
        DeltaSpec(key_heads=2, value_heads=4, key_dim=16, value_dim=16),
        AttentionSpec(),
    )
    layers = tuple(LayerSpec(mixer=mixer) for mixer in mixers)
    shape = dataclasses.replace(tiny.CONFIG, layers=layers)
    model = tiny.adapted(quantize(tiny.drawn(shape)))
    plain = losses(model, "layer", False, "device", seq=70)
    assert plain[1] < plain[0]
    again = losses(model, "host", True, "device", micro=2, seq=70)
    np.testing.assert_allclose(again, plain, rtol=1e-5)


@pytest.mark.slow
def test_what_layers_are_given_and_told_counts_wherever_they_rest():
    """Keys and values of the first, which the others take; and what tokens tell all of them."""
    layers = (
        LayerSpec(mixer=AttentionSpec(gives="these")),
        *[LayerSpec(mixer=AttentionSpec(takes="these"))] * 2,
    )
    shape = dataclasses.replace(tiny.CONFIG, num_layers=3, layers=layers)
    vocab = shape.vocab_size
    shape = dataclasses.replace(shape, per_layer_size=16, per_layer_vocab=vocab)
    targets = "k_proj,per_layer_model_projection"
    model = tiny.adapted(quantize(tiny.drawn(shape)), targets=targets)
    plain = losses(model, "layer", False, "device")
    assert plain[1] < plain[0]
    np.testing.assert_allclose(losses(model, "host", True, "device"), plain, rtol=1e-5)
    together = losses(model, "attention", True, "device", micro=2)
    np.testing.assert_allclose(together, plain, rtol=1e-5)


def kept(model):
    """Returns the arrays that the loss keeps for its backward, and those of the base."""
    graphdef, lora, base = qlora.split(model)
    ids = tiny.tokens(2, 7)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape)}

    def vjp(lora, base):
        def loss(lora):
            model = qlora.join(graphdef, lora, base)
            return SFT(model, batch, None, "layer")[0]

        return jax.vjp(loss, lora)[1]

    return jax.tree.leaves(jax.eval_shape(vjp, lora, base)), base


@pytest.mark.parametrize("kind", ["unlike", "turns"])
def test_no_packed_copy_is_kept_for_backward(kind):
    model = quantized()
    if kind == "turns":  # as Gemma's and SmolLM3's layers are
        specs = [LayerSpec(mixer=AttentionSpec(window=w)) for w in (3, None) * 2]
        shape = dataclasses.replace(tiny.CONFIG, num_layers=4, layers=tuple(specs))
        model = quantize(Decoder(shape, key=jax.random.key(0), dtype="float32"))
    residuals, base = kept(tiny.adapted(model))
    codes = [x for x in jax.tree.leaves(base) if x.dtype in (jnp.uint16, jnp.uint8)]
    found = [x for x in residuals if x.dtype in (jnp.uint16, jnp.uint8)]
    assert found
    assert sorted(x.shape for x in found) == sorted(x.shape for x in codes)
