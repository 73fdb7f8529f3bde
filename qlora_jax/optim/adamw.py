"""AdamW by name, and where its state rests."""

from typing import Any

import optax

from qlora_jax.config.train import Optimizer
from qlora_jax.optim.eight_bit import adamw_8bit
from qlora_jax.optim.offload import offload


def adamw(name: Optimizer, *args: Any, **kwargs: Any) -> optax.GradientTransformation:
    """Returns optax.adamw or adamw_8bit, which take the same arguments."""
    return (adamw_8bit if name == "adamw8bit" else optax.adamw)(*args, **kwargs)


def placed(
    tx: optax.GradientTransformation, away: bool, resident_bytes: int = 0
) -> optax.GradientTransformation:
    """Returns a transform whose state rests on the host, or on the device.

    By the same slices in either case, so that both give the same numbers.
    """
    if away:
        return offload(tx, resident_bytes=resident_bytes)
    return offload(tx, "device")
