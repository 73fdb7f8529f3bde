"""PEFT folders whose layers differ, or whose names do: read as what PEFT computes of them.

That PEFT computes the same is in tests/interop/test_adapters.py.
"""

import dataclasses
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters import Adapter, LoRAConfig, attach, combine, merge
from qlora_jax.adapters.attach import join, split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.cli.main import main
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft, peft_misfits, settings
from qlora_jax.exchange.read import read_adapter
from qlora_jax.models import Decoder
from qlora_jax.nn import LoRA
from qlora_jax.objectives import SFT

SAME = 2e-5
"""Absolute, of logits of size 10: the order of float32 sums."""
ATTENTION = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
MODEL = "base_model.model.model."


def written(folder: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    """Writes a PEFT folder."""
    folder.mkdir(parents=True)
    save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    text = json.dumps(plain | {"target_modules": ["q_proj", "v_proj"]} | settings)
    (folder / "adapter_config.json").write_text(text)
    return folder


def pair(layer: int, name: str, rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the factors of a linear of attention, as PEFT names and turns them."""
    rng = np.random.default_rng((seed, layer, rank))
    out = {"q": 64, "v": 32}[name]
    return {
        ATTENTION.format(layer, name, "A"): rng.normal(size=(rank, 64)) * 0.2,
        ATTENTION.format(layer, name, "B"): rng.normal(size=(out, rank)) * 0.2,
    }


def summed(tensors: dict[str, Any], scales: dict[tuple[int, str], float]) -> Decoder:
    """Returns the base with scale * B @ A added to its weights, in float64."""
    graphdef, state = nnx.split(tiny.decoder())
    flat = dict(nnx.to_flat_state(state))
    for (layer, name), scale in scales.items():
        a, b = (tensors[ATTENTION.format(layer, name, x)] for x in "AB")
        path = ("layers", "attn", f"{name}_proj", "kernel")
        kernel = np.array(flat[path].get_value(), np.float64)
        kernel[layer] += scale * (b @ a)
        flat[path] = flat[path].replace(jnp.asarray(kernel, jnp.float32))
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def close(model: Decoder, wanted: Decoder) -> None:
    ids = tiny.tokens()
    one, two = tiny.logits(model, ids), tiny.logits(wanted, ids)
    np.testing.assert_allclose(one, two, atol=SAME, rtol=0)


RANKS = pair(0, "q", 4) | pair(1, "q", 2) | pair(0, "v", 4) | pair(1, "v", 4)
TARGETS = r".*(0\.self_attn\.q_proj|self_attn\.v_proj)"
LAYERS = pair(0, "q", 4) | pair(0, "v", 4) | pair(1, "v", 4)
FORMS: dict[str, tuple[dict, dict, dict, str]] = {
    "ranks by layer": (
        RANKS,
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
        {(0, "q"): 2, (1, "q"): 4, (0, "v"): 2, (1, "v"): 2},
        r"q_proj \(2, 4 to 4\); scales .*q_proj \(2, 4 to 2\)",
    ),
    "ranks by layer, one scale": (
        RANKS,
        {
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 4},
        },
        {(0, "q"): 2, (1, "q"): 2, (0, "v"): 2, (1, "v"): 2},
        r"padded with zeros.*layers.attn.q_proj \(2, 4 to 4\)",
    ),
    "alphas by layer": (
        LAYERS | pair(1, "q", 4),
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3}, "use_rslora": True},
        {(0, "q"): 1.5, (1, "q"): 4, (0, "v"): 4, (1, "v"): 4},
        r"layers.attn.q_proj \(1.5, 4 to 4\)",
    ),
    "alpha below 0, and 0": (
        LAYERS | pair(1, "q", 4),
        {"lora_alpha": -8, "alpha_pattern": {"v_proj": 0}},
        {(0, "q"): -2, (1, "q"): -2},
        r"q_proj \(-2 to 2\), layers.attn.v_proj \(0 to 1\); alpha is 0 in layers.attn.v",
    ),
    "other layers by linear": (
        LAYERS,
        {"target_modules": TARGETS},
        {(0, "q"): 2, (0, "v"): 2, (1, "v"): 2},
        "",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_differ_compute_what_they_did(form, tmp_path, caplog):
    tensors, settings, scales, said = FORMS[form]
    folder = written(tmp_path / "peft", tensors, **settings)
    base = tiny.decoder()
    assert peft_misfits(folder, base) == []
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        model = import_peft(folder, base)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(said)
    for message in messages:
        assert str(folder) in message
    if said:
        assert re.search(said, messages[0]), messages[0]
    close(model, summed(tensors, scales))
    # What goes out is another form of the same, which says so of itself.
    again = import_peft(export_peft(tmp_path / "out", model), tiny.decoder())
    assert lora_config(again) == lora_config(model)
    np.testing.assert_array_equal(
        tiny.logits(again, tiny.tokens()), tiny.logits(model, tiny.tokens())
    )


def test_padded_ranks_and_layers_without_adapter_do_not_learn(tmp_path: Path):
    tensors = pair(0, "q", 4) | pair(1, "q", 2) | pair(1, "v", 4)
    patterns = {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
        "target_modules": r".*(q_proj|1.self_attn.v_proj)",
    }
    model = import_peft(written(tmp_path / "a", tensors, **patterns), tiny.decoder())
    graphdef, lora, base = split(model)
    tokens = tiny.tokens()
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}

    @jax.jit
    def gradients(lora, base):
        return jax.grad(lambda x: SFT(join(graphdef, x, base), batch)[0])(lora)

    grads = {
        path: np.asarray(v[...]) for path, v in nnx.to_flat_state(gradients(lora, base))
    }
    q = {x: grads["layers", "attn", "q_proj", f"lora_{x}"] for x in "ab"}
    assert np.abs(q["a"][1, :, :2]).min() > 0 and np.abs(q["b"][1, :2]).min() > 0
    assert not q["a"][1, :, 2:].any() and not q["b"][1, 2:].any()
    assert not grads["layers", "attn", "v_proj", "lora_b"][0].any()


def test_layers_by_linear_travel_with_our_own_adapter(tmp_path: Path):
    config = LoRAConfig(
        rank=4, targets="q_proj,v_proj,o_proj", layers_pattern={"q_proj": "1"}
    )
    model = attach(tiny.decoder(), config, key=jax.random.key(0))
    adapter = Adapter.of(model)
    lora = tiny.randomized(adapter.lora)
    model = Adapter(lora, adapter.config).on(tiny.decoder())
    own = lora_config(model)
    assert own.layers == () and own.layers_pattern == {"layers.attn.q_proj": "1"}
    save_adapter(tmp_path / "a", lora, own)
    back = load_adapter(tmp_path / "a", tiny.decoder())
    assert lora_config(back) == own
    ids = tiny.tokens()
    np.testing.assert_array_equal(tiny.logits(back, ids), tiny.logits(model, ids))
    read = read_adapter(tmp_path / "a")
    doubled = combine([read, read], [0.5, 0.5], "concat").on(tiny.decoder())
    close(doubled, model)
    close(merge(model, dtype="float32"), model)
    peft = import_peft(export_peft(tmp_path / "peft", model), tiny.decoder())
    assert lora_config(peft) == own
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, LoRA)]
    assert sum(node.active is not None for node in nodes) == 1


def test_a_pattern_of_layers_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="layers-pattern q_proj is '1,1', expected"):
        LoRAConfig(layers_pattern={"q_proj": "1,1"})
    config = LoRAConfig(targets="q_proj", layers_pattern={"q_proj": "0,2"})
    with pytest.raises(ConfigError, match=r"q_proj \[0, 2\]: the model has 2 layers"):
        attach(tiny.decoder(), config, key=jax.random.key(0))


RENAMED: dict[str, Callable[[str], str]] = {
    "default": lambda name: name.replace(".weight", ".default.weight"),
    "text part, transformers 5": lambda name: name.replace(
        MODEL, MODEL + "language_model."
    ),
    "text part, transformers 4": lambda name: name.replace(
        MODEL, "base_model.model.language_model.model."
    ),
}


@pytest.mark.parametrize("form", RENAMED)
def test_names_of_other_forms_mean_the_same(form, tmp_path: Path, caplog):
    tensors = {RENAMED[form](name): array for name, array in LAYERS.items()}
    kinds: dict[str, Any] = {"alpha_pattern": {"layers.1.self_attn.v_proj": 2}}
    kinds["target_modules"] = TARGETS
    if "text" in form:
        # What is beside the text part has tensors of the same kind.
        outside = "base_model.model.vision_tower.layers.0.q_proj.lora_A.weight"
        tensors[outside] = np.ones((4, 8))
        kinds["target_modules"] = (
            rf"(.*language_model{TARGETS}|vision_tower.*\.[qv]_proj)"
        )
    model = import_peft(written(tmp_path / "a", tensors, **kinds), tiny.decoder())
    close(model, summed(LAYERS, {(0, "q"): 2, (0, "v"): 2, (1, "v"): 0.5}))
    said = caplog.records[0].getMessage()
    assert len(caplog.records) == 1
    if "text" in form:
        assert "text part of the model alone: vision_tower.layers.0.q_proj" in said
    else:
        assert "6 tensors have the adapter's name, 'default'" in said


def test_factors_that_settings_do_not_name_are_named(tmp_path: Path, caplog):
    folder = written(tmp_path / "a", LAYERS, target_modules=["v_proj"])
    model = import_peft(folder, tiny.decoder())
    close(model, summed(LAYERS, {(0, "q"): 2, (0, "v"): 2, (1, "v"): 2}))
    assert "does not name model.layers.0.self_attn.q_proj" in caplog.text


def tied() -> Decoder:
    """Returns the tiny base with its embedding as its head."""
    model = tiny.decoder()
    config = dataclasses.replace(model.config, tie_word_embeddings=True)
    made = nnx.clone(model)
    made.config, made.lm_head = config, nnx.data(None)
    return made


def head_pair() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "base_model.model.lm_head.lora_A.weight": rng.normal(size=(4, 64)) * 0.2,
        "base_model.model.lm_head.lora_B.weight": rng.normal(size=(272, 4)) * 0.2,
    }


def test_an_adapter_on_a_tied_head_alone_gives_it_a_copy(tmp_path: Path, caplog):
    tensors = head_pair()
    folder = written(tmp_path / "a", tensors, target_modules=["lm_head"])
    assert peft_misfits(folder, tied()) == []
    model = import_peft(folder, tied())
    assert "gets its own copy of the embedding" in caplog.text
    a, b = (tensors[f"base_model.model.lm_head.lora_{x}.weight"] for x in "AB")
    ids = tiny.tokens()
    base = tied()
    hidden = np.asarray(base.hidden_states(ids), np.float64)
    table = np.asarray(base.embed_tokens.weight[...], np.float64)
    wanted = hidden @ (table + 2 * b @ a).T
    np.testing.assert_allclose(tiny.logits(model, ids), wanted, atol=SAME, rtol=0)
    assert lora_config(model).tied is False
    again = import_peft(export_peft(tmp_path / "out", model), tied())
    np.testing.assert_array_equal(tiny.logits(again, ids), tiny.logits(model, ids))
    save_adapter(tmp_path / "ours", split(model)[1], lora_config(model))
    again = load_adapter(tmp_path / "ours", tied())
    np.testing.assert_array_equal(tiny.logits(again, ids), tiny.logits(model, ids))


def test_tied_factors_follow_the_embedding(tmp_path: Path, caplog):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(4, 272)) * 0.1, rng.normal(size=(64, 4)) * 0.1
    names = [f"{MODEL}embed_tokens.lora_embedding_{x}" for x in "AB"]
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    folder = written(tmp_path / "a", dict(zip(names, (a, b), strict=True)), **settings)
    model = import_peft(folder, tied())
    base = tied()
    table = np.asarray(base.embed_tokens.weight[...], np.float64) + 2 * (b @ a).T
    base.embed_tokens.weight.set_value(jnp.asarray(table, jnp.float32))
    close(model, base)
    assert "the head's factors follow the embedding's" in caplog.text


def test_a_tied_head_is_refused_with_the_reason():
    for targets in ("lm_head", "q_proj,lm_head", "lm_.*"):
        with pytest.raises(ConfigError) as error:
            tiny.adapted(tied(), targets=targets)
        assert "lm_head is tied to embed_tokens and has no weight of its own" in str(
            error.value
        )
        assert "--lora.no-tied" in str(error.value)
        assert "matches no linear" not in str(error.value)
    assert tiny.adapted(tied(), targets="lm_head", tied=False).lm_head is not None
    # One that matches other modules too leaves the tied head alone, as before.
    assert tiny.adapted(tied(), targets=".*(q_proj|lm_head)").lm_head is None


def test_modules_that_trained_in_some_layers_are_the_bases_in_others(tmp_path, caplog):
    own = {f"{MODEL}layers.1.input_layernorm.weight": np.full(64, 1.5)}
    settings = {
        "modules_to_save": ["layers.1.input_layernorm"],
        "target_modules": TARGETS,
    }
    model = import_peft(
        written(tmp_path / "a", LAYERS | own, **settings), tiny.decoder()
    )
    norm = np.asarray(model.layers.attn_norm.weight[...])
    base = np.asarray(tiny.decoder().layers.attn_norm.weight[...])
    np.testing.assert_array_equal(norm[0], base[0])
    np.testing.assert_array_equal(norm[1], np.full(64, 1.5))
    assert "layers.attn_norm.weight trained in some layers only" in caplog.text


def test_what_modules_to_save_names_and_the_file_does_not_have(tmp_path, caplog):
    folder = written(
        tmp_path / "a", LAYERS, modules_to_save=["score"], target_modules=TARGETS
    )
    import_peft(folder, tiny.decoder())  # as in PEFT, which finds no such module
    assert "modules_to_save score: the model has none" in caplog.text
    folder = written(
        tmp_path / "b", LAYERS, modules_to_save=["norm"], target_modules=TARGETS
    )
    with pytest.raises(AdapterMismatchError, match="names norm, of which"):
        import_peft(folder, tiny.decoder())


def test_settings_that_no_adapter_here_has_are_named_at_once(tmp_path: Path):
    wrong = {
        "lora_bias": True,
        "target_modules": "q_proj(",
        "lora_alpha": "8",
        "rank_pattern": {"q_proj": None},
    }
    with pytest.raises(AdapterMismatchError) as error:
        import_peft(written(tmp_path / "a", LAYERS, **wrong), tiny.decoder())
    text = str(error.value)
    assert "lora_B has biases" in text and "bias='lora_only'" in text
    assert "'q_proj(' is no pattern" in text
    assert "lora_alpha is '8', expected null or a finite number" in text
    assert "rank_pattern.q_proj is null" in text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_gives(umask, mode, tmp_path: Path):
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    before = os.umask(umask)
    try:
        out = export_peft(tmp_path / "peft", model, tokenizer=tiny.tokenizer())
        tiny.write_folder(tmp_path / "base")
        save_adapter(tmp_path / "own", split(model)[1], lora_config(model))
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"adapter_model.safetensors", "model.safetensors"} <= {f.name for f in files}
    wrong = {
        str(file.relative_to(tmp_path)): oct(found)
        for file in files
        if (found := stat.S_IMODE(file.stat().st_mode)) != mode
    }
    assert not wrong
    assert not list(out.glob("*.partial"))


def test_the_command_puts_the_tokenizer_beside_and_names_the_base_as_given(
    tmp_path: Path, capsys, monkeypatch
):
    base = tiny.write_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    save_adapter(tmp_path / "a", split(model)[1], lora_config(model))
    monkeypatch.chdir(tmp_path)
    for extra, name in (([], "base"), (["--base-name", "owner/name"], "owner/name")):
        out = tmp_path / f"peft{len(extra)}"
        args = ["export", "--model", "base", "--adapter", "a", "--out", str(out)]
        assert main([*args, *extra]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        settings = json.loads((out / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == said["base_name"] == name
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / file).read_bytes() == (base / file).read_bytes()
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 4


def test_equal_configs_have_equal_hashes():
    one = LoRAConfig(alpha=32, rank_pattern={"a": 1, "b": 2}, layers=(1,))
    two = LoRAConfig(alpha=32.0, rank_pattern={"b": 2, "a": 1}, layers=(1,))
    assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize(
    ("name", "module", "found"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "layers.0.xq_proj", False),
        ("0.q_proj", "layers.10.q_proj", False),
        ("layers.1.q", "layers.1.q", True),
        ("layers.1.q", "layers.12q", True),  # PEFT takes it as a pattern
        ("", "layers.", True),
        ("longer.than.it", "it", False),
    ],
)
def test_a_name_is_matched_as_the_pattern_that_peft_makes_of_it(name, module, found):
    assert (re.match(rf"(.*\.)?({name})$", module) is not None) == found
    assert settings.matched({name: 2}, module, 1) == (2 if found else 1)


def test_settings_have_so_many_patterns_and_keys_at_most():
    many = {f"a{i}+": 2 for i in range(501)}
    (said,) = settings.not_held({"rank_pattern": many})
    assert said == "it has 501 patterns, expected at most 500"
    names = {f"layers.{i}.q": 2 for i in range(20_000)}
    assert not settings.not_held({"rank_pattern": names})
    (said,) = settings.not_held({"rank_pattern": names | {"x": 1}})
    assert "an object of at most 20000" in said
    assert (
        len(settings.not_held({"modules_to_save": ["(a"], "target_modules": "(b"})) == 2
    )
