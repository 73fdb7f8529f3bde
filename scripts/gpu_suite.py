"""All GPU checks and benchmarks, in one command on a host with an NVIDIA GPU.

    python scripts/gpu_suite.py --out suite.jsonl               # everything, some minutes
    python scripts/gpu_suite.py --out suite.jsonl --only sweep --large

Sections: ceilings (copy bandwidth, bf16 product), numerics (every implementation, and
attention, against float64, fresh random inputs, NaN-poisoned outputs' memory), sweep
(tokens over the linears of Llama-3 8B, and 70B with --large: the library's choice, cuBLAS
on dense bf16 weights, two_pass, bitsandbytes where it is installed), lora (an adapted
linear with its gradients), step (a training step of an 8B-shaped model; PEFT +
bitsandbytes where installed), memory (gpu_memory.py: paged and streamed steps, and a
70B-shaped one with the allocator capped at 48 and, streamed, at 12 GB).

Times are device time (CUPTI, the sum of a call's kernels): medians over calls that rotate
among weights larger together than the L2. Workers compile in parallel and run one at a
time. Rows are appended to --out as they come; what is there is not run again. Needs jax
>= 0.11.2 with CUDA, flax and optax for `step`; the package need not be installed.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_memory  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
QUICK = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
SMALL = ("llama3_8b_gate_up", "llama3_8b_down", "llama3_8b_q_o", "llama3_8b_k_v")
LARGE = ("llama3_70b_q_o", "llama3_70b_gate_up", "llama3_70b_down")
NUMERICS = [(1, 512, 1024), (7, 768, 2560), (33, 512, 1024), (300, 1152, 1536)]
RANK = 16
TASK_SECONDS = 30  # a hung kernel ends its worker, not the suite


def tasks(sections: list[str], large: bool, quick: bool) -> list[dict]:
    """Returns what is to be measured, most wanted first."""
    from pallas_kernels.shapes import SHAPES

    found = []
    directions = ("forward", "backward")
    if "ceilings" in sections:
        found += [{"section": "ceilings", "what": w} for w in ("copy", "product")]
    if "numerics" in sections:
        found += [
            {"section": "numerics", "what": name, "direction": d, "m": m, "n": n, "k": k,
             "exact": exact, "dtype": dtype}
            for m, n, k in NUMERICS
            for name in ("hopper", "decode", "two_pass", "xla", "lora")
            for d in directions
            for exact in ((False, True) if name == "hopper" else (False,))
            for dtype in (("bfloat16", "float16") if m == 33 else ("bfloat16",))
            if not (name == "decode" and (d == "backward" or m > 32))
        ]  # fmt: skip
        found += [  # tokens, heads, head_dim
            {"section": "numerics", "what": "attention", "direction": d, "m": 1000,
             "n": 8, "k": 128, "exact": False, "dtype": "bfloat16"}
            for d in directions
        ]  # fmt: skip
    shapes = [SHAPES[name] for name in SMALL + (LARGE if large else ())]
    if "sweep" in sections:
        found += [
            {
                "section": "sweep",
                "what": what,
                "direction": d,
                "m": m,
                "n": s.n,
                "k": s.k,
            }
            for s in shapes
            for m in (QUICK if quick else TOKENS)
            for d in directions
            for what in ("ours", "dense", "two_pass", "bitsandbytes")
            if not (quick and d == "backward" and m < 64)
        ]
    if "lora" in sections:
        found += [
            {"section": "lora", "what": what, "m": m, "n": s.n, "k": s.k}
            for s in shapes[:3]
            for m in (512, 2048, 4096)
            for what in ("ours", "two_pass and separate")
        ]
    if "step" in sections:
        found += [
            {"section": "step", "what": what, "batch": batch, "seq": 2048}
            for batch in (1, 4)
            for what in ("ours", "peft", "ours, attention by xla")
        ]
    if "memory" in sections:
        found += gpu_memory.tasks()
    return found


@contextlib.contextmanager
def turn(out: str):
    """Waits until no other worker runs anything on the GPU."""
    with open(out + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def emit(out: str, task: dict, **figures) -> None:
    with open(out, "a") as stream:
        stream.write(json.dumps(task | figures) + "\n")


# --- jax workers -------------------------------------------------------------------------


class Bench:
    """Builds and measures the jax tasks of one worker process."""

    def __init__(self, seed: int):
        import jax

        self.jax = jax
        self.seed = seed * 100_000 + int(time.time()) % 100_000

    def random(self, spec):
        """Random data of a spec: never zeros, which run faster than real data."""
        jax, jnp = self.jax, self.jax.numpy
        self.seed += 1
        key = jax.random.key(self.seed)
        if spec.dtype in (jnp.uint16, jnp.uint8):
            return jax.random.bits(key, spec.shape, spec.dtype)
        if spec.dtype == jnp.float32 and len(spec.shape) < 2:  # absmax and its parts
            return jax.random.uniform(key, spec.shape, jnp.float32, 0.02, 0.1)
        return jax.random.normal(key, spec.shape, jnp.float32).astype(spec.dtype)

    def weight(self, n: int, k: int):
        """The spec of a double-quantized NF4 weight."""
        import jax.numpy as jnp

        from pallas_kernels import layout
        from pallas_kernels.layout import QuantizedTensor

        shapes = layout.array_shapes((n, k), 64, "planar256", True)
        arrays = {
            name: self.jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in shapes.items()
        }
        return QuantizedTensor(shape=(n, k), layout="planar256", **arrays)

    def build(self, task: dict):
        """Compiles a task; returns the executable, the fixed specs and the rotated ones."""
        if task["what"] == "attention":
            return self.build_attention(task)
        jax, jnp = self.jax, self.jax.numpy
        from pallas_kernels.matmul import nf4_lora_matmul, nf4_matmul

        spec = jax.ShapeDtypeStruct
        if task["section"] == "ceilings":
            if task["what"] == "copy":
                f, args = (
                    lambda x: x + jnp.bfloat16(1),
                    [spec((1 << 31,), jnp.bfloat16)],
                )
            else:
                f = lambda a, b: jnp.dot(a, b)  # noqa: E731
                args = [spec((8192, 8192), jnp.bfloat16)] * 2
            return jax.jit(f).lower(*args).compile(), args, []
        m, n, k = task["m"], task["n"], task["k"]
        dtype = jnp.dtype(task.get("dtype", "bfloat16"))
        w, what = self.weight(n, k), task["what"]
        factors = [spec((k, RANK), jnp.float32), spec((RANK, n), jnp.float32)]
        x, dy = spec((m, k), dtype), spec((m, n), dtype)
        if task["section"] == "lora" or what == "lora":
            name = None if what in ("ours", "lora") else "two_pass"
            product = lambda x, w, a, b: nf4_lora_matmul(x, w, a, b, 2.0, name)  # noqa: E731
            if task["section"] == "lora":

                def f(x, dy, a, b, w):
                    y, pull = jax.vjp(lambda x, a, b: product(x, w, a, b), x, a, b)
                    return y, *pull(dy)

                return (
                    jax.jit(f).lower(x, dy, *factors, w).compile(),
                    [
                        x,
                        dy,
                        *factors,
                    ],
                    [w],
                )
        elif what == "dense":
            w = spec((n, k), jnp.bfloat16)
            product = lambda x, w: jnp.dot(  # noqa: E731
                x, w.T, preferred_element_type=jnp.float32
            ).astype(x.dtype)
        else:
            name = None if what == "ours" else what
            exact = task.get("exact", False)
            product = lambda x, w: nf4_matmul(x, w, name, exact=exact)  # noqa: E731
        extra = factors if what == "lora" else []
        if task["direction"] == "forward":
            f = lambda x, *rest: product(x, rest[-1], *rest[:-1])  # noqa: E731
        else:
            # The product is linear in x, so its transpose needs no forward pass.
            def f(dy, *rest):
                zero = jnp.zeros(x.shape, x.dtype)
                pull = jax.vjp(lambda x: product(x, rest[-1], *rest[:-1]), zero)[1]
                return pull(dy)[0]

        if what == "dense" and task["direction"] == "backward":
            f = lambda dy, w: jnp.dot(  # noqa: E731
                dy, w, preferred_element_type=jnp.float32
            ).astype(dy.dtype)
        first = x if task["direction"] == "forward" else dy
        return jax.jit(f).lower(first, *extra, w).compile(), [first, *extra], [w]

    def build_attention(self, task: dict):
        """Compiles causal attention with grouped keys, or all of its gradients."""
        from qlora_jax.nn.attention import causal_attention

        jax = self.jax

        def f(q, k, v, dy):
            y, vjp = jax.vjp(causal_attention, q, k, v)
            return (y,) if task["direction"] == "forward" else vjp(dy)

        seq, heads, dim = task["m"], task["n"], task["k"]
        q = jax.ShapeDtypeStruct((1, seq, heads, dim), task["dtype"])
        k = jax.ShapeDtypeStruct((1, seq, heads // 4, dim), task["dtype"])
        return jax.jit(f).lower(q, k, k, q).compile(), [q, k, k, q], []

    def attention_error(self, task: dict, run, fixed) -> dict:
        """Compares attention with numpy float64; the largest of all outputs' errors."""
        import numpy as np

        args = [self.random(s) for s in fixed]
        got = run(*args)
        q, k, v, dy = (np.asarray(a, np.float64)[0].swapaxes(0, 1) for a in args)
        group = q.shape[0] // k.shape[0]
        k, v = (np.repeat(x, group, axis=0) for x in (k, v))
        scores = q @ k.swapaxes(1, 2) * q.shape[2] ** -0.5
        seen = np.tri(q.shape[1], dtype=bool)
        p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        p /= p.sum(-1, keepdims=True)
        dp = dy @ v.swapaxes(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * q.shape[2] ** -0.5

        def summed(x):
            return x.reshape(-1, group, *x.shape[1:]).sum(1)

        want = [p @ v]
        if task["direction"] == "backward":
            want = [
                ds @ k,
                summed(ds.swapaxes(1, 2) @ q),
                summed(p.swapaxes(1, 2) @ dy),
            ]
        errors = [
            np.linalg.norm(np.asarray(g, np.float64)[0].swapaxes(0, 1) - w)
            / np.linalg.norm(w)
            for g, w in zip(got, want, strict=True)
        ]
        return {"error": float(max(errors))}

    def error(self, task: dict, run, fixed, rotated) -> dict:
        """Compares one product with numpy float64 on fresh random data."""
        import numpy as np

        from pallas_kernels import reference

        if task["what"] == "attention":
            return self.attention_error(task, run, fixed)
        jnp = self.jax.numpy
        args = [self.random(s) for s in fixed]
        w = self.jax.tree.map(self.random, rotated[0])
        # What is freed here is what the output's memory may be: not the right answer.
        self.jax.block_until_ready(jnp.full((1 << 26,), jnp.nan)).delete()
        got = np.asarray(run(*args, w), np.float64)
        dense = np.asarray(reference.dequantize(w, "float32"), np.float64)
        dense = dense if task["direction"] == "backward" else dense.T
        x, *factors = (np.asarray(a, np.float64) for a in args)
        want = x @ dense
        if factors:
            a, b = factors
            a, b = (a, b) if task["direction"] == "forward" else (b.T, a.T)
            want = want + 2.0 * (x @ a) @ b
        return {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want))}

    def time(self, task: dict, run, fixed, rotated) -> dict:
        """Device microseconds of a call: median, and the 10th and 90th percentile."""
        # The CUPTI reader that jax's own mosaic_gpu.profiler.measure is made of; that one
        # repeats a call with the same arguments, which the L2 would serve.
        from jax._src.lib import mosaic_gpu

        jax = self.jax
        args = [self.random(s) for s in fixed]
        size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(rotated))
        count = max(3, min(24, -(-200_000_000 // size))) if rotated else 1
        sets = [[jax.tree.map(self.random, w) for w in rotated] for _ in range(count)]
        for one in sets:
            jax.block_until_ready(run(*args, *one))
        repeats = max(2, 24 // count)
        cupti = mosaic_gpu._mosaic_gpu_ext
        cupti._cupti_init()
        for _ in range(repeats):
            results = [run(*args, *one) for one in sets]
        jax.block_until_ready(results)
        kernels = cupti._cupti_get_timings(True)
        calls = repeats * count
        if len(kernels) % calls:
            raise RuntimeError(f"{len(kernels)} kernels in {calls} calls")
        each = len(kernels) // calls
        totals = sorted(
            1e3 * sum(ms for _, ms in kernels[i * each : (i + 1) * each])
            for i in range(calls)
        )
        return {
            "us": totals[calls // 2],
            "us_10": totals[calls // 10],
            "us_90": totals[-1 - calls // 10],
            "kernels": each,
        }


def jax_worker(mine: list[dict], out: str, seed: int) -> None:
    """Compiles all of its tasks, then runs them, one process at a time."""
    from pallas_kernels.matmul import choose

    bench = Bench(seed)
    built = []
    for task in mine:
        try:
            built.append((task, *bench.build(task)))
        except Exception as error:
            emit(out, task, failed=f"{type(error).__name__}: {str(error)[:300]}")
    for task, run, fixed, rotated in built:
        with turn(out):
            signal.alarm(TASK_SECONDS)
            try:
                if task["section"] == "numerics":
                    figures = bench.error(task, run, fixed, rotated)
                else:
                    figures = bench.time(task, run, fixed, rotated)
                if task["what"] == "ours" and "direction" in task:
                    weight = bench.weight(task["n"], task["k"])
                    choice = choose(
                        task["direction"], task["m"], weight, bench.jax.numpy.bfloat16
                    )
                    figures["choice"] = choice.implementation
                    figures["config"] = dict(choice.config)
                emit(out, task, **figures)
            except Exception as error:
                emit(out, task, failed=f"{type(error).__name__}: {str(error)[:300]}")
            signal.alarm(0)


def bitsandbytes_worker(mine: list[dict], out: str) -> None:
    """bitsandbytes' matmul_4bit, forward and (by its autograd function) backward."""
    try:
        import bitsandbytes as bnb
        import torch
        from bitsandbytes import functional
    except ImportError as error:
        for task in mine:
            emit(out, task, failed=str(error))
        return
    from torch.profiler import ProfilerActivity, profile

    weights: dict[tuple[int, int], list] = {}
    for task in mine:
        m, n, k = task["m"], task["n"], task["k"]
        with turn(out):
            try:
                if (n, k) not in weights:
                    weights.clear()
                    count = max(3, min(24, -(-200_000_000 // (n * k // 2))))
                    weights[n, k] = [
                        functional.quantize_4bit(
                            torch.randn(n, k, device="cuda", dtype=torch.bfloat16),
                            quant_type="nf4",
                            compress_statistics=True,
                        )
                        for _ in range(count)
                    ]
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
                backward = task["direction"] == "backward"

                def call(packed, state, x=x, dy=dy, backward=backward):
                    if not backward:
                        with torch.no_grad():
                            return bnb.matmul_4bit(x, packed.t(), quant_state=state)
                    dense = functional.dequantize_4bit(packed, state)
                    return dy @ dense  # what MatMul4Bit.backward does

                for packed, state in weights[n, k]:
                    call(packed, state)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    for _ in range(2):
                        for packed, state in weights[n, k]:
                            call(packed, state)
                    torch.cuda.synchronize()
                calls = 2 * len(weights[n, k])
                total = sum(e.self_device_time_total for e in seen.key_averages())
                emit(out, task, us=total / calls, version=bnb.__version__)
            except Exception as error:
                emit(out, task, failed=f"{type(error).__name__}: {str(error)[:300]}")


# --- The training step --------------------------------------------------------------------

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def our_step(task: dict, lock: contextlib.AbstractContextManager) -> dict:
    """Tokens a second and peak memory of qlora_jax, layers recomputed in backward.

    Compiles from shapes alone; the GPU is used inside `lock`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    import qlora_jax as qlora
    from pallas_kernels import layout
    from qlora_jax.models import Decoder, DecoderConfig
    from qlora_jax.nn import Linear, QuantizedLinear

    config = DecoderConfig(rms_norm_eps=1e-5, rope_theta=5e5, **LLAMA_8B)
    # Only shapes: a dense 8B model would not fit, and is never made.
    skeleton = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))

    def quantized(path, node):
        if isinstance(node, Linear) and "lm_head" not in path:
            stack, n, k = node.kernel.get_value().shape
            q = layout.abstract_tensor((n, k), (stack,), dtype="bfloat16")
            return QuantizedLinear(q)
        return node

    graphdef, state = nnx.split(nnx.recursive_map(quantized, skeleton))

    @functools.partial(jax.jit, static_argnums=0)
    def fill(spec, key):
        if spec.dtype == jnp.float32:  # absmax scale and offset
            return jnp.full(spec.shape, 1e-3, jnp.float32)
        bits = jax.random.bits(
            key, spec.shape, jnp.uint8 if spec.dtype == jnp.uint8 else jnp.uint16
        )
        if spec.dtype == jnp.bfloat16:  # sign and mantissa random, about 0.01
            bits = (bits & np.uint16(0x807F)) | np.uint16(0x3C00)
            return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
        return bits

    def filled():
        specs, structure = jax.tree.flatten(state)
        # The largest first: what making them takes is then less than the step's peak.
        order = sorted(range(len(specs)), key=lambda i: -specs[i].size)
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(specs))
        made = {
            i: jax.block_until_ready(fill(bench_spec(specs[i]), keys[i])) for i in order
        }
        return jax.tree.unflatten(structure, [made[i] for i in range(len(specs))])

    def bench_spec(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    lora_config = qlora.LoRAConfig(rank=RANK, alpha=32, targets="all-linear")

    def adapted(state):
        model = nnx.merge(graphdef, state)
        return qlora.attach(model, lora_config, key=jax.random.key(1))

    def split(state):
        return qlora.split(adapted(state))[1:]

    adapted_graph = qlora.split(nnx.eval_shape(lambda: adapted(state)))[0]
    tx = optax.adamw(2e-4)
    shape = (task["batch"], task["seq"])
    lora, base = jax.eval_shape(split, state)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    step = qlora.make_train_step(adapted_graph, tx, checkpoint="layer")
    start = time.perf_counter()
    opt_state = jax.eval_shape(tx.init, lora)
    compiled = step.lower(lora, base, opt_state, batch).compile()
    compile_s = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    with lock:
        lora, base = jax.jit(split, donate_argnums=0)(filled())
        opt_state = tx.init(lora)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "weights": jnp.ones(shape, jnp.float32),
        }
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            lora, opt_state, metrics = jax.block_until_ready(
                compiled(lora, base, opt_state, batch)
            )
            seconds.append(time.perf_counter() - start)
        memory = jax.devices()[0].memory_stats()
    second = sorted(seconds[2:])[1]
    return {
        "tokens_per_s": task["batch"] * task["seq"] / second,
        "step_s": second,
        "compile_s": compile_s,
        "loss": float(metrics["loss"]),
        "base_gib": sum(x.nbytes for x in jax.tree.leaves(base)) / 2**30,
        "peak_gib": memory["peak_bytes_in_use"] / 2**30,
        "arguments_gib": analysis.argument_size_in_bytes / 2**30,
        "temporaries_gib": analysis.temp_size_in_bytes / 2**30,
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def peft_step(task: dict) -> dict:
    """The same of PEFT + bitsandbytes + transformers, gradient checkpointing on."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LLAMA_8B["vocab_size"],
        hidden_size=LLAMA_8B["hidden_size"],
        intermediate_size=LLAMA_8B["intermediate_size"],
        num_hidden_layers=LLAMA_8B["num_layers"],
        num_attention_heads=LLAMA_8B["num_heads"],
        num_key_value_heads=LLAMA_8B["num_kv_heads"],
        head_dim=LLAMA_8B["head_dim"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in model.model.layers.modules():
        for name, linear in list(module.named_children()):
            if name not in LINEARS:
                continue
            new = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            shape = (linear.out_features, linear.in_features)
            dense = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02
            new.weight = bnb.nn.Params4bit(
                dense,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=new,
            ).to("cuda")
            setattr(module, name, new)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                real = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda")
                real = torch.ones_like(real) if real.ndim == 1 else real * 0.02
                setattr(module, name, torch.nn.Parameter(real, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config=config, device="cuda")
    model.model.rotary_emb = rotary
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=list(LINEARS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).cuda()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    shape = (task["batch"], task["seq"])
    tokens = torch.randint(0, LLAMA_8B["vocab_size"], shape, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    second = sorted(seconds[2:])[1]
    return {
        "tokens_per_s": task["batch"] * task["seq"] / second,
        "step_s": second,
        "loss": float(loss),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "versions": {"bitsandbytes": bnb.__version__, "torch": torch.__version__},
    }


def step_worker(task: dict, out: str) -> None:
    """Runs one training step task in this process."""
    try:
        if task["section"] == "memory":
            gpu_memory.cap(task["what"])
            emit(out, task, **gpu_memory.memory_step(task, turn(out)))
        elif task["what"].startswith("ours"):
            if task["what"] == "ours, attention by xla":
                os.environ["QLORA_JAX_ATTENTION"] = "xla"
            emit(out, task, **our_step(task, turn(out)))
        else:
            with turn(out):
                emit(out, task, **peft_step(task))
    except Exception as error:
        emit(out, task, failed=f"{type(error).__name__}: {str(error)[:600]}")


# --- Running and printing -----------------------------------------------------------------


def read(out: str) -> list[dict]:
    """Rows so far."""
    path = Path(out)
    return (
        [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )


def is_done(task: dict, rows: list[dict]) -> bool:
    return any(task.items() <= row.items() and "failed" not in row for row in rows)


def report(rows: list[dict]) -> None:
    """Prints what was found: failures, errors, and a line a product."""
    for row in rows:
        if "failed" in row and row["what"] != "decode":
            print(
                "failed", {k: v for k, v in row.items() if k != "failed"}, row["failed"]
            )
    for row in rows:
        if "error" in row:
            print(
                f"numerics {row['what']:<9}{row['direction']:<9}m={row['m']:<4} n={row['n']} "
                f"k={row['k']} {row['dtype']} exact={row['exact']}: {row['error']:.2e}"
            )
    bandwidth, rate = 4.3e12, 780e12
    for row in rows:
        if row["section"] == "ceilings" and "us" in row:
            if row["what"] == "copy":
                bandwidth = 2 * (1 << 32) / row["us"] * 1e6
                print(f"copy {bandwidth / 1e12:.2f} TB/s")
            else:
                rate = 2 * 8192**3 / row["us"] * 1e6
                print(f"bf16 product {rate / 1e12:.0f} TFLOP/s")
    table: dict[tuple, dict] = {}
    for row in rows:
        if row["section"] == "sweep" and "us" in row:
            key = (row["n"], row["k"], row["direction"], row["m"])
            table.setdefault(key, {})[row["what"]] = row
    for (n, k, direction, m), found in sorted(table.items()):
        if "ours" not in found:
            continue
        us = found["ours"]["us"]
        floor = max(n * k * 4.127 / 8 / bandwidth, 2 * m * n * k / rate) * 1e6
        others = "  ".join(
            f"{name} {found[name]['us'] / us:.2f}x" for name in found if name != "ours"
        )
        print(
            f"{n:>6} x {k:<6}{direction:<9}m={m:<6}{us:9.1f} us "
            f"{floor / us:5.0%} of the ceiling  {found['ours'].get('choice', ''):<9}{others}"
        )
    for row in rows:
        if row["section"] == "lora" and "us" in row:
            print(
                f"lora {row['what']:<22}{row['n']}x{row['k']} m={row['m']}: {row['us']:.1f}"
            )
        if row["section"] in ("step", "memory") and "step_s" in row:
            print(row["section"], row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = ["ceilings", "numerics", "sweep", "lora", "step", "memory"]
    parser.add_argument("--out", default="gpu_suite.jsonl")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--large", action="store_true", help="70B's linears too")
    parser.add_argument("--quick", action="store_true", help="fewer token counts")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1500, help="stop after")
    parser.add_argument("--list", action="store_true", help="print the tasks and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="print --out and stop")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.worker:
        kind, mine = args.worker.split(":", 1)
        mine = json.loads(Path(mine).read_text())
        if kind == "bitsandbytes":
            bitsandbytes_worker(mine, args.out)
        elif kind.startswith("step"):
            step_worker(mine[0], args.out)
        else:
            jax_worker(mine, args.out, int(kind))
        return
    if args.report:
        report(read(args.out))
        return
    rows = read(args.out)
    todo = [t for t in tasks(args.only, args.large, args.quick) if not is_done(t, rows)]
    if args.list:
        print(*map(json.dumps, todo), sep="\n")
        return
    end = time.time() + args.seconds
    steps = [t for t in todo if t["section"] in ("step", "memory")]
    bnb = [t for t in todo if t["what"] == "bitsandbytes"]
    rest = [t for t in todo if t not in steps and t not in bnb]
    shares = [(str(i), rest[i :: args.workers]) for i in range(args.workers)]
    for i, task in enumerate(steps):
        shares.append((f"step{i}", [task]))
    run([*shares, ("bitsandbytes", bnb)], args.out, end)
    report(read(args.out))


def run(shares: list[tuple[str, list[dict]]], out: str, end: float) -> None:
    """Runs worker processes side by side until `end`."""
    workers = []
    for kind, mine in shares:
        if not mine:
            continue
        path = Path(f"{out}.{kind}.json")
        path.write_text(json.dumps(mine))
        command = [sys.executable, __file__, "--out", out, "--worker", f"{kind}:{path}"]
        log = open(f"{out}.{kind}.log", "w")  # noqa: SIM115
        workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    for worker in workers:
        try:
            worker.wait(max(1, end - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()


if __name__ == "__main__":
    main()
