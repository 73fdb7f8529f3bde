"""`qlora quickstart`: the whole path on the embedded model, in about a minute."""

import contextlib
import dataclasses
import importlib.resources
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from qlora_jax.adapters import LoRAConfig, attach
from qlora_jax.cli import options
from qlora_jax.cli.begin import beginning, check_run_folder, made
from qlora_jax.cli.progress import TrainProgress
from qlora_jax.cli.train import sizes
from qlora_jax.config.quant import QuantConfig, QuantOptions
from qlora_jax.config.run import RunConfig
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.evaluate import exact_match
from qlora_jax.evaluate.exact_match import Answer
from qlora_jax.exchange.metadata import BASE_NF4
from qlora_jax.files import write_file
from qlora_jax.sources.load import load
from qlora_jax.sources.save import save_model
from qlora_jax.train.loop import Trainer
from qlora_jax.train.report import write_report

LORA = LoRAConfig(rank=16, alpha=32)
TRAIN = TrainConfig(
    max_steps=400,
    micro_batch=48,
    grad_accum=1,
    learning_rate=2e-3,
    lora_plus_ratio=4.0,
    schedule="cosine",
    warmup_ratio=0.05,
    max_grad_norm=1.0,
    eval_every=100,
    save_every=None,
)
DATA = DataConfig(max_tokens=16)
"""Settings that solve the task in about a minute on two CPU cores. A model this small
wants a far higher learning rate than the defaults, which are those of 7B models, most of all
for lora_b; with one rate for both, 4e-3, some seeds end below 90 %. No row is longer than 16
tokens, so no batch is padded further."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Quantize, fine-tune, evaluate and sample the embedded model."""

    out: Path = Path("runs/quickstart")
    """The run folder."""

    max_steps: int | None = None
    """Fewer steps than the default, for a quick look."""

    overwrite: bool = False
    """Start anew in a run folder, replacing that run."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Says what begins, at once, and afterwards how long it took."""
    print(title, flush=True)
    began = time.monotonic()
    yield
    print(f"   took {time.monotonic() - began:.1f} s", flush=True)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    assets = Path(str(importlib.resources.files("qlora_jax") / "assets"))
    out = args.out
    check_run_folder(out, args.overwrite)
    train = TRAIN
    if args.max_steps is not None:
        train = dataclasses.replace(TRAIN, max_steps=args.max_steps)

    with stage("1. Quantize the embedded base to NF4 and save it"):
        model, tokenizer = load(assets / "base", QuantConfig())
        assert tokenizer is not None
        config = _as_of_train(assets, out, train)
        with made(out), beginning(out, config):
            saved = save_model(model, out / BASE_NF4, source=assets / "base")

    with stage("2. Attach an adapter, which changes nothing yet"):
        rows = read_dataset(assets / "train.jsonl", tokenizer, DATA)
        held = read_dataset(assets / "test.jsonl", tokenizer, DATA)
        model = attach(model, LORA, key=jax.random.key(train.seed))
        progress = TrainProgress()
        trainer = Trainer(
            *(model, rows, train, out),
            **{"evaluation": held, "lora": LORA, "progress": progress},
            packing="drawn",  # a row is as long as its documents: there is nothing to pack
        )
        progress.expect(trainer.steps)

    with stage(f"3. Ask it the {len(held)} held-out questions"):
        # With the adapter at zero these are the base's answers, and what is compiled for
        # them serves step 5.
        before, answers_before = exact_match(
            trainer.model, held, tokenizer, max_new_tokens=8
        )
        print(f"   exact match {before:.1%}")

    with stage(f"4. Fine-tune the adapter, {train.max_steps} steps"), progress:
        fitted = trainer.fit()

    with stage("5. Ask again"):
        after, answers = exact_match(trainer.model, held, tokenizer, max_new_tokens=8)
    print(f"   exact match {before:.1%} before, {after:.1%} after\n")
    _show(answers_before, answers)
    figures = {
        "out": str(out),
        "exact_match_before": before,
        "exact_match": after,
        **fitted,
        **sizes(trainer),
        "base_nf4_file_bytes": saved["bytes"],
        "answers": [a.given.strip() for a in answers[:5]],
    }
    _report(out, figures)
    return figures


def _as_of_train(assets: Path, out: Path, train: TrainConfig) -> RunConfig:
    """Returns what `qlora train` would call the same run."""
    return RunConfig(
        model=str(out / BASE_NF4),
        data_file=(str(assets / "train.jsonl"),),
        eval_file=(str(assets / "test.jsonl"),),
        lora=LORA,
        train=train,
        data=DATA,
        quant=QuantOptions(),
    )


def _show(before: list[Answer], after: list[Answer]) -> None:
    for old, new in list(zip(before, after, strict=True))[:2]:
        given, expected = new.given.strip(), new.expected.strip()
        print(f"   {new.prompt.strip()}")
        print(f"     base:    {old.given.strip()[:60]!r}")
        print(f"     adapter: {given!r}   expected {expected!r}\n")


def _report(out: Path, figures: dict[str, Any]) -> None:
    report = write_report(out, figures)
    print(
        "memory   base {base_bytes:,} B   adapter {adapter_bytes:,} B   "
        "optimizer {optimizer_bytes:,} B".format(**figures)
    )
    print(f"curve    {out / 'loss.png'}\nreport   {report}")
    write_file(out / "figures.json", json.dumps(figures, indent=2) + "\n")
