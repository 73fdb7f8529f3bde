"""Reading the parameters of a source: which tensors each is made of, and how it is held."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.config.quant import Mxfp4Use, QuantConfig, TableFormat
from qlora_jax.errors import CheckpointError, ShapeError, gathered
from qlora_jax.models import Decoder
from qlora_jax.names import Table, dotted
from qlora_jax.nn.packing import quantize_rows, quantize_tensor
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf.file import GGUF
from qlora_jax.sources.safetensors import Checkpoint, TensorInfo, shortened
from qlora_jax.sources.source import (
    HF_HEAD,
    Source,
    left_out,
    misnamed,
)


class Wanted(NamedTuple):
    """A parameter's Hugging Face names, and how they are stacked.

    Attributes:
      names: The Hugging Face names, in the order of the stack.
      stack: Leading axes: (), (layers,) or (layers, experts).
      shape: The shape of one, without the stack's axes.
    """

    names: list[str]
    stack: tuple[int, ...]
    shape: tuple[int, ...]


def wanted_of(skeleton: Decoder, table: Table) -> dict[str, Wanted]:
    """Returns what each of our paths is made of."""
    wanted = {}
    for keys, variable in nnx.to_flat_state(nnx.state(skeleton)):
        path, shape = dotted(keys), variable.get_value().shape
        stack = table.stack(path)
        wanted[path] = Wanted(table.names(path), stack, shape[len(stack) :])
    return wanted


def check_names(source: Source, wanted: dict[str, Wanted]) -> list[str]:
    """Refuses tensors that do not fit; returns what the model has no place for."""
    checkpoint, config = source.tensors, source.config
    problems, known, missing = [], set(), []
    for names, _, shape in wanted.values():
        known.update(names)
        for name in names:
            if bitsandbytes.is_packed(checkpoint, name):
                continue  # its own entries have the shape
            if name not in checkpoint:
                missing.append(name)
                problems.append(f"{name} is missing")
            elif (problem := _unlike_a_weight(checkpoint.infos[name])) is not None:
                problems.append(problem)
            elif checkpoint.infos[name].shape != shape:
                have = checkpoint.infos[name].shape
                problems.append(f"{name} has shape {have}, config.json wants {shape}")
    if missing == [HF_HEAD]:
        problems.append(
            'if the embedding is the head, write "tie_word_embeddings": true into config.json'
        )
    elif hint := misnamed(missing, checkpoint.infos):
        problems.insert(0, hint)
    stacks = {path: names for path, (names, stack, _) in wanted.items() if stack}
    problems += _unlike_experts(stacks, checkpoint)
    if problems:
        raise CheckpointError(
            gathered(f"{source} does not fit its config.json", problems)
        )
    more = left_out(checkpoint, known, source.family, config.num_layers)
    what = f"left out, as a {config.model_type} has no place for them: "
    return [what + ", ".join(more)] if more else []


def _unlike_experts(
    names: Mapping[str, list[str]], tensors: Collection[str]
) -> list[str]:
    """Returns stacks of which a part is 4-bit and a part dense: experts of one layer.

    Args:
      names: Our path of a stacked parameter -> its names in the files.
      tensors: Names in the files.
    """
    problems = []
    for path, stack in names.items():
        packed = [bitsandbytes.is_packed(tensors, name) for name in stack]
        if all(packed) or not any(packed):
            continue
        dense = [name for name, yes in zip(stack, packed, strict=True) if not yes]
        problems.append(
            f"{path}: {sum(packed)} of {len(stack)} are 4-bit, and these are dense: "
            f"{shortened(dense)}"
        )
    if problems:
        problems.append(
            "the experts of a layer must be stored alike: load the original folder and "
            "quantize it (quant=, --quant.codebook nf4)"
        )
    return problems


def _unlike_a_weight(info: TensorInfo) -> str | None:
    return None if info.encoded is None else info.encoded.problem


class Reader:
    """Reads parameters, stacking layers in place and gathering problems."""

    def __init__(
        self,
        checkpoint: Checkpoint | GGUF,
        quant: QuantConfig | None,
        dtype: str,
        tables: Mapping[str, TableFormat],
        table_quant: QuantConfig | None,
        stream: bool,
        mxfp4: Mxfp4Use = "keep",
    ):
        self.mxfp4 = mxfp4
        self.checkpoint, self.quant, self.dtype = checkpoint, quant, dtype
        self.tables, self.table_quant, self.stream = tables, table_quant, stream
        self.problems: list[str] = []

    def check(self, source: Source) -> None:
        """Raises CheckpointError with everything that could not be used."""
        if problems := [*source.damage(), *self.problems]:
            raise CheckpointError(gathered(f"{source} has unusable weights", problems))

    def read(self, path: str, wanted: Wanted) -> Any:
        """Returns one parameter: an array, a PackedWeight, or a stack of either."""
        names, lead, shape = wanted
        if not lead:
            return self.one(path, names[0], shape)
        stack = None
        for name, index in zip(names, np.ndindex(*lead), strict=True):
            value = self.one(path, name, shape)
            if value is None:
                continue
            if self.stream:
                value = jax.tree.map(np.asarray, value)
            if stack is None:
                zeros = np.zeros if self.stream else jnp.zeros
                stack = jax.tree.map(
                    lambda leaf, zeros=zeros: zeros((*lead, *leaf.shape), leaf.dtype),
                    value,
                )
            if jax.tree.structure(stack) != jax.tree.structure(value):
                self.problems.append(
                    f"{name} is stored unlike {names[0]}; layers must be alike"
                )
                continue
            # In place (the stack is donated), so memory holds the model and one tensor.
            stack = (
                _fill_in(stack, value, index)
                if self.stream
                else _put(stack, value, index)
            )
        if self.stream:
            here = jax.sharding.SingleDeviceSharding(
                jax.devices()[0], memory_kind="pinned_host"
            )
            stack = jax.device_put(stack, here)
        return stack

    def one(self, path: str, name: str, shape: tuple[int, ...]) -> Any:
        """Returns one layer of a parameter; None if it is unusable, which `problems` says."""
        try:
            if bitsandbytes.is_packed(self.checkpoint, name):
                q = self._stored(name, shape)
                # transformers quantizes routers that are linears too; here they are none.
                if path.endswith(".kernel") and not self.decodes(name):
                    return q
                w = q.decode()
            else:
                w = self.checkpoint[name]
                scaled = bitsandbytes.is_packed_table(self.checkpoint, name)
                if self.tables.get(path) == "int8" and (scaled or w.dtype == np.int8):
                    return bitsandbytes.read_int8(self.checkpoint, name, self.dtype)
                w = jnp.asarray(w)
            if not jnp.issubdtype(w.dtype, jnp.floating):
                raise ShapeError(f"{w.dtype} values, of which config.json says nothing")
            if w.dtype.itemsize == 1:
                raise ShapeError(f"{w.dtype} values, and no scale that is known here")
            if (pack := self.packing(path, self.quant)) is not None:
                return pack(w)
            value, finite = _convert(w, self.dtype)
            if not finite:
                raise ShapeError("NaN or Inf values (or too large for its dtype)")
            return value
        except (ShapeError, CheckpointError) as error:
            text = str(error)
            self.problems.append(text if text.startswith(name) else f"{name}: {text}")
            return None

    def decodes(self, name: str) -> bool:
        """Whether a packed linear is decoded as it is read."""
        form = bitsandbytes.known_as(self.checkpoint, name)
        return form == bitsandbytes.MXFP4 and self.mxfp4 == "decode"

    def packing(
        self, path: str, quant: QuantConfig | None
    ) -> Callable[[jax.Array], PackedWeight] | None:
        """Returns what makes a parameter's dense value 4-bit or int8; None where it stays.

        Args:
          path: The dotted path of the parameter.
          quant: The quantization of a layer's linear; None leaves it dense.
        """
        table = self.tables.get(path)
        if table == "int8":
            return quantize_rows
        if table is not None:
            quant = self.table_quant if table == "4bit" else None
        elif not path.endswith(".kernel"):
            quant = None
        if quant is None:
            return None
        return functools.partial(quantize_tensor, config=quant)

    def _stored(self, name: str, shape: tuple[int, ...]) -> PackedWeight:
        q = bitsandbytes.read(self.checkpoint, name, self.dtype)
        if q.shape != shape:
            raise ShapeError(f"shape {q.shape}, config.json wants {shape}")
        return q


def _fill_in(stack: Any, value: Any, i: tuple[int, ...]) -> Any:
    def fill(s: np.ndarray, v: np.ndarray) -> np.ndarray:
        s[i] = v
        return s

    return jax.tree.map(fill, stack, value)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, value: Any, i: Any) -> Any:
    return jax.tree.map(lambda s, v: s.at[i].set(v), stack, value)


@functools.partial(jax.jit, static_argnums=1)
def _convert(w: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    value = w.astype(dtype)
    return value, jnp.isfinite(value).all()
