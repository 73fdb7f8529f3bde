"""What a run will need of device and host memory, part by part, from shapes alone.

What is resident (base, tables, adapter, optimizer state) is counted exactly. What a step
holds for a while is a model of XLA's buffer assignment:

    activations kept for backward  +  the larger of what else is alive at once
                                      (gradients and a layer's backward, or the loss)

whose coefficients were fitted to compiled steps (scripts/bench/memory.py and
make/fit_memory.py), one set for NVIDIA GPUs and one for CPUs. A fit of all models but one is
off by 2.4 % of XLA's account on that one (the median; 17.4 % at most) for a GPU, 4.6 % and
13.7 % for a CPU. Of models that no fit has had, one whose layers take turns in sixes needs
a third more than the estimate (scripts/results/README.md, "Memory").
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.device import (
    LOGITS_BYTES,
    TWO_PASS_WHOLE_BYTES,
    XLA_TILE_BYTES,
    XLA_WHOLE_BYTES,
)
from pallas_kernels.formats import FORMATS, Int8Rows, PackedWeight, QuantizedTensor
from qlora_jax.adapters.attach import attach_zero, split
from qlora_jax.budget.setup import Setup
from qlora_jax.config.quant import TableFormat
from qlora_jax.config.train import Optimizer, TrainConfig
from qlora_jax.models import Decoder, DecoderConfig, abstract
from qlora_jax.models.layers import SAVED
from qlora_jax.models.streaming import copies_ahead
from qlora_jax.names import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    PER_LAYER,
    dotted,
    is_stacked,
    layers_at,
    plain,
)
from qlora_jax.nn import FrozenLinear, Weighted
from qlora_jax.nn.frozen import modules, replaced
from qlora_jax.optim.adamw import adamw

Platform = Literal["gpu", "cpu"]
MARGIN, TURNS_MARGIN = 0.12, 0.4
"""What a plan keeps free, relative to its estimate, in case that is too low; the second
where layers of several kinds take turns (Gemma 2 and 3), of which the fit has one model."""
Coefficients = Mapping[tuple[Platform, bool], Mapping[str, float]]
"""{(platform, whether whole layers are recomputed): {feature: coefficient}}."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes that a step needs, by part.

    Attributes:
      device: What it takes of device memory at its peak.
      host: What it takes of pinned host memory.
      margin: The share of the device's estimate that a run may need beyond it, such as
        0.12.
    """

    device: dict[str, int]
    host: dict[str, int]
    margin: float = MARGIN

    @property
    def device_bytes(self) -> int:
        """The sum of the device's parts."""
        return sum(self.device.values())

    @property
    def safe_bytes(self) -> int:
        """Device memory that a run should have: the estimate and its margin."""
        return math.ceil((1 + self.margin) * self.device_bytes)

    @property
    def host_bytes(self) -> int:
        """The sum of the host's parts."""
        return sum(self.host.values())


