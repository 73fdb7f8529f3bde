"""Flax NNX modules: linears and embedding, frozen and adapted, norm, rotary, attention."""

from qlora_jax.nn.embedding import DecodedEmbedding as DecodedEmbedding
from qlora_jax.nn.embedding import Embedding as Embedding
from qlora_jax.nn.embedding import FrozenTable as FrozenTable
from qlora_jax.nn.embedding import LoRAEmbedding as LoRAEmbedding
from qlora_jax.nn.embedding import QuantizedEmbedding as QuantizedEmbedding
from qlora_jax.nn.embedding import TrainedRows as TrainedRows
from qlora_jax.nn.frozen import Adapted as Adapted
from qlora_jax.nn.frozen import Weighted as Weighted
from qlora_jax.nn.linear import DecodedLinear as DecodedLinear
from qlora_jax.nn.linear import FrozenLinear as FrozenLinear
from qlora_jax.nn.linear import Linear as Linear
from qlora_jax.nn.linear import QuantizedLinear as QuantizedLinear
from qlora_jax.nn.lora import LoRA as LoRA
from qlora_jax.nn.quantizing import quantize as quantize
from qlora_jax.nn.variables import FrozenParam as FrozenParam
