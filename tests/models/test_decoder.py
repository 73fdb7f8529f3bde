"""The decoder, against transformers' logits and a plain numpy decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

from pallas_kernels.formats import QuantizedTensor
from qlora_jax.evaluate import perplexity
from qlora_jax.models import Decoder
from qlora_jax.sources.load import load

# Float32 sums in another order; logits are of order 1.
LOGITS = {"rtol": 0, "atol": 1e-4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What differs between families, in as few models as show it.
VARIANTS = {
    "llama, biases, scaled rope, any head_dim": oracle.hf_config(
        attention_bias=True, rope_theta=500.0, rope_scaling=LLAMA3, head_dim=24
    ),
    "mistral, sliding window": oracle.hf_config(model_type="mistral", sliding_window=3),
    "qwen2, biases on q, k and v, tied": oracle.hf_config(
        model_type="qwen2",
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    ),
}


def run(model: Decoder, ids: np.ndarray) -> jax.Array:
    """Applies a model, compiled once for each kind."""
    return _run(*nnx.split(model), jnp.asarray(ids, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, ids):
    return nnx.merge(graphdef, state)(ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode(graphdef, state, tokens, positions, cache):
    return nnx.merge(graphdef, state).decode(tokens, positions, cache)


@functools.cache
def variant(name: str) -> tuple[dict, dict]:
    return VARIANTS[name], oracle.hf_tensors(VARIANTS[name])


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Decoder:
    hf, tensors = variant("mistral, sliding window")
    folder = oracle.write_folder(tmp_path_factory.mktemp("mistral"), hf, tensors)
    return load(folder, dtype="float32")[0]


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("llama_bnb_nf4_dq_float32", "logits.npy"),
        ("llama_bnb_nf4_float32", "logits.npy"),
        ("llama_fp32", "logits.npy"),
        ("llama_bf16_sharded", "logits_upcast_fp32.npy"),
        ("qwen2_fp32", "logits.npy"),
    ],
)
def test_logits_are_those_of_transformers(golden, name, logits):
    folder = golden(f"models/{name}")
    ids = np.load(golden("models/input_ids.npy"))
    model, tokenizer = load(folder, dtype="float32")
    assert tokenizer is None
    actual = run(model, ids)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, np.load(folder / logits), **LOGITS)


def test_the_numpy_decoder_agrees_with_transformers(golden):
    folder = golden("models/llama_fp32")
    ids = np.load(golden("models/input_ids.npy"))
    hf = oracle.hf_config(vocab_size=256, intermediate_size=192, rms_norm_eps=1e-6)
    actual = oracle.logits(hf, load_file(folder / "model.safetensors"), ids)
    np.testing.assert_allclose(actual, np.load(folder / "logits.npy"), **LOGITS)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_family_computes_what_its_config_says(tmp_path, name):
    hf, tensors = variant(name)
    model, _ = load(oracle.write_folder(tmp_path, hf, tensors), dtype="float32")
    ids = np.random.default_rng(0).integers(0, 48, (2, 9))
    np.testing.assert_allclose(
        run(model, ids), oracle.logits(hf, tensors, ids), **LOGITS
    )


def steps(model: Decoder, prompts: list[np.ndarray], follow: np.ndarray) -> list:
    """Decodes prompts, padded on the left, and then one column at a time."""
    graphdef, state = nnx.split(model)
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    positions = np.full_like(tokens, -1)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))
    cache = model.empty_cache(len(prompts), longest + follow.shape[1])
    logits, cache = _decode(graphdef, state, tokens, positions, cache)
    out = [logits]
    for i in range(follow.shape[1]):
        last = positions[:, -1:] + i + 1
        logits, cache = _decode(graphdef, state, follow[:, i : i + 1], last, cache)
        out.append(logits)
    return out


def test_decoding_with_a_cache_equals_the_full_forward(mistral):
    # The window (3) is shorter than the prompt, and keys outlive it in the cache.
    ids = np.random.default_rng(1).integers(0, 48, (2, 9)).astype(np.int32)
    expected = run(mistral, ids)
    decoded = steps(mistral, list(ids[:, :5]), ids[:, 5:])
    for i, logits in enumerate(decoded):
        np.testing.assert_allclose(logits, expected[:, 4 + i], **LOGITS)


def test_padding_on_the_left_is_not_seen(mistral):
    ids = np.random.default_rng(1).integers(0, 48, (2, 9)).astype(np.int32)
    alone = run(mistral, ids)
    # Row 0 has a prompt of 5, row 1 one of 2: three of padding.
    follow = np.stack([ids[0, 5:9], ids[1, 2:6]])
    decoded = steps(mistral, [ids[0, :5], ids[1, :2]], follow)
    for i, logits in enumerate(decoded):
        np.testing.assert_allclose(logits[0], alone[0, 4 + i], **LOGITS)
        np.testing.assert_allclose(logits[1], alone[1, 1 + i], **LOGITS)


def test_padding_on_the_right_is_not_seen(mistral):
    ids = np.random.default_rng(1).integers(0, 48, (2, 9)).astype(np.int32)
    changed = np.where(np.arange(9) < 5, ids, 0)
    np.testing.assert_allclose(
        run(mistral, ids)[:, :5], run(mistral, changed)[:, :5], **LOGITS
    )


def loss_of(model: Decoder, checkpoint: str):
    """A loss of the hidden states, by the adapter."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora, base):
        hidden = nnx.merge(graphdef, lora, base).hidden_states(
            tiny.tokens(), key=jax.random.key(0), checkpoint=checkpoint
        )
        return jnp.sum(jnp.square(hidden) * jnp.arange(64.0))

    return loss, lora, base


