"""What a run will need of device and host memory, part by part, from shapes alone.

What is resident (base, tables, adapter, optimizer state) is counted exactly. What a step
holds for a while is a model of XLA's buffer assignment:

    gradients  +  activations kept for backward  +  the largest of what is alive at once
                                                    (a layer's backward, or the loss)

whose coefficients were fitted to compiled steps (scripts/measure_memory.py), one set for
NVIDIA GPUs and one for CPUs; tests/train/test_memory.py holds it to 5 % of XLA's account.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pallas_kernels.layout import QuantizedTensor, abstract_tensor
from qlora_jax.adapters.attach import attach_zero, split
from qlora_jax.adapters.config import LoRAConfig
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.decoder import Checkpoint
from qlora_jax.nn import (
    Embedding,
    FrozenParam,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
)
from qlora_jax.quant import QuantConfig

Platform = Literal["gpu", "cpu"]


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
    offload: bool = False
    """Optimizer state on the host."""
    stream: bool = False
    """Layers' weights on the host."""
    quantize_embedding: bool = False
    quantize_head: bool = False

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
    """

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """All of the device's."""
        return sum(self.device.values())

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
        head = path == ("lm_head",)
        if setup.quant is None:
            return node
        if isinstance(node, Linear) and (setup.quantize_head or not head):
            *stack, n, k = node.kernel.get_value().shape
            bias = None if node.bias is None else node.bias.get_value()
            made = QuantizedLinear(_packed((n, k), tuple(stack), setup))
            return _biased(made, bias)
        if isinstance(node, Embedding) and setup.quantize_embedding:
            return QuantizedEmbedding(_packed(node.weight.get_value().shape, (), setup))
        return node

    graphdef, state = nnx.split(nnx.recursive_map(replace, skeleton))

    def adapted(state: nnx.State) -> Decoder:
        model = nnx.merge(graphdef, state)
        return attach_zero(model, setup.lora, key=jax.random.key(0))

    whole = split(nnx.eval_shape(adapted, state))[0]
    lora, base = jax.eval_shape(lambda state: split(adapted(state))[1:], state)
    return whole, lora, base


def _packed(
    shape: tuple[int, ...], stack: tuple[int, ...], setup: Setup
) -> QuantizedTensor:
    quant = setup.quant
    assert quant is not None
    return abstract_tensor(
        shape,
        stack,
        block_size=quant.block_size,
        codebook=quant.codebook,
        double_quant=quant.double_quant,
        dtype=setup.dtype,
    )


def _biased(linear: QuantizedLinear, bias: Any) -> QuantizedLinear:
    if bias is not None:
        linear.bias = nnx.data(FrozenParam(bias))
    return linear


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def optimizer_state(lora: nnx.State) -> Any:
    """Returns AdamW's state of an adapter, as shapes."""
    return jax.eval_shape(optax.adamw(1e-4).init, lora)


@dataclasses.dataclass(frozen=True)
class _Transients:
    """What a step holds for a while beside gradients and kept activations, as multiples.

    Attributes:
      adapter: Of the adapter's bytes: copies in the compute dtype, updates.
      accumulated: The same, more, with more than one micro-batch.
      layer: Of a layer's stored weights: cut out of the stack.
      turn: The same for each further layer of a group in turns.
      wide, hidden_both, kv: Of tokens x the compute dtype's bytes x intermediate size, hidden
        size (where norms stand before and after), and kv heads' size.
      logits: Of the float32 logits of a chunk of the loss.
      decoded: Of the largest piece of a weight that is decoded at once.
    """

    adapter: float
    accumulated: float = 0.0
    layer: float = 0.0
    turn: float = 0.0
    wide: float = 0.0
    hidden_both: float = 0.0
    kv: float = 0.0
    logits: float = 0.0
    decoded: float = 0.0


# By least largest error over scripts/results/memory_*.jsonl: 1.2 % and 4.8 % of a step's all.
_FITTED: dict[tuple[Platform, bool], _Transients] = {
    ("gpu", True): _Transients(
        adapter=0.67,
        accumulated=0.58,
        layer=0.45,
        wide=5.24,
        hidden_both=24.7,
        kv=9.55,
        logits=0.13,
    ),
    ("gpu", False): _Transients(
        adapter=0.06, accumulated=0.58, wide=5.24, kv=7.08, logits=0.02
    ),
    ("cpu", True): _Transients(
        adapter=2.0, layer=1.10, turn=6.53, wide=13.5, decoded=4.08
    ),
    ("cpu", False): _Transients(
        adapter=1.88, turn=4.94, wide=11.93, kv=8.54, decoded=3.46
    ),
}
"""By platform, and whether whole layers are recomputed."""


