"""Times how long rows take to be ready: tokenized by several processes, by one, and kept.

    python -m scripts.bench.data --model DIR --chats FILE [--rows 100000]
        [--chat-template FILE] [--append FILE]

--chats has rows with conversations (such as shared/data/fastchat's), of which the first
three turns of user and assistant are taken, again and again with another first word each,
until there are --rows. They are read as `qlora train` reads them: first with no rows kept,
then again. CPU seconds are of this process and those it starts.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_jax.data import DataConfig, forming, read_dataset
from qlora_jax.sources.source import open_source
from scripts.bench import harness

SPEAKERS = {"human": "user", "gpt": "assistant"}


def write_chats(source: Path, path: Path, count: int) -> int:
    """Writes chats of three turns; returns the file's bytes."""
    chats = []
    for row in json.loads(source.read_text(encoding="utf-8")):
        turns = [
            {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
            for turn in row["conversations"][:6]
        ]
        if len(turns) == 6:
            chats.append(turns)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            first, *rest = chats[i % len(chats)]
            first = {**first, "content": f"{i} {first['content']}"}
            stream.write(json.dumps({"messages": [first, *rest]}) + "\n")
    return path.stat().st_size


def seconds(call: Any) -> tuple[float, float]:
    """Returns how long a call takes, and the processor's time of all processes."""

    def cpu() -> float:
        return sum(os.times()[:4])

    began, spent = time.perf_counter(), cpu()
    call()
    return time.perf_counter() - began, cpu() - spent


def main() -> None:
    """Runs the benchmark; prints one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--chat-template", help="a file; the model's own without it")
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer
    assert tokenizer is not None
    config = DataConfig(
        max_tokens=4096, too_long="truncate", chat_template=args.chat_template
    )
    figures: dict[str, Any] = {"rows": args.rows}
    with tempfile.TemporaryDirectory() as folder:
        path, keep = Path(folder) / "chats.jsonl", Path(folder) / "rows"
        figures["file_bytes"] = write_chats(args.chats, path, args.rows)

        def read(keep: Path | None) -> None:
            rows = read_dataset(path, tokenizer, config, keep=keep).rows
            figures["tokens"] = sum(len(row.tokens) for row in rows)

        for name in ("first", "again"):
            took, spent = seconds(lambda: read(keep))
            figures[name] = {"s": round(took, 2), "cpu_s": round(spent, 2)}
        figures["kept_bytes"] = sum(file.stat().st_size for file in keep.iterdir())
        forming.ALONE = args.rows  # all of it in this process
        took, spent = seconds(lambda: read(None))
        figures["one_process"] = {"s": round(took, 2), "cpu_s": round(spent, 2)}
    harness.record("data", args.append, cores=forming._cores(), figures=figures)


if __name__ == "__main__":
    main()
