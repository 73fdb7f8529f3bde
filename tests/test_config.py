"""RunConfig and its file: written whole, read back equal, older files open."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.cli import train
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


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("all-linear", "all-linear"),
        ("q_proj, v_proj,", ("q_proj", "v_proj")),
        ("layers.attn.q_proj", ("layers.attn.q_proj",)),
        (r"layers\.(attn|mlp)\..{1,9}", r"layers\.(attn|mlp)\..{1,9}"),
        ("layers.attn.._proj", "layers.attn.._proj"),
        ("", ()),
    ],
)
def test_targets_are_all_names_or_an_expression_wherever_they_are_given(
    given: str, held: Any, tmp_path: Path
):
    config = LoRAConfig(targets=given)
    assert config.targets == held
    assert config == LoRAConfig(targets=held) == parse(["--lora.targets", given])
    assert LoRAConfig.from_json({"targets": given}) == config
    assert LoRAConfig.from_json(config.as_json()) == config
    write_run(tmp_path, RunConfig(lora=config))
    assert read_run(tmp_path).lora == config
    (tmp_path / "config.toml").write_text(f"[lora]\ntargets = '{given}'\n")
    assert read_run(tmp_path).lora == config


def parse(flags: list[str]) -> LoRAConfig:
    return train.parse(flags, "qlora train").lora


def test_names_are_given_by_commas_or_spaces(tmp_path: Path):
    config = LoRAConfig(
        targets=("q_proj", "v_proj"), modules_to_save=("norm", "lm_head")
    )
    for save in (["norm,lm_head"], ["norm", "lm_head"]):
        flags = ["--lora.targets", "q_proj", "v_proj", "--lora.modules-to-save", *save]
        assert parse(flags) == config
    old = config.as_json() | {"targets": "q_proj,v_proj"}
    assert LoRAConfig.from_json(old | {"modules_to_save": "norm,lm_head"}) == config
    (tmp_path / "config.toml").write_text(
        '[lora]\ntargets = ["q_proj", "v_proj"]\nmodules_to_save = ["norm", "lm_head"]'
    )
    assert read_run(tmp_path).lora == config


def test_files_of_older_versions_open(tmp_path: Path):
    (tmp_path / "config.toml").write_text(
        'model = "m"\ndata_file = "a.jsonl"\nout = "r"\noverwrite = false\nauto = []\n'
        "[quant]\nembedding = true\nhead = false\n[train]\nmax_steps = 3\n"
        '[lora]\ntargets = "q_proj,v_proj"\nmodules_to_save = "norm,lm_head"\n'
    )
    config = read_run(tmp_path)
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.lora.modules_to_save == ("norm", "lm_head")
    assert config.data_file == ("a.jsonl",) and config.train.max_steps == 3
    assert (config.quant.embedding, config.quant.head) == ("4bit", "none")
    assert config.data == DataConfig(packing="drawn")  # as their rows came
    (tmp_path / "config.toml").write_text("[data]\nmax_tokens = 8\n")
    assert read_run(tmp_path).data == DataConfig(max_tokens=8, packing="drawn")
    write_run(tmp_path, RunConfig())
    assert read_run(tmp_path).data.packing == "auto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unset = 3", "unset is 3, expected a list of names"),
        (
            'unset = ["train.max_steps"]\n[train]\nmax_steps = 3',
            "is set, and unset names",
        ),
        ('unset = ["model.a"]\nmodel = "m"', "and model is no table"),
        ('unset = ["train.micro_batch"]', "train.micro_batch is unset, expected int"),
        ('unset = ["train.nothing"]', "train.nothing is no known key"),
        ("data = 3", "data is 3, expected a table"),
        ("[lora]\ntargets = [1]", r"lora.targets is \[1\], expected str \| tuple"),
        ("[lora]\ntargets = 'q_proj('", r"--lora.targets 'q_proj\(' is no pattern"),
        ("modle = 3", "modle is no known key; did you mean model"),
        ("[quant", "is not TOML"),
        ("a" + ".a" * 10_000 + " = 1", "has a key of more than 64 parts"),
        ("[a" + " . 'a'" * 64 + "]", "has a key of more than 64 parts"),
        ("[" + "a" * 4_000_000, "is not TOML"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_any_dataclass_can_be_written(tmp_path: Path):
    write_toml(tmp_path / "a.toml", LoRAConfig())
    assert from_dict(LoRAConfig, read_toml(tmp_path / "a.toml"), "a") == LoRAConfig()
