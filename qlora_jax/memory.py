"""What a run will need of device and host memory, part by part, from shapes alone.

What is resident (base, tables, adapter, optimizer state) is counted exactly. What a step
holds for a while is a model of XLA's buffer assignment:

    activations kept for backward  +  the larger of what else is alive at once
                                      (gradients and a layer's backward, or the loss)

whose coefficients were fitted to compiled steps (scripts/measure_memory.py and
fit_memory.py), one set for NVIDIA GPUs and one for CPUs. A fit of all models but one is
off by 2.4 % of XLA's account on that one (the median; 17.4 % at most) for a GPU, 4.6 % and
13.7 % for a CPU. Of models that no fit has had, one whose layers take turns in sixes needs
a third more than the estimate (scripts/results/README.md, "Memory").
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.device import (
    LOGITS_BYTES,
    TWO_PASS_WHOLE_BYTES,
    XLA_TILE_BYTES,
    XLA_WHOLE_BYTES,
)
from pallas_kernels.formats import Int8Rows, PackedWeight, QuantizedTensor
from qlora_jax.adapters.attach import attach_zero, split
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig, TableFormat
from qlora_jax.config.train import Checkpoint, Optimizer
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.streaming import copies_ahead
from qlora_jax.names import is_stacked
from qlora_jax.nn import (
    Embedding,
    FrozenParam,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
)
from qlora_jax.optim.adamw import adamw

Platform = Literal["gpu", "cpu"]
MARGIN, TURNS_MARGIN = 0.12, 0.4
"""What a plan keeps free, relative to its estimate, in case that is too low; the second
where layers of several kinds take turns (Gemma 2 and 3), of which the fit has one model."""
Coefficients = Mapping[tuple[Platform, bool], Mapping[str, float]]
"""{(platform, whether whole layers are recomputed): {feature: coefficient}}."""


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes of host memory that may still be taken, where Linux says it.

    In a container with a limit of its own (cgroup v2) it is what that leaves, if less.

    Args:
      root: Where /proc and /sys lie.
    """

    def numbers(path: str) -> dict[str, int]:
        try:
            lines = (root / path).read_text().replace(":", " ").splitlines()
        except OSError:
            return {}
        pairs = [line.split()[:2] for line in lines if len(line.split()) > 1]
        return {name: int(value) for name, value in pairs if value.isdigit()}

    available = numbers("proc/meminfo").get("MemAvailable")
    if available is None:
        return None
    free = 1024 * available
    try:
        group = root / "sys/fs/cgroup"
        limit, used = ((group / f"memory.{x}").read_text() for x in ("max", "current"))
        # Cached files are given up when memory is asked for.
        files = numbers("sys/fs/cgroup/memory.stat").get("inactive_file", 0)
        free = min(free, int(limit) - int(used) + files)
    except (OSError, ValueError):
        pass  # no such group, or its limit is 'max'
    return max(free, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a step's memory depends on."""

    config: DecoderConfig
    quant: QuantConfig | None = QuantConfig()
    """None for a dense base."""
    lora: LoRAConfig = LoRAConfig()
    dtype: str = "bfloat16"
    """Of the computation, and of what stays dense."""
    micro_batch: int = 1
    grad_accum: int = 1
    max_tokens: int = 2048
    checkpoint: Checkpoint = "layer"
    optimizer: Optimizer = "adamw"
    offload: bool = False
    """Optimizer state on the host, and what micro-batches' gradients add up to."""
    resident_bytes: int = 0
    """Of that state what stays on the device."""
    stream: bool = False
    """Layers' weights on the host."""
    embedding: TableFormat = "none"
    head: TableFormat = "none"

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.max_tokens


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Attributes:
      device: Of device memory, at the step's peak.
      host: Of pinned host memory.
      margin: How much more than the estimate a run may need of the device, as a part of it.
    """

    device: dict[str, int]
    host: dict[str, int]
    margin: float = MARGIN

    @property
    def device_bytes(self) -> int:
        """All of the device's."""
        return sum(self.device.values())

    @property
    def safe_bytes(self) -> int:
        """Device memory that a run should have: the estimate and its margin."""
        return math.ceil((1 + self.margin) * self.device_bytes)

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return sum(self.host.values())


def abstract_parts(
    setup: Setup,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns `split` of the setup's model, every array a jax.ShapeDtypeStruct."""
    skeleton = nnx.eval_shape(
        lambda: Decoder(setup.config, key=jax.random.key(0), dtype=setup.dtype)
    )

    def replace(path: tuple, node: Any) -> Any:
        if setup.quant is None:
            return node
        if isinstance(node, Linear):
            held = setup.head if path == ("lm_head",) else "4bit"
            if held == "none":
                return node
            bias = None if node.bias is None else node.bias.get_value()
            made = QuantizedLinear(_quantized(node.kernel.get_value(), held, setup))
            return _biased(made, bias)
        if isinstance(node, Embedding) and setup.embedding != "none":
            weight = node.weight.get_value()
            return QuantizedEmbedding(_quantized(weight, setup.embedding, setup))
        return node

    graphdef, state = nnx.split(nnx.recursive_map(replace, skeleton))

    def adapted(state: nnx.State) -> Decoder:
        model = nnx.merge(graphdef, state)
        return attach_zero(model, setup.lora, key=jax.random.key(0))

    whole = split(nnx.eval_shape(adapted, state))[0]
    lora, base = jax.eval_shape(lambda state: split(adapted(state))[1:], state)
    return whole, lora, base


def _quantized(weight: Any, held: TableFormat, setup: Setup) -> PackedWeight:
    quant, (*stack, n, k) = setup.quant, weight.shape
    if held == "int8":
        return Int8Rows.abstract((n, k), tuple(stack), dtype=weight.dtype.name)
    assert quant is not None
    return QuantizedTensor.abstract(
        (n, k), tuple(stack), **dataclasses.asdict(quant), dtype=setup.dtype
    )


def _biased(linear: QuantizedLinear, bias: Any) -> QuantizedLinear:
    if bias is not None:
        linear.bias = nnx.data(FrozenParam(bias))
    return linear


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def optimizer_state(lora: nnx.State, name: Optimizer = "adamw") -> Any:
    """Returns an optimizer's state of an adapter, as shapes."""
    return jax.eval_shape(adamw(name, 1e-4).init, lora)


# Fitted by scripts/fit_memory.py over scripts/results/memory_*.jsonl, by least largest
# error of a step's all; `features` says of what each is a multiple.
FITTED: Coefficients = {
    ("gpu", True): {
        **{"adapter": 0.199, "adapter_8_bit": 0.084, "accumulated": 0.009},
        **{"layer": 0.041, "ahead": 1.911, "turn": 1.904, "hidden_both": 16.496},
        **{"kv": 12.936, "wide": 6.203, "several": 10.828, "together": 3.943},
        **{"logits": 0.373, "int8": 0.685, "pieces": 57.5e6, "workspace": 45.2e6},
    },
    ("gpu", False): {
        **{"adapter": 0.089, "kv": 6.975, "wide": 5.288, "together": 64.446},
    },
    ("cpu", True): {
        **{"adapter": 2.542, "adapter_8_bit": 0.406, "decoded": 5.904},
        **{"hidden_both": 73.503, "bias": 15.666, "wide": 10.019},
    },
    ("cpu", False): {
        **{"adapter": 1.876, "decoded": 3.461, "hidden_both": 84.065},
        **{"kv": 8.528, "wide": 11.934, "together": 52.55},
    },
}


def estimate(
    setup: Setup, platform: Platform = "gpu", fitted: Coefficients = FITTED
) -> Memory:
    """Returns what a step needs, by part.

    On a CPU device and host are one memory, and all is the device's.

    Args:
      setup: What is trained, and how.
      platform: Whose memory, a GPU's or a CPU's.
      fitted: The coefficients; others than the library's are for judging a fit.
    """
    parts = _resident(setup)
    kept = _kept(setup, platform)
    coefficients = fitted[platform, setup.checkpoint != "none"]
    most = max(_at_peak(setup, platform, parts, coefficients).values())
    device = {
        "layers": parts["layers"],
        "embedding": parts["embedding"],
        "head": parts["head"],
        "adapter": parts["adapter"],
        "optimizer state": parts["optimizer"],
        "gradients": parts["adapter"],
        "activations for backward": kept,
        "while a layer or the loss runs": max(0, most - parts["adapter"]),
    }
    host: dict[str, int] = dict.fromkeys(
        ("layers", "optimizer state", "activations for backward"), 0
    )
    if platform == "gpu":
        if setup.stream:
            host["layers"] = device.pop("layers")
        if setup.offload:
            away = max(0, parts["optimizer"] - setup.resident_bytes)
            host["optimizer state"] = away
            device["optimizer state"] -= away
            if setup.grad_accum > 1 and not setup.stream:
                host["gradients"] = parts["adapter"]
        if setup.checkpoint == "host":
            c = setup.config
            each = setup.tokens * c.hidden_size * jnp.dtype(setup.dtype).itemsize
            host["activations for backward"] = c.num_layers * each * _together(setup)
    return Memory(device, host, TURNS_MARGIN if setup.config.period > 1 else MARGIN)


_COUNTED: dict[
    str, dict[str, int]
] = {}  # a plan asks for hundreds of one model's setups


def _resident(setup: Setup) -> dict[str, int]:
    """Counts the arrays of a setup, wherever they rest."""
    plain = dataclasses.replace(
        setup,
        micro_batch=1,
        grad_accum=1,
        max_tokens=1,
        checkpoint="layer",
        offload=False,
        resident_bytes=0,
        stream=False,
    )
    if (known := _COUNTED.get(repr(plain))) is not None:
        return known
    _, lora, base = abstract_parts(plain)
    sizes: dict[str, int] = dict.fromkeys(("layers", "embedding", "head"), 0)
    names = {"embed_tokens": "embedding", "lm_head": "head"}
    for path, variable in nnx.to_flat_state(base):
        part = "layers" if is_stacked(path) else names.get(str(path[0]), "head")
        sizes[part] += tree_bytes(variable.get_value())
    sizes["adapter"] = tree_bytes(lora)
    sizes["optimizer"] = tree_bytes(optimizer_state(lora, setup.optimizer))
    _COUNTED[repr(plain)] = sizes
    return sizes


def _together(setup: Setup) -> int:
    """Returns how many micro-batches go through a layer before the next does."""
    return setup.grad_accum if setup.stream else 1


def _adds_up(setup: Setup) -> bool:
    """Whether the device holds the sum of micro-batches' gradients beside a new one."""
    return setup.grad_accum > 1 and not setup.stream and not setup.offload


def _kept(setup: Setup, platform: Platform) -> int:
    """Returns the bytes of activations that wait on the device for backward."""
    c = setup.config
    each = setup.tokens * jnp.dtype(setup.dtype).itemsize
    if setup.checkpoint == "host" and platform == "gpu":
        return 2 * each * c.hidden_size  # one that arrives, one that leaves
    return c.num_layers * each * _together(setup) * _features_kept(setup)


def _features_kept(setup: Setup) -> int:
    """Returns the features of a token that a layer keeps for backward."""
    c = setup.config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kept = c.hidden_size
    if setup.checkpoint == "attention":
        kept += q
    if setup.checkpoint == "none":
        kept += c.hidden_size + 2 * q + 2 * kv + 2 * _wide(c)
        kept += (4 if c.fused else 7) * setup.lora.rank
        kept += q + kv if c.qk_norm != "none" else 0
        kept += 2 * c.hidden_size if c.norms != "pre" else 0
    return kept


def _wide(config: DecoderConfig) -> int:
    """Returns the feed-forward features that a token meets."""
    experts = config.experts_per_token if config.num_experts else 1
    return config.intermediate_size * experts


def _at_peak(
    setup: Setup,
    platform: Platform,
    parts: dict[str, int],
    coefficients: Mapping[str, float],
) -> dict[str, int]:
    """Returns what is alive beside kept activations, gradients too, when a layer's backward
    runs and when the loss does."""
    sums = {"layer": parts["adapter"], "loss": 0}
    if _adds_up(setup):
        sums["loss"] += parts["adapter"]
    for (moment, name), size in features(setup, platform, parts).items():
        sums[moment] += round(coefficients.get(name, 0.0) * size)
    return sums


def features(
    setup: Setup, platform: Platform, parts: dict[str, int]
) -> dict[tuple[str, str], float]:
    """Returns {(when, name): bytes}: what a step holds for a while is multiples of these.

    When a layer's backward runs: copies and updates of the adapter, and what micro-batches
    add up to; a layer's stored weights, cut out of the stack, once more for one that is
    copied ahead and for each further layer of a group in turns; activations as wide as the
    feed-forward, as the kv heads, as the hidden size (where norms stand before and after;
    where several micro-batches go through a layer together, once and for each further one),
    as q, k and v that have biases; the largest piece of a weight that is decoded at once.
    When the loss runs: a chunk of logits, pieces of a 4-bit head, logits that an int8 one
    puts together, and libraries' workspace.
    """
    c, item = setup.config, jnp.dtype(setup.dtype).itemsize
    # On a CPU products come out in float32, whatever goes in.
    tokens = setup.tokens * (item if platform == "gpu" else 2)
    a_layer = parts["layers"] / c.num_layers
    decoded = 0
    if setup.quant is not None and platform == "cpu":
        whole = c.hidden_size * c.intermediate_size
        decoded = XLA_TILE_BYTES["cpu"]
        if whole * item <= XLA_WHOLE_BYTES["cpu"]:
            decoded = 4 * whole
    together = _together(setup)
    more = (together - 1) * tokens
    chunk = min(LOGITS_BYTES[platform], 4 * setup.tokens * c.vocab_size)
    biased = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    head = setup.embedding if c.tie_word_embeddings else setup.head
    pieces = (
        head == "4bit"
        and c.hidden_size % 256
        and 2 * c.hidden_size * c.vocab_size > TWO_PASS_WHOLE_BYTES["gpu"]
    )
    ahead = setup.stream and copies_ahead(
        c.num_layers, c.period, together, setup.checkpoint
    )
    return {
        ("layer", "adapter"): parts["adapter"] * (setup.optimizer == "adamw"),
        ("layer", "adapter_8_bit"): parts["adapter"] * (setup.optimizer != "adamw"),
        ("layer", "accumulated"): parts["adapter"] * _adds_up(setup),
        ("layer", "layer"): a_layer,
        ("layer", "ahead"): a_layer * ahead,
        ("layer", "turn"): a_layer * (c.period - 1),
        ("layer", "wide"): tokens * _wide(c),
        ("layer", "hidden_both"): tokens * c.hidden_size * (c.norms == "both"),
        ("layer", "kv"): tokens * c.num_kv_heads * c.head_dim,
        ("layer", "bias"): tokens * biased * c.attention_bias,
        ("layer", "together"): more * c.hidden_size,
        ("layer", "several"): tokens * c.hidden_size * (together > 1),
        ("layer", "decoded"): decoded,
        ("loss", "logits"): chunk,
        ("loss", "pieces"): float(bool(pieces)),
        ("loss", "int8"): (head == "int8") * chunk * item / 4,
        ("loss", "workspace"): 1.0,
    }
