"""`qlora quickstart`: the whole path on the embedded model, in about a minute."""

import dataclasses
import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from qlora_jax.adapters import LoRAConfig, attach
from qlora_jax.cli import options
from qlora_jax.cli.options import QuantOptions
from qlora_jax.cli.progress import TrainProgress
from qlora_jax.cli.train import CONFIG, sizes
from qlora_jax.cli.train import Args as TrainArgs
from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.evaluate import exact_match
from qlora_jax.io.hf import check_output, load, save_model
from qlora_jax.quant import QuantConfig
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.loop import Trainer
from qlora_jax.train.report import write_report

LORA = LoRAConfig(rank=16, alpha=32)
TRAIN = TrainConfig(
    max_steps=500,
    micro_batch=48,
    grad_accum=1,
    learning_rate=4e-3,
    schedule="cosine",
    warmup_ratio=0.05,
    max_grad_norm=1.0,
    beta2=0.99,
    eval_every=100,
    save_every=None,
)
DATA = DataConfig(max_tokens=128)
"""Settings that solve the task in about a minute on two CPU cores. A model this small
wants a far higher learning rate than the defaults, which are those of 7B models."""


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


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    assets = Path(str(importlib.resources.files("qlora_jax") / "assets"))
    out = args.out
    if args.overwrite and (out / CONFIG).exists():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    else:
        check_output(out, args.overwrite)
    train = TRAIN
    if args.max_steps is not None:
        train = dataclasses.replace(TRAIN, max_steps=args.max_steps)

    print("1. Quantize the embedded base to NF4 and save it")
    model, tokenizer = load(assets / "base", QuantConfig())
    assert tokenizer is not None
    saved = save_model(model, out / "base-nf4", source=assets / "base", overwrite=True)

    print("2. Ask it the held-out questions")
    rows = read_dataset(assets / "train.jsonl", tokenizer, DATA)
    held = read_dataset(assets / "test.jsonl", tokenizer, DATA)
    before, answers_before = exact_match(model, held, tokenizer, max_new_tokens=8)
    print(f"   exact match {before:.1%} of {len(held)}")

    print(f"3. Fine-tune an adapter, {train.max_steps} steps")
    model = attach(model, LORA, key=jax.random.key(train.seed))
    with TrainProgress(train.steps(len(rows))) as progress:
        trainer = Trainer(
            model, rows, train, out, evaluation=held, lora=LORA, progress=progress
        )
        config = TrainArgs(
            model=str(out / "base-nf4"),
            data_file=str(assets / "train.jsonl"),
            eval_file=str(assets / "test.jsonl"),
            out=str(out),
            lora=LORA,
            train=train,
            data=DATA,
            quant=QuantOptions(),
        )
        options.write_toml(out / CONFIG, config)
        fitted = trainer.fit()

    print("4. Ask again")
    after, answers = exact_match(trainer.model, held, tokenizer, max_new_tokens=8)
    print(f"   exact match {before:.1%} before, {after:.1%} after\n")
    for old, new in list(zip(answers_before, answers, strict=True))[:2]:
        print(f"   {new.prompt.strip()}")
        print(f"     base:    {old.given.strip()[:60]!r}")
        print(
            f"     adapter: {new.given.strip()!r}   expected {new.expected.strip()!r}\n"
        )
    figures = {
        "out": str(out),
        "exact_match_before": before,
        "exact_match": after,
        **fitted,
        **sizes(trainer),
        "base_nf4_file_bytes": saved["bytes"],
        "answers": [a.given.strip() for a in answers[:5]],
    }
    report = write_report(out, figures)
    print(
        "memory   base {base_bytes:,} B   adapter {adapter_bytes:,} B   "
        "optimizer {optimizer_bytes:,} B".format(**figures)
    )
    print(f"curve    {out / 'loss.png'}\nreport   {report}")
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
