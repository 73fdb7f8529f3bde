"""Safetensors, one tensor at a time: a folder of files read as a mapping.

Each tensor is mapped into memory by itself when it is asked for and unmapped when the
caller lets go of it, so that host memory holds one tensor and never a file. Headers are
checked before anything is read, so that a truncated file is named with its tensor.
"""

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax import digests
from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.inputs import check_regular, parse_json, read_json
from qlora_jax.schema import TEXT, mapped, misfits

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 96 << 20
_MAX_AXES, _MAX_SIZE = 8, 2**48
_BEHIND = 4
"""So many tensors may be read before the digest of the first of them is known."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class Cut(NamedTuple):
    """Says how a part is cut out of a stored tensor: the tensor's name, its shape, and what
    returns the part as a view of it."""

    name: str
    shape: tuple[int, ...]
    of: Callable[[np.ndarray], np.ndarray]


class Encoded(NamedTuple):
    """Says how a weight is decoded that is stored as several tensors.

    Attributes:
      called: What tables call the form it is stored in.
      nbytes: Bytes of all its entries.
      decode: Reads them, and returns the weight or raises CheckpointError. Of a stack it
        may be what decodes one matrix at a time (sources/encoded/stacked.py).
      problem: Why they are no weight; there is nothing to decode then.
    """

    called: str
    nbytes: int
    decode: Callable[[], Any] | None
    problem: str | None = None


class TensorInfo(NamedTuple):
    """Says where a tensor lies: its file, dtype, shape and first byte in the file.

    Where qlora_jax wrote the file, the digest of the tensor's bytes is there too. What is cut
    out of a tensor has that one's place and digest, and says how it is cut. What is decoded
    from several has the place of one of them, and says how.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    sha256: str | None = None
    cut: Cut | None = None
    encoded: Encoded | None = None


Part = tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]
"""The shape of what is cut out of a tensor, and what cuts it."""


