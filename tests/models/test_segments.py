"""Layers are segments: whatever is in their slots, all that can be done with layers can."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from models import unlike

import qlora_jax as qlora
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.names import flatten
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.models import Decoder
from qlora_jax.models.cache import Context
from qlora_jax.models.spec import LayerSpec, MLPSpec, segments
from qlora_jax.names import stack_key
from qlora_jax.nn import quantize

RTOL = 2e-5
"""The error allowed, relative to the largest logit: both sides compute in float32, in programs
of another shape."""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    unlike.known(monkeypatch)


@functools.cache
def quantized():
    return quantize(unlike.decoder())


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL * np.abs(want).max())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaaa", ["a*4"]),
        ("abbb", ["a*1", "b*3"]),
        ("abababab", ["ab*4"]),
        ("aaabaaabaa", ["aaab*2", "a*2"]),
        ("dabcabcabc", ["d*1", "abc*3"]),
        ("abc", ["abc*1"]),
        ("aabaab", ["aab*2"]),
        ("aaaabaaa", ["a*4", "b*1", "a*3"]),
    ],
)
def test_segments_have_the_fewest_slots(text, expected):
    specs = tuple(LayerSpec(mixer=letter) for letter in text)
    found = segments(specs)
    said = ["".join(s.mixer for s in one.pattern) + f"*{one.repeats}" for one in found]
    assert said == expected
    slots = [slot for one in found for slot in one.slots()]
    assert {i: spec for layers, spec in slots for i in layers} == dict(enumerate(specs))


def test_layers_apply_in_their_order():
    model, ids = quantized(), tiny.tokens(2, 9)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    @nnx.jit
    def by_hand(model, ids):
        context = Context(positions, model._shared(positions))
        x = model._embed(ids)
        where = {
            number: (stack, i)
            for (layers, _), stack in zip(model.config.slots, model.stacks, strict=True)
            for i, number in enumerate(layers)
        }
        for number in range(model.config.num_layers):
            stack, i = where[number]
            graphdef, state = nnx.split(stack)
            one = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            x, _, _ = one(x, context)
        return model.logits(model.norm(x))

    close(nnx.jit(lambda m, ids: m(ids))(model, ids), by_hand(model, ids))


def test_decoding_equals_the_full_forward_whatever_mixers_remember():
    model, ids = quantized(), tiny.tokens(2, 8)
    whole = nnx.jit(lambda m, ids: m(ids))(model, ids)
    # The second row begins two positions later, with padding on the left.
    padded = ids.at[1].set(jnp.roll(ids[1], 2))
    positions = jnp.stack([jnp.arange(8), jnp.arange(8) - 2]).clip(-1)
    decode = nnx.jit(lambda m, *args: m.decode(*args))
    logits, cache = decode(
        model, padded[:, :5], positions[:, :5], model.empty_cache(2, 8)
    )
    for i in range(5, 9):
        close(logits, jnp.stack([whole[0, i - 1], whole[1, i - 3]]))
        if i < 8:
            one = slice(i, i + 1)
            logits, cache = decode(model, padded[:, one], positions[:, one], cache)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), (0, 1, 2, 3, 6)])
def test_adapters_by_layer_travel_and_come_back(layers, tmp_path):
    config = {"layers": layers, "targets": "in_proj,q_proj,up_proj"}
    model = tiny.moved(quantized(), **config)
    _, lora, _ = qlora.split(model)
    adapted = sorted({name.rpartition(".")[0] for name in flatten(lora)})
    every = layers or range(7)
    wanted = {f"layers.{i}.attn.in_proj" for i in (1, 4)}
    wanted |= {f"layers.{i}.attn.q_proj" for i in (0, 2, 3, 5, 6)}
    wanted |= {f"layers.{i}.mlp.up_proj" for i in (0, 2, 5)}
    wanted |= {
        f"layers.{i}.mlp.experts.{e}.up_proj" for i in (1, 3, 4, 6) for e in (0, 1)
    }
    assert adapted == sorted(n for n in wanted if int(n.split(".")[1]) in every)
    assert lora_config(model).layers == layers
    save_adapter(tmp_path, lora, lora_config(model))
    ids = tiny.tokens(1, 6)
    said = nnx.jit(lambda m, ids: m(ids))(model, ids)
    for back in (
        load_adapter(tmp_path, quantized()),
        qlora.read_adapter(tmp_path).on(quantized()),
        qlora.Adapter.of(model).on(quantized()),
    ):
        assert lora_config(back) == lora_config(model)
        close(nnx.jit(lambda m, ids: m(ids))(back, ids), said)
    # One that a model has and one that a folder has can be computed with together.
    half = qlora.combine(
        [qlora.Adapter.of(model), qlora.read_adapter(tmp_path)], [0.3, 0.7]
    )
    close(nnx.jit(lambda m, ids: m(ids))(half.on(quantized()), ids), said)


@pytest.mark.slow
def test_rows_take_their_own_adapters():
    targets = "in_proj,out_proj,q_proj,down_proj"
    config = {"targets": targets, "layers": (0, 1, 2, 4, 5)}
    # Experts are nothing that rows can choose.
    config["layers_pattern"] = {"mlp.down_proj": "0,2,5", "experts.down_proj": "0"}
    first = tiny.moved(quantized(), **config)
    a = qlora.Adapter.of(first)
    bank = qlora.AdapterBank.of(quantized(), {"a": a}, slots=2)
    ids = tiny.tokens(2, 6)
    run = nnx.jit(lambda m, ids: m(ids))
    got = run(bank.route(["a", None]), ids)
    close(got, jnp.stack([run(first, ids)[0], run(quantized(), ids)[1]]))


@pytest.mark.slow
def test_merges_give_the_same_and_say_what_they_lost():
    model, ids = tiny.moved(quantized()), tiny.tokens(1, 6)
    run = nnx.jit(lambda m, ids: m(ids))
    merged = qlora.merge(model, dtype="float32")
    close(run(merged, ids), run(model, ids))
    report = qlora.merge_report(
        model, qlora.merge(model, requantize=qlora.QuantConfig())
    )
    assert len(report.relative) == len(flatten(qlora.split(model)[1])) // 2
    assert report.relative.keys() >= {
        "layers.4.attn.in_proj",
        "layers.3.mlp.experts.1.up_proj",
    }
    assert 0 < report.total[0] < 0.2


def test_the_program_does_not_grow_with_the_repeats():
    def size(repeats: int) -> int:
        model = nnx.eval_shape(lambda: unlike.decoder(repeats))
        traced = jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t))
        graph, state = nnx.split(model)
        return str(traced(state, tiny.tokens(1, 6))).count(" = ")

    assert size(3) == size(5)


def test_dense_layers_before_a_mixture_are_the_first_segment():
    dense = LayerSpec(feed_forward=MLPSpec(intermediate_size=64))
    config = dataclasses.replace(tiny.CONFIG, num_experts=2)
    layers = (dense, *config.specs, *config.specs)
    config = dataclasses.replace(config, num_layers=5, layers=layers)
    model = Decoder(config, key=jax.random.key(0))
    assert list(model.layers) == [stack_key(range(0, 1)), stack_key(range(1, 5))]
    widths = [stack.attn.q_proj.kernel[...].shape[0] for stack in model.stacks]
    assert widths == [1, 4]
    assert list(itertools.chain(*(layers for layers, _ in config.slots))) == [*range(5)]
