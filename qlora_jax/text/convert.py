"""Folders without tokenizer.json: SentencePiece's tokenizer.model, vocab.json, tekken.json.

transformers makes a fast tokenizer of them (it needs no torch for that). It is what such
folders are measured against, so it is the converter here: the extra `sentencepiece`. Its
parsers are C++ that may abort, and may take for ever with a hostile file; so it runs in a
process of its own, `python -m qlora_jax.text.convert FILE`, that has limits.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tokenizers

from qlora_jax.errors import CheckpointError
from qlora_jax.inputs import check_regular
from qlora_jax.text import bounded

MAX_BYTES = 256 << 20
"""The largest file that is converted."""

SECONDS = 10
"""Time of the processor that the process has after its imports."""

BYTES_PER_SECOND = 200_000
"""Bytes of the file for which it has another second: a fifth of what is usual."""

MEMORY = 1 << 30
"""Bytes of memory that it has after its imports."""

MEMORY_FACTOR = 64
"""Bytes of memory that it has beside those for each byte of the file."""

SOURCES = (
    "tokenizer.model",
    "spm.model",
    "tiktoken.model",
    "tekken.json",
    "merges.txt",
)
"""Files that a tokenizer can be made of, where there is no tokenizer.json."""

PACKAGES = "'transformers>=5' sentencepiece protobuf"


def source_of(folder: Path) -> Path | None:
    """Returns the file to convert; None where there is none."""
    files = (folder / name for name in SOURCES)
    return next((file for file in files if file.is_file()), None)


def convert(source: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Converts a folder's tokenizer.

    Returns:
      (tokenizer, name -> text of its special tokens).

    Raises:
      CheckpointError: the converter is not installed, refuses the file, or takes too long.
    """
    folder = source.parent
    check_regular(source, limit=MAX_BYTES)
    for path in folder.iterdir():  # of which it may open any; a FIFO has no end
        if not path.is_dir():
            check_regular(path)
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "qlora_jax.text.convert", str(source)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    try:
        made: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise CheckpointError(
            f"{source} cannot be converted: {_ended(done)}; it is damaged, or made to do harm"
        ) from None
    if "missing" in made:
        raise CheckpointError(
            f"{folder} has {source.name} and no tokenizer.json, and what converts it is "
            f"not installed ({made['missing']}): pip install {PACKAGES}. Or write "
            "tokenizer.json once, in a Python that has them: AutoTokenizer.from_pretrained("
            "folder).save_pretrained(folder)"
        )
    if "error" in made:
        raise CheckpointError(f"{source} cannot be converted by {made['error']}")
    bounded.check_patterns(made["tokenizer"].encode(), source)
    with bounded.no_panic():
        return tokenizers.Tokenizer.from_str(made["tokenizer"]), made["special"]


def _ended(done: "subprocess.CompletedProcess[bytes]") -> str:
    """Says how the process ended that had no answer."""
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return "it takes too long, or too much memory"
    # It is shown to people at most, so bytes that are no text may be replaced.
    said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"its converter ended with status {done.returncode} ({said[:200]})"


def _limit(size: int) -> None:
    """Limits the time and the memory of this process, for a file of so many bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + SECONDS
    seconds += size // BYTES_PER_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with contextlib.suppress(FileNotFoundError):  # where the system has no such file
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY + MEMORY_FACTOR * size
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _answer(source: Path) -> dict[str, Any]:
    """Converts a file in this process; returns the answer for the one that started it."""
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401 # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return {"missing": str(error)}
    _limit(source.stat().st_size)
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            str(source.parent), local_files_only=True, trust_remote_code=False
        )
        text = made.backend_tokenizer.to_str()
        named = made.special_tokens_map.items()
        special = {name: token for name, token in named if isinstance(token, str)}
        return {"tokenizer": text, "special": special}
    except Exception as error:  # it can fail in any way that Python can
        return {"error": f"transformers {transformers.__version__}: {error}"[:2000]}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # a print is no answer
    json.dump(_answer(Path(sys.argv[1])), answers)
