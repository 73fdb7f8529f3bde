"""What bench/revisions.py times of one revision of qlora_jax, through its public names alone.

Run as a file with that revision's tree on PYTHONPATH, so it imports nothing of scripts. Each
line of the standard input names what to do once; the answer is the seconds of this process's
processors that it took, on which other programs of the machine have less influence. The first
line that it prints has the names, and what XLA counts of the compiled steps.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

import qlora_jax as qlora
from pallas_kernels.packed_matmul import nf4_matmul

HIDDEN, WIDE, VOCAB, HEADS = 1024, 2816, 4096, 16


def write(folder: Path, layers: int) -> Path:
    """Writes a random Llama as a folder, in float32."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int) -> None:
        tensors[name] = 0.02 * rng.standard_normal(shape, np.float32)

    draw("model.embed_tokens.weight", VOCAB, HIDDEN)
    draw("lm_head.weight", VOCAB, HIDDEN)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for i in range(layers):
        own = f"model.layers.{i}"
        for name in "qkvo":
            draw(f"{own}.self_attn.{name}_proj.weight", HIDDEN, HIDDEN)
        draw(f"{own}.mlp.gate_proj.weight", WIDE, HIDDEN)
        draw(f"{own}.mlp.up_proj.weight", WIDE, HIDDEN)
        draw(f"{own}.mlp.down_proj.weight", HIDDEN, WIDE)
        for name in ("input", "post_attention"):
            tensors[f"{own}.{name}_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def training(folder: Path, quant: Any) -> tuple[Callable[[], Any], dict[str, int]]:
    """Returns a call that takes one training step of a folder's model, the first of which
    compiles; and what XLA counts: operations, bytes that they read and write, memory."""
    model, _ = qlora.load(folder, quant, "float32")
    config = qlora.LoRAConfig(rank=16, alpha=32)
    graphdef, lora, base = qlora.split(
        qlora.attach(model, config, key=jax.random.key(0))
    )
    tx = optax.adamw(1e-4)
    step = qlora.make_train_step(graphdef, tx)
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, VOCAB)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    held = [lora, tx.init(lora)]
    compiled = step.lower(lora, base, held[1], batch).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counted = {
        "flops": int(cost["flops"]),
        "bytes_accessed": int(cost["bytes accessed"]),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
    }

    def once() -> None:
        held[0], held[1], _ = step(held[0], base, held[1], batch)
        jax.block_until_ready(held)

    return once, counted


def product() -> Callable[[], Any]:
    """Returns a call of nf4_matmul, forward and backward, as wide as in a layer of 1B."""
    w = qlora.quantize_tensor(jax.random.normal(jax.random.key(0), (2048, 2048)))
    x = jax.random.normal(jax.random.key(1), (256, 2048))

    @jax.jit
    def both(x: Any, w: Any) -> Any:
        y, back = jax.vjp(lambda x: nf4_matmul(x, w), x)
        return y, back(y)

    return lambda: jax.block_until_ready(both(x, w))


def main() -> None:
    """Answers until the standard input ends; the argument is a folder to work in."""
    root = Path(sys.argv[1])
    small, deep = write(root / "4", 4), write(root / "32", 32)
    quant = qlora.QuantConfig()

    def compiles(folder: Path) -> Callable[[], Any]:
        once, _ = training(folder, quant)

        def again() -> None:
            jax.clear_caches()
            once()

        return again

    nf4, of_nf4 = training(small, quant)
    dense, of_dense = training(small, None)
    calls: dict[str, Callable[[], Any]] = {
        "product": product(),
        "step of NF4": nf4,
        "step of a dense base": dense,
        "load": lambda: jax.block_until_ready(
            jax.tree.leaves(nnx.state(qlora.load(small, quant, "float32")[0]))
        ),
        "compile 4 layers": compiles(small),
        "compile 32 layers": compiles(deep),
    }
    for call in calls.values():
        call()
    programs = {"step of NF4": of_nf4, "step of a dense base": of_dense}
    print(json.dumps([list(calls), programs]), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        calls[line.strip()]()
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