class _Check(NamedTuple):
    """The digest of a tensor that was read, and the one that it was written with."""

    file: Path
    sha256: str
    digest: Future[str]


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a model folder, by name, read on access.

    Attributes:
      infos: {name: TensorInfo} of every tensor.
      notes: What was left unread, or read otherwise than a user may think.
    """

    def __init__(self, folder: Path):
        """Opens model.safetensors, or without one the shards of the index.

        Which files, and which of two tensors of one name, is as transformers chooses.

        Raises:
          CheckpointError: no file, or files that are missing, truncated or corrupt; all
            of them are named.
        """
        self.infos: dict[str, TensorInfo] = {}
        self._checks: dict[str, _Check] = {}
        self._last: deque[Future[str]] = deque(maxlen=_BEHIND)
        self._thread = ThreadPoolExecutor(1, "digests")
        files, self.notes = _files(folder)
        written = digests.read(folder)
        problems, twice = [], []
        for file in files:
            infos, problem = _read_header(file)
            entry = written.get(file.name)
            if entry and not problem and not digests.is_other(folder, file.name, entry):
                own = entry.get("tensors", {})
                infos = {
                    name: info._replace(sha256=own.get(name))
                    for name, info in infos.items()
                }
            twice += [
                f"{name} ({self.infos[name].file.name}, {file.name})"
                for name in infos
                if name in self.infos
            ]
            self.infos.update(infos)
            problems += problem
        if problems:
            raise CheckpointError(gathered(f"{folder} cannot be read", problems))
        if twice:
            self.notes.append(
                "tensors that two files have were read from the latter: "
                + shortened(twice)
            )

    def rename(self, usual: Callable[[str], str]) -> None:
        """Gives every tensor the name that `usual` returns for its own.

        Raises:
          CheckpointError: tensors would have one name.
        """
        infos: dict[str, TensorInfo] = {}
        names: dict[str, str] = {}
        problems = []
        for name, info in self.infos.items():
            new = usual(name)
            if new in names:
                problems.append(f"{names[new]} and {name} are both {new}")
            names[new], infos[new] = name, info
        if problems:
            where = next(iter(infos.values())).file.parent
            raise CheckpointError(gathered(f"{where} has tensors twice", problems))
        self.infos = infos

    def split(self, name: str, parts: Mapping[str, Part]) -> None:
        """Puts parts of a tensor in its place.

        Args:
          name: The tensor.
          parts: For each new name the shape of the part, and what cuts it out of the whole.

        Raises:
          CheckpointError: there is a tensor of such a name.
        """
        info = self.infos.pop(name)
        if twice := [part for part in parts if part in self.infos]:
            raise CheckpointError(
                f"{info.file}: {twice[0]} is there, and a part of {name} too; which of them "
                "is meant cannot be told"
            )
        for part, (shape, of) in parts.items():
            cut = Cut(name, info.shape, of)
            self.infos[part] = info._replace(shape=shape, cut=cut)

    def join(self, name: str, parts: Sequence[str], info: TensorInfo) -> None:
        """Puts a weight in the place of the tensors that it is stored as.

        Args:
          name: The weight.
          parts: The tensors.
          info: What is known of the weight, and how it is decoded.

        Raises:
          CheckpointError: there is another tensor of its name.
        """
        for part in parts:
            del self.infos[part]
        if name in self.infos:
            raise CheckpointError(
                f"{info.file}: {name} is there, and {parts[0]} too; which of them is meant "
                "cannot be told"
            )
        self.infos[name] = info

    def stored(self, name: str) -> tuple[str, int]:
        """Returns how a tensor is stored: the name of its dtype or form, and its bytes."""
        info = self.infos[name]
        if info.encoded is not None:
            return info.encoded.called, info.encoded.nbytes
        return info.dtype.name, math.prod(info.shape) * info.dtype.itemsize

    def __getitem__(self, name: str) -> np.ndarray:
        """Maps one tensor, read-only, or decodes it.

        Raises:
          CheckpointError: what it would be decoded from is no weight.
        """
        info = self.infos[name]
        if info.encoded is None:
            return self.map(name, info)
        if info.encoded.decode is None:
            raise CheckpointError(f"{info.encoded.problem}")
        array = info.encoded.decode()
        return np.asarray(array) if info.cut is None else info.cut.of(array)

    def map(self, name: str, info: TensorInfo) -> np.ndarray:
        """Maps what lies at a place, read-only.

        A thread takes its digest meanwhile, which `damage` compares with the one that it was
        written with.

        Args:
          name: The tensor, or what was cut out of one.
          info: Its place.
        """
        if 0 in info.shape:
            return np.zeros(info.shape, info.dtype)
        whole = info.shape if info.cut is None else info.cut.shape
        array = np.memmap(info.file, info.dtype, "r", info.start, whole or (1,))
        stored = name if info.cut is None else info.cut.name
        if info.sha256 is not None and stored not in self._checks:
            if (
                len(self._last) == _BEHIND
            ):  # so that few are mapped for the thread alone
                self._last[0].result()
            check = self._thread.submit(digests.of_array, array)
            self._checks[stored] = _Check(info.file, info.sha256, check)
            self._last.append(check)
        if info.cut is not None:
            return info.cut.of(array)
        return array.reshape(info.shape)

    def damage(self) -> list[str]:
        """Returns a sentence for each tensor, of those read so far, that is damaged.

        Of a folder that has no digests nothing is known.
        """
        return [
            f"{name}: its bytes in {check.file.name} are not those that were written there; "
            f"{digests.ADVICE}"
            for name, check in self._checks.items()
            if check.digest.result() != check.sha256
        ]

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self.infos)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self.infos)


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Returns names in one line, at most `limit` of them."""
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the files to read, and notes on those that are there and are not read."""
    index = folder / INDEX
    if os.path.lexists(folder / SINGLE):
        beside = (
            f"{INDEX} is there beside {SINGLE}, which is read whole; it is not used"
        )
        return [folder / SINGLE], [beside] if index.exists() else []
    if not os.path.lexists(index):
        raise CheckpointError(_no_weights(folder))
    shards = shards_of(index)
    if missing := [s for s in shards if not os.path.lexists(folder / s)]:
        raise CheckpointError(
            gathered(f"{folder} lacks shards that {INDEX} names; fetch them", missing)
        )
    return [folder / shard for shard in shards], []


def shards_of(index: Path) -> list[str]:
    """Returns the files that an index names."""
    read = read_json(index, limit=_MAX_INDEX_BYTES)
    problems = misfits(read, {"weight_map": mapped(TEXT)}, ("weight_map",))
    shards = [] if problems else sorted(set(read["weight_map"].values()))
    if wrong := [s for s in shards if Path(s).name != s or "\0" in s]:
        problems.append(f"{wrong[0][:80]!r} is no file name")
    if problems or not shards:
        what = "; ".join(problems) or "its weight_map is empty"
        raise CheckpointError(
            f"{index} is no safetensors index ({what}); expected an object with a "
            "weight_map from tensors to files. Fetch it again."
        )
    return shards


def _no_weights(folder: Path) -> str:
    text = f"{folder} has no {SINGLE} and no {INDEX}"
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors")
        for path in folder.glob(pattern)
        if not path.name.startswith("adapter_model")
    )
    if any(name.endswith(".safetensors") for name in others):
        return (
            f"{text}, but {shortened(others)}; name a single file {SINGLE}, or fetch the "
            "index of the shards"
        )
    if others:
        return (
            f"{text}, but PyTorch's {shortened(others)}. Convert them once, where "
            "transformers is installed: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(folder) writes safetensors"
        )
    return f"{text}; expected a Hugging Face model folder"


class _Entry(NamedTuple):
    """What a header says of one tensor; its bytes are counted from the header's end."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, value: Any) -> _Entry | str:
    """Reads a header's entry of a tensor, or says what is wrong with it."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or value.keys() != keys:
        return f"{name[:80]} has an entry other than dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"{name} has dtype {dtype!r:.80}, which is unknown"
    if (
        not _are_sizes(shape)
        or len(shape) > _MAX_AXES
        or math.prod(size or 1 for size in shape) > _MAX_SIZE  # an empty array's too
    ):
        return f"{name} has the shape {shape!r:.80}, which no array has"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"{name} has the data_offsets {offsets!r:.80}, expected two places"
    entry = _Entry(name, DTYPES[dtype], tuple(shape), *offsets)
    needed = math.prod(shape) * entry.dtype.itemsize
    if entry.end - entry.begin != needed:
        have = entry.end - entry.begin
        return f"{name} has {have} bytes, its shape needs {needed}"
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(i) is int and i >= 0 for i in values)


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns what a file has, and what is wrong with it."""
    size = check_regular(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            return {}, [f"{file.name}: truncated or no safetensors file ({size} bytes)"]
        text = stream.read(length)
    try:
        header = parse_json(text.decode("utf-8"), f"{file.name}: its header")
    except UnicodeDecodeError:
        return {}, [f"{file.name}: its header is corrupt: it is not UTF-8"]
    except CheckpointError as error:
        return {}, [f"{error}; it is corrupt"]
    if not isinstance(header, dict) or not isinstance(
        header.pop("__metadata__", {}), dict
    ):
        return {}, [f"{file.name}: its header is corrupt: it is no object of tensors"]
    read = [_entry(name, value) for name, value in header.items()]
    entries = [entry for entry in read if isinstance(entry, _Entry)]
    problems = [problem for problem in read if isinstance(problem, str)]
    start = 8 + length
    problems += _unlike_the_file(entries, size - start, whole=not problems)
    infos = {
        entry.name: TensorInfo(file, entry.dtype, entry.shape, start + entry.begin)
        for entry in entries
    }
    return infos, [f"{file.name}: {problem}" for problem in problems]


def _unlike_the_file(entries: list[_Entry], size: int, *, whole: bool) -> list[str]:
    """Says where tensors do not lie one after another, or do not end where the file does.

    Args:
      entries: What the header says.
      size: Bytes after the header.
      whole: Whether these are all the tensors of the file.
    """
    if late := [entry for entry in entries if entry.end > size]:
        return [
            f"{entry.name} ends at byte {entry.end} of the data, which has {size}: "
            "truncated; fetch it again"
            for entry in late
        ]
    if not whole:
        return []
    at, before = 0, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            how = "overlaps" if entry.begin < at else "does not follow"
            return [f"{entry.name} {how} {before}; the file is corrupt, fetch it again"]
        at, before = entry.end, entry.name
    if at != size:
        return [f"{size - at} bytes after the last tensor; the file is corrupt"]
    return []
