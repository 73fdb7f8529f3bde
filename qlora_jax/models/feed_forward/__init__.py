"""What in a layer does not mix positions: one file each, and the table of them."""

from typing import Any

from qlora_jax.models.feed_forward.beside import Beside
from qlora_jax.models.feed_forward.experts import experts
from qlora_jax.models.feed_forward.mlp import MLP
from qlora_jax.models.spec import BesideSpec, ExpertsSpec, MLPSpec

FEED_FORWARDS: dict[type, Any] = {
    MLPSpec: MLP,
    ExpertsSpec: experts,
    BesideSpec: Beside,
}
"""Class of a LayerSpec's feed-forward -> what makes the module that it stands for:

    (spec, config, linear, normal) -> module
        linear(out, in, bias, *stack) makes a linear, with more axes in front of it than the
        stack of layers has where it is given them; normal(*shape) draws other parameters.

and the module has

    kept -> {name: features a token}
        What it keeps for backward under each name that it gives `checkpoint_name`; names
        are those of SAVED in layers.py.
    __call__(x, key) -> y
        x and y are (batch, seq, hidden); `key` is for LoRA dropout, or None. One that has
        STREAM = True is called with the residual stream too, as x is before its norm.

and if it has a router

    load(x, stream, counted) -> (2, experts)
        How the router shares out those tokens of x that `counted`, (batch, seq), has a 1 for,
        see `Router.load`; `stream` is the residual stream. It is not computed unless it is
        asked for.
"""
