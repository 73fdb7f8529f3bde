"""Which family is said to be nearest to a model of none, and what it lacks."""

import oracle
import pytest

from qlora_jax.errors import CheckpointError
from qlora_jax.models import FAMILIES
from qlora_jax.models.nearest import LACKING, nearest
from qlora_jax.models.wrappers import WRAPPERS
from qlora_jax.sources.source import open_source

LAYER = "model.layers.0"
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


def test_the_table_has_no_family_that_opens_and_names_one_that_does():
    assert not LACKING.keys() & (FAMILIES.keys() | WRAPPERS.keys())
    assert {family for family, _ in LACKING.values()} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("hf", "tensors", "said"),
    [
        ({"model_type": "mllama"}, (), "llama, which lacks cross-attention to images"),
        (
            oracle.hf_config(model_type="new", **MIXTURE, index_topk=512, hc_mult=4),
            (f"{LAYER}.self_attn.q_norm.weight",),
            "tensors the nearest is qwen3_moe, which has no place for index_topk, hc_mult",
        ),
        (
            oracle.hf_config(model_type="new", bos_token_id=7, attention_dropout=0.1),
            (f"{LAYER}.self_attn.q_norm.weight.absmax", f"{LAYER}.mlp.router.weight"),
            "is qwen3, which has no place for model.layers.{}.mlp.router.weight",
        ),
        (
            oracle.hf_config(model_type="new", residual_multiplier=0.2, use_cache=True),
            ("layers.0.self_attn.q_proj.weight",),
            "the nearest is granite, which knows all of them",
        ),
        (
            oracle.hf_config(model_type="new", hidden_act="xielu", sliding_window=8),
            (),
            "By its config.json the nearest is llama, which has no place for hidden_act is",
        ),
        (
            {"model_type": "new", "text_config": {"model_type": "glm4"}},
            (),
            "Its text model is a glm4, which opens when it is saved alone",
        ),
        (
            {"model_type": "new", "llm_config": {"model_type": "kimi_linear"}},
            (),
            "Of its text model ('kimi_linear'): The nearest is qwen3_next, which lacks its own",
        ),
        ({"model_type": None, "n_layer": 3}, (), "No family is near: vocab_size is"),
    ],
)
def test_the_nearest_leaves_least_unread_and_that_is_named(hf, tensors, said):
    assert said in nearest(hf, tensors)


def test_it_is_said_of_a_folder_whether_or_not_its_tensors_can_be_read(tmp_path):
    hf = oracle.hf_config(model_type="new")
    tensors = oracle.hf_tensors(oracle.hf_config())
    oracle.write_folder(
        tmp_path, hf, tensors | {f"{LAYER}.odd": tensors["lm_head.weight"]}
    )
    with pytest.raises(CheckpointError, match="By its config.json and .*{}.odd$"):
        _ = open_source(tmp_path).config
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="By its config.json the nearest is llama"
    ):
        _ = open_source(tmp_path).config
