"""A source and an adapter become one folder, a weight at a time.

What the model will be is found from shapes alone, by the functions that attach and merge in
memory; each weight is then read, folded, measured and written before the next is read.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters import low_rank
from qlora_jax.adapters.attach import attach_zero
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.fingerprint import Scales, fingerprint
from qlora_jax.adapters.merge import (
    correction_config,
    correction_key,
    merge,
    stays_dense,
)
from qlora_jax.adapters.merge_report import MergeReport, squares_apart
from qlora_jax.adapters.names import explicit_layers, stacked_names
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.find import adapter_tokenizer
from qlora_jax.exchange.ours import (
    base_scales,
    check_scales,
    fit_adapter,
    write_adapter,
)
from qlora_jax.files import check_output
from qlora_jax.models import Decoder, hf_table
from qlora_jax.models.vocabulary import grown
from qlora_jax.names import EMBEDDING, HEAD, TABLES, Numbered
from qlora_jax.nn import Adapted, LoRA, Weighted
from qlora_jax.nn.folding import Applied, Factors, Folding, fold
from qlora_jax.nn.frozen import modules
from qlora_jax.sources.load import Tables, outline, outlined, reading
from qlora_jax.sources.save import (
    MERGE_REPORT,
    Place,
    as_saved,
    joining,
    new_model_folder,
    places,
    saved_config,
    saved_names,
    write_folder,
)
from qlora_jax.sources.source import Source, open_source, say

_TABLE, _HEAD = f"{EMBEDDING}.weight", f"{HEAD}.kernel"
_DENSE = Tables(embedding="none", head="none", mxfp4="keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging:
    """Says in which formats a merge reads the weights of a base, and in which it writes
    them."""

    quant: QuantConfig | None = None
    """Quantize the linears of a dense source first, and merge onto that; None takes the
    source as it is."""

    tables: Tables = dataclasses.field(default_factory=_DENSE.copy)
    """The formats that embedding and head are held in before."""

    dtype: str = "bfloat16"
    """The dense weights of the result have this dtype, and what is 4-bit decodes to it."""

    requantize: QuantConfig | None = None
    """Quantize the merged linears; None leaves all dense."""

    correction_rank: int | None = None
    """With requantize an adapter of this rank is made for what that loses; None makes none."""

    correction_iterations: int = 1
    """Rounds of quantizing anew what that adapter leaves, and fitting it again."""

    def __post_init__(self):
        rank, rounds, problems = self.correction_rank, self.correction_iterations, []
        if rank is not None and self.requantize is None:
            problems.append("--correction-rank goes with --requantize")
        if rounds != 1 and rank is None:
            problems.append("--correction-iterations goes with --correction-rank")
        if rank is not None and rank < 1:
            problems.append(f"--correction-rank is {rank}, expected at least 1")
        if rounds < 1:
            problems.append(f"--correction-iterations is {rounds}, expected at least 1")
        if problems:
            raise ConfigError("; ".join(problems))


class Merged(NamedTuple):
    """What a merge into a folder came to.

    Attributes:
      saved: {"out": path, "bytes": of all tensors}.
      report: The errors of the folder's weights.
      corrected: The errors of these weights with the correction's adapter; None without
        one.
    """

    saved: dict[str, Any]
    report: MergeReport
    corrected: MergeReport | None


def merge_folder(
    source: Source,
    adapter: str | os.PathLike[str],
    out: Path,
    merging: Merging,
    *,
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
) -> Merged:
    """Writes what `save_model(merge(load_adapter(adapter, load(source))))` would.

    Memory holds the adapter, one weight in float32 a few times over, and the file that is
    being filled; never the model.

    Args:
      source: The base.
      adapter: A run folder, an adapter folder or a PEFT folder.
      out: The folder; a correction's adapter goes to `adapter/` in it, and the report to
        merge_report.json.
      merging: The quantization of the base, and the dtype and quantization of the result.
      overwrite: Write into a folder that is not empty.
      shard_bytes: Largest size of a file.

    Raises:
      OutputExistsError: see `check_output` and `write_folder`.
      OutputError: the folder cannot be written.
      CheckpointError: as `load` and `save_model`.
      AdapterMismatchError: as `load_adapter`, `merge` and `merge_corrected`. Whatever is
        raised, the folder is as it was.
    """
    check_output(out, overwrite)
    weights = _Weights(source, adapter, merging)
    with new_model_folder(out, source) as new:
        saved = write_folder(
            *(weights.parameters(), saved_config(weights.merged), merging.dtype),
            *(source.hf, new),
            origin=source,
            shard_bytes=shard_bytes,
        )
        larger = adapter_tokenizer(adapter, source.tokenizer)
        if larger is not None and larger is not source.tokenizer:
            larger.save_vocabulary(new.path)
        report, corrected = weights.report({}), None
        figures = report.to_json()
        if weights.correction is not None:
            weights.correction.save(new.path)
            corrected = weights.report(weights.correction.squares)
            figures["corrected"] = corrected.to_json()
        text = json.dumps(figures, indent=2) + "\n"
        (new.path / MERGE_REPORT).write_text(text, encoding="utf-8")
    return Merged(saved, report, corrected)


class _Weights:
    """Makes the weights of the merged model one by one, and measures what each lost."""

    def __init__(
        self, source: Source, adapter: str | os.PathLike[str], merging: Merging
    ):
        quant, tables = merging.quant, merging.tables
        self.source, self.merging = source, merging
        prepared = reading(source, quant, "float32", **tables)
        say(source.path, prepared.notes)
        self.reader, base = prepared.reader, outlined(source, prepared).model
        adapted, self.arrays = fit_adapter(adapter, base)
        graphdef, state = nnx.split(adapted)
        shapes = nnx.eval_shape(
            lambda state: merge(nnx.merge(graphdef, state), dtype="float32"), state
        )
        self.merged: Decoder = shapes
        self.places = joining(shapes.config, source).ordered(
            places(shapes, saved_names(shapes.config, source)),
            lambda place: place.name,
        )
        # A tied head that a merge makes its own is in the merged model alone.
        self.nodes: dict[Any, Weighted | Adapted] = dict(modules(shapes, Weighted))
        self.nodes |= modules(adapted, Adapted)
        # Until they are written, values are as `merge` has them: float32 beside 4 bits.
        plain = merging.dtype if merging.requantize is None else "float32"
        self.folding = Folding(plain, merging.requantize)
        self.marked = _Marked(adapter, Counter(x.numbered.path for x in self.places))
        self.squares: dict[str, np.ndarray] = {}
        self.correction = None
        if merging.correction_rank is not None:
            packed = [
                path
                for path, node in modules(adapted, LoRA)
                if not stays_dense(path, node)
            ]
            self.correction = _Correction(
                self.merged,
                correction_config(packed, merging.correction_rank),
                low_rank.Rounds(merging.correction_iterations),
            )

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Yields every parameter by its name in the folder."""
        for place in self.places:
            value = self._value(place)
            if value is None:
                continue
            path = place.numbered.path
            value = as_saved(path, value, self.merging.dtype)
            if self.correction is not None and isinstance(value, PackedWeight):
                self.correction.scales.add(path, value)
            if isinstance(value, PackedWeight):
                yield place.name, dataclasses.replace(value, dtype=self.merging.dtype)
            else:
                yield place.name, value.astype(self.merging.dtype)
        self.reader.check(self.source)

    def report(self, instead: Mapping[str, np.ndarray]) -> MergeReport:
        """Returns the report, in the order that a model's has; `instead` replaces figures."""
        names: dict[Any, list[str]] = {path: [] for path in self.nodes}
        for place in self.places:
            if (name := _module(place)) in self.squares and place.module in names:
                if place.numbered.path.endswith((".kernel", ".weight")):
                    names[place.module].append(name)
        squares = self.squares | dict(instead)
        order = [name for path in names for name in names[path]]
        return MergeReport.of({name: squares[name] for name in order})

    def _value(self, place: Place) -> Any:
        """Returns a merged parameter; None if the base's cannot be used."""
        own = self._factor(str(place.numbered))
        if own is not None:  # which trained in place of the base's
            return self.folding.trained(own)
        value = self._base(place)
        leaf = place.numbered.path.rpartition(".")[2]
        if value is None or leaf == "bias":
            return value
        name, node = _module(place), self.nodes[place.module]
        parts = {
            part: array
            for part in node.PARTS
            if (array := self._factor(f"{name}.{part}")) is not None
        }
        dense = stays_dense(place.module, node)
        folding = dataclasses.replace(self.folding, dense=dense)
        made = node.folded(value, parts, folding)
        exact = node.applied(value, parts)
        if exact is not None:
            made = self._measured(name, exact, made)
        return made

    def _base(self, place: Place) -> Any:
        """Reads one layer of the base's parameter; an untied head is the embedding."""
        config, (path, numbers) = self.source.config, place.numbered
        if path == _HEAD and config.tie_word_embeddings:
            path = _TABLE
        name = hf_table(config).name(path, numbers)
        value = self.reader.one(path, name, place.shape)
        self.marked.add(path, value)
        if value is None or isinstance(value, PackedWeight):
            return value
        grows = path.rpartition(".")[0] in TABLES
        if grows and value.shape[0] < place.shape[0]:
            value = grown(value, place.shape[0])
        return value

    def _measured(
        self, name: str, exact: Applied, made: Array | PackedWeight
    ) -> Array | PackedWeight:
        """Notes what a merged weight lost, and fits a correction to one that is packed."""
        if self.correction is not None and isinstance(made, PackedWeight):
            merged = fold(exact.kernel, exact.factors, scale=exact.scale)
            made, corrected = self.correction.fit(name, merged, made)
            self.correction.squares[name] = squares_apart(exact, corrected)
        self.squares[name] = squares_apart(exact, Applied(made))
        return made

    def _factor(self, name: str) -> Array | None:
        """Returns one of the adapter's arrays; None of a layer that has none."""
        return self._array(name) if name in self.arrays else None

    def _array(self, name: str) -> Array:
        return jnp.asarray(self.arrays[name], jnp.float32)


