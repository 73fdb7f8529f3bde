"""The settings that fit a memory budget, fastest first.

Memory is that of `estimate`, and a margin for its error. Speed is a model of
relative time, good for an order alone: recomputing costs a forward pass, streaming adds the
part of the copy time that is not overlapped with computation, short micro-batches decode
the base more often for each token.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from qlora_jax.budget.estimate import Memory, Platform, estimate
from qlora_jax.budget.setup import Setup
from qlora_jax.config.quant import QuantOptions
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.models import DecoderConfig, abstract
from qlora_jax.names import EXPERTS, is_stacked
from qlora_jax.nn import FrozenLinear
from qlora_jax.nn.frozen import modules

GIB = 1 << 30
PICKED = (
    *("micro_batch", "grad_accum", "checkpoint", "offload", "resident_bytes", "stream"),
    *("embedding", "head"),
)
"""The settings that a plan picks: of TrainConfig and, the last two, of QuantOptions."""
FOLLOWING = ("grad_accum", "resident_bytes")
"""Those of them that follow from others: from micro_batch, and from offload."""
_DEFAULTS = {**vars(TrainConfig()), **vars(QuantOptions())}
_CHECKPOINT_COST = {"none": 1.0, "attention": 1.25, "layer": 1.33, "host": 1.36}
"""A forward pass is a third of a step without checkpointing: forward, and the gradient to
activations, of which no weight has its own."""
_SMALL_COST = 0.02  # of paging the optimizer, and of 4-bit tables
_TABLE_COST = {"none": 0.0, "int8": 0.5, "4bit": 1.0}
"""The cost of a table's format, in multiples of _SMALL_COST. It makes a plan take int8, which
costs least perplexity, before it takes 4-bit tables."""
_STREAM_COST = 1.5
"""A streamed step is taken to last at least so many times as long. An H200 took 1.15 with 4
micro-batches of 8B; 1.8 with one, when a layer's copies had only its own turn. Copied ahead, as
they are now, they are not measured yet."""
_DECODE_TOKENS = 300  # a micro-batch costs as if it had so many tokens more
PCIE_BYTES_PER_S = 44e9
FLOPS = 550e12
"""Rates of an H200's host link and of its step's arithmetic, for streaming alone: measured,
the second as 530e12 for 8B and 618e12 for 70B (scripts/BENCHMARKS.md)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A setup that fits, and what it needs.

    Attributes:
      setup: The chosen settings.
      memory: What they need, by part.
      budget: Device bytes that were given.
      next_step: What more memory would buy: (bytes more, what), or None.
    """

    setup: Setup
    memory: Memory
    budget: int
    next_step: tuple[int, str] | None = None


def plan_memory(
    setup: Setup,
    memory_bytes: int,
    *,
    rows: int | None = None,
    host_bytes: int | None = None,
    platform: Platform = "gpu",
    fixed: Iterable[str] = (),
) -> Plan:
    """Picks micro-batch, checkpointing, paging, streaming and quantized tables.

    What fits leaves the margin of its estimate free, which may be too low.

    Args:
      setup: The model, adapter and sequence length; the settings to choose are ignored,
        unless `fixed` names them.
      memory_bytes: Device memory that the run may take.
      rows: The rows of a step, which are micro_batch times grad_accum; None for the setup's.
      host_bytes: Host memory that may be pinned; None for no limit.
      platform: Which fitted memory model to use, 'gpu' or 'cpu'.
      fixed: Names of settings (see PICKED) that stay as they are. Where offload is not
        among them, and is needed, resident_bytes is as much of the optimizer state as fits
        on the device.

    Raises:
      ConfigError: nothing fits; the message says the least that would.
    """
    rows = rows or setup.train.micro_batch * setup.train.grad_accum
    candidates = sorted(_candidates(setup, rows, set(fixed)), key=relative_time)
    found = _first(candidates, memory_bytes, host_bytes, platform)
    if found is None:
        raise ConfigError(_nothing(candidates, memory_bytes, host_bytes, platform))
    chosen, memory = found
    if chosen.train.offload and "offload" not in fixed:
        # As much of the optimizer state stays as there is room for beside the margin.
        room = int(memory_bytes / (1 + memory.margin)) - memory.device_bytes
        chosen = dataclasses.replace(chosen, resident_bytes=max(0, room))
        memory = estimate(chosen, platform)
    for more in (1, 2, 4, 8, 16, 32):
        better = _first(candidates, memory_bytes + more * GIB, host_bytes, platform)
        if better is not None and relative_time(better[0]) < relative_time(chosen):
            gain = (more * GIB, describe_change(chosen, better[0]))
            return Plan(chosen, memory, memory_bytes, gain)
    return Plan(chosen, memory, memory_bytes)


def _candidates(setup: Setup, rows: int, fixed: set[str]) -> Iterator[Setup]:
    # Where packing makes several sizes the same program, the largest evaluates fastest.
    batches = [n for n in range(rows, 0, -1) if rows % n == 0]
    tied = setup.config.tie_word_embeddings
    options: dict[str, list[Any]] = {
        "micro_batch": batches,
        "checkpoint": list(_CHECKPOINT_COST),
        "offload": [False, True],
        "stream": [False, True],
        "tables": ["none"] if setup.quant is None else list(_TABLE_COST),
    }
    for name in options.keys() & fixed:
        options[name] = [getattr(setup, name)]
    if fixed & {"embedding", "head"}:
        options["tables"] = [None]
    for values in itertools.product(*options.values()):
        changes = dict(zip(options, values, strict=True))
        tables = changes.pop("tables")
        if tables is not None:
            changes["embedding"] = tables
            changes["head"] = "none" if tied else tables
        accum = rows // changes["micro_batch"] or 1
        yield dataclasses.replace(setup, grad_accum=accum, **changes)


def relative_time(setup: Setup) -> float:
    """Returns the modelled time of a token, in units of the fastest settings'."""
    time = _CHECKPOINT_COST[setup.train.checkpoint] * (
        1 + _DECODE_TOKENS / setup.tokens
    )
    time *= 1 + _SMALL_COST * (_paged_part(setup) + _TABLE_COST[setup.embedding])
    if setup.train.stream:
        step = compute_seconds(setup) * setup.train.grad_accum
        exposed = streaming_seconds(setup) / step - 1
        time *= _STREAM_COST + max(0.0, exposed)
    return time


