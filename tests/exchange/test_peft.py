"""PEFT folders: there and back byte by byte, and what is refused.

That PEFT's own adapters give PEFT's logits and gradients is in
tests/adapters/test_peft_golden.py.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters import LoRAConfig
from qlora_jax.adapters.attach import split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.cli.main import main
from qlora_jax.errors import AdapterMismatchError, ConfigError, OutputExistsError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.models import Decoder

ALL = {
    "rank": 4,
    "alpha": 6.0,
    "rslora": True,
    "rank_pattern": {"down_proj": 8, "layers.attn.v_proj": 2},
    "alpha_pattern": {"q_proj": 3.0},
}


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder: Path, **changes: Any) -> None:
    text = json.dumps(settings(folder) | changes)
    (folder / "adapter_config.json").write_text(text)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_peft(tmp_path / "peft", tiny.adapted(tiny.decoder(), **ALL))


def test_an_exported_adapter_comes_back_as_it_was(exported: Path):
    model = tiny.adapted(tiny.decoder(), **ALL)
    back = import_peft(exported, tiny.decoder())
    for a, b in zip(
        tiny.arrays(split(back)[1]), tiny.arrays(split(model)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert lora_config(back) == lora_config(model)
    x = tiny.tokens()
    np.testing.assert_array_equal(tiny.logits(back, x), tiny.logits(model, x))


def test_modules_that_train_in_full_are_named_so_that_peft_finds_them(tmp_path: Path):
    # PEFT takes modules whose names end so: of every layer, and of no other place.
    saved = "lm_head,layers.mlp_norm,norm"
    model = tiny.adapted(tiny.decoder(), targets="v_proj", modules_to_save=saved)
    said = settings(export_peft(tmp_path / "a", model))["modules_to_save"]
    assert sorted(said) == ["lm_head", "model.norm", "post_attention_layernorm"]


def test_what_was_imported_is_exported_byte_by_byte(golden, tmp_path):
    for name in ("lora_all_r8_on_fp32", "lora_qv_r4_on_fp32", "rslora_r8_on_fp32"):
        source = golden(f"models/adapters/{name}/adapter_config.json").parent
        base = golden("models/llama_fp32/config.json").parent
        from qlora_jax.sources.load import load

        out = export_peft(tmp_path / name, import_peft(source, load(base)[0]))
        ours, theirs = (
            load_file(f / "adapter_model.safetensors") for f in (out, source)
        )
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            assert ours[key].dtype == array.dtype
            assert ours[key].tobytes() == array.tobytes()
        for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "peft_type"):
            assert settings(out)[key] == settings(source)[key], key


def test_settings_are_those_that_peft_writes(exported: Path):
    said = settings(exported)
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (4, 6, True)
    assert said["rank_pattern"] == {"mlp.down_proj": 8, "self_attn.v_proj": 2}
    assert said["alpha_pattern"] == {"self_attn.q_proj": 3}
    assert len(said["target_modules"]) == 7 and "q_proj" in said["target_modules"]
    tensors = load_file(exported / "adapter_model.safetensors")
    a = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    assert a.shape == (8, 128) and a.dtype == np.float32
    few = tiny.adapted(tiny.decoder(), targets="lm_head,q_proj")
    out = export_peft(exported.parent / "few", few)
    assert settings(out)["target_modules"] == ["lm_head", "q_proj"]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        r"model\.layers\.\d+\.self_attn\.[qv]_proj",
        [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"],
    ],
)
def test_targets_may_be_spelt_in_any_way(targets, tmp_path):
    model = tiny.adapted(tiny.decoder(), targets="q_proj,v_proj")
    folder = export_peft(tmp_path / "a", model)
    change(folder, target_modules=targets)
    back = import_peft(folder, tiny.decoder())
    assert lora_config(back).targets == ("layers.attn.q_proj", "layers.attn.v_proj")


def test_all_linear_is_every_linear_but_the_head(exported: Path):
    change(exported, target_modules="all-linear")
    assert len(lora_config(import_peft(exported, tiny.decoder())).targets) == 7


def test_peft_patterns_are_regular_expressions(exported: Path):
    patterns = {r"self_attn\.v_proj|x": 2, r"layers\.\d+\.mlp\.down_proj": 8}
    change(exported, rank_pattern=patterns)
    config = lora_config(import_peft(exported, tiny.decoder()))
    assert config.rank_pattern == {"layers.attn.v_proj": 2, "layers.mlp.down_proj": 8}


def test_all_that_cannot_be_held_is_named_at_once(exported: Path):
    wrong = {
        "bias": "whole",
        "fan_in_fan_out": True,
        "layer_replication": [[0, 1]],
        "peft_type": "LOHA",
    }
    change(exported, **wrong)
    with pytest.raises(AdapterMismatchError) as error:
        import_peft(exported, tiny.decoder())
    for key, value in wrong.items():
        assert f"{key} is {value!r}, which an adapter here cannot hold" in str(
            error.value
        )


def test_a_parameter_that_is_no_expert_is_named(exported: Path):
    change(exported, target_parameters=["mlp.up.weight"])
    message = "target_parameters names mlp.up.weight, of which there are no factors"
    with pytest.raises(AdapterMismatchError, match=message):
        import_peft(exported, tiny.decoder())


def edited(folder: Path, edit) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_B.weight"), "has no tensor for lora_b"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": np.zeros((3, 64), np.float32)}),
            "lora_a has rank 3, adapter_config.json says 4",
        ),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": np.zeros((4, 60), np.float32)}),
            r"layers.1.mlp.up_proj.lora_a: shape \(60, 4\), the model has \(64, 4\)",
        ),
        (
            lambda t: t.update({f"{UP}.lora_magnitude_vector": np.zeros(128)}),
            "up_proj.magnitude: no such adapter parameter in the model",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.wte.lora_A.weight": np.zeros((4, 8))}
            ),
            "the model has no module model.wte",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(exported: Path, edit, message):
    edited(exported, edit)
    with pytest.raises(AdapterMismatchError, match=message):
        import_peft(exported, tiny.decoder())


def test_the_copy_of_the_head_that_peft_saves_must_be_the_models(tmp_path: Path):
    model = tiny.adapted(tiny.decoder(), targets="lm_head,q_proj")
    folder = export_peft(tmp_path / "a", model)
    key = "base_model.model.lm_head.base_layer.weight"
    head = np.asarray(tiny.decoder().lm_head.kernel[...])
    edited(folder, lambda t: t.update({key: head}))
    assert lora_config(import_peft(folder, tiny.decoder())) == lora_config(model)
    edited(folder, lambda t: t.update({key: head + 0.1}))
    with pytest.raises(AdapterMismatchError, match="lm_head differs from the model's"):
        import_peft(folder, tiny.decoder())


def test_folders_that_cannot_be_read_say_why(tmp_path: Path, exported: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_config.json").write_text("{}")
    (tmp_path / "bin" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterMismatchError, match="a pickle; save it again"):
        import_peft(tmp_path / "bin", tiny.decoder())
    (exported / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterMismatchError, match="cannot be read as a PEFT adapter"):
        import_peft(exported, tiny.decoder())


def test_an_adapter_there_is_not_replaced_unasked(exported: Path):
    model = tiny.adapted(tiny.decoder())
    with pytest.raises(OutputExistsError, match="pass overwrite"):
        export_peft(exported, model)
    export_peft(exported, model, overwrite=True)
    assert settings(exported)["r"] == 4


def test_patterns_and_rslora_travel_with_our_own_adapter(tmp_path: Path):
    model = tiny.adapted(tiny.quantized(), **ALL)
    assert model.layers.attn.q_proj.scale == 3.0 / 2
    assert model.layers.mlp.down_proj.lora_a[...].shape == (2, 128, 8)
    save_adapter(tmp_path / "a", split(model)[1], lora_config(model))
    back = load_adapter(tmp_path / "a", tiny.quantized())
    x = tiny.tokens()
    np.testing.assert_array_equal(tiny.logits(back, x), tiny.logits(model, x))
    with pytest.raises(ConfigError, match="rank-pattern q_proj is 0.*alpha-pattern"):
        LoRAConfig(rank_pattern={"q_proj": 0}, alpha_pattern={"q_proj": -1.0})


def test_the_command_exports_imports_and_uses_peft_folders(tmp_path: Path, capsys):
    base = tiny.write_folder(tmp_path / "base")
    model = tiny.adapted(tiny.decoder(), **ALL)
    save_adapter(tmp_path / "a", split(model)[1], lora_config(model))
    model_args = ["--model", str(base)]

    def call(*args: object) -> str:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    call("export", *model_args, "--adapter", tmp_path / "a", "--out", tmp_path / "p")
    assert settings(tmp_path / "p")["base_model_name_or_path"] == str(base)
    call("import", *model_args, "--adapter", tmp_path / "p", "--out", tmp_path / "b")
    one, two = (load_adapter(tmp_path / n, tiny.decoder()) for n in ("a", "b"))
    for a, b in zip(
        tiny.arrays(split(one)[1]), tiny.arrays(split(two)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    merge = ["merge", *model_args, "--adapter", tmp_path / "p", "--out", tmp_path / "m"]
    call(*merge)
    assert main(["export", *model_args, "--out", str(tmp_path / "x")]) == 2
    assert "--adapter is missing" in capsys.readouterr().err
    args = ["export", "--format", "gguf", "--adapter", "a", "--out", "x", *model_args]
    assert main(args) == 2
    assert "fold the adapter in with qlora merge" in capsys.readouterr().err
    args = ["import", "--adapter", str(tmp_path / "a"), "--out", "x", *model_args]
    assert main(args) == 2
    assert "is no PEFT folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dora": True}, "DoRA: PEFT has none for experts"),
        ({"targets": "up_proj,q_proj"}, "PEFT needs gate_proj and up_proj together"),
    ],
)
def test_experts_adapters_that_peft_has_no_form_for_are_refused(
    tmp_path: Path, config, message
):
    model = tiny.adapted(experts(), **config)
    with pytest.raises(AdapterMismatchError, match=message):
        export_peft(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()


def test_experts_scales_and_ranks_go_into_the_factors(tmp_path: Path):
    kinds = {"rslora": True, "rank_pattern": {"down_proj": 2}, "dropout": 0.1}
    model = tiny.adapted(experts(), alpha_pattern={"up_proj": 3.0}, **kinds)
    out = export_peft(tmp_path / "a", model)
    said = settings(out)
    assert (said["rank_pattern"], said["alpha_pattern"]) == ({}, {})
    assert (said["use_rslora"], said["lora_dropout"]) == (False, 0.0)
    x = tiny.tokens()
    wanted = tiny.logits(model, x)
    back = tiny.logits(import_peft(out, experts()), x)
    np.testing.assert_allclose(back, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def experts() -> Decoder:
    config = dataclasses.replace(
        tiny.CONFIG, model_type="mixtral", num_experts=4, num_layers=1
    )
    return Decoder(config, key=jax.random.key(0), dtype="float32")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "8", "r is '8', expected null or a whole number"),
        ("lora_alpha", True, "lora_alpha is True, expected null or a finite number"),
        ("rank_pattern", ["q_proj"], "rank_pattern is .*expected null or an object"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern.q_proj is 'x'"),
        ("target_modules", {"a": 1}, "target_modules is"),
        ("target_modules", "(a+)+b", "is no pattern"),
        (
            "modules_to_save",
            "norm",
            "modules_to_save is 'norm', expected null or a list",
        ),
        ("layers_to_transform", [0, -1], r"layers_to_transform\[1\] is -1"),
        ("trainable_token_indices", {"a": 3}, "trainable_token_indices.a is 3"),
        ("trainable_token_indices", [10**9], "the row of token 1000000000"),
        ("use_rslora", "yes", "use_rslora is 'yes', expected null or true or false"),
    ],
)
def test_settings_are_held_to_their_kinds(exported: Path, key, value, message):
    path = exported / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(AdapterMismatchError, match=message):
        import_peft(exported, tiny.decoder())
