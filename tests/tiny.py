"""A tiny base, its tokenizer and its data, for tests that need a whole model.

The model is random, 2 layers of hidden 64; the tokenizer has one token a byte. Values
are cached: tests must not write to them (nothing in qlora_jax does).
"""

import contextlib
import dataclasses
import functools
import json
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from qlora_jax.adapters import Adapter, LoRAConfig, attach
from qlora_jax.adapters.attach import join
from qlora_jax.data import Dataset
from qlora_jax.data.dataset import Row
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import export_peft
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.nn import FrozenParam, quantize
from qlora_jax.objectives import SFT
from qlora_jax.sources.save import save_model
from qlora_jax.text.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
SPECIAL = ("<s>", "</s>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG = DecoderConfig(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Returns a tokenizer with one token a byte and the special ones."""
    from tokenizers import decoders, models, pre_tokenizers

    # The byte-level alphabet, printable stand-ins of all bytes, in byte order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


@functools.cache
def tokenizer(*, bos: bool = True, chat: bool = True) -> Tokenizer:
    """Returns it as the library holds it."""
    return Tokenizer(
        byte_tokenizer(),
        bos_id=BOS if bos else None,
        eos_ids=(EOS,),
        chat_template=CHAT_TEMPLATE if chat else None,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


@functools.cache
def decoder(dtype: str = "float32", seed: int = 0, bias: bool = False) -> Decoder:
    """Returns a dense base whose logits are far from uniform."""
    return drawn(dataclasses.replace(CONFIG, attention_bias=bias), dtype, seed)


def drawn(config: DecoderConfig, dtype: str = "float32", seed: int = 0) -> Decoder:
    """Returns a random model of a config."""
    # Filled by numpy: as many jax.random calls would each be compiled.
    model = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), dtype=dtype))
    rng = np.random.default_rng(seed)
    size = {"embed_tokens": 0.3, "kernel": 0.12, "bias": 0.3, "weight": 0.1}

    def draw(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = str(path[0] if path[0] in size else path[-1])
        x = size[name] * rng.standard_normal(variable.get_value().shape)
        x += name == "weight"
        return variable.replace(jnp.asarray(x, jnp.float32).astype(dtype))

    graphdef, state = nnx.split(model)
    flat = [(path, draw(path, v)) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


class One(nnx.Module):
    """A single linear, as a stranger's model would have it."""

    def __init__(self, linear: nnx.Module):
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


@functools.cache
def quantized(dtype: str = "float32", seed: int = 0, bias: bool = False) -> Decoder:
    """Returns `decoder` with 4-bit linears (the head stays dense)."""
    return quantize(decoder(dtype, seed, bias))


def adapted(
    model: nnx.Module, *, zero: bool = False, seed: int = 5, **config: Any
) -> Any:
    """Returns a model with an adapter whose lora_b is random, unless `zero`."""
    config = {"rank": 4, "alpha": 8.0} | config
    model = attach(model, LoRAConfig(**config), key=jax.random.key(seed))
    if zero:
        return model
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, randomized(lora, seed), base)


def moved(model: nnx.Module, **config: Any) -> Any:
    """Returns a model with an adapter of a kind, every value of which is moved."""
    config = {"rank": 4, "alpha": 6.0} | config
    graphdef, lora, base = nnx.split(
        attach(model, LoRAConfig(**config), key=jax.random.key(1)), nnx.LoRAParam, ...
    )
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), lora
    )
    return nnx.merge(graphdef, lora, base)


def randomized(lora: nnx.State, seed: int = 5) -> nnx.State:
    """Returns an adapter with lora_b drawn, so that it changes what the model says."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path[-1] != "lora_b":
            return variable
        x = 0.05 * rng.standard_normal(variable.get_value().shape)
        return variable.replace(jnp.asarray(x, jnp.float32))

    flat = [(path, draw(path, v)) for path, v in nnx.to_flat_state(lora)]
    return nnx.from_flat_state(flat)


def tokens(batch: int = 2, seq: int = 7, seed: int = 3) -> jax.Array:
    """Returns random token ids."""
    return jax.random.randint(jax.random.key(seed), (batch, seq), 0, 256, jnp.int32)


@functools.cache
def sums(count: int = 12, low: int = 0) -> tuple[dict[str, str], ...]:
    """Returns rows of a task that an adapter can learn: the next letter, doubled."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return tuple(
        {
            "input": f"after {letters[(low + i) % 26]}:",
            "output": f" {2 * letters[(low + i + 1) % 26]}",
        }
        for i in range(count)
    )


def rows(lengths: Sequence[int], seed: int = 0) -> Dataset:
    """Returns random rows of the given lengths; their first third is prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        prompt = max(1, length // 3)
        weights = np.zeros(length, np.float32)
        weights[prompt:] = 1
        ids = rng.integers(0, 256, length).astype(np.int32)
        made.append(Row(ids, weights, prompt, ""))
    return Dataset(made, max(lengths))


def batch(lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns one batch of random rows, in the order of their lengths."""
    return rows(lengths).pad(rows(lengths).rows, len(lengths))


def write_jsonl(path: Path, values: Sequence[Any]) -> Path:
    """Writes one JSON value a line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_folder(out: Path, model: Decoder | None = None) -> Path:
    """Writes a Hugging Face folder with the tokenizer."""
    from tokenizers import processors

    save_model(decoder() if model is None else model, out)
    made = byte_tokenizer()  # which puts BOS before a text, as Llama's
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    made.save(str(out / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def write_adapters(root: Path) -> Path:
    """Writes base/, and two adapters of it as a/ and b/, as PEFT has them a-peft/, b-peft/."""
    write_folder(root / "base")
    for name, seed, rank in (("a", 1, 4), ("b", 2, 2)):
        model = adapted(decoder(), seed=seed, rank=rank)
        adapter = Adapter.of(model)
        save_adapter(root / name, adapter.lora, adapter.config)
        export_peft(root / f"{name}-peft", model)
    return root


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens)


def logits(model: nnx.Module, tokens: jax.Array) -> np.ndarray:
    """Returns a model's logits, compiled once for models of the same structure."""
    graphdef, state = nnx.split(model)
    return np.asarray(_logits(graphdef, state, tokens))


@functools.partial(jax.jit, static_argnums=0)
def adapter_step(
    graphdef: nnx.GraphDef, lora: nnx.State, rest: nnx.State, tokens: jax.Array
) -> tuple[jax.Array, nnx.State]:
    """Returns the mean loss of all tokens, and the gradients of the adapter."""
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}

    def loss(lora):
        model = join(graphdef, lora, rest)
        return SFT(model, batch)[0] / (tokens.size - len(tokens))

    return jax.value_and_grad(loss)(lora)


def arrays(tree: Any) -> list[np.ndarray]:
    """Returns every leaf as a numpy array."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def frozen(model: nnx.Module) -> list[np.ndarray]:
    """Returns the values of every frozen variable."""
    return arrays(nnx.state(model, FrozenParam))


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