def _paged_part(setup: Setup) -> float:
    """Returns which part of the optimizer state comes and goes."""
    if not setup.train.offload:
        return 0.0
    if not setup.train.resident_bytes:
        return 1.0
    host = estimate(setup).host["optimizer state"]
    return host / (host + setup.train.resident_bytes)


@functools.lru_cache(maxsize=64)
def weights_met(config: DecoderConfig) -> int:
    """Returns the weights of all layers' linears that a token meets."""
    total = 0
    for path, node in modules(abstract(config), FrozenLinear):
        if is_stacked(path):
            met = math.prod((*node.stack, *node.shape))
            if EXPERTS in path:
                met = met * config.experts_per_token // config.num_experts
            total += met
    return total


def compute_seconds(setup: Setup) -> float:
    """Returns a micro-batch's arithmetic: forward (once more with checkpointing), and the
    gradient to activations."""
    passes = 2 if setup.train.checkpoint == "none" else 3
    return 2 * passes * weights_met(setup.config) * setup.tokens / FLOPS


def streaming_seconds(setup: Setup) -> float:
    """Returns what a step's copies of the layers take: one forward, one backward."""
    size = estimate(dataclasses.replace(setup, stream=True)).host["layers"]
    return 2 * size / PCIE_BYTES_PER_S


def free_streaming_tokens(setup: Setup) -> int:
    """Returns the tokens of a step from which on streaming hides, by the model."""
    a_token = compute_seconds(setup) / setup.tokens
    return math.ceil(streaming_seconds(setup) / a_token)


def _first(
    candidates: list[Setup], memory: int, host: int | None, platform: Platform
) -> tuple[Setup, Memory] | None:
    for setup in candidates:
        need = estimate(setup, platform)
        if need.safe_bytes <= memory and (host is None or need.host_bytes <= host):
            return setup, need
    return None


def _nothing(
    candidates: list[Setup], memory: int, host: int | None, platform: Platform
) -> str:
    needs = [(estimate(setup, platform), setup) for setup in candidates]
    least, setup = min(needs, key=lambda pair: pair[0].device_bytes)
    text = (
        f"nothing fits in {said(memory)}; the least is {said(least.safe_bytes)} of device "
        f"memory and {said(least.host_bytes)} of host memory ({flags_of(setup)})"
    )
    if host is not None and least.host_bytes > host:
        within = [pair for pair in needs if pair[0].host_bytes <= host]
        if within:
            here, there = min(within, key=lambda pair: pair[0].device_bytes)
            text += (
                f"; with no more than {said(host)} of the host it is "
                f"{said(here.safe_bytes)} ({flags_of(there)})"
            )
    several = setup.train.micro_batch * setup.train.grad_accum > 1
    fewer = ", fewer of them a step" if several else ""
    text += f". Each is an estimate and {least.margin:.0%} more, as it may be too low"
    return f"{text}. Shorter rows (--data.max-tokens){fewer} or a lower rank need less."


def picked(setup: Setup) -> dict[str, Any]:
    """Returns what a plan picks of a setup: {name of a setting: its value}."""
    return {name: getattr(setup, name) for name in PICKED}


def flags_of(setup: Setup) -> str:
    """Says the chosen settings as flags."""
    flags, always = [], ("micro_batch", "grad_accum", "checkpoint")
    for name, value in picked(setup).items():
        idle = name == "resident_bytes" and not setup.train.offload
        if idle or (value == _DEFAULTS[name] and name not in always):
            continue
        group = "quant" if hasattr(QuantOptions, name) else "train"
        flag = f"--{group}.{name.replace('_', '-')}"
        flags.append(flag if value is True else f"{flag} {value}")
    return " ".join(flags)


def describe_change(before: Setup, after: Setup) -> str:
    """Says what differs between two choices."""
    old, new = picked(before), picked(after)
    changes = [
        f"{name.replace('_', '-')} {_said(old[name])} -> {_said(new[name])}"
        for name in PICKED
        if name not in FOLLOWING and old[name] != new[name]
    ]
    faster = relative_time(before) / relative_time(after) - 1
    return f"{', '.join(changes)} (about {faster:.0%} faster)"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def said(size: int) -> str:
    """Says bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def parse_bytes(text: str) -> int:
    """Reads '24GiB', '24GB', '500MiB' or plain bytes.

    Raises:
      ConfigError: it is none of these.
    """
    units = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB, "TIB": 1 << 40}
    units |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
    number = text.strip().rstrip("BKMGTibkmgt ").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ConfigError(
            f"--memory {text!r} is no size; expected such as 24GiB, 24GB or 500MiB"
        ) from None
    if not value > 0:
        raise ConfigError(f"--memory {text!r} is not more than 0")
    return int(value)
