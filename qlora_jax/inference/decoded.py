"""A base whose 4-bit weights are decoded once, for generation and evaluation on CPUs.

A CPU has no fused kernel: a packed product decodes its weight first. For many tokens that is
little beside the product; for one token it is most of the time, and the same at each. Where
dense weights fit in memory they are decoded before the first token, in the dtype that every
product decodes them to. Adapters stay as they are. Training never does this.
"""

import dataclasses
import logging
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_kernels.device import current_device
from pallas_kernels.matmul import product_of
from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.budget.host import available_host_bytes
from qlora_jax.models.vocabulary import is_tied
from qlora_jax.names import EMBEDDING
from qlora_jax.nn import Weighted
from qlora_jax.nn.frozen import modules, replaced
from qlora_jax.nn.variables import rests_on_host

MOST_OF_AVAILABLE = 0.5
"""Decoded weights may take this part of the memory available; the rest is for the cache of
keys and values, activations and other programs."""

logger = logging.getLogger(__name__)
_SAID: set[str] = set()


def decoded(model: Any) -> Any:
    """Returns a model for inference: its 4-bit weights dense, where that is faster and fits.

    `generate` and the evaluations call it. Whoever calls those many times with one model
    passes them decoded(model), so that it is decoded once in all.

    Weights whose products do not decode them stay (int8 tables), and so do linears for
    which an implementation was named.

    Args:
      model: A Decoder, with or without an adapter, or an AdapterBank. It is left as it was,
        and shares all arrays but the decoded ones.

    Returns:
      The model with DecodedLinear and DecodedEmbedding in it; or the model itself, on
      other platforms, where nothing is 4-bit, where layers stream from host memory, or
      where memory does not suffice.
    """
    if isinstance(model, AdapterBank):
        return dataclasses.replace(model, model=decoded(model.model))
    if current_device().platform != "cpu" or rests_on_host(nnx.state(model)):
        return model
    dtype = jnp.dtype(getattr(model, "dtype", "float32"))
    tied = is_tied(model)
    count = sum(_elements(*module, tied) for module in modules(model, Weighted))
    if count == 0:
        return model
    need, free = count * dtype.itemsize, available_host_bytes()
    if free is None or need > MOST_OF_AVAILABLE * free:
        _say_packed(need, free)
        return model
    _say_once(
        "4-bit weights are decoded once, to %.2f GB of %s", need / 1e9, dtype.name
    )

    def decode(path: tuple, node: Weighted) -> nnx.Module:
        return node.decoded(dtype.name) if _elements(path, node, tied) else node

    return replaced(model, Weighted, decode)


def _elements(path: tuple, node: Weighted, tied: bool) -> int:
    """Returns how many weights of a module there are to decode."""
    tied = tied and EMBEDDING in path  # other tables are no head
    if not (node.packed and node.decodes_for_products(tied)):
        return 0
    decodes = product_of(node.stored).decodes
    return math.prod((*node.stack, *node.shape)) if decodes else 0


def _say_once(text: str, *args: Any) -> None:
    if text not in _SAID:
        _SAID.add(text)
        logger.info(text, *args)


def _say_packed(need: int, free: int | None) -> None:
    known = "how much memory is available is not known here"
    if free is not None:
        known = f"{free / 1e9:.2f} GB are available, of which they may take half"
    _say_once(
        "4-bit weights are decoded again for every token, which is slow: decoded they "
        "would take %.2f GB, and %s",
        need / 1e9,
        known,
    )
