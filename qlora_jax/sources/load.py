"""Loading a model, one tensor at a time, quantized as it streams in."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.config.quant import QuantConfig, TableFormat
from qlora_jax.errors import CheckpointError, ShapeError, gathered
from qlora_jax.models import Decoder, abstract, hf_table
from qlora_jax.names import Table, dotted
from qlora_jax.nn import (
    Embedding,
    FrozenParam,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
)
from qlora_jax.nn.moe import Router
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.packing import quantize_rows, quantize_tensor
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf.file import GGUF
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.source import (
    HF_HEAD,
    Source,
    left_out,
    misnamed,
    open_source,
    say,
    unlike_experts,
)
from qlora_jax.text.tokenizer import Tokenizer

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


def load(
    path_or_repo: str | os.PathLike[str] | Source,
    quant: QuantConfig | None = None,
    dtype: str = "bfloat16",
    *,
    embedding: TableFormat = "none",
    head: TableFormat = "none",
    stream: bool = False,
    implementation: str | None = None,
    revision: str | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """Loads a Hugging Face model, one tensor at a time.

    Args:
      path_or_repo: A folder with config.json and safetensors, a hub id, or a GGUF file,
        whose tensors are dequantized as they are read. Of a multimodal model (gemma3,
        llava, qwen2_5_vl, ...) the text model alone is opened. What a folder has beyond
        the model is left out, which one warning says.
      quant: Quantize the linears as they stream in (all but the head); None keeps a
        dense model dense. A folder with bitsandbytes 4-bit weights is read as it is.
      dtype: The dtype of everything that stays dense, and so of the computation:
        'bfloat16', 'float16' or 'float32'.
      embedding: Make the embedding '4bit' or 'int8' too, and a tied head with it. A folder
        that has it in int8 is read as it is.
      head: Make a head that is not tied to the embedding '4bit' or 'int8' too. A folder
        that has it in int8 is read as it is.
      stream: Put the layers' weights in pinned host memory as they load (`stream` does it
        to a base that is on the device); the device then never holds them all.
      implementation: The implementation of nf4_matmul in every quantized linear, such as
        'xla' or 'hopper'; None chooses by device and shape.
      revision: The branch, tag or commit of a hub id.

    Returns:
      The model, every weight a FrozenParam, and its tokenizer (None without one).

    Raises:
      CheckpointError: no such folder, an unknown architecture, or tensors that are
        missing, misshapen, corrupt or not finite; all problems in one message.
    """
    source = open_source(path_or_repo, revision)
    prepared = reading(source, quant, dtype, embedding, head, stream)
    say(source.path, prepared.notes)
    reader, wanted, skeleton, _ = prepared
    loaded = {path: reader.read(path, entry) for path, entry in wanted.items()}
    reader.check(source)
    return _fill(skeleton, loaded, implementation), source.tokenizer


def reading(
    source: Source,
    quant: QuantConfig | None,
    dtype: str,
    embedding: TableFormat,
    head: TableFormat,
    stream: bool = False,
) -> "Reading":
    """Prepares to read a source.

    Args:
      source: The opened checkpoint to read.
      quant, dtype, embedding, head, stream: See `load`.

    Raises:
      ShapeError: an unknown dtype.
      CheckpointError: tensors are missing or misshapen, or cannot be held so.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ShapeError(f"dtype is {dtype!r}, expected {', '.join(COMPUTE_DTYPES)}")
    config, stored = source.config, source.stored
    if stored is not None and quant is not None and quant != stored:
        raise CheckpointError(
            f"{source} is quantized already ({stored}); it cannot become {quant}. Load the "
            "original folder, or leave quant out."
        )
    if stored is not None:
        quant = None  # what such a folder keeps dense stays so
    skeleton = abstract(config, dtype)
    wanted = _wanted(skeleton, hf_table(config))
    notes = [*source.notes, *_check_names(source, wanted)]
    tables = resolve_tables(source, embedding, head)
    if set(tables.values()) != {"none"} and (quant or stored) is None:
        raise CheckpointError(
            f"{source} stays dense, so its embedding and head do too; give quant, or leave "
            "embedding and head out"
        )
    formats = {_TABLES[name]: tables[name] for name in _TABLES}
    reader = Reader(source.tensors, quant, dtype, formats, quant or stored, stream)
    return Reading(reader, wanted, skeleton, notes)