def estimate(setup: Setup, platform: Platform = "gpu") -> Memory:
    """Returns what a step needs, by part.

    On a CPU device and host are one memory, and all is the device's.
    """
    parts = _resident(setup)
    kept = _kept(setup, platform)
    device = {
        "layers": parts["layers"],
        "embedding": parts["embedding"],
        "head": parts["head"],
        "adapter": parts["adapter"],
        "optimizer state": parts["optimizer"],
        "gradients": parts["adapter"],
        "activations for backward": kept,
        "while a layer or the loss runs": _transients(setup, platform, parts),
    }
    host: dict[str, int] = dict.fromkeys(
        ("layers", "optimizer state", "activations for backward"), 0
    )
    if platform == "gpu":
        if setup.stream:
            host["layers"] = device.pop("layers")
        if setup.offload:
            host["optimizer state"] = device.pop("optimizer state")
        if setup.checkpoint == "host":
            c = setup.config
            each = setup.tokens * c.hidden_size * jnp.dtype(setup.dtype).itemsize
            host["activations for backward"] = c.num_layers * each
    return Memory(device, host)


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
        stream=False,
    )
    if (known := _COUNTED.get(repr(plain))) is not None:
        return known
    _, lora, base = abstract_parts(plain)
    sizes: dict[str, int] = dict.fromkeys(("layers", "embedding", "head"), 0)
    names = {"embed_tokens": "embedding", "lm_head": "head"}
    for path, variable in nnx.to_flat_state(base):
        part = "layers" if path[0] == "layers" else names.get(str(path[0]), "head")
        sizes[part] += tree_bytes(variable.get_value())
    sizes["adapter"] = tree_bytes(lora)
    sizes["optimizer"] = tree_bytes(optimizer_state(lora))
    _COUNTED[repr(plain)] = sizes
    return sizes


def _kept(setup: Setup, platform: Platform) -> int:
    """Returns the bytes of activations that wait on the device for backward."""
    c = setup.config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    each = setup.tokens * jnp.dtype(setup.dtype).itemsize
    if setup.checkpoint == "host" and platform == "gpu":
        return 2 * each * c.hidden_size  # one that arrives, one that leaves
    a_layer = c.hidden_size
    if setup.checkpoint == "attention":
        a_layer += q
    if setup.checkpoint == "none":
        a_layer += c.hidden_size + 2 * q + 2 * kv + 2 * _wide(c)
        a_layer += (4 if c.fused else 7) * setup.lora.rank
        a_layer += q + kv if c.qk_norm != "none" else 0
        a_layer += 2 * c.hidden_size if c.norms != "pre" else 0
    return c.num_layers * each * a_layer


def _wide(config: DecoderConfig) -> int:
    """Returns the feed-forward features that a token meets."""
    experts = config.experts_per_token if config.num_experts else 1
    return config.intermediate_size * experts


def _transients(setup: Setup, platform: Platform, parts: dict[str, int]) -> int:
    c, item = setup.config, jnp.dtype(setup.dtype).itemsize
    fit = _FITTED[platform, setup.checkpoint != "none"]
    # On a CPU products come out in float32, whatever goes in.
    tokens = setup.tokens * (item if platform == "gpu" else 2)
    a_layer = parts["layers"] / c.num_layers
    chunk = _LOGITS_BYTES[platform]
    decoded = 0
    if setup.quant is not None:
        whole = c.hidden_size * c.intermediate_size
        decoded = 4 * whole if whole * item <= _WHOLE_BYTES else _TILE_BYTES
    return round(
        fit.adapter * parts["adapter"]
        + fit.accumulated * parts["adapter"] * (setup.grad_accum > 1)
        + a_layer * (fit.layer + fit.turn * (c.period - 1))
        + fit.wide * tokens * _wide(c)
        + fit.hidden_both * tokens * c.hidden_size * (c.norms == "both")
        + fit.kv * tokens * c.num_kv_heads * c.head_dim
        + fit.logits * min(chunk, 4 * setup.tokens * c.vocab_size)
        + fit.decoded * decoded
    )


_LOGITS_BYTES = {"gpu": 256 << 20, "cpu": 32 << 20}  # train/loss.py
_WHOLE_BYTES, _TILE_BYTES = 8 << 20, 4 << 20  # pallas_kernels/reference.py, on a CPU
