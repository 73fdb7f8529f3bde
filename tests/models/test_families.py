"""config.json of each family to a DecoderConfig, and what is refused."""

import dataclasses
import inspect
import re

import oracle
import pytest
from models.family_cases import CASES

from qlora_jax.errors import CheckpointError
from qlora_jax.models import (
    FAMILIES,
    DecoderConfig,
    config_json,
    read_config,
    reading,
    settings,
)
from qlora_jax.nn.rope import Rope, RopeScaling

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE = {"model_type": "granitemoehybrid", "mamba_n_heads": 4}
DEEPSEEK = {"model_type": "kimi_k2", "num_key_value_heads": 4}
SCALING = RopeScaling(kind="llama3", factor=32.0)


def read(hf: dict) -> DecoderConfig:
    config, problems = read_config(hf)
    assert not problems
    return config


def problems(hf: dict) -> str:
    config, found = read_config(hf)
    assert config is None
    return "\n".join(found)


def test_the_families_are_named_by_their_model_type():
    assert {name: family.MODEL_TYPE for name, family in FAMILIES.items()} == {
        name: name for name in FAMILIES
    }


def test_llama_reads_sizes_and_derives_what_is_left_out():
    hf = oracle.hf_config()
    config = read(hf)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 2, 16)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    del hf["num_key_value_heads"]
    assert read(hf).num_kv_heads == 4
    assert read(hf | {"head_dim": 24}).head_dim == 24


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_rotary_settings_are_read_in_each_of_their_spellings(rope):
    config = read(oracle.hf_config(**rope))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == SCALING


def test_llamas_bias_is_on_all_four_projections_and_qwen2s_on_three():
    config = read(oracle.hf_config(attention_bias=True))
    assert config.attention_bias and config.output_bias
    config = read(oracle.hf_config(model_type="qwen2"))
    assert config.attention_bias and not config.output_bias


def test_mistral_reads_its_window():
    hf = oracle.hf_config(model_type="mistral")
    assert read(hf | {"sliding_window": 7}).sliding_window == 7
    assert read(hf | {"sliding_window": None}).sliding_window is None


def test_all_problems_of_a_config_are_named():
    hf = oracle.hf_config(hidden_act="relu", mlp_bias=True)
    hf["rope_scaling"] = {"rope_type": "spiral", "factor": 2.0}
    del hf["vocab_size"], hf["num_hidden_layers"]
    found = problems(hf)
    for part in (
        "vocab_size is missing",
        "num_hidden_layers is missing",
        "hidden_act is 'relu'; known: silu",
        "mlp_bias is true",
        "type 'spiral'; known: default, linear, dynamic, yarn, llama3",
    ):
        assert part in found


def test_scaling_without_its_parameters_is_refused():
    hf = oracle.hf_config(rope_scaling={"rope_type": "llama3", "factor": 8.0})
    assert "'llama3' lacks low_freq_factor, high_freq_factor" in problems(hf)
    hf = oracle.hf_config(rope_scaling={"type": "linear"})
    assert "'linear' lacks factor" in problems(hf)


def shape(config):
    return [(len(one.pattern), one.repeats) for one in config.segments]


def test_layers_are_scanned_by_the_pattern_that_repeats():
    hf = oracle.hf_config(model_type="gemma3_text", num_hidden_layers=26)
    config = read(hf)
    assert shape(config) == [(6, 4), (1, 2)]
    local = Rope(theta=1e4, dim=config.head_dim)
    assert [spec.mixer.rope for spec in config.specs[:6]] == [local] * 5 + ["global"]
    gemma2 = read(oracle.hf_config(model_type="gemma2", num_hidden_layers=26))
    assert shape(gemma2) == [(2, 13)]
    windows = {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9}
    hf = oracle.hf_config(model_type="qwen2", num_hidden_layers=5, **windows)
    assert [spec.mixer.window for spec in read(hf).specs] == [None] * 3 + [9] * 2
    assert shape(read(hf)) == [(1, 3), (1, 2)]
    assert shape(read(oracle.hf_config(model_type="qwen2"))) == [(1, 2)]
    hf = oracle.hf_config(model_type="qwen3_5_text", num_hidden_layers=64)
    assert shape(read(hf)) == [(4, 16)]