@pytest.mark.slow
def test_checkpointing_changes_no_gradient():
    model = tiny.adapted(tiny.decoder(), dropout=0.2)
    gradients = []
    for checkpoint in ("none", "layer"):
        loss, lora, base = loss_of(model, checkpoint)
        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(lora, base)))
    assert len(gradients[0]) == 2 * 7
    for kept, made_again in zip(*gradients, strict=True):
        largest = jnp.abs(kept).max()
        assert largest > 0
        np.testing.assert_allclose(kept, made_again, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("checkpoint", ["none", "layer"])
def test_nothing_dense_of_a_quantized_weight_is_kept_for_backward(checkpoint):
    loss, lora, base = loss_of(tiny.adapted(tiny.quantized()), checkpoint)
    kept = jax.eval_shape(
        lambda lora, base: jax.vjp(lambda lora: loss(lora, base), lora)[1], lora, base
    )
    sizes = {
        value.shape[0] * value.shape[1]
        for _, variable in nnx.to_flat_state(base)
        if isinstance(value := variable.get_value(), QuantizedTensor)
    }
    layers = tiny.CONFIG.num_layers
    dense = sizes | {layers * size for size in sizes}
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert not [x.shape for x in floats if x.size in dense]


def test_layer_checkpointing_keeps_the_stream_between_layers_alone():
    loss, lora, base = loss_of(tiny.adapted(tiny.quantized()), "layer")
    kept = jax.eval_shape(
        lambda lora, base: jax.vjp(lambda lora: loss(lora, base), lora)[1], lora, base
    )
    layers, width = tiny.CONFIG.num_layers, tiny.CONFIG.intermediate_size
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    assert (layers, *tiny.tokens().shape, tiny.CONFIG.hidden_size) in shapes
    assert not [
        s for s in shapes if s[:1] == (layers,) and s[-1] == width and len(s) > 3
    ]


def test_the_program_does_not_grow_with_depth():
    def operations(layers: int) -> int:
        config = dataclasses.replace(tiny.CONFIG, num_layers=layers)
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
        )
        program = jax.make_jaxpr(lambda s, ids: nnx.merge(graphdef, s)(ids))
        return str(program(state, tiny.tokens())).count("\n")

    assert operations(2) == operations(16)


@pytest.mark.slow
def test_stories15m_has_its_perplexity(shared):
    model, tokenizer = load(shared / "models/stories15m", dtype="float32")
    text = (shared / "data/tinystories/tinystories_a.txt").read_text()[:20000]
    value, count = perplexity(
        model, tokenizer.encode(text), window=250, bos_id=tokenizer.bos_id
    )
    assert count > 4000
    assert round(value, 2) == 5.38


@pytest.mark.slow
def test_stories15m_has_the_logits_of_the_numpy_decoder(shared):
    folder = shared / "models/stories15m"
    model, tokenizer = load(folder, dtype="float32")
    ids = np.array(
        [[tokenizer.bos_id, *tokenizer.encode("Once upon a time there was")]]
    )
    hf = oracle.hf_config(
        hidden_size=288,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=True,
    )
    expected = oracle.logits(hf, load_file(folder / "model.safetensors"), ids)
    np.testing.assert_allclose(run(model, ids), expected, **LOGITS)
