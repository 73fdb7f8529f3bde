"""The files of a PEFT folder, and the names of the tensors in it.

`adapter_config.json` has the settings, `adapter_model.safetensors` the tensors, named
`base_model.model.MODULE` and one of these ends (ours beside it, transposed where marked):

    .lora_A.weight (rank, in)               lora_a, transposed
    .lora_B.weight (out, rank)              lora_b, transposed
    .lora_magnitude_vector (out,)           magnitude, of DoRA
    .lora_embedding_A (rank, vocab)         lora_a of the embedding, transposed
    .lora_embedding_B (hidden, rank)        lora_b, transposed
    .token_adapter.trainable_tokens_delta   rows: the tokens' new rows, no difference
    .bias, .base_layer.bias                 bias, of a plain and of an adapted linear
    .weight                                 a module that trained in full

With a grown vocabulary PEFT saves embedding and head too, some of them twice. Names may
hold the adapter's name, `default`, as a model's own state_dict has them, and MODULE may lie
in the text part of a multimodal model.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qlora_jax import digests
from qlora_jax.errors import AdapterMismatchError, gathered
from qlora_jax.inputs import check_regular, read_json
from qlora_jax.models import Decoder, DecoderConfig, abstract, hf_table
from qlora_jax.names import HEAD, Numbered, dotted

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = (
    (".lora_A.weight", "lora_a"),
    (".lora_B.weight", "lora_b"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_embedding_A", "lora_a"),
    (".lora_embedding_B", "lora_b"),
    (".token_adapter.trainable_tokens_delta", "rows"),
    (".base_layer.bias", "bias"),
    (".bias", "bias"),
    (".token_adapter.base_layer.weight", "copy"),
    (".base_layer.weight", "copy"),
    (".original_module.weight", "copy"),
    (".modules_to_save.weight", "own"),
    (".weight", "own"),
)
_DEFAULT = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
_WRAPPERS = (("model.language_model.", "model."), ("language_model.", ""))
"""Each pair is the beginning of the names that the text part of a multimodal model has, and
what stands in its place when that part is alone: first as transformers 5 has it, then as 4
had."""


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def module_names(config: DecoderConfig) -> dict[str, str]:
    """Returns {our path of a module, layers and experts numbered: Hugging Face's}.

    It has the modules of the model, and the head, which a tied model has no weights of.
    """
    table, skeleton = hf_table(config), abstract(config)
    names = {HEAD: table.name(f"{HEAD}.kernel").rpartition(".")[0]}
    for path, _ in nnx.to_flat_state(nnx.state(skeleton)):
        for index in np.ndindex(*table.stack(dotted(path))):
            ours = str(Numbered.at(path, index)).rpartition(".")[0]
            names[ours] = table.name(dotted(path), index).rpartition(".")[0]
    return names


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a folder's settings, PEFT's defaults where they are unset, and its tensors.

    Raises:
      AdapterMismatchError: a file is missing, or is not what its name says.
    """
    if (folder / "adapter_model.bin").exists() and not (folder / TENSORS).exists():
        raise AdapterMismatchError(
            f"{folder} has adapter_model.bin, a pickle; save it again in PEFT with "
            "safe_serialization=True"
        )
    try:
        settings = read_json(folder / CONFIG, error=AdapterMismatchError)
        check_regular(folder / TENSORS, AdapterMismatchError)
        stored = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, AdapterMismatchError):
            raise
        raise AdapterMismatchError(
            f"{folder} cannot be read as a PEFT adapter: {error}"
        ) from None
    given = {key: value for key, value in settings.items() if value is not None}
    return {"r": 8, "lora_alpha": 8} | given, stored


def check_undamaged(folder: Path) -> None:
    """Refuses tensors that are not as qlora_jax wrote them.

    A file that another program wrote since, as its header shows, is taken as it is, and that
    is said. Where tensors do not fit the model, that says more, so this comes afterwards.

    Raises:
      AdapterMismatchError: some are not; all are named.
    """
    entry = digests.read(folder).get(TENSORS)
    if entry is None or digests.is_other(folder, TENSORS, entry):
        return
    if wrong := digests.damage(folder, TENSORS, entry):
        raise AdapterMismatchError(gathered(f"{folder} is damaged", wrong))


