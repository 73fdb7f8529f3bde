"""What mixes positions in a layer: one file each, and the table of them."""

from typing import Any

from qlora_jax.models.mixers.attention import Attention
from qlora_jax.models.mixers.delta_net import DeltaNet
from qlora_jax.models.mixers.latent_attention import LatentAttention
from qlora_jax.models.mixers.mamba import Mamba
from qlora_jax.models.mixers.short_conv import ShortConv
from qlora_jax.models.spec import (
    AttentionSpec,
    DeltaSpec,
    LatentSpec,
    MambaSpec,
    ShortConvSpec,
)

MIXERS: dict[type, Any] = {
    AttentionSpec: Attention,
    DeltaSpec: DeltaNet,
    LatentSpec: LatentAttention,
    ShortConvSpec: ShortConv,
    MambaSpec: Mamba,
}
"""Class of a LayerSpec's mixer -> the module that it stands for, which has

    __init__(spec, config, linear, norm, normal)
        linear(out, in, bias) and norm(features, offset, eps, groups) make its parts, and
        normal(*shape) draws other parameters, all with the axis of a stack. A norm's offset
        and eps are the config's where none are given.
    shared(positions) -> dict
        What all layers need that depends on positions alone, int32 (batch, seq), such as
        rotations; made once for all layers.
    empty_cache(batch, capacity, dtype) -> pytree
        What one layer remembers of the tokens it has seen, of none at first.
    kept -> {name: features a token}
        What it keeps for backward under each name that it gives `checkpoint_name`; names
        are those of SAVED in layers.py.
    __call__(x, context, cache, key) -> (y, new cache)
        x and y are (batch, seq, hidden); cache is None while training, and so is the new
        one; `context` is a `cache.Context`; `key` is for LoRA dropout, or None. A mixer
        whose spec has `gives` returns what later layers find in `context.given` in place of
        the new cache: while decoding that is the cache, while training the same of these
        tokens alone.
"""
