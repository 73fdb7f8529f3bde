"""A 4-bit copy of a model's folder, made one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_jax.config.quant import Mxfp4Use, QuantConfig, TableFormat
from qlora_jax.files import check_output
from qlora_jax.sources.load import reading
from qlora_jax.sources.reader import Reader, Wanted
from qlora_jax.sources.save import joining, new_model_folder, write_folder
from qlora_jax.sources.source import Source, say


def quantize_folder(
    source: Source,
    out: Path,
    quant: QuantConfig,
    dtype: str = "bfloat16",
    *,
    embedding: TableFormat = "none",
    head: TableFormat = "none",
    mxfp4: Mxfp4Use = "keep",
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
) -> dict[str, Any]:
    """Writes what `save_model(load(source, quant, ...), out)` would, without the model.

    Memory holds one tensor, and the file that is being filled.

    Args:
      source: The opened dense checkpoint.
      out: The folder.
      quant: The quantization of the linears.
      dtype: The dtype of everything that stays dense: 'bfloat16', 'float16' or 'float32'.
      embedding: The format of the embedding, and of a tied head: 'int8', or 'none' for
        dense.
      head: The format of an untied head: 'int8', or 'none' for dense.
      mxfp4: Write experts that the source has in MXFP4 as they are ('keep'), or quantize
        them with the other linears ('decode').
      overwrite: Write into a folder that is not empty.
      shard_bytes: Largest size of a file.

    Returns:
      {"out": path, "bytes": of all tensors}.

    Raises:
      OutputExistsError: see `check_output`.
      CheckpointError: as `load`; nothing is written then.
      OutputError: the folder cannot be written; one that was there is as it was.
    """
    check_output(out, overwrite)
    prepared = reading(source, quant, dtype, embedding, head, mxfp4=mxfp4)
    say(source.path, prepared.notes)
    reader, wanted = prepared.reader, prepared.wanted
    with new_model_folder(out, source) as new:
        return write_folder(
            *(_parameters(reader, wanted, source), source.config, dtype),
            *(source.hf, new),
            origin=source,
            shard_bytes=shard_bytes,
        )


def _parameters(
    reader: Reader, wanted: dict[str, Wanted], source: Source
) -> Iterator[tuple[str, Any]]:
    entries = [
        (path, name, shape)
        for path, (names, _, shape) in wanted.items()
        for name in names
    ]
    joined = joining(source.config, source)
    for path, name, shape in joined.ordered(entries, lambda entry: entry[1]):
        value = reader.one(path, name, shape)
        if value is not None:
            yield name, value
    reader.check(source)
