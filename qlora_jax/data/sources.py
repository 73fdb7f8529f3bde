"""Finds the sources of rows: files, folders and ids of the hub's datasets, each with a share.

    rows.jsonl                     a file of rows (data/records.py has the kinds)
    rows.jsonl:0.3                 0.3 of its rows in each epoch, other ones in the next
    owner/name:train               a split of a dataset of the hub
    owner/name/main@v1:test:2      its configuration, its revision, each row twice an epoch
    folder:train                   a dataset in a folder, as the hub or `datasets` keeps it

What lies on disk comes first: a file's name may hold colons. Where there is a folder `owner`,
owner/name is not asked of the hub unless `hf://` stands before it.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.problems import Problems
from qlora_jax.data.records import Record, read_records, suffix_of
from qlora_jax.data.unpacking import ROWS
from qlora_jax.errors import DataError
from qlora_jax.sources.hub import local_owner, offline, split_prefix

logger = logging.getLogger(__name__)

_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.+-]+))?(@(?P<revision>[\w./-]+))?"
)
_SPLIT = re.compile(r":(?P<split>[A-Za-z_][\w.+-]*(\[[^\]]*\])?)$")
_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclasses.dataclass(frozen=True)
class Source:
    """One of a run's sources of rows.

    Attributes:
      name: A path, or the hub's owner/name.
      local: Whether it is on this disk.
      config: The configuration of a dataset of the hub; None where none is named.
      revision: The revision of a dataset of the hub; None where none is named.
      split: The split of a dataset; None where none is named.
      weight: The number of times that an epoch has each row: 2 has each twice, 0.3 has
        other 30 % of them in each epoch.
      prefix: What says that the hub is meant, where it was given: `hf://`.
    """

    name: str
    local: bool
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    weight: float = 1.0
    prefix: str = dataclasses.field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Reads what a user gave.

        Raises:
          DataError: it is on no disk, and no id; or its weight is no positive number.
        """
        rest, weight = text, 1.0
        if not Path(rest).exists() and (
            found := re.search(r":([-+.\deE]+|nan|inf)$", rest)
        ):
            try:
                weight = float(found[1])
            except ValueError:
                raise DataError(f"{text}: {found[1]!r} is no number") from None
            if not 0 < weight < float("inf"):
                raise DataError(
                    f"{text}: the weight is {found[1]}, expected more than 0; it says how "
                    "often an epoch has each row"
                )
            rest = rest[: found.start()]
        split = None
        if not Path(rest).exists() and (found := _SPLIT.search(rest)):
            split, rest = found["split"], rest[: found.start()]
        path = Path(rest).expanduser()
        if path.exists():
            if split is not None and path.is_file():
                raise DataError(f"{text}: {rest} is a file, which has no splits")
            if not (path.is_file() or path.is_dir()):
                raise DataError(f"{text} is no file and no folder; expected {ROWS}")
            return cls(str(path), True, split=split, weight=weight)
        prefix, rest = split_prefix(rest)
        file = not prefix and suffix_of(path) in _FILES
        found = None if file else _ID.fullmatch(rest)
        if found is None:
            raise DataError(
                f"{rest} is no file; expected {ROWS}, a folder with a dataset, or an id of "
                "the hub (owner/name, owner/name/configuration:split)"
            )
        if not prefix and (problem := local_owner(found["name"])):
            raise DataError(problem)
        config, revision = found["config"], found["revision"]
        return cls(found["name"], False, config, revision, split, weight, prefix)

    @property
    def file(self) -> Path | None:
        """The file that it is, if it is one."""
        path = Path(self.name)
        return path if self.local and path.is_file() else None

    def __str__(self) -> str:
        """Returns what `parse` reads, a path made absolute."""
        name = self.prefix + self.name
        text = str(Path(self.name).absolute()) if self.local else name
        text += f"/{self.config}" if self.config else ""
        text += f"@{self.revision}" if self.revision else ""
        text += f":{self.split}" if self.split else ""
        return text + (f":{self.weight:g}" if self.weight != 1 else "")


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """Reads what a user gave.

    Raises:
      DataError: none, one of them twice, or one that is none; all are named.
    """
    sources, problems = [], []
    for text in texts:
        try:
            sources.append(Source.parse(text))
        except DataError as error:
            problems.append(str(error))
    names = [dataclasses.replace(source, weight=1.0) for source in sources]
    problems += [
        f"{source} is given twice; a weight says how often its rows come ({source}:2)"
        for i, source in enumerate(names)
        if source in names[:i]
    ]
    if problems or not sources:
        raise DataError("\n".join(problems) or "no rows are given")
    return sources


class Opened:
    """A source that can be read.

    Attributes:
      problems: What is wrong with its rows, as they are read.
      identity: Says whether another time it has the same rows: a file to be digested, or
        the digest that `datasets` keeps of a dataset.
    """

    def __init__(self, source: Source):
        """Opens it; a dataset of the hub is downloaded.

        Raises:
          DataError: it cannot be opened.
        """
        self._table: Any = None
        self.identity: Path | str
        if (file := source.file) is not None:
            self.problems, self.identity = Problems(source.name), file
        else:
            self._table, split = _dataset(source)
            name = f"{source.name}:{split}" if split else source.name
            self.problems = Problems(name, lines=False)
            self.identity = f"datasets {self._table._fingerprint}"

    def records(self) -> Iterator[Record]:
        """Yields its rows, each with its place."""
        if isinstance(self.identity, Path):
            yield from read_records(self.identity, self.problems)
            return
        number = 0
        for batch in self._table.iter(batch_size=1000):
            for row in _rows(batch):
                number += 1
                yield number, row


def _rows(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _dataset(source: Source) -> tuple[Any, str | None]:
    """Opens a dataset by the `datasets` library; returns its table and split."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: a dataset in a folder or of the hub needs the datasets library: pip "
            "install datasets (the extra 'data' of qlora_jax brings it), or give its files"
        ) from None
    folder = Path(source.name)
    if not source.local and offline():
        # Asked at every call, as the library reads its variables once.
        from datasets import config

        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
    try:
        if source.local and (
            (folder / "dataset_dict.json").is_file()
            or (folder / "state.json").is_file()
        ):
            opened = datasets.load_from_disk(source.name)
        else:
            name = str(folder.absolute()) if source.local else source.name
            opened = datasets.load_dataset(
                name, source.config, split=source.split, revision=source.revision
            )
    except Exception as error:  # it raises of all kinds
        raise DataError(f"{source} cannot be opened: {error}") from None
    if not isinstance(opened, Mapping):  # one split
        return opened, source.split
    splits, split = {str(name): table for name, table in opened.items()}, source.split
    if split is None:
        split = "train" if "train" in splits else next(iter(splits), "")
        if len(splits) > 1:
            logger.info("%s: split %r of %s", source.name, split, ", ".join(splits))
    if split not in splits:
        raise DataError(f"{source}: has the splits {', '.join(splits) or 'none'}")
    return splits[split], split
