"""OLMo 3: OLMo 2 with windows on three of four layers, whose rotary positions are their own."""

from typing import Any

from qlora_jax.models import olmo2, reading
from qlora_jax.nn.rope import Rope

MODEL_TYPE = "olmo3"
NAMES = olmo2.NAMES
IGNORED = olmo2.IGNORED
DEFAULTS = {"rms_norm_eps": 1e-5, "sliding_window": 4096}
_THETA = 5e5


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    types, problems = reading.full_each(hf, 4)
    rope = hf.get("rope_parameters") or {}
    far, near = rope.get(reading.FULL), rope.get(reading.SLIDING)
    if far is None and near is None:
        # The older spelling, in which scaling is of full layers.
        theta = hf.get("rope_theta") or _THETA
        if theta != _THETA:
            problems.append(
                f"rope_theta is {theta}, which transformers 4 gives to all layers and "
                "transformers 5 to full ones; write rope_parameters with full_attention and "
                "sliding_attention, and a rope_theta in each"
            )
        far = hf.get("rope_scaling") or {}
    far, near = ({"rope_theta": _THETA} | (one or {}) for one in (far, near))
    scaling, theta, _, problem = reading.read_rope(hf, near)
    return reading.read(
        hf,
        problems + ([f"of sliding layers, {problem}"] if problem else []),
        rope=far,
        norms="post",
        qk_norm="all",
        types=types,
        sliding_rope=Rope(theta=theta, scaling=scaling, dim=reading.head_dim(hf)),
    )
