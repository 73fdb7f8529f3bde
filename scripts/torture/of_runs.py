"""Readers of adapters, PEFT folders, and what a run writes.

What is read is also used, as far as that takes no compilation: a damaged file may open and
fail later. An `assert` here says what must hold of an input that was not refused.
"""

import json
import math
import random
import tomllib
from pathlib import Path
from typing import Any

import jax
import tomli_w
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.config.run import RunConfig, read_run, write_run
from qlora_jax.exchange.ours import describe_adapter, misfits, save_adapter
from qlora_jax.exchange.peft import describe_peft, export_peft, peft_misfits
from qlora_jax.exchange.read import read_adapter
from qlora_jax.sources.load import outline
from qlora_jax.train.metrics import MetricsLog, read_metrics
from scripts.torture import mutate
from scripts.torture.of_models import damage_array, damage_safetensors
from scripts.torture.reader import BASE, Reader, one_of


def _adapted() -> Any:
    model, _ = qlora.load(BASE)
    return qlora.attach(
        model,
        qlora.LoRAConfig(rank=2, targets="q_proj,v_proj", rank_pattern={"v_proj": 3}),
        key=jax.random.key(0),
    )


def _make_adapter(folder: Path) -> None:
    model = _adapted()
    _, lora, _ = qlora.split(model)
    config = qlora.LoRAConfig(
        rank=2, targets="q_proj,v_proj", rank_pattern={"v_proj": 3}
    )
    save_adapter(folder / "adapter", lora, config)


_bases: list[Any] = []


def _base() -> Any:
    if not _bases:
        _bases.append(outline(BASE).model)
    return _bases[0]


def _read_adapter(folder: Path) -> None:
    folder /= "adapter"
    describe_adapter(folder)
    misfits(folder, _base())


def _damage_arrays(folder: Path, rng: random.Random) -> None:
    files = sorted(p for p in (folder / "adapter/arrays").rglob("*") if p.is_file())
    mutate.of_bytes(rng.choice(files), rng)


def _make_peft(folder: Path) -> None:
    export_peft(folder / "peft", _adapted())


def _damage_peft(folder: Path, rng: random.Random) -> None:
    folder /= "peft"
    path = folder / "adapter_model.safetensors"
    if rng.random() < 0.6:
        settings = folder / "adapter_config.json"
        given = json.loads(settings.read_text())
        given |= {
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": given.get("alpha_pattern") or {"q_proj": 4.0},
            "modules_to_save": rng.choice((None, ["norm"])),
            "trainable_token_indices": rng.choice(
                (None, [1, 2], {"embed_tokens": [1]})
            ),
            "layers_to_transform": rng.choice((None, [0, 1])),
            "layers_pattern": rng.choice((None, "layers")),
        }
        settings.write_text(json.dumps(given))
        mutate.of_json(settings, rng)
    elif rng.random() < 0.5:
        damage_safetensors(path, rng)
    else:
        tensors = dict(load_file(path))
        damage_array(tensors, rng.choice([*tensors]), rng)
        save_file(tensors, path)


def _read_peft(folder: Path) -> None:
    folder /= "peft"
    describe_peft(folder)
    peft_misfits(folder, _base())


def _make_run(folder: Path) -> None:
    write_run(folder, RunConfig(model="base", data_file=("a.jsonl",)))


def _damage_run(folder: Path, rng: random.Random) -> None:
    path = folder / "config.toml"
    if rng.random() < 0.3:
        mutate.of_bytes(path, rng)
        return
    tree = mutate.mutated(tomllib.loads(path.read_text()), rng)
    try:
        text = tomli_w.dumps(tree)
    except (TypeError, ValueError, AttributeError):  # null, or no table
        text = path.read_text() + rng.choice(
            ("x = " + "[" * 100_000, "x = " + "9" * 5000, "x = nan", "x.y = 1\nx = 2")
        )
    for name, raw in mutate.RAW.items():
        text = text.replace(f'"@raw:{name}"', raw.replace(":", "="))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _make_metrics(folder: Path) -> None:
    rows = [
        {"step": i, "loss": 2.0 / i, "grad_norm": 0.5, "learning_rate": 1e-4}
        for i in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def _read_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    for row in read_metrics(path):
        assert isinstance(row["step"], int)
        assert row.get("loss") is None or math.isfinite(row["loss"])
    MetricsLog(path, 2).close()


READERS: dict[str, Reader] = {
    "adapter": Reader(
        _make_adapter,
        one_of(("adapter/adapter.json", mutate.of_json)),
        _read_adapter,
    ),
    "arrays": Reader(
        _make_adapter,
        _damage_arrays,
        lambda folder: read_adapter(folder / "adapter"),
        heavy=True,
    ),
    "peft": Reader(_make_peft, _damage_peft, _read_peft),
    "run": Reader(_make_run, _damage_run, read_run),
    "metrics": Reader(
        _make_metrics, one_of(("metrics.jsonl", mutate.of_lines)), _read_metrics
    ),
}
