"""A training step of qlora_jax, for bench/train_step.py.

The library as its users have it: Decoder, quantize (NF4, double quantization), attach,
split and make_train_step with optax.adamw; float32 adapters, and the same code with a
dense base when not `quantized`.

Besides training it measures, by the task's mode:
  memory: XLA's account of the compiled loss and gradient.
  compile: seconds to trace and to compile the train step.

Options: `implementation`, of nf4_matmul in every linear (default: the library chooses).

Run by the parent, with a Python that has jax, flax and optax.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as qlora
from qlora_jax.models import Decoder, DecoderConfig, llama
from qlora_jax.nn import QuantizedLinear
from qlora_jax.objectives import SFT
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


def stacked_weights(task: Task) -> dict[str, np.ndarray]:
    """Returns the task's weights by our paths, layers stacked, in the task's dtype."""
    paths = {name: path for path, name in llama.NAMES.items()}
    stacks: dict[str, np.ndarray] = {}
    for name, matrix in task.weights():
        path = paths[re.sub(r"\.layers\.\d+\.", ".layers.{}.", name)]
        if layer := re.search(r"\.layers\.(\d+)\.", name):
            shape = (task.num_layers, *matrix.shape)
            stack = stacks.setdefault(path, np.empty(shape, jnp.dtype(task.dtype)))
            stack[int(layer[1])] = matrix
        else:
            stacks[path] = matrix.astype(jnp.dtype(task.dtype))
    return stacks


def dense_decoder(task: Task) -> Decoder:
    """Returns the task's Llama with its weights, in the task's dtype."""
    config = DecoderConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.hidden_size,
        intermediate_size=task.intermediate_size,
        num_layers=task.num_layers,
        num_heads=task.num_heads,
        num_kv_heads=task.num_kv_heads,
        head_dim=task.head_dim,
        rms_norm_eps=task.rms_norm_eps,
        rope_theta=task.rope_theta,
    )
    model = Decoder(config, key=jax.random.key(task.seed), dtype=task.dtype)
    for path, stack in stacked_weights(task).items():
        variable = model
        for part in path.split("."):
            variable = getattr(variable, part)
        variable.set_value(jnp.asarray(stack))
    return model


def build(task: Task) -> Contestant:
    """Builds the model, its adapter and its train step."""
    model = dense_decoder(task)
    if task.quantized:
        model = qlora.quantize(model, qlora.QuantConfig(double_quant=True))
    if implementation := task.options.get("implementation"):
        for _, node in model.iter_modules():
            if isinstance(node, QuantizedLinear):
                node.implementation = implementation
    config = qlora.LoRAConfig(rank=task.rank, alpha=task.alpha, targets="all-linear")
    model = qlora.attach(model, config, key=jax.random.key(task.seed + 1))
    graphdef, lora, base = qlora.split(model)
    del model
    factors = jax.tree.leaves(lora)
    if len(factors) != 2 * len(LINEARS):
        raise RuntimeError(f"expected {2 * len(LINEARS)} stacks, got {lora}")
    tx = optax.adamw(task.learning_rate, weight_decay=0.0)
    tokens = task.tokens()
    batch = {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}
    train_step = qlora.make_train_step(graphdef, tx, checkpoint=task.checkpoint)
    state = {"lora": lora, "opt_state": tx.init(lora)}
    facts = {
        "adapter_dtype": str(factors[0].dtype),
        "adapter_parameters": sum(factor.size for factor in factors),
        "base_mib": sum(leaf.nbytes for leaf in jax.tree.leaves(base)) / MIB,
        "versions": versions("jax", "jaxlib", "flax", "optax", "qlora_jax"),
    }
    del lora, factors

    def memory() -> dict:
        def loss_of(lora, base, batch):
            model = qlora.join(graphdef, lora, base)
            return SFT(model, batch, None, task.checkpoint)[0]

        gradient = jax.jit(jax.value_and_grad(loss_of))
        on_device = jax.tree.map(jnp.asarray, batch)
        return xla_memory(gradient.lower(state["lora"], base, on_device).compile())

    def compile_time() -> dict:
        arguments = state["lora"], base, state["opt_state"], batch
        return compile_seconds(train_step, *arguments)

    def step() -> float:
        state["lora"], state["opt_state"], metrics = jax.block_until_ready(
            train_step(state["lora"], base, state["opt_state"], batch)
        )
        return float(metrics["loss"])

    return Contestant(step, facts, {"memory": memory, "compile": compile_time})


if __name__ == "__main__":
    run(build)
