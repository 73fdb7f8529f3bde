"""A training step of qwix LoRA and QLoRA on a flax.nnx Llama, for bench/train_step.py.

qwix brings no models: this one is written as its users write theirs (nnx.Linear,
nnx.Embed, nnx.RMSNorm, a Python loop over the layers) and handed to
qwix.apply_lora_to_model, with weight_qtype='nf4' and tile_size=64 when `quantized`
(its documentation's QLoRA, with the tile size of the QLoRA paper: its default is one
scale a column; it has no double quantization).

The step is one jax.jit of loss, gradient of the adapters and optax.adamw, with the
adapters and the optimizer state donated. qwix keeps the adapters in the dtype of the
base.

Run by the parent, with the Python that has qwix.
"""

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx

from scripts.bench.peers.protocol import (
    LINEARS,
    MIB,
    Contestant,
    Task,
    compile_seconds,
    run,
    versions,
    xla_memory,
)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Applies rotary position embedding in Llama's half-split form.

    Args:
      x: Queries or keys, (batch, seq, heads, head_dim).
      theta: Base of the frequencies.

    Returns:
      The same shape and dtype.
    """
    seq, head_dim = x.shape[1], x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(seq, dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, task: Task, linear, rngs: nnx.Rngs):
        self.head_dim, self.theta = task.head_dim, task.rope_theta
        kv_size = task.num_kv_heads * task.head_dim
        self.q_proj = linear(task.hidden_size, task.hidden_size, rngs=rngs)
        self.k_proj = linear(task.hidden_size, kv_size, rngs=rngs)
        self.v_proj = linear(task.hidden_size, kv_size, rngs=rngs)
        self.o_proj = linear(task.hidden_size, task.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), self.theta)
        k = rotate(self.k_proj(x).reshape(heads), self.theta)
        v = self.v_proj(x).reshape(heads)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.reshape(x.shape))


class Mlp(nnx.Module):
    """Gated feed-forward layer."""

    def __init__(self, task: Task, linear, rngs: nnx.Rngs):
        self.gate_proj = linear(task.hidden_size, task.intermediate_size, rngs=rngs)
        self.up_proj = linear(task.hidden_size, task.intermediate_size, rngs=rngs)
        self.down_proj = linear(task.intermediate_size, task.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each with its norm and residual."""

    def __init__(self, task: Task, linear, norm, rngs: nnx.Rngs):
        self.input_norm, self.post_norm = norm(rngs=rngs), norm(rngs=rngs)
        self.self_attn = Attention(task, linear, rngs)
        self.mlp = Mlp(task, linear, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


def checkpointed(layer: Layer, x: jax.Array) -> jax.Array:
    """Runs a layer that is computed again in the backward pass."""
    graphdef, state = nnx.split(layer)
    return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


class Llama(nnx.Module):
    """Int (batch, seq) tokens to (batch, seq, vocab) logits."""

    def __init__(self, task: Task, rngs: nnx.Rngs):
        dtype = jnp.dtype(task.dtype)

        def linear(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(
                in_features,
                out_features,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                kernel_init=nnx.initializers.zeros,
                rngs=rngs,
            )

        def norm(rngs: nnx.Rngs) -> nnx.RMSNorm:
            return nnx.RMSNorm(
                task.hidden_size,
                epsilon=task.rms_norm_eps,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )

        self.embed_tokens = nnx.Embed(
            task.vocab_size,
            task.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [Layer(task, linear, norm, rngs) for _ in range(task.num_layers)]
        )
        self.norm = norm(rngs)
        self.lm_head = linear(task.hidden_size, task.vocab_size, rngs)

    def __call__(self, tokens: jax.Array, checkpoint: bool = False) -> jax.Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = checkpointed(layer, x) if checkpoint else layer(x)
        return self.lm_head(self.norm(x))


def dense_llama(task: Task) -> Llama:
    """Returns the task's Llama with its weights, in the task's dtype."""
    model = Llama(task, nnx.Rngs(task.seed))
    dtype = jnp.dtype(task.dtype)
    for name, matrix in task.weights():
        module = model
        for part in name.removeprefix("model.").removesuffix(".weight").split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        if isinstance(module, nnx.Embed):
            module.embedding.set_value(jnp.asarray(matrix, dtype))
        else:
            module.kernel.set_value(jnp.asarray(matrix.T, dtype))
    return model


def array_bytes(tree) -> int:
    """Returns the bytes of a pytree, at half a byte for a 4-bit element."""
    bits = 0
    for leaf in jax.tree.leaves(tree):
        four = leaf.dtype in (jnp.uint4, jnp.int4)
        bits += leaf.size * (4 if four else 8 * leaf.dtype.itemsize)
    return bits // 8


def build(task: Task) -> Contestant:
    """Builds the model, its adapter and its jitted step."""
    quantization = {"weight_qtype": "nf4", "tile_size": 64} if task.quantized else {}
    provider = qwix.LoraProvider(
        module_path=rf".*({'|'.join(LINEARS)})",
        rank=task.rank,
        alpha=task.alpha,
        **quantization,
    )
    tokens = jnp.asarray(task.tokens())
    model = qwix.apply_lora_to_model(
        dense_llama(task), provider, tokens[:1, :8], rngs=nnx.Rngs(task.seed)
    )
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    del model
    expected = 2 * len(LINEARS) * task.num_layers
    if len(jax.tree.leaves(lora)) != expected:
        raise RuntimeError(f"expected {expected} LoRA factors, got {lora}")
    tx = optax.adamw(task.learning_rate, weight_decay=0.0)
    opt_state = tx.init(lora)
    checkpoint = task.checkpoint == "layer"

    def loss_of(lora, base, tokens):
        model = nnx.merge(graphdef, lora, base)
        logits = model(tokens, checkpoint)[:, :-1].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def train(lora, base, opt_state, tokens):
        loss, gradient = jax.value_and_grad(loss_of)(lora, base, tokens)
        updates, opt_state = tx.update(gradient, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    train_step = jax.jit(train, donate_argnums=(0, 2))
    state = {"lora": lora, "opt_state": opt_state}
    facts = {
        "adapter_dtype": str(jax.tree.leaves(lora)[0].dtype),
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(lora)),
        "base_mib": array_bytes(base) / MIB,
        "versions": versions("jax", "jaxlib", "flax", "optax", "qwix"),
    }
    del lora, opt_state

    def memory() -> dict:
        gradient = jax.jit(jax.value_and_grad(loss_of))
        return xla_memory(gradient.lower(state["lora"], base, tokens).compile())

    def compile_time() -> dict:
        arguments = state["lora"], base, state["opt_state"], tokens
        return compile_seconds(train_step, *arguments)

    def step() -> float:
        state["lora"], state["opt_state"], loss = jax.block_until_ready(
            train_step(state["lora"], base, state["opt_state"], tokens)
        )
        return float(loss)

    return Contestant(step, facts, {"memory": memory, "compile": compile_time})


if __name__ == "__main__":
    run(build)