class _Correction:
    """The adapter for what merging into 4 bits loses, a linear at a time."""

    def __init__(self, merged: Decoder, config: LoRAConfig, rounds: low_rank.Rounds):
        self.rounds, self.key = rounds, correction_key()
        graphdef, state = nnx.split(merged)
        shapes = nnx.eval_shape(
            lambda state: attach_zero(
                nnx.merge(graphdef, state), config, key=jax.random.key(0)
            ),
            state,
        )
        self.config = lora_config(shapes)
        lora = nnx.state(shapes, nnx.LoRAParam)
        parts = nnx.to_flat_state(lora)
        self.names = [name for part in parts for name in stacked_names(*part)]
        self.layers = explicit_layers(lora, self.config)
        self.arrays: dict[str, np.ndarray] = {}
        self.squares: dict[str, np.ndarray] = {}
        self.scales = Scales()

    def fit(
        self, name: str, merged: Array, packed: PackedWeight
    ) -> tuple[PackedWeight, Applied]:
        """Returns one linear's 4-bit weight, and it with its adapter."""
        rank = self.config.rank
        fit = low_rank.alternate(
            *(merged, packed, None, self.key),
            rank=rank,
            scale=self.config.alpha / rank,
            rounds=self.rounds,
        )
        self.arrays[f"{name}.lora_a"] = np.asarray(fit.lora_a)
        self.arrays[f"{name}.lora_b"] = np.asarray(fit.lora_b)
        made = fit.base if self.rounds.change_base else packed
        factors = Factors(fit.lora_a, fit.lora_b)
        return made, Applied(made, factors, jnp.float32(self.config.alpha / rank))

    def save(self, out: Path) -> None:
        """Writes the adapter into a merged folder, whose mark it bears."""
        mark = fingerprint(outline(open_source(out)).model)
        assert mark is not None
        base = json.loads(mark) | {"scales": self.scales.rounded()}
        arrays = {name: self.arrays[name] for name in self.names}
        write_adapter(
            *(out / "adapter", arrays, self.config, base),
            layers=self.layers,
            overwrite=True,
        )


class _Marked:
    """Compares the 4-bit weights of a base with those that an adapter was made for."""

    def __init__(self, adapter: str | os.PathLike[str], layers: Mapping[str, int]):
        self.adapter = adapter
        self.wanted = base_scales(adapter)
        self.scales = Scales()
        self.left = dict(layers)

    def add(self, path: str, value: Any) -> None:
        """Takes in one layer of a weight, and compares the weight after its last one.

        Layers that are dense have no scale, and count as layers all the same.

        Raises:
          AdapterMismatchError: the adapter was made for another weight.
        """
        if path not in self.wanted:
            return
        if isinstance(value, PackedWeight):
            self.scales.add(path, value)
        self.left[path] -= 1
        if self.left[path] == 0 and path in self.scales:
            check_scales(self.adapter, self.scales.rounded(path))


def _module(place: Place) -> str:
    """Returns the numbered name of the module that has a parameter."""
    path, numbers = place.numbered
    return str(Numbered(path.rpartition(".")[0], numbers))
