"""Starts a run's adapter that begins with more than zeros (`--lora.init`)."""

import sys
from pathlib import Path
from typing import Any

import jax

from qlora_jax.adapters.attach import attach_zero, detach
from qlora_jax.adapters.compensate import describe, input_moments, overall
from qlora_jax.adapters.compensate import start as started
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantOptions
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, Dataset
from qlora_jax.errors import CheckpointError, ConfigError, gathered
from qlora_jax.exchange.metadata import BASE
from qlora_jax.sources.load import original_kernels
from qlora_jax.sources.save import save_model
from qlora_jax.sources.source import Source

CALIBRATION_TOKENS = 16384
"""So many tokens of the training rows are run to measure the moments that --lora.init qera
needs. More make them steadier, and take longer."""


def compensated(
    model: Any,
    original: str | Source,
    lora: LoRAConfig,
    train: TrainConfig,
    data: DataConfig,
    rows: Dataset,
    key: jax.Array,
) -> tuple[Any, dict[str, float]]:
    """Attaches an adapter that begins with what quantization lost; and by how much."""
    read = original_kernels(original)
    moments = None
    if lora.init.startswith("qera"):
        size, length = train.micro_batch, min(data.max_tokens, 512)
        batches = -(-CALIBRATION_TOKENS // (size * length))
        tokens = rows.packed(batches * size, length, train.seed)
        moments = input_moments(
            model,
            tokens.reshape(batches, size, length),
            paths=lora.matches,
            diagonal=lora.init == "qera-diagonal",
        )
    model = attach_zero(model, lora, key=key)
    model, errors = started(model, lora.init, read, moments, key=key)
    print(f"{lora.init}: {describe(errors)}", file=sys.stderr)
    before, after = overall(errors)
    return model, {"quantization_error": before, "compensated_error": after}


def check_own_base(
    source: Source,
    out: Path,
    lora: LoRAConfig,
    quant: QuantOptions,
    add_tokens: tuple[str, ...],
    original: str | None,
) -> None:
    """Refuses what does not go with a run that makes a 4-bit base of its own.

    Raises:
      ConfigError: all that does not, by flag.
    """
    problems = []
    if add_tokens:
        problems.append("--add-tokens: the base in the run folder has no rows for them")
    if lora.modules_to_save:
        names = ",".join(lora.modules_to_save)
        problems.append(f"--lora.modules-to-save {names}: trains a part of that base")
    if lora.bias != "none":
        problems.append(f"--lora.bias {lora.bias}: trains a part of that base")
    for name in ("embedding", "head"):
        if getattr(quant, name) != "none":
            problems.append(f"--quant.{name}: that base is saved with it dense")
    if quant.codebook == "none":
        problems.append("--quant.codebook none: there has to be a 4-bit base")
    if source.stored is not None and original is None:
        problems.append(
            f"{source} is 4-bit already; give its dense folder as --model or --original"
        )
    base = out / BASE
    if base.exists() and base.samefile(source.path):
        problems.append(f"--model {source}: the run's own base would replace it")
    if problems:
        what = "--lora.init pissa, which changes the 4-bit base, does not go with"
        raise ConfigError(gathered(what, problems))


def save_base(model: Any, out: Path, source: Source) -> None:
    """Saves the base of a new run, which resume and the other subcommands find there."""
    save_model(detach(model), out / BASE, source=source)


def saved_base(out: Path) -> Path:
    """Returns the base that a run made.

    Raises:
      CheckpointError: it is not there.
    """
    base = out / BASE
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base} is not there: the 4-bit base that this run (--lora.init pissa) made and "
            "trains on; bring it back, or start anew"
        )
    return base
