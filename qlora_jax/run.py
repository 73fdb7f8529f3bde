"""What a run is: RunConfig, the one shape of its settings, and its file in the run's folder.

The command's flags, --config files, config.toml and resume share it. config.toml is written
whole, settings that are None too, and reads back equal.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qlora_jax.adapters.config import LoRAConfig
from qlora_jax.data.config import DataConfig
from qlora_jax.data.sources import parse_sources
from qlora_jax.errors import ConfigError
from qlora_jax.io.hf import Tables, read_config, resolve_tables
from qlora_jax.quant import QuantConfig, TableFormat
from qlora_jax.toml import from_dict, read_toml, write_toml
from qlora_jax.train.config import TrainConfig

FILE = "config.toml"
"""Its name in a run's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """How the base's weights are held."""

    codebook: Literal["auto", "nf4", "fp4", "int4", "none"] = "auto"
    """nf4, fp4 or int4 quantize a dense folder while it loads; none keeps it dense; auto
    takes a 4-bit folder as it is, a dense one as the subcommand says."""

    block_size: int = 64
    """Elements that share one absmax; a power of two, 32 to 4096."""

    double_quant: bool = True
    """Keep absmax in 8 bits."""

    embedding: TableFormat = "none"
    """Of the embedding, and a tied head with it: 4bit is as the linears are held, int8 has
    one scale a row; none leaves it as the folder has it, dense unless that is int8."""

    head: TableFormat = "none"
    """The same of an untied head."""

    def tables(self, folder: Path) -> Tables:
        """Returns how `load` will hold embedding and head.

        Raises:
          CheckpointError: the folder has them in int8, and they are to be 4-bit.
        """
        hf = read_config(folder)[0]
        return resolve_tables(folder, hf, self.embedding, self.head)

    def resolve(self, folder: Path, *, auto: QuantConfig | None) -> QuantConfig | None:
        """Returns how to quantize a folder; None to take its weights as they are.

        Args:
          folder: Of the model.
          auto: What 'auto' does with a dense folder.

        Raises:
          ConfigError: 'none' for a folder that is 4-bit.
        """
        stored = read_config(folder)[3]
        if self.codebook == "auto":
            return None if stored is not None else auto
        if self.codebook == "none":
            if stored is not None:
                raise ConfigError(
                    f"--quant.codebook none: {folder} holds 4-bit weights; give the "
                    "original folder for a dense model"
                )
            return None
        return self.config()

    def config(self) -> QuantConfig:
        """Returns the QuantConfig, of NF4 for 'auto'."""
        codebook = "nf4" if self.codebook in ("auto", "none") else self.codebook
        return QuantConfig(
            codebook=codebook,
            block_size=self.block_size,
            double_quant=self.double_quant,
        )


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
    data: DataConfig = DataConfig()
    quant: QuantOptions = QuantOptions()

    def anywhere(self) -> "RunConfig":
        """Returns the same run with paths that do not depend on the working folder."""

        def absolute(path: str | None) -> str | None:
            try:
                there = path is not None and Path(path).exists()
            except (OSError, ValueError):  # no path, but a template's text
                there = False
            return str(Path(str(path)).resolve()) if there else path

        def sources(texts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(map(str, parse_sources(texts))) if texts else ()

        data = dataclasses.replace(
            self.data,
            chat_template=absolute(self.data.chat_template),
            prompt_template=absolute(self.data.prompt_template),
        )
        return dataclasses.replace(
            self,
            data=data,
            model=absolute(self.model),
            original=absolute(self.original),
            data_file=sources(self.data_file),
            eval_file=sources(self.eval_file),
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
    """Reads the settings of a run; one that an older version wrote has defaults for the rest.

    Raises:
      ConfigError: there are none, or they cannot be used; all problems are named.
    """
    values = read_toml(folder / FILE)
    for name in OF_THE_COMMAND:
        values.pop(name, None)
    quant = values.get("quant")
    for name in ("embedding", "head"):  # as runs wrote them before there was int8
        if isinstance(quant, dict) and isinstance(quant.get(name), bool):
            quant[name] = "4bit" if quant[name] else "none"
    return from_dict(RunConfig, values, str(folder / FILE))
