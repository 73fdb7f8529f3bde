"""Embedding and head in a PEFT folder: copies that are no part of it, and tied heads."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pallas_kernels.formats import PackedWeight
from qlora_jax.exchange.peft.names import Tensors
from qlora_jax.models import Decoder
from qlora_jax.names import EMBEDDING, HEAD

TABLES = (f"{EMBEDDING}.weight", f"{EMBEDDING}.lora_a", f"{HEAD}.kernel")
"""Parameters with a row a token."""


def follow_the_embedding(
    flat: dict[str, np.ndarray], settings: Mapping[str, Any], model: Decoder
) -> list[str]:
    """Adds the factors of a tied head that follow the embedding's; returns what is said.

    With ensure_weight_tying PEFT gives the head lora_A = lora_embedding_B transposed and
    lora_B = lora_embedding_A transposed. Here they are copies.
    """
    pair = [f"{EMBEDDING}.{factor}" for factor in ("lora_a", "lora_b")]
    follows = settings.get("ensure_weight_tying") and model.lm_head is None
    if not follows or not all(name in flat for name in pair):
        return []
    flat[f"{HEAD}.lora_a"], flat[f"{HEAD}.lora_b"] = (
        flat[name].T for name in pair[::-1]
    )
    return [
        "the head's factors follow the embedding's (ensure_weight_tying): they are copies "
        "here, which learn apart from each other"
    ]


def not_copies(
    tensors: Tensors,
    model: Decoder,
    settings: Mapping[str, Any],
    trained: set[str],
    tokens: set[int],
) -> list[str]:
    """Takes what PEFT saves along with an adapter, and is no part of it, out of `flat`.

    That is copies of embedding and head, where an adapter is on them or the vocabulary has
    grown, and the head of a tied embedding that trains. `trained` are the modules that
    modules_to_save names. Returns what differs.
    """
    flat, copies = tensors.flat, tensors.copies
    head, table = f"{HEAD}.kernel", f"{EMBEDDING}.weight"
    for theirs, mine, follows in (
        (head, table, settings.get("ensure_weight_tying")),
        (f"{HEAD}.rows", f"{EMBEDDING}.rows", True),
    ):
        if follows and model.lm_head is None and theirs in flat and mine in flat:
            if np.array_equal(flat[theirs], flat[mine]):
                del flat[theirs]
    for name, part in ((HEAD, head), (EMBEDDING, table)):
        if part in flat and name not in trained:
            # Of a vocabulary that has grown: the new rows are nowhere else.
            if len(flat[part]) == model.config.vocab_size or tokens:
                copies[name] = flat.pop(part)
    problems = []
    for name, array in copies.items():
        ours = _own_weight(model, name)
        if isinstance(ours, jax.ShapeDtypeStruct):
            continue
        if ours is None:
            problems.append(f"a copy of {name} is no part of an adapter")
            continue
        whole = f"{name}.kernel" in flat or f"{name}.weight" in flat
        new = set() if whole else set(range(len(ours), len(array)))
        # To the rounding of a 16-bit copy.
        same = array.shape[1:] == ours.shape[1:] and np.allclose(
            ours, np.asarray(array[: len(ours)], np.float32), rtol=2**-7, atol=1e-6
        )
        if not same or new - tokens:
            problems.append(f"{name} differs from the model's")
    return problems


def _own_weight(model: Decoder, name: str) -> Any:
    """Returns the model's own table, or its shape where there is no more of it."""
    if name not in (EMBEDDING, HEAD):
        return None
    if name == HEAD and model.lm_head is not None:
        table = model.lm_head.kernel.get_value()
    else:
        table = model.embed_tokens.weight.get_value()
    if isinstance(table, PackedWeight):  # further from a copy than its rounding
        return jax.ShapeDtypeStruct(table.shape, "float32")
    return table if isinstance(table, jax.ShapeDtypeStruct) else np.asarray(table, "f4")
