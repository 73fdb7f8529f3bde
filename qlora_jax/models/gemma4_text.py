"""Gemma 4 (text): layers with windows, and global ones with larger heads whose keys are values.

Norms multiply by their weights alone, values are normed without any, and global layers
rotate the first quarter of their frequencies. In E2B and E4B each layer takes a part of
per-layer embeddings, and the later layers take keys and values of earlier ones. In
26B-A4B a mixture is beside each layer's feed-forward, whose files hold the experts of a layer
together.
"""

import dataclasses
from typing import Any

from qlora_jax.models import gemma2, llama, reading
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.fused import Fused
from qlora_jax.models.spec import AttentionSpec, BesideSpec, MLPSpec
from qlora_jax.nn.rope import Rope

MODEL_TYPE = "gemma4_text"
_PER_LAYER, _BESIDE = "layers.per_layer", "layers.mlp"
_EXPERT = "model.layers.{}.experts.{}"
NAMES = (
    gemma2.NAMES
    | llama.QK_NORM
    | {
        "layers.scale.weight": "model.layers.{}.layer_scalar",
        "per_layer.embed_tokens_per_layer.weight": "model.embed_tokens_per_layer.weight",
        "per_layer.per_layer_model_projection.kernel": (
            "model.per_layer_model_projection.weight"
        ),
        "per_layer.per_layer_projection_norm.weight": (
            "model.per_layer_projection_norm.weight"
        ),
        f"{_PER_LAYER}.per_layer_input_gate.kernel": (
            "model.layers.{}.per_layer_input_gate.weight"
        ),
        f"{_PER_LAYER}.per_layer_projection.kernel": (
            "model.layers.{}.per_layer_projection.weight"
        ),
        f"{_PER_LAYER}.post_per_layer_input_norm.weight": (
            "model.layers.{}.post_per_layer_input_norm.weight"
        ),
        f"{_BESIDE}.own_post_norm.weight": (
            "model.layers.{}.post_feedforward_layernorm_1.weight"
        ),
        f"{_BESIDE}.experts_norm.weight": (
            "model.layers.{}.pre_feedforward_layernorm_2.weight"
        ),
        f"{_BESIDE}.experts_post_norm.weight": (
            "model.layers.{}.post_feedforward_layernorm_2.weight"
        ),
        f"{_BESIDE}.router_scale.weight": "model.layers.{}.router.scale",
        f"{_BESIDE}.mixture.router.weight": "model.layers.{}.router.proj.weight",
        f"{_BESIDE}.mixture.router.expert_scales.weight": (
            "model.layers.{}.router.per_expert_scale"
        ),
        f"{_BESIDE}.mixture.experts.gate_proj.kernel": f"{_EXPERT}.gate_proj.weight",
        f"{_BESIDE}.mixture.experts.up_proj.kernel": f"{_EXPERT}.up_proj.weight",
        f"{_BESIDE}.mixture.experts.down_proj.kernel": f"{_EXPERT}.down_proj.weight",
    }
)
FUSED = (
    Fused(
        "model.layers.{}.experts.gate_up_proj",
        (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"),
    ),
    Fused("model.layers.{}.experts.down_proj", (f"{_EXPERT}.down_proj.weight",)),
)
IGNORED = llama.IGNORED
DEFAULTS = {
    "head_dim": 256,
    "global_head_dim": 512,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "num_kv_shared_layers": 0,
}
_ROPES = {
    reading.SLIDING: {"rope_theta": 1e4},
    reading.FULL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
}
_EVERY = 6  # where config.json has no layer_types
_BY_LAYER = {"head_dim": "head_dim", "num_key_value_heads": "kv_heads"}
_SCALINGS = ("linear", "proportional")


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    hf["hidden_act"] = hf["hidden_activation"]
    layers = hf.get("num_hidden_layers") or 0
    types = hf.get("layer_types") or [
        reading.SLIDING if (i + 1) % _EVERY else reading.FULL for i in range(layers)
    ]
    # transformers makes the last layer a global one, whatever is said of it.
    types = hf["layer_types"] = [*types[:-1], reading.FULL]
    ropes = hf["rope_parameters"] = hf.get("rope_parameters") or _ROPES
    if problems := _problems(hf, ropes):
        return None, [*problems, *reading.unknown(hf, _ROPES[reading.SLIDING])]
    per_layer = hf["hidden_size_per_layer_input"]
    experts: dict[str, Any] = {}
    if hf.get("enable_moe_block"):
        experts = {
            "num_experts": hf.get("num_experts"),
            "experts_per_token": hf.get("top_k_experts"),
            "intermediate_size": hf.get("moe_intermediate_size"),
        }
    config, problems = reading.read(
        hf,
        rope=ropes[reading.SLIDING],
        types=types,
        norms="both",
        qk_norm="head",
        value_norm=True,
        attention_scale=1.0,
        layer_scale=True,
        per_layer_size=per_layer,
        per_layer_vocab=hf["vocab_size_per_layer_input"] if per_layer else 0,
        embedding_scale=hf.get("hidden_size", 1) ** 0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
        **experts,
    )
    if config is None:
        return None, problems
    first = layers - hf["num_kv_shared_layers"]
    mixers, problems = _mixers(hf, config, types)
    mixers, more = _shared(types, mixers, first)
    problems += more or _misfits(config, mixers)
    if problems:
        return None, problems
    return reading.with_layers(config, mixers, _feed_forwards(hf, first)), []


def _problems(hf: dict[str, Any], ropes: dict[str, Any]) -> list[str]:
    """Returns what of a config.json no decoder here has, or goes with nothing else."""
    problems = [
        f"rope_parameters has no {kind}" for kind in _ROPES if not ropes.get(kind)
    ]
    if far := ropes.get(reading.FULL):
        scaling, *_, problem = reading.read_rope(hf, far)
        if problem is not None:
            problems.append(problem)
        elif scaling is not None and scaling.kind not in _SCALINGS:
            problems.append(
                f"the global layers' rope_scaling is {scaling.kind}; known: default, "
                f"{', '.join(_SCALINGS)}"
            )
    both = hf.get("use_bidirectional_attention")
    if both not in (None, False, "vision"):
        problems.append(
            f"use_bidirectional_attention is {both!r}; of text only causal is supported"
        )
    vocab, rows = hf.get("vocab_size") or 0, hf["vocab_size_per_layer_input"]
    if hf["hidden_size_per_layer_input"] and rows < vocab:
        problems.append(
            f"vocab_size_per_layer_input is {rows}, expected at least vocab_size, {vocab}"
        )
    needs = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if hf.get("enable_moe_block"):
        problems += [
            f"{name} is missing, and enable_moe_block is true"
            for name in needs
            if not hf.get(name)
        ]
    return problems


def _feed_forwards(hf: dict[str, Any], first: int) -> list[MLPSpec | BesideSpec]:
    """Returns the layers' feed-forwards, which may be wider from layer `first` on."""
    size = hf["intermediate_size"]
    wide = 2 * size if hf.get("use_double_wide_mlp") else size
    sizes = [size if i < first else wide for i in range(hf["num_hidden_layers"])]
    if hf.get("enable_moe_block"):
        return [BesideSpec(own_size=own) for own in sizes]
    return [MLPSpec(intermediate_size=None if n == size else n) for n in sizes]


def _mixers(
    hf: dict[str, Any], config: DecoderConfig, types: list[str]
) -> tuple[list[AttentionSpec], list[str]]:
    """Returns the layers' specs, each as if its keys and values were its own, and problems."""
    sizes, problems = _sizes(hf, types)
    scaling, theta, partial, _ = reading.read_rope(
        hf, hf["rope_parameters"][reading.FULL]
    )
    mixers = []
    for kind, own, spec in zip(types, sizes, config.specs, strict=True):
        mixer = dataclasses.replace(spec.mixer, **own)
        features = mixer.head_dim or config.head_dim
        if kind == reading.FULL:
            # A share of a head counts where positions are scaled, as transformers has it.
            dim = features if scaling is None else int(features * partial)
            mixer = dataclasses.replace(
                mixer,
                rope=Rope(theta=theta, scaling=scaling, dim=dim),
                keys_as_values=bool(hf.get("attention_k_eq_v")),
            )
        elif features != config.head_dim:
            mixer = dataclasses.replace(
                mixer, rope=dataclasses.replace(config.rope, dim=features)
            )
        mixers.append(mixer)
    return mixers, problems


def _shared(
    types: list[str], mixers: list[AttentionSpec], first: int
) -> tuple[list[AttentionSpec], list[str]]:
    """Lets layers take keys and values of the last layer of their kind that has its own.

    Args:
      types: The kinds of the layers.
      mixers: Their specs.
      first: The number of the first layer that takes.
    """
    mixers, problems = list(mixers), []
    for kind in dict.fromkeys(types[max(first, 0) :]):
        giver = next((i for i in reversed(range(first)) if types[i] == kind), None)
        if giver is None:
            problems.append(
                f"num_kv_shared_layers leaves no layer of {kind} with keys and values of its "
                f"own; of {len(types)} layers the first {max(first, 0)} have them"
            )
            continue
        mixers[giver] = dataclasses.replace(mixers[giver], gives=kind)
        for i in range(first, len(types)):
            if types[i] == kind:
                mixers[i] = dataclasses.replace(mixers[i], takes=kind)
    return mixers, problems


def _misfits(config: DecoderConfig, mixers: list[AttentionSpec]) -> list[str]:
    """Returns which layers' sizes of heads do not go together."""
    problems, given = [], {}
    for i, mixer in enumerate(mixers):
        features = mixer.head_dim or config.head_dim
        heads = mixer.kv_heads or config.num_kv_heads
        if features % 2 or config.num_heads % heads:
            problems.append(
                f"layer {i} has {heads} heads of {features} features for {config.num_heads} "
                "queries; expected an even number of features, and a multiple of the heads"
            )
        if mixer.gives is not None:
            given[mixer.gives] = heads, features
        if mixer.takes is not None and given.get(mixer.takes) != (heads, features):
            problems.append(
                f"layer {i} has other heads than the layer whose keys and values it takes"
            )
    return problems


def _sizes(
    hf: dict[str, Any], types: list[str]
) -> tuple[list[dict[str, int]], list[str]]:
    """Reads what of AttentionSpec the sizes of each layer's heads are, and problems.

    transformers writes them as per_layer_config; folders from before it did have those of
    global layers in fields of their own.
    """
    whole = {"head_dim": hf["global_head_dim"]}
    if hf.get("attention_k_eq_v") and hf.get("num_global_key_value_heads"):
        whole["num_key_value_heads"] = hf["num_global_key_value_heads"]
    given = hf.get("per_layer_config")
    if given is None:
        given = {str(i): whole for i, kind in enumerate(types) if kind == reading.FULL}
    problems, by_layer = [], {}
    for name, own in given.items():
        if not name.isdecimal() or int(name) >= len(types):
            problems.append(
                f"per_layer_config has layer {name!r}, of {len(types)} layers from 0"
            )
        elif unknown := sorted(own.keys() - _BY_LAYER.keys()):
            problems.append(
                f"per_layer_config of layer {name} has {', '.join(unknown)}; known: "
                f"{', '.join(_BY_LAYER)}"
            )
        else:
            by_layer[int(name)] = {_BY_LAYER[key]: own[key] for key in own}
    # What all layers have is said of no layer, so that layers are alike that are so.
    usual = {"head_dim": hf["head_dim"], "kv_heads": hf.get("num_key_value_heads")}
    return [
        {key: x for key, x in by_layer.get(i, {}).items() if x != usual[key]}
        for i in range(len(types))
    ], problems