def abstract_parts(
    setup: Setup,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns `split` of the setup's model, every array a jax.ShapeDtypeStruct."""
    skeleton = abstract(setup.config, setup.dtype)
    specs = dict(setup.config.slots)

    def stays_dense(path: tuple) -> bool:
        """Whether a folder keeps this linear dense in these layers (LayerSpec.dense)."""
        layers = layers_at(path)
        inside = plain(path).partition(".")[2]
        return layers is not None and inside in specs[layers].dense

    def hold(path: tuple, node: Weighted) -> nnx.Module:
        held = _held(path, node, setup)
        if held == "none" or stays_dense(path):
            return node
        bias = None if node.bias is None else node.bias.get_value()
        return node.holding(_quantized(node.stored, held, setup), bias)

    graphdef, state = nnx.split(replaced(skeleton, Weighted, hold))

    def adapted(state: nnx.State) -> Decoder:
        model = nnx.merge(graphdef, state)
        return attach_zero(model, setup.lora, key=jax.random.key(0))

    whole = split(nnx.eval_shape(adapted, state))[0]
    lora, base = jax.eval_shape(lambda state: split(adapted(state))[1:], state)
    return whole, lora, base


def _held(path: tuple, node: Weighted, setup: Setup) -> TableFormat | Literal["mxfp4"]:
    """Returns the format that a setup holds a module's weight in."""
    if setup.mxfp4 == "keep" and EXPERTS in path and isinstance(node, FrozenLinear):
        return "mxfp4"
    if setup.quant is None:
        return "none"
    if dotted(path) in (EMBEDDING, PER_LAYER):
        return setup.embedding
    if path == (HEAD,):
        return setup.head
    return "4bit" if isinstance(node, FrozenLinear) else "none"


def _quantized(weight: Any, held: str, setup: Setup) -> PackedWeight:
    quant, (*stack, n, k) = setup.quant, weight.shape
    if held == "mxfp4":
        return FORMATS[held].abstract((n, k), tuple(stack), dtype=weight.dtype.name)
    if held == "int8":
        return Int8Rows.abstract((n, k), tuple(stack), dtype=weight.dtype.name)
    assert quant is not None
    return QuantizedTensor.abstract(
        (n, k), tuple(stack), **dataclasses.asdict(quant), dtype=setup.dtype
    )


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def optimizer_state(lora: nnx.State, name: Optimizer = "adamw") -> Any:
    """Returns an optimizer's state of an adapter, as shapes."""
    return jax.eval_shape(adamw(name, 1e-4).init, lora)


# Fitted by scripts/make/fit_memory.py over scripts/results/memory_*.jsonl, by least largest
# error of a step's all; `features` says of what each is a multiple.
FITTED: Coefficients = {
    ("gpu", True): {
        **{"adapter": 0.199, "adapter_8_bit": 0.084, "accumulated": 0.009},
        **{"layer": 0.041, "ahead": 1.911, "turn": 0.966, "hidden_both": 16.736},
        **{"kv": 12.936, "wide": 6.203, "several": 10.828, "together": 3.943},
        **{"logits": 0.373, "int8": 0.685, "pieces": 57.5e6, "workspace": 45.2e6},
    },
    ("gpu", False): {
        **{"adapter": 0.069, "bias": 0.416, "kv": 8.636},
        **{"several": 452.245, "wide": 5.175},
    },
    ("cpu", True): {
        **{
            "adapter": 2.091,
            "adapter_8_bit": 0.368,
            "decoded": 6.964,
            "several": 3.166,
        },
        **{"hidden_both": 62.003, "bias": 6.25, "wide": 11.827, "layer": 0.361},
    },
    ("cpu", False): {
        **{"adapter": 0.063, "bias": 16.248, "decoded": 6.134},
        **{"hidden_both": 63.54, "kv": 21.833, "layer": 2.83},
        **{"several": 176.719, "wide": 9.155},
    },
}


def estimate(
    setup: Setup, platform: Platform = "gpu", fitted: Coefficients = FITTED
) -> Memory:
    """Returns what a step needs, by part.

    On a CPU device and host are one memory, and all is the device's.

    Args:
      setup: What is trained, and how.
      platform: Which fitted memory model to use, 'gpu' or 'cpu'.
      fitted: The coefficients; others than the library's are for judging a fit.
    """
    parts = _resident(setup)
    kept = _kept(setup, platform)
    coefficients = fitted[platform, setup.train.checkpoint != "none"]
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
        train = setup.train
        if train.stream:
            host["layers"] = device.pop("layers")
        if train.offload:
            away = max(0, parts["optimizer"] - train.resident_bytes)
            host["optimizer state"] = away
            device["optimizer state"] -= away
            if setup.micro_batches > 1 and not train.stream:
                host["gradients"] = parts["adapter"]
        if train.checkpoint == "host":
            c = setup.config
            each = setup.tokens * c.hidden_size * jnp.dtype(setup.dtype).itemsize
            host["activations for backward"] = c.num_layers * each * _together(setup)
    in_turns = any(len(one.pattern) > 1 for one in setup.config.segments)
    return Memory(device, host, TURNS_MARGIN if in_turns else MARGIN)


def _resident(setup: Setup) -> dict[str, int]:
    """Counts the arrays of a setup, wherever they rest."""
    # All that they depend on of how it trains.
    train = TrainConfig(
        compute_dtype=setup.train.compute_dtype, optimizer=setup.train.optimizer
    )
    return _counted(
        dataclasses.replace(setup, train=train, max_tokens=1, packed_rows=None)
    )


@functools.lru_cache(maxsize=64)  # a plan asks for hundreds of one model's setups
def _counted(setup: Setup) -> dict[str, int]:
    _, lora, base = abstract_parts(setup)
    sizes: dict[str, int] = dict.fromkeys(("layers", "embedding", "head"), 0)
    names = {"embed_tokens": "embedding", "per_layer": "embedding", "lm_head": "head"}
    for path, variable in nnx.to_flat_state(base):
        part = "layers" if is_stacked(path) else names.get(str(path[0]), "head")
        sizes[part] += tree_bytes(variable.get_value())
    sizes["adapter"] = tree_bytes(lora)
    sizes["optimizer"] = tree_bytes(optimizer_state(lora, setup.train.optimizer))
    return sizes


def _together(setup: Setup) -> int:
    """Returns how many micro-batches go through a layer before the next does."""
    return setup.micro_batches if setup.train.stream else 1


def _adds_up(setup: Setup) -> bool:
    """Whether the device holds the sum of micro-batches' gradients beside a new one."""
    several = setup.micro_batches > 1
    return several and not (setup.train.stream or setup.train.offload)


def _kept(setup: Setup, platform: Platform) -> int:
    """Returns the bytes of activations that wait on the device for backward."""
    c = setup.config
    each = setup.tokens * jnp.dtype(setup.dtype).itemsize
    if setup.train.checkpoint == "host" and platform == "gpu":
        return 2 * each * c.hidden_size  # one that arrives, one that leaves
    return each * _together(setup) * _features_kept(setup)


def _features_kept(setup: Setup) -> int:
    """Returns the features of a token that all layers together keep for backward."""
    c, total = setup.config, 0
    saved = {"layer": (), "host": (), "attention": ("mixed",), "none": SAVED}
    for slot in _slots(c):
        features = c.hidden_size + c.per_layer_size + slot.gives
        names = saved[setup.train.checkpoint]
        features += sum(slot.kept.get(name, 0) for name in names)
        if setup.train.checkpoint == "none":
            features += slot.linears * setup.lora.rank
        total += slot.layers * features
    return total


class _Slot(NamedTuple):
    """What memory depends on of the layers of one slot.

    Attributes:
      layers: The number of layers.
      kept: Features a token by the checkpoint names that they are kept under.
      wide: Features that `down` takes of a token, of all experts that it meets.
      linears: The linears of one layer; those of all experts count once.
      gives: Features a token of keys and values that later layers take.
    """

    layers: int
    kept: Mapping[str, int]
    wide: int
    linears: int
    gives: int


@functools.lru_cache(maxsize=64)  # a plan asks for hundreds of one model's setups
def _slots(config: DecoderConfig) -> tuple[_Slot, ...]:
    return tuple(
        _Slot(
            len(layers),
            stack.kept,
            _wide(stack.mlp.kept),
            sum(1 for _ in modules(stack, FrozenLinear)),
            sum(stack.kept[name] for name in "kv") if spec.gives else 0,
        )
        for (layers, spec), stack in zip(
            config.slots, abstract(config).stacks, strict=True
        )
    )


def _wide(kept: Mapping[str, int]) -> int:
    """Returns the width of a feed-forward, from what it keeps for backward."""
    return kept["up"] if "up" in kept else sum(kept.values()) // 2


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
    turns = max(len(one.pattern) for one in c.segments)
    decoded = 0
    if setup.quant is not None and platform == "cpu":
        whole = c.hidden_size * c.intermediate_size
        decoded = XLA_TILE_BYTES["cpu"]
        if whole * item <= XLA_WHOLE_BYTES["cpu"]:
            decoded = 4 * whole
    together = _together(setup)
    more = (together - 1) * tokens
    chunk = min(LOGITS_BYTES[platform], 4 * setup.tokens * c.vocab_size)
    slots = _slots(c)
    biased = max(sum(slot.kept.get(name, 0) for name in "qkv") for slot in slots)
    head = setup.embedding if c.tie_word_embeddings else setup.head
    pieces = (
        head == "4bit"
        and c.hidden_size % 256
        and 2 * c.hidden_size * c.vocab_size > TWO_PASS_WHOLE_BYTES["gpu"]
    )
    ahead = setup.train.stream and any(
        copies_ahead(one.repeats * len(one.pattern), together, setup.train.checkpoint)
        for one in c.segments
    )
    return {
        ("layer", "adapter"): parts["adapter"] * (setup.train.optimizer == "adamw"),
        ("layer", "adapter_8_bit"): parts["adapter"]
        * (setup.train.optimizer != "adamw"),
        ("layer", "accumulated"): parts["adapter"] * _adds_up(setup),
        ("layer", "layer"): a_layer,
        ("layer", "ahead"): a_layer * ahead,
        ("layer", "turn"): a_layer * (turns - 1),
        ("layer", "wide"): tokens * max(slot.wide for slot in slots),
        ("layer", "hidden_both"): tokens * c.hidden_size * (c.norms == "both"),
        ("layer", "kv"): tokens * max(slot.kept.get("k", 0) for slot in slots),
        ("layer", "bias"): tokens * biased * c.attention_bias,
        ("layer", "together"): more * c.hidden_size,
        ("layer", "several"): tokens * c.hidden_size * (together > 1),
        ("layer", "decoded"): decoded,
        ("loss", "logits"): chunk,
        ("loss", "pieces"): float(bool(pieces)),
        ("loss", "int8"): (head == "int8") * chunk * item / 4,
        ("loss", "workspace"): 1.0,
    }