class Reading(NamedTuple):
    """What reading a source takes.

    Attributes:
      reader: Reads its parameters.
      wanted: The tensors that each parameter is made of, by its path.
      skeleton: A model of shapes, dense.
      notes: Sentences for the user on what is left out, or read otherwise than written.
    """

    reader: "Reader"
    wanted: "dict[str, Wanted]"
    skeleton: Decoder
    notes: list[str]


class Tables(TypedDict):
    """The formats of embedding and head, as `load` takes them by keyword."""

    embedding: TableFormat
    head: TableFormat


_TABLES = {"embedding": "embed_tokens.weight", "head": "lm_head.kernel"}


def resolve_tables(source: Source, embedding: TableFormat, head: TableFormat) -> Tables:
    """Returns how embedding and head will be held: as asked for, or as a source has them.

    Raises:
      CheckpointError: an unknown format, or another is asked for than the folder has.
    """
    tables, problems = Tables(embedding=embedding, head=head), []
    stored = [name.rpartition(".")[2] for name in bitsandbytes.int8_tables(source.hf)]
    for name, module in (("embedding", "embed_tokens"), ("head", "lm_head")):
        asked = tables[name]
        if asked not in get_args(TableFormat):
            known = ", ".join(get_args(TableFormat))
            problems.append(f"{name} is {asked!r}, expected {known}")
        elif module in stored and asked == "4bit":
            problems.append(f"{name} is stored in int8 and cannot become 4-bit")
        elif module in stored:
            tables[name] = "int8"
    if problems:
        raise CheckpointError(gathered(f"{source} cannot be held so", problems))
    return tables


class Outline(NamedTuple):
    """A model whose layers' linears are not read.

    Attributes:
      model: The kernels of its layers are shapes alone, and so is whatever would be made
        4-bit or int8; other parameters are mapped from the files.
      notes: What was left out, or read otherwise.
    """

    model: Decoder
    notes: list[str]


def outline(
    path_or_repo: str | os.PathLike[str] | Source,
    quant: QuantConfig | None = None,
    *,
    embedding: TableFormat = "none",
    head: TableFormat = "none",
) -> Outline:
    """Opens a model without reading its linears.

    Args:
      path_or_repo, quant, embedding, head: See `load`.

    Raises:
      CheckpointError: as `load`.
    """
    source = open_source(path_or_repo)
    return outlined(source, reading(source, quant, "bfloat16", embedding, head))


def outlined(source: Source, prepared: Reading) -> Outline:
    """Makes the outline of what is prepared to be read.

    Args:
      source: The source.
      prepared: From `reading`, of that source.
    """
    reader, wanted, skeleton, notes = prepared
    checkpoint, formats = source.tensors, reader.tables

    def packed(path: str) -> Any:
        """Returns the shapes of what is held in 4 bits or int8; None of what is dense."""
        if path not in wanted:
            return None
        names, stack, shape = wanted[path]
        if bitsandbytes.is_packed_table(checkpoint, names[0]):
            return bitsandbytes.read_int8(checkpoint, names[0], "bfloat16")
        stored = bitsandbytes.is_packed(checkpoint, names[0])
        quant = source.stored if stored else reader.quant
        if (pack := reader.packing(path, quant)) is None:
            return None
        one = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), one
        )

    def hold(path: tuple, node: Any) -> Any:
        name = dotted(path)
        if isinstance(node, Linear) and (q := packed(f"{name}.kernel")) is not None:
            made = QuantizedLinear(q)
            made.bias = node.bias
            return made
        if isinstance(node, Embedding) and (q := packed(f"{name}.weight")) is not None:
            return QuantizedEmbedding(q)
        return node

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name, value = dotted(path), variable.get_value()
        inner = path[-1] == "kernel" and name not in formats
        if inner or not isinstance(value, jax.ShapeDtypeStruct):
            return variable
        names, stack, _ = wanted[name]
        if not stack:
            return variable.replace(checkpoint[names[0]])
        whole = np.stack([checkpoint[name] for name in names])
        return variable.replace(whole.reshape(value.shape))

    graphdef, state = nnx.split(nnx.recursive_map(hold, skeleton))
    flat = [(path, fill(path, v)) for path, v in nnx.to_flat_state(state)]
    reader.check(source)
    return Outline(nnx.merge(graphdef, nnx.from_flat_state(flat)), notes)


