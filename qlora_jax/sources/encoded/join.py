"""Puts weights in the place of the entries that they are stored as."""

import functools
import math
from collections import Counter

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.encoded.config import Encoding
from qlora_jax.sources.encoded.form import Form, Part, Parts, Settings
from qlora_jax.sources.encoded.stacked import STACKED, stacks
from qlora_jax.sources.safetensors import Checkpoint, Encoded, TensorInfo

_ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale"),
    *("output_scale", "output_global_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "k_global_scale", "v_global_scale"),
    *("q_zero_point", "k_zero_point", "v_zero_point"),
)
"""Ends of keys of what quantizes activations, or keys and values in a cache."""


def join(checkpoint: Checkpoint, encoding: Encoding) -> None:
    """Gives a folder M.weight for each module M that has its entries, decoded on access.

    What of them does not fit is said where the weight is asked for. Scales of activations
    are taken away, and named once.

    Args:
      checkpoint: The folder's tensors, under their own names.
      encoding: How its linears are stored.
    """
    known = {end for form in encoding.forms for end in (*form.needed, *form.more)}
    modules: dict[str, dict[str, TensorInfo]] = {}
    scales: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    if encoding.stacked is not None:
        for name, end, info in stacks(checkpoint, encoding.stacked, encoding.settings):
            kinds[f"{encoding.stacked.called}, experts together"] += 1
            checkpoint.join(name, [name, name + end], info)
    for name in list(checkpoint.infos):
        module, _, end = name.rpartition(".")
        if end in _ACTIVATIONS or end.endswith(STACKED[1]):
            scales[end] += 1
            del checkpoint.infos[name]
        elif end in known:
            modules.setdefault(module, {})[end] = checkpoint.infos[name]
    for module, infos in modules.items():
        form = next((form for form in encoding.forms if form.belongs(infos)), None)
        if form is None:
            continue
        kinds[form.called] += 1
        before = f"{module}." if module else ""
        parts = {
            end: Part(
                before + end,
                info,
                functools.partial(checkpoint.map, before + end, info),
            )
            for end, info in infos.items()
        }
        names = [part.name for part in parts.values()]
        checkpoint.join(
            f"{before}weight", names, _weight(parts, form, encoding.settings)
        )
    said = ", ".join(f"{n} in {kind}" for kind, n in kinds.items()) or "none is found"
    checkpoint.notes.append(
        f"its weights are quantized (quant_method {encoding.method}: {said}); they are decoded "
        "as they are read, and then held as those of a dense folder are; activations are not "
        "quantized"
    )
    if scales:
        named = ", ".join(f"{end} ({n} tensors)" for end, n in scales.items())
        checkpoint.notes.append(f"scales of activations are left out: {named}")


def _weight(parts: Parts, form: Form, settings: Settings) -> TensorInfo:
    """Returns what is known of the weight that has these entries."""
    infos = [part.info for part in parts.values()]
    size = sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)
    try:
        _check_ends(parts, form)
        shape, dtype, decode = form.measure(parts, settings)
        encoded = Encoded(form.called, size, decode)
    except CheckpointError as error:
        shape, dtype = (), infos[0].dtype
        encoded = Encoded(form.called, size, None, str(error))
    return TensorInfo(infos[0].file, dtype, shape, infos[0].start, encoded=encoded)


def _check_ends(parts: Parts, form: Form) -> None:
    """Raises CheckpointError if a weight lacks an entry, or has one of another form."""
    module = next(part.name.removesuffix(end) for end, part in parts.items())
    if lacking := [end for end in form.needed if end not in parts]:
        raise CheckpointError(f"{module}{lacking[0]} is missing")
    if others := [end for end in parts if end not in (*form.needed, *form.more)]:
        raise CheckpointError(
            f"{module}{others[0]} is no part of a weight in {form.called}"
        )