def test_gemma_4s_layers_take_turns_and_later_ones_take_from_earlier_ones():
    hf = oracle.hf_config(model_type="gemma4_text", num_hidden_layers=60)
    hf |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    config = read(hf)
    assert shape(config) == [(6, 10)]
    near, far = (config.specs[i].mixer for i in (4, 5))
    assert (near.head_dim, near.kv_heads, near.keys_as_values) == (None, None, False)
    assert (far.head_dim, far.kv_heads, far.keys_as_values) == (512, 1, True)
    scaling = RopeScaling(kind="proportional", share=0.25)
    assert far.rope == Rope(theta=1e6, scaling=scaling, dim=512)
    # As E2B has them: 15 layers with keys and values of their own, then 20 without.
    types = [*["sliding_attention"] * 4, "full_attention"] * 7
    shared = {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
    hf |= {"num_hidden_layers": 35, "layer_types": types} | shared
    config = read(hf)
    gives = {i: s.gives for i, s in enumerate(config.specs) if s.gives}
    assert gives == {13: "sliding_attention", 14: "full_attention"}
    assert [s.mixer.takes for s in config.specs] == [None] * 15 + types[15:]
    wide = [s.feed_forward.intermediate_size for s in config.specs]
    assert wide == [None] * 15 + [2 * config.intermediate_size] * 20
    assert sum(size for size, _ in shape(config)) == 12


def test_what_a_family_cannot_be_is_refused():
    hf = oracle.hf_config(model_type="gemma2", use_bidirectional_attention=True)
    assert "only causal is supported" in problems(hf)
    rope = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    hf = oracle.hf_config(model_type="gemma3_text", rope_parameters=rope)
    assert "the sliding layers' rope_scaling is linear" in problems(hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types has chunked"),
        ({"hidden_activation": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "is 9, of 8 experts"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "has 1 entries for 2"),
        ({"model_type": "qwen3_5_text", "layer_types": ["mamba"]}, "1 entries for 2"),
        (
            {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
            "use_bidirectional_attention is 'all'; of text only causal",
        ),
        (
            {"model_type": "gemma4_text", "num_kv_shared_layers": 1},
            "leaves no layer of full_attention with keys and values of its own",
        ),
        (
            {"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 4},
            "top_k_experts is missing, and enable_moe_block is true",
        ),
        (
            {"model_type": "gemma4_text", "vocab_size_per_layer_input": 5},
            "vocab_size_per_layer_input is 5, expected at least vocab_size",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"1": {"skip": ["mlp"]}}},
            "per_layer_config of layer 1 has skip; known: head_dim",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"2": {}}},
            "per_layer_config has layer '2', of 2 layers from 0",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"1": {"head_dim": 7}}},
            "layer 1 has 2 heads of 7 features for 4 queries",
        ),
        (
            {"model_type": "gemma4_text", "rope_parameters": {"full_attention": {}}},
            "rope_parameters has no sliding_attention",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": "LLLG"},
            "sliding_window_pattern is 'LLLG', expected a whole number above 0",
        ),
        (
            {"model_type": "exaone4", "sliding_window_pattern": "LLS"},
            "sliding_window_pattern is 'LLS'",
        ),
        (
            {"model_type": "cohere2", "sliding_window": None},
            "sliding_window is null, and there are sliding layers",
        ),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm is true"),
        ({"model_type": "ernie4_5", "use_bias": True}, "use_bias is true"),
        ({"model_type": "olmo3", "rope_theta": 1e6}, "rope_theta is 1000000.0"),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {"sliding_attention": {"rope_type": "spiral"}},
            },
            "of sliding layers, rope_scaling has type 'spiral'",
        ),
        (
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}},
            "rope_parameters lacks llama_4_scaling_beta",
        ),
        (
            {"model_type": "qwen3_5_text", "layer_types": ["full_attention", "conv"]},
            "layer_types has conv; known: full_attention, linear_attention",
        ),
        (
            {"model_type": "qwen3_5_text", "linear_num_value_heads": 24},
            "24, expected a multiple of linear_num_key_heads, which is 16",
        ),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                },
            },
            r"of [1] values, expected 8",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes, message):
    hf = oracle.hf_config(**{"model_type": "gemma2"} | changes)
    assert message in problems(hf)


