"""Memory of merging an adapter into a folder, by the number of layers; before and after.

    python -m scripts.bench.merge [--layers 2 5] [--ways bfloat16 nf4] [--before FOLDER]
        [--append FILE]

Makes a bfloat16 folder with layers of a 70B Llama (bench/quantize.py) and an adapter of
rank 16 on all linears, and runs `qlora merge` in a process each way: into bfloat16, and with
--requantize nf4. --before is a checkout of an older commit, whose `qlora merge` runs on the
same folders in turn: what it writes is compared byte by byte. Memory is the peak of what the
process itself holds (RssAnon, sampled every 5 ms), above that of one that has only imported
the library.
"""

import argparse
import filecmp
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import harness
from scripts.bench.quantize import watched, write_model

ROOT = Path(__file__).parents[2]
WAYS = {"bfloat16": [], "nf4": ["--requantize", "nf4"]}
"""What the base is merged into -> the flags that ask for it."""


def work(flags: list[str]) -> dict[str, float]:
    """Runs `qlora merge` in this process; returns the figures."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.cli.main import main

    badness = Path("/proc/self/oom_score_adj")
    if badness.exists():  # when memory ends, it ends here
        badness.write_text("1000")
    jax.block_until_ready(jnp.zeros(8) + 1)
    idle = harness.held_bytes("RssAnon")

    def merge() -> None:
        if main(["merge", *flags]):
            sys.exit("qlora merge failed")

    seconds, most = watched(merge)
    return {"s": round(seconds, 1), "bytes": most - idle}


def write_adapter_of(model: Path, out: Path) -> None:
    """Writes an adapter of rank 16 on all linears, drawn at random."""
    import jax
    from flax import nnx

    from qlora_jax.adapters.attach import attach_zero
    from qlora_jax.adapters.fingerprint import fingerprint
    from qlora_jax.adapters.names import flatten
    from qlora_jax.config.lora import LoRAConfig
    from qlora_jax.exchange.ours import write_adapter
    from qlora_jax.sources.load import outline

    config = LoRAConfig(rank=16)
    base = outline(model).model
    mark = fingerprint(base)
    assert mark is not None
    graphdef, state = nnx.split(base)
    shapes = nnx.eval_shape(
        lambda state: flatten(
            nnx.state(
                attach_zero(nnx.merge(graphdef, state), config, key=jax.random.key(0)),
                nnx.LoRAParam,
            )
        ),
        state,
    )
    rng = np.random.default_rng(0)
    arrays = {
        name: (0.01 * rng.standard_normal(x.shape)).astype(np.float32)
        for name, x in shapes.items()
    }
    write_adapter(out, arrays, config, json.loads(mark))


def merged(tree: Path, model: Path, adapter: Path, out: Path, flags: list[str]) -> Any:
    """Runs `qlora merge` of a checkout; returns its seconds and bytes."""
    words = ["--model", model, "--adapter", adapter, "--out", out, *flags]
    # The library of that checkout, and this program: of the path, not of where it is run.
    path = {"PYTHONPATH": f"{tree}:{ROOT}", "PYTHONSAFEPATH": "1"}
    return harness.told(harness.worker("merge", *words), **path)


def compared(a: Path, b: Path) -> dict[str, bool]:
    """Says which files of two folders are the same."""
    names = sorted({path.name for folder in (a, b) for path in folder.iterdir()})
    same, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return {name: name in same for name in names}


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(work(args.worker)))
        return
    figures: dict[str, Any] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            model, adapter = here / "model", here / "adapter"
            model.mkdir()
            figures[str(layers)] = write_model(model, layers, args.vocab)
            write_adapter_of(model, adapter)
            for way in args.ways:
                trees = {"streamed": ROOT} | (
                    {"before": args.before.absolute()} if args.before else {}
                )
                found = figures[str(layers)][way] = {}
                for name, tree in trees.items():
                    out = here / f"{way}-{name}"
                    found[name] = merged(tree, model, adapter, out, WAYS[way])
                    print(
                        f"{layers} layers, {way:<10}{name:<10}{found[name]}", flush=True
                    )
                if args.before:
                    outs = (here / f"{way}-{name}" for name in trees)
                    found["same"] = compared(*outs)
                    print(found["same"], flush=True)
    harness.record("merge", args.append, figures=figures)


if __name__ == "__main__":
    main()
