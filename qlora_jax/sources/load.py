"""Loading a model, one tensor at a time, quantized as it streams in."""

import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config.quant import Mxfp4Use, QuantConfig, TableFormat
from qlora_jax.errors import CheckpointError, ShapeError, gathered
from qlora_jax.models import Decoder, abstract, hf_table
from qlora_jax.names import PER_LAYER, dotted
from qlora_jax.nn import QuantizedLinear, Weighted
from qlora_jax.nn.frozen import replaced
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.reader import Reader, Wanted, check_names, wanted_of
from qlora_jax.sources.source import (
    Source,
    open_source,
    say,
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
    mxfp4: Mxfp4Use = "keep",
    stream: bool = False,
    implementation: str | None = None,
    revision: str | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """Loads a Hugging Face model, one tensor at a time.

    Args:
      path_or_repo: A folder with config.json and safetensors, a hub id, or a GGUF file,
        whose tensors are dequantized as they are read, but for experts that are all in
        MXFP4. Of a multimodal model (gemma3,
        llava, qwen2_5_vl, ...) the text model alone is opened. What a folder has beyond
        the model is left out, which one warning says.
      quant: Quantize the linears as they stream in (all but the head); None keeps a
        dense model dense. A folder with bitsandbytes 4-bit weights is read as it is.
      dtype: The dtype of everything that stays dense, and so of the computation:
        'bfloat16', 'float16' or 'float32'.
      embedding: Make the embedding '4bit' or 'int8' too, and with it a tied head and the
        table of per-layer embeddings. A folder that has it in int8 is read as it is.
      head: Make a head that is not tied to the embedding '4bit' or 'int8' too. A folder
        that has it in int8 is read as it is.
      mxfp4: Hold experts that a folder or file has in MXFP4 as they are ('keep'), or decode
        them as they are read, and quantize them with the other linears ('decode').
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
    prepared = reading(source, quant, dtype, embedding, head, stream, mxfp4)
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
    mxfp4: Mxfp4Use = "keep",
) -> "Reading":
    """Prepares to read a source.

    Args:
      source: The opened checkpoint to read.
      quant, dtype, embedding, head, stream, mxfp4: See `load`.

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
    wanted = wanted_of(skeleton, hf_table(config))
    notes = [*source.notes, *check_names(source, wanted)]
    tables = resolve_tables(source, embedding, head, mxfp4)
    if {tables["embedding"], tables["head"]} != {"none"} and (quant or stored) is None:
        raise CheckpointError(
            f"{source} stays dense, so its embedding and head do too; give quant, or leave "
            "embedding and head out"
        )
    formats: dict[str, TableFormat] = {
        path: tables[name] for name, path in _TABLES.items()
    }
    formats[f"{PER_LAYER}.weight"] = tables["embedding"]
    settings = quant, dtype, formats, quant or stored, stream, mxfp4
    reader = Reader(source.tensors, *settings)
    return Reading(reader, wanted, skeleton, notes)


class Reading(NamedTuple):
    """What reading a source takes.

    Attributes:
      reader: Reads its parameters.
      wanted: The tensors that each parameter is made of, by its path.
      skeleton: A model of shapes, dense.
      notes: Sentences for the user on what is left out, or read otherwise than written.
    """

    reader: Reader
    wanted: dict[str, Wanted]
    skeleton: Decoder
    notes: list[str]


class Tables(TypedDict):
    """The formats of embedding and head, and what becomes of MXFP4, as `load` takes them by
    keyword."""

    embedding: TableFormat
    head: TableFormat
    mxfp4: Mxfp4Use


_TABLES: dict[Literal["embedding", "head"], str] = {
    "embedding": "embed_tokens.weight",
    "head": "lm_head.kernel",
}


def resolve_tables(
    source: Source, embedding: TableFormat, head: TableFormat, mxfp4: Mxfp4Use = "keep"
) -> Tables:
    """Returns how embedding and head will be held, as asked for or as a source has them; and
    whether it has experts in MXFP4 that are kept so.

    Raises:
      CheckpointError: an unknown format, or another is asked for than the folder has.
    """
    has_mxfp4 = bitsandbytes.mxfp4_config(source.hf) is not None
    kept: Mxfp4Use = mxfp4 if has_mxfp4 else "decode"
    tables, problems = Tables(embedding=embedding, head=head, mxfp4=kept), []
    stored = [name.rpartition(".")[2] for name in bitsandbytes.int8_tables(source.hf)]
    for name, path in _TABLES.items():
        asked, module = tables[name], path.partition(".")[0]
        if asked not in get_args(TableFormat):
            known = ", ".join(get_args(TableFormat))
            problems.append(f"{name} is {asked!r}, expected {known}")
        elif module in stored and asked == "4bit":
            problems.append(f"{name} is stored in int8 and cannot become 4-bit")
        elif module in stored:
            tables[name] = "int8"
    if mxfp4 not in get_args(Mxfp4Use):
        known = ", ".join(get_args(Mxfp4Use))
        problems.append(f"mxfp4 is {mxfp4!r}, expected {known}")
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
    mxfp4: Mxfp4Use = "keep",
) -> Outline:
    """Opens a model without reading its linears.

    Args:
      path_or_repo, quant, embedding, head, mxfp4: See `load`.

    Raises:
      CheckpointError: as `load`.
    """
    source = open_source(path_or_repo)
    prepared = reading(source, quant, "bfloat16", embedding, head, mxfp4=mxfp4)
    return outlined(source, prepared)


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
        form, quant = bitsandbytes.known_as(checkpoint, names[0]), reader.quant
        if form == bitsandbytes.MXFP4 and not reader.decodes(names[0]):
            return bitsandbytes.mxfp4_shapes(shape, stack)
        if form is not None and form != bitsandbytes.MXFP4:
            quant = source.stored
        if (pack := reader.packing(path, quant)) is None:
            return None
        one = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), one
        )

    def hold(path: tuple, node: Weighted) -> nnx.Module:
        q = packed(f"{dotted(path)}.{node.WEIGHT}")
        if q is None:
            return node
        bias = None if node.bias is None else node.bias.get_value()
        return node.holding(q, bias)

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name, value = dotted(path), variable.get_value()
        inner = path[-1] == "kernel" and name not in formats
        if inner or not isinstance(value, jax.ShapeDtypeStruct):
            return variable
        names, stack, _ = wanted[name]
        if bitsandbytes.is_packed(checkpoint, names[0]):
            return variable.replace(reader.read(name, wanted[name]))
        if not stack:
            return variable.replace(checkpoint[names[0]])
        whole = np.stack([checkpoint[name] for name in names])
        return variable.replace(whole.reshape(value.shape))

    graphdef, state = nnx.split(replaced(skeleton, Weighted, hold))
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
        name = table.name(f"{path}.kernel", index)
        if bitsandbytes.is_packed(
            checkpoint, name
        ):  # MXFP4, whose values are the originals
            kernel = np.asarray(bitsandbytes.read(checkpoint, name).decode("float32"))
        else:
            kernel = checkpoint[name]
        if problems := source.damage():
            raise CheckpointError(gathered(f"{source} has unusable weights", problems))
        return kernel

    return read


def _fill(
    skeleton: Decoder, loaded: dict[str, Any], implementation: str | None
) -> Decoder:
    def fill(path: tuple, node: Weighted) -> nnx.Module:
        name = dotted(path)
        made = node.holding(loaded[f"{name}.{node.WEIGHT}"], loaded.get(f"{name}.bias"))
        if isinstance(made, QuantizedLinear):
            made.implementation = implementation
        return made

    return replaced(skeleton, Weighted, fill)
