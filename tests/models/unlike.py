"""A family that no checkpoint has: layers of four kinds, with a mixer and a feed-forward that
the library does not know. What works for it works for whatever a new family brings.

The mixer is the one that CONTRIBUTING.md shows how to add.
"""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import jax
import tiny
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.models import Decoder
from qlora_jax.models.feed_forward import FEED_FORWARDS
from qlora_jax.models.mixers import MIXERS
from qlora_jax.models.spec import AttentionSpec, ExpertsSpec, LayerSpec, MLPSpec
from qlora_jax.nn.lora import project


def _written(heading: str) -> dict[str, Any]:
    """Runs the first block of Python under a heading of CONTRIBUTING.md, as a file of it."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split(f"## {heading}")[1].split("```python\n")[1].split("```")[0]
    module = types.ModuleType("written")
    sys.modules[module.__name__] = module
    exec(code, module.__dict__)
    return module.__dict__


_MIXER = _written("Adding a mixer")
DecaySpec, Decay = _MIXER["DecaySpec"], _MIXER["Decay"]


@dataclasses.dataclass(frozen=True)
class SquaredSpec:
    """Two linears with a squared ReLU between them."""

    width: int


class Squared(nnx.Module):
    def __init__(self, spec, config, linear, normal):
        self.width = spec.width
        self.up_proj = linear(spec.width, config.hidden_size, False)
        self.down_proj = linear(config.hidden_size, spec.width, False)

    kept = property(lambda self: {"up": self.width})

    def __call__(self, x, key=None):
        up = checkpoint_name(project(self.up_proj, x, key, 4), "up")
        return project(self.down_proj, jax.nn.relu(up) ** 2, key, 5)


def known(monkeypatch: Any) -> None:
    """Puts both into the library's tables while a test runs."""
    monkeypatch.setitem(MIXERS, DecaySpec, Decay)
    monkeypatch.setitem(FEED_FORWARDS, SquaredSpec, Squared)


FIRST = LayerSpec(feed_forward=MLPSpec(intermediate_size=192))
PATTERN = (
    LayerSpec(mixer=DecaySpec(decay=0.5), feed_forward=ExpertsSpec()),
    LayerSpec(mixer=AttentionSpec(window=3), feed_forward=SquaredSpec(width=128)),
    LayerSpec(mixer=AttentionSpec(rope="none"), feed_forward=ExpertsSpec()),
)


def config(repeats: int = 2) -> Any:
    """Returns a dense layer, and then three unlike ones in turn."""
    layers = (FIRST, *PATTERN * repeats)
    return dataclasses.replace(
        tiny.CONFIG, num_layers=len(layers), layers=layers, num_experts=2
    )


def decoder(repeats: int = 2) -> Decoder:
    """Returns a dense decoder of it; its table is large enough for logits to differ."""
    model = Decoder(config(repeats), key=jax.random.key(0), dtype="float32")
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, state)
    )