def test_layers_without_a_window_have_no_rotary_positions_where_others_have_one():
    def kinds(**changes):
        hf = oracle.hf_config(**{"num_hidden_layers": 5} | changes)
        return "".join(
            ("L" if spec.mixer.window else "G") + spec.mixer.rope[0]
            for spec in read(hf).specs
        )

    for pattern in (4, "LLLG"):
        got = kinds(model_type="exaone4", sliding_window_pattern=pattern)
        assert got == "LgLgLgGnLg"
    pattern = {"sliding_window": None, "sliding_window_pattern": 0}
    assert kinds(model_type="exaone4", **pattern) == "Gg" * 5
    assert kinds(model_type="cohere2") == "LgLgLgGnLg"


def test_olmo_3_scales_full_layers_alone_in_both_spellings():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    old = read(oracle.hf_config(model_type="olmo3", rope_theta=5e5, rope_scaling=yarn))
    new = read(
        oracle.hf_config(model_type="olmo3", rope_parameters={"full_attention": yarn})
    )
    assert old == new and old.rope_scaling is not None
    near = [spec.mixer.rope for spec in old.specs if spec.mixer.window]
    assert near == [Rope(theta=5e5, dim=old.head_dim)] * len(near) and near


def test_more_rope_flags_than_layers_and_old_gelu_are_taken():
    hf = oracle.hf_config(model_type="smollm3", no_rope_layers=[1, 0, 1])
    assert [spec.mixer.rope for spec in read(hf).specs] == ["global", "none"]
    hf = oracle.hf_config(model_type="gemma", hidden_act="gelu")
    assert read(hf).activation == "gelu_tanh"


def test_kimi_k2_is_read_as_deepseek_v3():
    hf = CASES["deepseek_v3"]
    config = read(hf | {"model_type": "kimi_k2"})
    assert config == read(hf) and config.model_type == "kimi_k2"
    assert FAMILIES["kimi_k2"].NAMES is FAMILIES["deepseek_v3"].NAMES


