"""RunConfig and its file: written whole, read back equal, older files open."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantOptions
from qlora_jax.config.run import RunConfig, has_run, read_run, write_run
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig
from qlora_jax.errors import ConfigError
from qlora_jax.toml import from_dict, read_toml, write_toml


def test_what_is_written_reads_back_equal(tmp_path: Path):
    assert not has_run(tmp_path)
    config = RunConfig(
        model="a/b",
        data_file=("x.jsonl:0.3", 'odd "name"'),
        add_tokens=("<ä>", "\n"),
        lora=LoRAConfig(layers=(1, 2), rank_pattern={"q_proj": 4}, alpha=3.5),
        train=TrainConfig(max_grad_norm=None, save_every=None, epochs=2.0, max_steps=7),
        data=DataConfig(columns=("input=q",), prompt_template="{{ q }}\n"),
        quant=QuantOptions(codebook="none", embedding="int8"),
    )
    for one in (config, RunConfig()):
        write_run(tmp_path, one)
        assert has_run(tmp_path) and read_run(tmp_path) == one


def nones(cls: Any, prefix: str = "") -> list[tuple[str, ...]]:
    """Returns the places of all settings that may be None."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        path = (*prefix, name)
        if dataclasses.is_dataclass(hint):
            found += nones(hint, path)
        elif type(None) in typing.get_args(hint):
            found.append(path)
    return found


def test_every_setting_that_may_be_none_comes_back_as_none(tmp_path: Path):
    places = nones(RunConfig)
    assert ("train", "max_grad_norm") in places and ("train", "save_every") in places
    config = RunConfig()
    for *tables, name in places:
        inner: Any = config
        if tables:
            inner = dataclasses.replace(getattr(config, tables[0]), **{name: None})
            config = dataclasses.replace(config, **{tables[0]: inner})
        else:
            config = dataclasses.replace(config, **{name: None})
    write_run(tmp_path, config)
    assert read_run(tmp_path) == config
    assert len(read_toml(tmp_path / "config.toml")["train"]) == len(
        dataclasses.fields(TrainConfig)
    )


def test_files_of_older_versions_open(tmp_path: Path):
    (tmp_path / "config.toml").write_text(
        'model = "m"\ndata_file = "a.jsonl"\nout = "r"\noverwrite = false\nauto = []\n'
        "[quant]\nembedding = true\nhead = false\n[train]\nmax_steps = 3\n"
    )
    config = read_run(tmp_path)
    assert config.data_file == ("a.jsonl",) and config.train.max_steps == 3
    assert (config.quant.embedding, config.quant.head) == ("4bit", "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unset = 3", "unset is 3, expected a list of names"),
        (
            'unset = ["train.max_steps"]\n[train]\nmax_steps = 3',
            "is set, and unset names",
        ),
        ('unset = ["model.a"]\nmodel = "m"', "and model is no table"),
        ('unset = ["train.micro_batch"]', "train.micro_batch is None, expected int"),
        ('unset = ["train.nothing"]', "train.nothing is no known key"),
        ("modle = 3", "modle is no known key; did you mean model"),
        ("[quant", "is not TOML"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_any_dataclass_can_be_written(tmp_path: Path):
    write_toml(tmp_path / "a.toml", LoRAConfig())
    assert from_dict(LoRAConfig, read_toml(tmp_path / "a.toml"), "a") == LoRAConfig()
