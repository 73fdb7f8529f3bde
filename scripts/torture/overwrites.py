"""Overwrites each kind of output, and looks at every state that a kill meanwhile can leave.

    python -m scripts.torture.overwrites --model FOLDER --append scripts/results/torture.jsonl

Before each call by which the command changes files, the folder of the output is copied. Every
distinct copy has to be the old output or the new one, by the loss that it gives, or be refused
when it is opened; and the same command has to make the new output of it (of a run's, of every
`--each`-th), with nothing left over. A run that opens has to be the old one or the new one, as
far as it is, in its settings, in every line of metrics, and in its adapter and checkpoints; and
resuming has to end it. Files of others lie in each folder, and have to stay as they are. Calls
of Python are seen; Orbax's own all write under a hidden name.
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
from qlora_jax.inputs import read_json
from qlora_jax.train.metrics import read_metrics
from scripts.bench import harness
from scripts.torture.small_run import MEASURED
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
            ["inspect", "--verify", "OUT"],
        ),
    }


def placed(command: list, out: Path) -> list:
    return [out if word == "OUT" else word for word in command]


def overwrite(
    kind: str, old: list, new: list, opens: list, root: Path, each: int
) -> Counter[str]:
    """Overwrites an output; returns how many states of each sort that left."""
    name = "out.gguf" if kind == "gguf" else "out"
    place = root / "place" / name
    place.parent.mkdir(parents=True)
    must(*placed(old, place))
    if place.is_dir():
        for other in OTHERS:
            (place / other).parent.mkdir(exist_ok=True)
            (place / other).write_text(other)
    before = answer(opens, place), parts(place)
    counts: Counter[str] = Counter()
    with states(place.parent, root / "states") as found:
        must(*placed(new, place), "--overwrite")
    after = answer(opens, place), parts(place)
    assert before[0][0] == after[0][0] == 0 and before != after, (kind, before, after)
    distinct = {tree(state): state for state in found}
    counts["states"] = len(distinct)
    for i, state in enumerate(distinct.values()):
        # Opened where the output was: some paths are said in what a command prints.
        shutil.rmtree(place.parent)
        shutil.copytree(state, place.parent, symlinks=True)
        sort = judged(kind, answer(opens, place), parts(place), before, after)
        counts[sort] += 1
        if not keeps_others(place):
            counts["others' files lost"] += 1
        if sort == "wrong":
            print(kind, state, answer(opens, place), parts(place), file=sys.stderr)
        if kind == "run" and i % each:
            continue  # to train again takes its time
        resumed = kind == "run" and sort == "new" and i % (2 * each) == 0
        if resumed and not call("train", "--resume", place)[0]:
            counts["resumed"] += 1
        else:
            call(*placed(new, place), "--overwrite")
        left = [x.name for x in place.parent.iterdir() if x != place]
        now = answer(opens, place), parts(place)
        if now != after or left or not keeps_others(place):
            counts["not mended"] += 1
            print(kind, state, left, file=sys.stderr)
        counts["made again"] += 1
    return counts


OTHERS = ("notes.txt", "mine/model.pt")
"""Files that no command wrote."""


def keeps_others(place: Path) -> bool:
    """Whether the files of others are in an output that is a folder, as they were."""
    there = [place / name for name in OTHERS]
    return not place.is_dir() or all(
        x.is_file() and x.read_text() == name
        for x, name in zip(there, OTHERS, strict=True)
    )


def parts(run: Path) -> dict[str, str]:
    """Returns what a run's folder has, a text a part: settings, metrics, adapters."""
    if not (run / "config.toml").is_file():
        return {}  # no run, or one that nothing opens
    found = {"settings": (run / "config.toml").read_text()}
    for row in read_metrics(run / "metrics.jsonl"):
        kept = {name: row[name] for name in MEASURED if name in row}
        found[f"metrics {row['step']} {sorted(kept)}"] = json.dumps(kept)
    folders = [run / "adapter", *(run / "checkpoints").glob("[0-9]*")]
    for one in folders:
        if "." not in one.name and (one / "adapter.json").is_file():
            found[one.name] = json.dumps(read_json(one / "adapter.json")["sha256"])
    return found


Seen = tuple[tuple[int, str], dict[str, str]]
"""What `answer` and `parts` say of an output."""


def judged(
    kind: str, now: tuple[int, str], has: dict[str, str], before: Seen, after: Seen
) -> str:
    """Says whether an output is the old one or the new one, is refused, or is wrong."""
    if kind != "run" or not has:
        if now in (before[0], after[0]):
            return "old" if now == before[0] else "new"
        return "refused" if now[0] == 2 else "wrong"
    for name, whole in (("old", before[1]), ("new", after[1])):
        if all(whole.get(part) == text for part, text in has.items()):
            return name if now[0] == 0 else f"refused, {name}"
    return "wrong"


def answer(opens: list, place: Path) -> tuple[int, str]:
    """Opens an output by a command; returns its status and what it measured."""
    status, said = call(*placed(opens, place))
    return status, str(json.loads(said).get("loss")) if status == 0 else ""


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
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", help="some of them")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind, commands in cases(args.model, root).items():
            if args.kinds and kind not in args.kinds:
                continue
            figures[kind] = overwrite(kind, *commands, root / kind, args.each)
            print(kind, dict(figures[kind]), file=sys.stderr)
    harness.record(
        "overwrites",
        args.append,
        command=harness.command("torture.overwrites"),
        **{kind: dict(counts) for kind, counts in figures.items()},
    )
    wrong = ("wrong", "not mended", "others' files lost")
    if any(counts[name] for counts in figures.values() for name in wrong):
        sys.exit(
            "a state was neither old nor new, and not refused; or others' files went"
        )


if __name__ == "__main__":
    main()
