"""What the children of bench/train_step.py share: the task, and how they talk.

A child gets its task as one JSON argument, builds its model, runs the warm-up
steps, sends one line `{"ready": true, ...}` and then waits. For each line `N` on
its stdin it runs N training steps and sends `{"step_s": [...]}`. When its stdin
closes it sends `{"done": true, ...}` with its memory figures and ends.

All contestants train the same Llama: the same float32 weights from NumPy (each
casts them to its own dtype, and quantizes them in its own way) on the same
tokens, so that their first losses agree and can be compared.

Only the standard library and NumPy are imported here: the children run in virtual
environments that have no jax, or another one.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from scripts.bench.harness import forget_peak, held_bytes
from scripts.bench.harness import versions as versions

MIB = 2**20
WEIGHT_STD = 0.02
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of one layer, by their Hugging Face names: all get an adapter."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One contestant's task. Adam's betas and epsilon are everyone's defaults."""

    contestant: str
    """Name in the table, such as "peft-nf4"."""
    quantized: bool
    """NF4 base weights; otherwise dense ones in `dtype`."""
    dtype: str
    """The base, the activations and the matmuls have this dtype: "bfloat16" or "float32"."""
    vocab_size: int
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 4
    num_heads: int = 16
    num_kv_heads: int = 16
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    batch_size: int = 2
    sequence_tokens: int = 256
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    checkpoint: str = "none"
    """Gradient checkpointing: "none" or "layer"."""
    warmup_steps: int = 3
    seed: int = 0
    mode: str = "train"
    """"train", or the key of one of Contestant.measures."""
    options: dict[str, str] = field(default_factory=dict)
    """What only one child understands, from --option; see that child."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    def tokens(self) -> np.ndarray:
        """Returns the one batch that every step trains on: int32 (batch, seq)."""
        shape = (self.batch_size, self.sequence_tokens)
        generator = np.random.default_rng(self.seed)
        return generator.integers(0, self.vocab_size, shape, dtype=np.int32)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields Hugging Face names and float32 (out, in) matrices, one at a time.

        The norms are not among them: they stay at one.
        """
        hidden, mlp = self.hidden_size, self.intermediate_size
        kv = self.num_kv_heads * self.head_dim
        shapes = {"model.embed_tokens": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            attention, feed = (
                f"model.layers.{layer}.self_attn",
                f"model.layers.{layer}.mlp",
            )
            shapes |= {
                f"{attention}.q_proj": (hidden, hidden),
                f"{attention}.k_proj": (kv, hidden),
                f"{attention}.v_proj": (kv, hidden),
                f"{attention}.o_proj": (hidden, hidden),
                f"{feed}.gate_proj": (mlp, hidden),
                f"{feed}.up_proj": (mlp, hidden),
                f"{feed}.down_proj": (hidden, mlp),
            }
        shapes["lm_head"] = (self.vocab_size, hidden)
        generator = np.random.Generator(np.random.SFC64(self.seed))
        for name, shape in shapes.items():
            matrix = generator.standard_normal(shape, dtype=np.float32)
            matrix *= WEIGHT_STD
            yield f"{name}.weight", matrix


@dataclass(frozen=True)
class Contestant:
    """A built model, ready to train."""

    step: Callable[[], float]
    """Runs one step to its end (loss, gradient, AdamW update); returns the loss."""
    facts: dict = field(default_factory=dict)
    """Figures that do not change, for the ready line."""
    measures: dict[str, Callable[[], dict]] = field(default_factory=dict)
    """When the task has one of these modes, its function is measured instead of steps."""


def peak_rss_mib() -> float:
    """Returns the largest resident size since the start or the last forgetting."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def return_free_memory() -> None:
    """Collects garbage and gives freed heap back to the kernel (glibc only)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def xla_memory(compiled) -> dict[str, float]:
    """Returns XLA's own account of a compiled JAX function, in MiB."""
    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes / MIB
    temporaries = analysis.temp_size_in_bytes / MIB
    return {
        "arguments_mib": arguments,
        "temporaries_mib": temporaries,
        "total_mib": arguments + temporaries,
    }


def compile_seconds(step, *arguments) -> dict[str, float]:
    """Returns how long a jitted step takes to trace and to compile."""
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}


def claim_stdout() -> Callable[[dict], None]:
    """Keeps stdout for JSON lines alone: what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict) -> None:
        print(json.dumps(message), file=channel, flush=True)

    return send


def run(build: Callable[[Task], Contestant]) -> None:
    """Builds this program's task, warms up, and runs the steps that the parent asks for.

    The task is the program's one argument. What it prints meanwhile goes to stderr.
    """
    send = claim_stdout()
    task = Task(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    contestant = build(task)
    build_s = time.perf_counter() - start
    if task.mode != "train":
        figures = contestant.measures[task.mode]()
        send({"ready": True, "build_s": build_s, **contestant.facts, **figures})
        return
    return_free_memory()
    rss_after_build_mib = held_bytes("VmRSS") / MIB
    start = time.perf_counter()
    losses = [contestant.step()]
    first_step_s = time.perf_counter() - start
    losses += [contestant.step() for _ in range(task.warmup_steps - 1)]
    return_free_memory()
    start_peak_mib = peak_rss_mib()
    counted_afresh = forget_peak()
    send(
        {
            "ready": True,
            "build_s": build_s,
            "first_step_s": first_step_s,
            "rss_after_build_mib": rss_after_build_mib,
            **contestant.facts,
        }
    )
    for line in sys.stdin:
        step_s = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = contestant.step()
            step_s.append(time.perf_counter() - start)
            losses.append(loss)
        send({"step_s": step_s, "loss": losses[-1]})
    steps_peak_mib = held_bytes("VmHWM") / MIB if counted_afresh else None
    send(
        {
            "done": True,
            "steps": len(losses),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "rss_peak_mib": max(start_peak_mib, peak_rss_mib()),
            "rss_peak_steps_mib": steps_peak_mib,
        }
    )
