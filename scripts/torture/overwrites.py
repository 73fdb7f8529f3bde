"""Overwrites each kind of output, and looks at every state that a kill meanwhile can leave.

    python -m scripts.torture.overwrites --model FOLDER --append scripts/results/torture.jsonl

Before each call by which the command changes files, the folder of the output is copied. Every
distinct copy has to be the old output or the new one, by the loss that it gives, or be refused
when it is opened; and the same command has to make the new output of it (of a run's, of every
eighth), with nothing left over. Calls of Python are seen; Orbax's own all write under a hidden
name.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from qlora_jax.cli.main import main as qlora
from scripts.bench import harness
from scripts.torture.states import states

RUN = ("--train.max-steps", "2", "--train.micro-batch", "2", "--lora.rank", "4")
RUN += ("--data.max-tokens", "32", "--train.save-every", "1")


def call(*args: object) -> tuple[int, str]:
    """Runs a command in this process; returns its status, and its last line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = qlora([str(arg) for arg in args])
    return status, (out if status == 0 else err).getvalue().strip().rpartition("\n")[2]


def must(*args: object) -> None:
    """Runs a command that has to work."""
    status, said = call(*args)
    if status:
        sys.exit(f"{args}: {said}")


def cases(model: Path, root: Path) -> dict[str, tuple[list, list, list]]:
    """Returns {kind: (what makes the old one, the overwriting command, what opens it)}.

    Each takes its output where a command has OUT.
    """
    rows = root / "rows.jsonl"
    rows.write_text('{"input": "a", "output": "b"}\n' * 8)
    for name, seed in (("one", "1"), ("two", "2")):
        train = ("train", "--model", model, "--data", rows, "--out", root / name)
        must(*train, *RUN, "--train.seed", seed)
    one, two = root / "one", root / "two"
    quantize = ["quantize", "--model", model, "--out", "OUT"]
    peft = ["export", "--model", model, "--out", "OUT", "--adapter"]
    gguf = ["export", "--format", "gguf", "--model", model, "--out", "OUT", "--dtype"]
    merge = ["merge", "--model", model, "--adapter", one, "--out", "OUT"]
    merge += ["--requantize", "nf4", "--correction-rank", "2"]
    compress = ["compress", "--out", "OUT", "--rank", "2", "--adapter"]
    train = ["train", "--model", model, "--data", rows, "--out", "OUT", *RUN]
    by_adapter = ["evaluate", "--model", model, "--data", rows, "--adapter", "OUT"]
    by_model = ["evaluate", "--model", "OUT", "--data", rows]
    return {
        "quantize": (quantize, [*quantize, "--quant.codebook", "fp4"], by_model),
        "merge": (quantize, merge, by_model),
        "peft": ([*peft, one], [*peft, two], by_adapter),
        "gguf": ([*gguf, "f16"], [*gguf, "q8_0"], by_model),
        "adapter": ([*compress, one], [*compress, two], by_adapter),
        "run": (
            [*train, "--train.seed", "1"],
            [*train, "--train.seed", "2"],
            by_adapter,
        ),
    }


def placed(command: list, out: Path) -> list:
    return [out if word == "OUT" else word for word in command]


def overwrite(kind: str, old: list, new: list, opens: list, root: Path) -> Counter[str]:
    """Overwrites an output; returns how many states of each sort that left."""
    name = "out.gguf" if kind == "gguf" else "out"
    place = root / "place" / name
    place.parent.mkdir(parents=True)
    must(*placed(old, place))
    before = answer(opens, place)
    counts: Counter[str] = Counter()
    with states(place.parent, root / "states") as found:
        must(*placed(new, place), "--overwrite")
    after = answer(opens, place)
    assert before[0] == after[0] == 0 and before != after, (kind, before, after)
    distinct = {tree(state): state for state in found}
    counts["states"] = len(distinct)
    for i, state in enumerate(distinct.values()):
        # Opened where the output was: some paths are said in what a command prints.
        shutil.rmtree(place.parent)
        shutil.copytree(state, place.parent, symlinks=True)
        status, said = now = answer(opens, place)
        if now in (before, after):
            counts["old" if now == before else "new"] += 1
        elif status == 2:
            counts["refused"] += 1
        else:
            counts["wrong"] += 1
            print(kind, state, status, said, file=sys.stderr)
        if kind == "run" and i % 8:
            continue  # to train again takes its time
        must(*placed(new, place), "--overwrite")
        left = [x.name for x in place.parent.iterdir() if x != place]
        if answer(opens, place) != after or left:
            counts["not mended"] += 1
            print(kind, state, left, file=sys.stderr)
    return counts


def answer(opens: list, place: Path) -> tuple[int, str]:
    """Opens an output by a command; returns its status and what it measured."""
    status, said = call(*placed(opens, place))
    return status, str(json.loads(said)["loss"]) if status == 0 else ""


def tree(folder: Path) -> str:
    """Returns a digest of all that is in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes() if path.is_file() else b"/")
    return found.hexdigest()


def main() -> None:
    """Runs."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", help="some of them")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind, commands in cases(args.model, root).items():
            if args.kinds and kind not in args.kinds:
                continue
            figures[kind] = overwrite(kind, *commands, root / kind)
            print(kind, dict(figures[kind]), file=sys.stderr)
    harness.record(
        "overwrites",
        args.append,
        command=harness.command("torture.overwrites"),
        **{kind: dict(counts) for kind, counts in figures.items()},
    )
    if any(counts["wrong"] or counts["not mended"] for counts in figures.values()):
        sys.exit("a state was neither old nor new, and not refused")


if __name__ == "__main__":
    main()
