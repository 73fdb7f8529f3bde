"""LoRA+ is AdamW whose lora_b has a learning rate of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.adapters import attach, split
from qlora_jax.adapters.names import flatten
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.optim.lora_plus import lora_plus
from qlora_jax.train.optimizer import make_optimizer


def stepped(ratio: float, **config: object) -> dict[str, np.ndarray]:
    """Returns what two steps on a constant gradient made of zeros, by name."""
    lora = LoRAConfig(rank=2, targets="q_proj,embed_tokens")
    lora = split(attach(tiny.decoder(), lora, key=jax.random.key(0)))[1]
    params = jax.tree.map(jnp.zeros_like, lora)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.01), lora)
    tx = make_optimizer(
        TrainConfig(lora_plus_ratio=ratio, learning_rate=1e-3, **config), 10
    )
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(x) for name, x in flatten(params).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{}, {"offload": True, "weight_decay": 0.1}, {"optimizer": "adamw8bit"}]
)
def test_lora_b_moves_a_ratio_times_as_far(config):
    plain, faster = stepped(1.0, **config), stepped(16.0, **config)
    moved = "layers.0.attn.q_proj.lora_b"
    decay = 2e-4 if "weight_decay" in config else 1e-6
    np.testing.assert_allclose(faster[moved], 16 * plain[moved], rtol=16 * decay)
    assert np.abs(plain[moved]).min() > 0
    for name in plain.keys() - {moved, moved.replace("0", "1", 1)}:
        np.testing.assert_array_equal(faster[name], plain[name])


def test_every_lora_b_but_the_embeddings_is_faster():
    ones = {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}
    updates = {"layers": {"q_proj": ones}, "embed_tokens": ones, "lm_head": ones}
    faster, _ = lora_plus(16.0).update(updates, optax.EmptyState())
    moved = jax.tree.map(lambda x: float(x[0]), faster)
    slow, fast = {"lora_a": 1.0, "lora_b": 1.0}, {"lora_a": 1.0, "lora_b": 16.0}
    assert moved == {
        "layers": {"q_proj": fast},
        "embed_tokens": slow,
        "lm_head": fast,
    }


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="--train.lora-plus-ratio is 0"):
        TrainConfig(lora_plus_ratio=0)