def test_a_shape_of_no_writable_family_asks_for_its_source():
    config = read(oracle.hf_config(model_type="granite", residual_multiplier=0.5))
    with pytest.raises(CheckpointError, match="give the folder it came from"):
        config_json.write_config(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": SCALING, "rope_theta": 5e5},
        {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
        {"attention_bias": True, "output_bias": True, "tie_word_embeddings": True},
        {"sliding_window": 5},
        {"attention_bias": True},
    ],
    ids=["plain", "llama3", "linear", "biases", "window", "bias on q, k and v"],
)
def test_a_written_config_reads_back_as_it_was(changes):
    config = dataclasses.replace(read(oracle.hf_config()), **changes)
    assert read(config_json.write_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0.5}, "hidden_size is 0.5, expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True, expected a whole number"),
        ({"num_hidden_layers": 10**9}, "expected a whole number from 1 to 1000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "x" * 10**6}, r"xxx\.\.\."),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": ["linear"]}, "rope_scaling is .*expected null or an object"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        (
            {"rope_parameters": {"full_attention": 3}},
            "kind of layers that is no object",
        ),
        ({"hidden_act": ["silu"]}, "hidden_act is .*expected null or a text"),
        ({"layer_types": [3, "x"]}, r"layer_types\[0\] is 3, expected a text"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "sparse_step is 0"),
        ({"model_type": "smollm3", "no_rope_layers": "ab"}, "no_rope_layers is 'ab'"),
        (
            {"model_type": "qwen3_5_text", "full_attention_interval": 0},
            "full_attention_interval is 0",
        ),
        (
            {"model_type": "qwen3_5_text", "linear_key_head_dim": 1.5},
            "linear_key_head_dim is 1.5",
        ),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads"),
        (
            DEEPSEEK | {"num_key_value_heads": 2},
            "num_key_value_heads is 2, expected num_",
        ),
        (DEEPSEEK | {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "is 'softmax', expected 'sigmoid'"),
        (DEEPSEEK | {"topk_method": "greedy"}, "is 'greedy'; known: noaux_tc"),
        (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq is 2, expected 1"),
        (DEEPSEEK | {"partial_rotary_factor": 0.5}, "rotary_factor is 0.5, expected 1"),
        (DEEPSEEK | {"n_group": 2, "topk_group": 3}, "n_group is 2, topk_group is 3"),
        (
            DEEPSEEK | {"num_experts_per_tok": 200},
            "enough experts in them for each tok",
        ),
        (
            GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 0},
            "is 0, of 4 exp",
        ),
        (
            GRANITE | {"mamba_d_head": 7},
            "mamba_n_heads is 4, mamba_d_head 7 and mamba_n_",
        ),
        (GRANITE | {"mamba_n_groups": 3}, "as many heads in each group"),
        (
            GRANITE | {"time_step_limit": [0.1, 2.0]},
            "time_step_limit is .0.1, 2.0.; steps",
        ),
        (
            GRANITE | {"position_embedding_type": "alibi"},
            "is 'alibi'; known: null, nope",
        ),
        (
            GRANITE | {"layer_types": ["moe"]},
            "1 entries for 2 layers\nlayer_types has moe",
        ),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "x"]},
            "has x; known: full_att",
        ),
        ({"model_type": "lfm2", "layer_types": ["conv"]}, "has 1 entries for 2 layers"),
        ({"model_type": "lfm2_moe"}, "layer_types is missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 0},
            "per_tok is 2, of 0 experts",
        ),
        (
            {"model_type": "deepseek_v2", "norm_topk_prob": True},
            "norm_topk_prob is true.*\nnum_experts_per_tok is missing",
        ),
        (
            {
                "model_type": "glm4_moe_lite",
                "mlp_layer_types": ["dense", "odd", "dense"],
            },
            "has 3 entries for 2 layers\nmlp_layer_types has odd; known: dense, sparse",
        ),
        (
            {"num_attention_heads": 64, "num_key_value_heads": 64},
            "a head has 1 features",
        ),
        ({"head_dim": 7}, "a head has 7 features, of which 7 are rotated"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": 1.0}},
            "low_freq_factor 1.0 and high_freq_factor 1.0",
        ),
    ],
)
def test_fields_are_held_to_their_kinds_and_ranges(changes, message):
    assert re.search(message, problems(oracle.hf_config() | changes))


def test_every_field_that_a_family_reads_has_a_kind():
    """Reads the families' own sources: what they take from a config.json is in the table."""
    taken = set()
    for family in (*FAMILIES.values(), reading):
        text = inspect.getsource(family)
        taken |= set(re.findall(r"""hf(?:\.get\(|\[)"(\w+)\"""", text))
    free = {"use_bidirectional_attention", "hidden_act"}  # true or false alone; its own
    assert taken - free <= settings.KINDS.keys()
    assert len(taken) > 20


@pytest.mark.parametrize("name", CASES)
def test_null_is_no_value_where_it_says_nothing(name):
    # transformers writes it for what a model has not: "num_experts": null in a Llama's.
    hf = CASES[name]
    nulls = {key: None for key, kind in settings.KINDS.items() if kind.fits(None)}
    silent = {key: None for key in settings.KINDS if settings.of_some_families(key)}
    for key in getattr(FAMILIES[hf["model_type"]], "DEFAULTS", {}):
        silent.pop(key, None)  # what the family has itself cannot be null
    assert "logits_scaling" in silent and "sliding_window" not in silent
    config, found = read_config(dict(nulls | silent | hf))
    assert not found and config is not None
    assert read_config(dict(silent | hf)) == read_config(dict(hf))
