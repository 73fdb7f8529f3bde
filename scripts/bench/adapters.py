"""Combining, compressing and merging adapters: time and memory, beside PEFT's.

    python -m scripts.bench.adapters [--torch-python SIDE_VENV/bin/python] [--append FILE]

Two adapters of rank 16 on the linears of one Llama-3 8B layer (all seven), float32 factors,
dense bf16 base. Each operation runs in a process of its own: the median of three calls after
a first one (which compiles; where that takes over a minute, that one), and by how much the
peak RSS of the calls is above what the process held before them (Linux). `compress` has no
counterpart in PEFT: an update of 4096 x 4096, rank 32 to 16, beside numpy's dense SVD, and
how far the two results are apart.
scripts/interop_venv makes the side venv with PEFT.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from scripts.bench import harness

SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
"""Linear -> (in, out)."""
RANK, WEIGHTS = 16, [0.7, 0.4]
OPERATIONS = {
    "exact sum (concat, cat)": "concat",
    "best rank 16 of the sum (svd)": "svd",
    "linear": "linear",
    "ties, density 0.5": "ties",
    "ties_svd, density 0.5": "ties_svd",
    "merge into bf16": "merge",
    "compress, rank 32 to 16": "compress",
}


def ours(operation: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns a call of qlora_jax, and what to do after it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from qlora_jax.adapters import LoRAConfig, attach, merge
    from qlora_jax.adapters.combine import combine
    from qlora_jax.adapters.value import Adapter
    from qlora_jax.nn import Linear

    rng = np.random.default_rng(0)

    class Layer(nnx.Module):
        def __init__(self):
            for name, (k, n) in SHAPES.items():
                kernel = 0.02 * rng.standard_normal((n, k), np.float32)
                setattr(self, name, Linear(jnp.asarray(kernel, jnp.bfloat16)))

    layer = Layer()
    models = []
    for seed in range(2):
        model = attach(layer, LoRAConfig(rank=RANK), key=jax.random.key(seed))
        for name, (_, n) in SHAPES.items():
            b = 0.01 * rng.standard_normal((RANK, n), np.float32)
            getattr(model, name).lora_b.set_value(jnp.asarray(b))
        models.append(model)
    if operation == "merge":
        return (
            lambda: jax.block_until_ready(
                nnx.state(merge(models[0], dtype="bfloat16"))
            ),
            lambda: None,
        )
    adapters = [Adapter.of(model) for model in models]
    density = 0.5 if operation.startswith("ties") else 1.0
    rank = RANK if operation.endswith("svd") else None
    return (
        lambda: jax.block_until_ready(
            combine(adapters, WEIGHTS, operation, rank=rank, density=density).lora
        ),
        lambda: None,
    )


def compressed(whose: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns a call that finds the best rank 16 of an update of rank 32, (4096, 4096)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from qlora_jax.adapters import LoRAConfig, attach
    from qlora_jax.adapters.algebra import compress
    from qlora_jax.adapters.value import Adapter
    from qlora_jax.nn import Linear

    class One(nnx.Module):
        def __init__(self):
            self.linear = Linear(jnp.zeros((4096, 4096), jnp.bfloat16))

    rng = np.random.default_rng(0)
    config = LoRAConfig(rank=2 * RANK, alpha=2 * RANK)
    model = attach(One(), config, key=jax.random.key(0))
    b = 0.01 * rng.standard_normal((2 * RANK, 4096), np.float32)
    model.linear.lora_b.set_value(jnp.asarray(b))
    adapter = Adapter.of(model)

    def ours() -> Any:
        return jax.block_until_ready(compress(adapter, RANK).lora)

    if whose == "ours":
        return ours, lambda: None
    a = np.asarray(model.linear.lora_a[...])
    best: list[Any] = []

    def dense() -> None:
        u, values, vh = np.linalg.svd(a @ b, full_matrices=False)
        best[:] = [(u[:, :RANK] * values[:RANK]) @ vh[:RANK]]

    def compare() -> dict[str, float]:
        made = nnx.to_pure_dict(ours())["linear"]
        mine = np.asarray(made["lora_a"]) @ np.asarray(made["lora_b"])
        error = np.linalg.norm(mine - best[0]) / np.linalg.norm(best[0])
        return {"apart": float(f"{error:.2g}")}

    return dense, compare


def peft(operation: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the same of PEFT, which changes the model: so it is changed back after."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, (k, n) in SHAPES.items():
                linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
                setattr(self, name, linear)

    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=list(SHAPES), init_lora_weights=False
    )
    model = get_peft_model(Layer(), config, adapter_name="a")
    model.add_adapter("b", config)
    if operation == "merge":
        return (
            lambda: model.base_model.merge_adapter(["a"]),
            model.base_model.unmerge_adapter,
        )
    kind = {"concat": "cat"}.get(operation, operation)
    more = {"density": 0.5} if operation.startswith("ties") else {}
    more |= {"svd_rank": RANK} if operation.endswith("svd") else {}

    return (
        lambda: model.add_weighted_adapter(
            ["a", "b"], WEIGHTS, "ab", combination_type=kind, **more
        ),
        lambda: model.delete_adapter("ab"),
    )


def worker(whose: str, operation: str) -> None:
    """Measures one operation in this process; prints a JSON line."""
    if operation == "compress":
        call, after = compressed(whose)
    else:
        call, after = (ours if whose == "ours" else peft)(operation)
    harness.forget_peak()
    before, more = harness.held_bytes("VmRSS"), None
    seconds: list[float] = []
    while len(seconds) < 4 and not (seconds and seconds[0] > 60):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
        more = after()
    figures = {
        "seconds": round(statistics.median(seconds[1:] or seconds), 4),
        "first_s": round(seconds[0], 3),
        "peak_mib": round((harness.held_bytes("VmHWM") - before) / 2**20),
        **(more if isinstance(more, dict) else {}),
    }
    print(json.dumps(figures))


def measure(python: str, whose: str, operation: str) -> dict[str, float]:
    """Runs a worker."""
    command = harness.worker("adapters", whose, operation, python=python)
    return harness.told(command, JAX_PLATFORMS="cpu")


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--torch-python", help="of a venv with torch and PEFT")
    kinds = list(OPERATIONS.values())
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    for said, operation in OPERATIONS.items():
        if operation not in args.only:
            continue
        found[said] = {"ours": measure(sys.executable, "ours", operation)}
        if operation == "compress":
            found[said]["numpy"] = measure(sys.executable, "numpy", operation)
        elif args.torch_python:
            found[said]["peft"] = measure(args.torch_python, "peft", operation)
        row = "  ".join(
            f"{whose} {x['seconds']:8.3f} s +{x['peak_mib']:5.0f} MiB"
            for whose, x in found[said].items()
        )
        print(f"{said:<32}{row}", flush=True)
    harness.record("adapters", args.append, operations=found)


if __name__ == "__main__":
    main()
