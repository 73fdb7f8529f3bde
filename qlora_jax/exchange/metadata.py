"""An adapter's folder as files: adapter.json, which says what it is, and its arrays.

adapter.json has the digest of every array and one of itself, so that a folder that is damaged
or was changed is named as it is read.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax import digests
from qlora_jax.adapters.fingerprint import MARK
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import (
    AdapterMismatchError,
    ConfigError,
    first_line,
    gathered,
)
from qlora_jax.inputs import check_tree, read_json
from qlora_jax.models.settings import MAX_LAYERS
from qlora_jax.schema import NULL, OBJECT, TEXT, either, listed, mapped, misfits, whole

METADATA = "adapter.json"
ARRAYS = "arrays"
ADAPTER, BASE, BASE_NF4 = "adapter", "base", "base-nf4"
"""Folders that a run folder has: the adapter, the 4-bit base that init 'pissa' made for it, and
the one that quickstart makes."""
OWN_DIGEST = "metadata_sha256"
"""The entry of adapter.json that has the digest of all others."""
FORMAT = 1
_SPARE_BYTES, _PACKED = 256 << 20, 16
"""Bytes of arrays that any files may hold, and bytes more for each of theirs."""
_KINDS = {
    "format": whole(1, 2**31),
    "lora": OBJECT,
    "base": either(NULL, MARK),
    "arrays": mapped(listed(whole(0, 2**31), 8)),
    "layers": mapped(listed(whole(0, MAX_LAYERS - 1), MAX_LAYERS)),
    "sha256": either(TEXT, mapped(TEXT)),
    OWN_DIGEST: TEXT,
}
"""Fields of adapter.json -> their kinds."""


def adapter_metadata(
    arrays: Mapping[str, np.ndarray],
    config: LoRAConfig,
    base: dict[str, Any] | None,
    layers: Mapping[str, list[int]] | None = None,
) -> str:
    """Returns the text of an adapter's adapter.json; see `write_adapter` for the arguments.

    It has the digest of every array, and one of itself.
    """
    metadata = {
        "format": FORMAT,
        "lora": dataclasses.asdict(config),
        "base": base,
        "arrays": {name: list(x.shape) for name, x in arrays.items()},
        **({"layers": layers} if layers else {}),
        "sha256": {name: digests.of_array(x) for name, x in arrays.items()},
    }
    metadata[OWN_DIGEST] = digests.of_json(metadata)
    return json.dumps(metadata, indent=2) + "\n"


def read_metadata(folder: Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """Reads the adapter.json of a folder.

    Raises:
      AdapterMismatchError: it cannot be read, or is of a later format.
    """
    path = folder / METADATA
    metadata = read_json(path, error=AdapterMismatchError)
    problems = misfits(metadata, {"format": _KINDS["format"]}, ("format",))
    if not problems and metadata["format"] > FORMAT:
        raise AdapterMismatchError(
            f"{folder} has format {metadata['format']}; this version reads up to {FORMAT}"
        )
    if "base" not in metadata:
        problems.append("base is missing")
    problems += misfits(metadata, _KINDS, ("lora", "arrays"))
    if problems:
        raise AdapterMismatchError(gathered(f"{path} cannot be read", problems))
    try:
        return LoRAConfig.from_json(metadata["lora"]), metadata
    except ConfigError as error:
        raise AdapterMismatchError(f"{path} cannot be read: {error}") from None


def restored(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Reads an adapter's arrays, by dotted name, and compares them with their digests.

    Adapters of versions that wrote no digests are read unchecked.

    Args:
      folder: A folder with adapter.json: an adapter's, or a checkpoint of a run.
      metadata: What adapter.json says.

    Raises:
      AdapterMismatchError: what is there is damaged; every array that is not as it was
        written is named.
    """
    place = folder / ARRAYS
    if not place.exists() and (folder / ADAPTER).is_dir():
        place = folder / ADAPTER  # of a checkpoint
    check_tree(place, AdapterMismatchError)
    _check_size(place, metadata)
    # Orbax names no file, and leaves noise behind, so the files are compared before.
    if wrong := digests.damaged_files(folder, within=f"{place.name}/"):
        raise AdapterMismatchError(gathered(f"adapter {folder} is damaged", wrong))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(place, _abstract(metadata))
    except Exception as error:  # Orbax raises of every kind, Exception itself too
        raise AdapterMismatchError(
            f"{place} cannot be read, so it is damaged: {first_line(error)}"
        ) from None
    expected = metadata.get("sha256", {})
    expected = expected if isinstance(expected, dict) else {"sha256": expected}
    problems = [
        f"{name} is not as it was written: its sha256 is {found[:12]}..., expected "
        f"{str(expected.get(name))[:12]}..."
        for name, x in arrays.items()
        if expected and (found := digests.of_array(x)) != expected.get(name)
    ]
    if problems:
        raise AdapterMismatchError(gathered(f"adapter {folder} is damaged", problems))
    return arrays


def _check_size(place: Path, metadata: dict[str, Any]) -> None:
    """Refuses arrays that would be far larger than the files that they are in.

    Orbax makes an array of the size that its own metadata says, zeros where there is no file.
    """
    files = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    arrays = sum(4 * math.prod(shape) for shape in metadata["arrays"].values())
    if arrays > _SPARE_BYTES + _PACKED * files:
        raise AdapterMismatchError(
            f"{place} has files of {files} bytes, and {METADATA} says that they hold arrays of "
            f"{arrays}; it is damaged, or made to fill the memory"
        )


def check_unchanged(folder: Path, metadata: dict[str, Any]) -> None:
    """Refuses an adapter.json that is not as it was written.

    Where it does not fit the model, that says more, so it is asked for afterwards.

    Raises:
      AdapterMismatchError: it was changed, or is damaged.
    """
    own = {name: value for name, value in metadata.items() if name != OWN_DIGEST}
    if not metadata.keys() & {OWN_DIGEST, "sha256"}:
        return  # of a version that wrote no digests
    if digests.of_json(own) != metadata.get(OWN_DIGEST):
        raise AdapterMismatchError(
            f"{folder / METADATA} was changed after it was written, or is damaged; to use it "
            f"as it is now, take the entries sha256 and {OWN_DIGEST} out of it"
        )


def _abstract(metadata: dict[str, Any]) -> dict[str, Any]:
    # The arrays are restored onto this process's device, whatever saved them.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), np.float32, sharding=sharding)
        for name, shape in metadata["arrays"].items()
    }
