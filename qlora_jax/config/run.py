"""What a run is: RunConfig, the one shape of its settings, and its file in the run's folder.

The command's flags, --config files, config.toml and resume share it. config.toml is written
whole, settings that are None too, and reads back equal.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.config.data import DataConfig
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.objective import COMPARING, WITH_REFERENCE, ObjectiveConfig
from qlora_jax.config.quant import QuantOptions
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.toml import from_dict, read_toml, write_toml

FILE = "config.toml"
"""Its name in a run's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run: with the same machine, they and the data are the run."""

    model: str | None = None
    """Hugging Face folder or hub id."""

    data_file: Annotated[tuple[str, ...], tyro.conf.arg(name="data")] = ()
    """Rows to train on: files (JSON lines, JSON, CSV, TSV, Parquet, packed or not), folders
    or ids of datasets, with a split (owner/name:train) and a weight (b.parquet:0.3 takes
    other 30 % of its rows in each epoch). `qlora data` shows what a run will see of them."""

    eval_file: Annotated[tuple[str, ...], tyro.conf.arg(name="eval-data")] = ()
    """Rows for the eval loss, given alike; without them, --data.eval-rows of the training
    rows."""

    original: str | None = None
    """Dense folder behind a 4-bit --model, for another --lora.init than zero."""

    memory: str | None = None
    """Device memory to keep to (24GiB); without it what a GPU reports. A run that needs more
    is refused, with settings that would fit. --train.micro-batch auto takes the fastest,
    --train.offload auto keeps on the host what of the optimizer state does not fit."""

    add_tokens: tuple[str, ...] = ()
    """Texts that become one token each. Their rows of embedding and head train with the
    adapter, which keeps them and its tokenizer; --lora.modules-to-save embed_tokens,lm_head
    trains whole tables instead."""

    lora: LoRAConfig = LoRAConfig()
    train: TrainConfig = TrainConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    quant: QuantOptions = QuantOptions()

    def __post_init__(self):
        name = self.objective.name
        if self.data.train_on != DataConfig().train_on and name in COMPARING:
            raise ConfigError(
                f"--data.train-on {' '.join(self.data.train_on)}: --objective {name} compares "
                "answers, which are the assistant's; the setting is for sft and distill"
            )
        if self.data.train_on_prompt and name in ("dpo", "simpo", "kto"):
            raise ConfigError(
                f"--data.train-on-prompt has no effect with --objective {name}, which compares "
                "answers; of objectives on answers, orpo alone learns prompts"
            )
        if self.lora.init == "pissa" and name in WITH_REFERENCE:
            raise ConfigError(
                f"--lora.init pissa makes another base, and --objective {name} compares with "
                "the base without its adapter, which is then not the model that training "
                "begins with; choose another --lora.init, or an objective without a reference "
                "(orpo, simpo)"
            )
        in_place = {"modules-to-save": self.lora.modules_to_save}
        in_place["bias"] = () if self.lora.bias == "none" else (self.lora.bias,)
        named = [f"--lora.{flag} {','.join(x)}" for flag, x in in_place.items() if x]
        if named and name in WITH_REFERENCE and not self.objective.precompute_reference:
            raise ConfigError(
                f"{' and '.join(named)}: with what trains in place, the base of --objective "
                f"{name}'s reference is no longer there; --objective.precompute-reference asks "
                "it before training"
            )


OF_THE_COMMAND = ("out", "overwrite", "config", "resume", "auto")
"""Settings of one call of the command, which older runs wrote into their files."""


def has_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / FILE).is_file()


def write_run(folder: Path, config: RunConfig) -> None:
    """Writes a run's settings into its folder."""
    write_toml(folder / FILE, config)


def read_run(folder: Path) -> RunConfig:
    """Reads the settings of a run; one that an older version wrote goes on as it began.

    Raises:
      ConfigError: there are none, or they cannot be used; all problems are named.
    """
    values = read_toml(folder / FILE)
    for name in OF_THE_COMMAND:
        values.pop(name, None)
    data = values.setdefault("data", {})
    if isinstance(data, dict):  # rows came as they were drawn before there was packing
        data.setdefault("packing", "drawn")
    return from_dict(RunConfig, as_written_now(values), str(folder / FILE))


def as_written_now(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a file as this version writes them."""
    quant, train = values.get("quant"), values.get("train")
    for name in ("embedding", "head"):  # as runs wrote them before there was int8
        if isinstance(quant, dict) and isinstance(quant.get(name), bool):
            quant[name] = "4bit" if quant[name] else "none"
    # As runs wrote it before an objective had settings.
    if isinstance(train, dict) and "objective" in train and "objective" not in values:
        rest = {key: value for key, value in train.items() if key != "objective"}
        named = {"name": train["objective"]}
        return {**values, "train": rest, "objective": named}
    return values