@dataclasses.dataclass
class Tensors:
    """The tensors of a PEFT folder by our names.

    Attributes:
      flat: {our name, numbered: array as ours is}.
      copies: {our module: a copy of the base's weight that PEFT saved along}.
      names: {our path of a module, numbered: its name in the folder}.
      outside: Modules of a multimodal model beside its text part.
      problems: What is no part of an adapter for this model.
      notes: What was read otherwise than it is written.
    """

    flat: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    copies: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: set[str] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def named(stored: dict[str, np.ndarray], model: Decoder) -> Tensors:
    """Reads the names of a folder's tensors."""
    made = Tensors(names=module_names(model.config))
    ours = {theirs: own for own, theirs in made.names.items()}
    plain = {_DEFAULT.sub("", name): name for name in stored}
    if len(plain) < len(stored):
        twice = sorted({*stored} - {*plain.values()})
        made.problems.append(f"{', '.join(twice)}: there is one without '.default' too")
    if changed := [name for name, old in plain.items() if name != old]:
        made.notes.append(
            f"{len(changed)} tensors have the adapter's name, 'default', in theirs, and are "
            "read as if it were not there (PEFT leaves them out)"
        )
    wrapper = _wrapper(plain, ours)
    if wrapper is not None:
        made.names = {own: _wrapped(name, wrapper) for own, name in made.names.items()}
        ours = {theirs: own for own, theirs in made.names.items()}
    for name, old in plain.items():
        _place(made, name, stored[old], ours, wrapper, model)
    if made.outside:
        some = sorted(made.outside)
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        made.notes.append(
            f"left out, as this is the text part of the model alone: {', '.join(some[:3])}"
            f"{more}"
        )
    return made


def _wrapper(names: dict[str, str], known: dict[str, str]) -> tuple[str, str] | None:
    """Returns where the text part of a multimodal model is, if tensors are of one."""
    for wrapper in _WRAPPERS:
        inside, alone = PREFIX + wrapper[0], wrapper[1]
        for name in names:
            if name.startswith(inside):
                parts = (alone + name.removeprefix(inside)).split(".")
                if any(".".join(parts[:i]) in known for i in range(1, len(parts))):
                    return wrapper
    return None


def _wrapped(name: str, wrapper: tuple[str, str]) -> str:
    inside, alone = wrapper
    return inside + name.removeprefix(alone) if name.startswith(alone) else name


def _place(
    made: Tensors,
    name: str,
    array: np.ndarray,
    ours: dict[str, str],
    wrapper: tuple[str, str] | None,
    model: Decoder,
) -> None:
    """Puts a tensor where it belongs, or says why it belongs nowhere."""
    end, part = next(((e, o) for e, o in ENDS if name.endswith(e)), (None, ""))
    module = name.removeprefix(PREFIX).removesuffix(end or "")
    if not name.startswith(PREFIX):
        made.problems.append(f"{name} is no tensor of an adapter")
    elif wrapper and module not in ours and not module.startswith(wrapper[0]):
        made.outside.add(module)
    elif end is None:
        made.problems.append(f"{name} is no tensor of an adapter")
    elif module not in ours:
        made.problems.append(f"{name}: the model has no module {module}")
    elif not np.isfinite(np.asarray(array, np.float32)).all():
        made.problems.append(f"{name} has NaN or Inf values")
    elif part == "copy":
        made.copies[ours[module]] = array
    elif part == "own":
        known = hf_table(model.config).templates
        kernel = f"{Numbered.parse(ours[module]).path}.kernel" in known
        key = f"{ours[module]}.{'kernel' if kernel else 'weight'}"
        if not np.array_equal(made.flat.setdefault(key, array), array):
            made.problems.append(f"{name} is there twice, with different values")
    else:
        turned = array.T if part in ("lora_a", "lora_b") else array
        made.flat[f"{ours[module]}.{part}"] = turned
