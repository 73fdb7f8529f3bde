"""What to say of a model that is of no family here: the nearest family, and what it lacks.

Of models that people ask for a table says both. Of others config.json does, and the names of
the tensors: nearest is the family that leaves the fewest of both unread.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from pallas_kernels.formats import weight_of
from qlora_jax.models import FAMILIES, read_config, settings
from qlora_jax.models.wrappers import without_wrapper
from qlora_jax.names import template_of

_BIASED = "LayerNorm with biases, and biases in the feed-forward"

LACKING: dict[str, tuple[str, str]] = {
    "apertus": ("arcee", "xIELU, and norms of heads"),
    "cwm": ("llama", "windows by kind of layer"),
    "falcon_h1": ("granitemoehybrid", "Mamba 2 beside attention, multipliers in it"),
    "gemma3n": ("gemma4_text", "AltUp, LAuReL, sparse activations"),
    "glm_moe_dsa": ("glm4_moe_lite", "an indexer of attention"),
    "gpt_neox": ("cohere", f"{_BIASED}, two norms before a parallel block"),
    "kimi_linear": ("qwen3_next", "its own delta attention, latent attention"),
    "llama4": ("mixtral", "attention in chunks, a shared expert, scaled inputs"),
    "mistral4": ("deepseek_v3", "queries that grow with their position, a softmax"),
    "mllama": ("llama", "cross-attention to images"),
    "nemotron": ("arcee", "LayerNorm with biases, partial rotary positions"),
    "nemotron_h": ("granitemoehybrid", "layers of one part, experts without a gate"),
    "phi": ("cohere", f"{_BIASED}, partial rotary positions"),
    "qwen3_vl_moe": ("qwen3_moe", "the names of a text model inside of it"),
    "starcoder2": ("arcee", _BIASED),
}
"""model_type -> (the nearest family, what that lacks)."""

_TEXTS = ("text_config", "llm_config", "language_config")
_NEUTRAL = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("model_type", "_name_or_path", "use_cache", "pretraining_tp"),
    *("initializer_range", "output_router_logits", "router_aux_loss_coef"),
    "quantization_config",
}
"""Fields that change nothing of what a token's logits are."""

_SHOWN = 6


def nearest(hf: dict[str, Any], tensors: Collection[str] = ()) -> str:
    """Returns a sentence on the family that is nearest to a model of none.

    Args:
      hf: The object of its config.json.
      tensors: The names of its tensors, as far as they are known.
    """
    inner = next((hf[key] for key in _TEXTS if isinstance(hf.get(key), dict)), None)
    named = hf.get("model_type")
    if isinstance(named, str) and named in LACKING:
        return "The nearest is {}, which lacks {}".format(*LACKING[named])
    if inner is not None:
        text = inner.get("model_type")
        if isinstance(text, str) and text in FAMILIES:
            return f"Its text model is a {text}, which opens when it is saved alone"
        return f"Of its text model ({text!r:.80}): {nearest(inner, tensors)}"
    if missing := settings.missing(hf):
        return f"No family is near: {', '.join(missing)}"
    beyond = {
        family: [*_unread(hf, family), *_homeless(tensors, family)]
        for family in FAMILIES
    }
    found = min(beyond, key=lambda family: len(beyond[family]))
    seen = "config.json and tensors" if tensors else "config.json"
    text = f"By its {seen} the nearest is {found}"
    if not (lacks := beyond[found]):
        return f"{text}, which knows all of them; its own code may compute otherwise"
    more = f" and {len(lacks) - _SHOWN} more" if len(lacks) > _SHOWN else ""
    return f"{text}, which has no place for {', '.join(lacks[:_SHOWN])}{more}"


def _unread(hf: dict[str, Any], family: str) -> Iterator[str]:
    """Yields what a family refuses, or does not read, of a config.json."""
    known = {name: hf[name] for name in hf.keys() & settings.KINDS.keys()}

    def read(name: str = "", value: Any = None) -> Any:
        changed = {key: one for key, one in known.items() if key != name}
        changed |= {"model_type": family} | ({} if value is None else {name: value})
        return read_config(changed)

    config, problems = read()
    yield from (problem.partition(";")[0] for problem in problems)
    for name, value in hf.items():
        if name in _NEUTRAL or name.endswith(("token_id", "dropout")) or not value:
            continue
        if name not in known:
            yield f"{name:.40}"
        elif config is not None and read(name) == read(name, _other(value)) == read():
            yield name


def _other(value: Any) -> Any:
    """Returns another value of a field, of its kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2
        case list():
            return value[1:]
        case dict():
            return value | {"rope_type": "?"}
    return "?"


def _homeless(tensors: Iterable[str], family: str) -> list[str]:
    """Returns the kinds of tensors that a family has no place for."""
    module = FAMILIES[family]
    known = {*module.NAMES.values()}
    kinds = {
        template_of(without_wrapper(weight_of(name)))
        for name in tensors
        if not name.endswith(module.IGNORED)
    }
    return sorted(kind for kind in kinds if not {kind, f"model.{kind}"} & known)
