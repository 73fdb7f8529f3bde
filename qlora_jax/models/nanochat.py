"""nanochat: norms without weights, and a squared ReLU in place of the gate.

Embeddings, queries and keys have such a norm too; heads turn backward.
"""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "nanochat"
NAMES = llama.NAMES | {
    "layers.mlp.up_proj.kernel": "model.layers.{}.mlp.fc1.weight",
    "layers.mlp.down_proj.kernel": "model.layers.{}.mlp.fc2.weight",
}
IGNORED = llama.IGNORED
DEFAULTS = {"hidden_act": "relu2", "final_logit_softcapping": 15.0}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(
        hf,
        gated=False,
        norm_kind="bare",
        embedding_norm=True,
        qk_norm="rotated",
        rope_backward=True,
        logit_softcap=hf["final_logit_softcapping"],
    )