def original_kernels(
    path_or_repo: str | os.PathLike[str] | Source,
) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Returns a reader of a dense folder's linears, for `attach` and `compensate`.

    Returns:
      read(dotted path, index in its stack) -> the stored kernel (out, in), in its own
      dtype.

    Raises:
      CheckpointError: the folder cannot be read, or is 4-bit itself.
    """
    source = open_source(path_or_repo)
    if (stored := source.stored) is not None:
        raise CheckpointError(
            f"{source} holds 4-bit weights ({stored.codebook}), not the original ones; "
            "give the dense folder (--original)"
        )
    checkpoint, table = source.tensors, hf_table(source.config)

    def read(path: str, index: tuple[int, ...]) -> np.ndarray:
        kernel = checkpoint[table.name(f"{path}.kernel", index)]
        if problems := source.damage():
            raise CheckpointError(gathered(f"{source} has unusable weights", problems))
        return kernel

    return read


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


def _wanted(skeleton: Decoder, table: Table) -> dict[str, Wanted]:
    """Returns what each of our paths is made of."""
    wanted = {}
    for keys, variable in nnx.to_flat_state(nnx.state(skeleton)):
        path, shape = dotted(keys), variable.get_value().shape
        stack = table.stack(path)
        wanted[path] = Wanted(table.names(path), stack, shape[len(stack) :])
    return wanted


def _check_names(source: Source, wanted: dict[str, Wanted]) -> list[str]:
    """Refuses tensors that do not fit; returns what the model has no place for."""
    checkpoint, config = source.tensors, source.config
    problems, known, missing = [], set(), []
    for names, _, shape in wanted.values():
        known.update(names)
        for name in names:
            if name not in checkpoint:
                missing.append(name)
                problems.append(f"{name} is missing")
            elif bitsandbytes.is_packed(checkpoint, name):
                continue  # packed; its quant_state has the shape
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
    problems += unlike_experts(stacks, checkpoint)
    if problems:
        raise CheckpointError(
            gathered(f"{source} does not fit its config.json", problems)
        )
    more = left_out(checkpoint, known, source.family, config.num_layers)
    what = f"left out, as a {config.model_type} has no place for them: "
    return [what + ", ".join(more)] if more else []


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
    ):
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
                return self._stored(name, shape)
            w = self.checkpoint[name]
            scaled = bitsandbytes.is_packed_table(self.checkpoint, name)
            if self.tables.get(path) == "int8" and (scaled or w.dtype == np.int8):
                return bitsandbytes.read_int8(self.checkpoint, name, self.dtype)
            w = jnp.asarray(w)
            if not jnp.issubdtype(w.dtype, jnp.floating):
                raise ShapeError(f"{w.dtype} values, of which config.json says nothing")
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
        q = bitsandbytes.read(self.checkpoint, name)
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


def _fill(
    skeleton: Decoder, loaded: dict[str, Any], implementation: str | None
) -> Decoder:
    def fill(path: tuple, node: Any) -> Any:
        dotted = ".".join(map(str, path))
        if isinstance(node, Linear):
            kernel, bias = loaded[f"{dotted}.kernel"], loaded.get(f"{dotted}.bias")
            if isinstance(kernel, PackedWeight):
                return QuantizedLinear(kernel, bias, implementation)
            return Linear(kernel, bias)
        if isinstance(node, RMSNorm):
            return RMSNorm(loaded[f"{dotted}.weight"], node.eps, node.offset)
        if isinstance(node, Router):
            node.weight = FrozenParam(loaded[f"{dotted}.weight"])
        if isinstance(node, Embedding):
            table = loaded[f"{dotted}.weight"]
            quantized = isinstance(table, PackedWeight)
            return QuantizedEmbedding(table) if quantized else Embedding(table)
        return node

    return nnx.recursive_map(fill, skeleton)
