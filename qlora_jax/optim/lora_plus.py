"""LoRA+: lora_b learns faster than lora_a.

Source: Hayou et al., arXiv 2402.12354, which finds a ratio of about 16 good; PEFT's
create_loraplus_optimizer. Adam's update, decay with it, is the learning rate times
something, so that multiplying it is learning at a multiple of the rate.
"""

from typing import Any

import jax
import optax

from qlora_jax.names import EMBEDDING

FASTER = "lora_b"


def lora_plus(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of every lora_b but the embedding's by a number.

    Args:
      ratio: The learning rate of lora_b as a multiple of all others'; 1 changes nothing.

    Returns:
      A stateless optax transform, for the end of a chain.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree.map_with_path(
            lambda path, u: u * ratio if _faster(path) else u, updates
        )
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _faster(path: tuple[Any, ...]) -> bool:
    names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
    return FASTER in names and EMBEDDING not in names
