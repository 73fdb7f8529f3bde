"""qlora inspect: what it says of models, runs and adapters, and of their fit."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import qlora_jax
from qlora_jax.adapters import LoRAConfig, attach
from qlora_jax.adapters.attach import split
from qlora_jax.cli.main import main
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.sources.gguf.write import write_gguf
from qlora_jax.sources.save import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("inspect") / "base")


def inspect(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    assert main(["inspect", *map(str, args)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def save(out: Path, model: Decoder, **config) -> Path:
    config = LoRAConfig(**{"rank": 4} | config)
    return save_adapter(
        out, split(attach(model, config, key=jax.random.key(0)))[1], config
    )


def test_a_model_is_counted_by_part(base: Path, capsys):
    found = inspect(capsys, base)
    c = tiny.CONFIG
    assert (found["family"], found["layers"], found["tokenizer"]) == ("llama", 2, True)
    assert found["parameters"] == sum(found["parameters_by_part"].values())
    by = found["parameters_by_part"]
    assert by["embedding"] == by["head"] == c.vocab_size * c.hidden_size
    assert by["feed-forward"] == 3 * 2 * c.hidden_size * c.intermediate_size
    assert by["norms"] == 5 * c.hidden_size
    assert found["bytes"] == 4 * found["parameters"]  # float32
    assert (found["dtype"], found["quantization"]) == ("float32", "dense")


def test_a_4_bit_folder_says_how_and_how_small(tmp_path: Path, capsys):
    save_model(tiny.quantized("bfloat16"), tmp_path / "q")
    found = inspect(capsys, tmp_path / "q")
    assert found["quantization"] == "nf4, block 64, double-quantized absmax"
    size = found["bytes_by_part"]["feed-forward"]
    bits = 8 * size / found["parameters_by_part"]["feed-forward"]
    assert 4.1 < bits < 6  # beside the codes: tables and names, which tiny linears feel


def test_a_gguf_file_says_how_its_tensors_are_stored(tmp_path: Path, capsys):
    pytest.importorskip("gguf")
    base = Path(qlora_jax.__file__).parent / "assets" / "base"  # has a real tokenizer
    file = tmp_path / "m.gguf"
    write_gguf(base, file, "q8_0")
    found, folder = inspect(capsys, file), inspect(capsys, base)
    alike = ("family", "parameters", "layers", "vocabulary", "context", "tokenizer")
    assert {k: found[k] for k in alike} == {k: folder[k] for k in alike}
    assert (found["format"], found["tokens"]) == ("GGUF", folder["tokens"])
    norms = 2 * found["layers"] + 1
    matrices = sum(folder["tensors_by_kind"].values()) - norms
    assert found["tensors_by_kind"] == {"q8_0": matrices, "f32": norms}
    assert f"q8_0 ({matrices} tensors)" in found["quantization"]
    small = found["parameters_by_part"]["norms"]  # q8_0: 34 bytes for 32 values
    assert found["bytes"] == (found["parameters"] - small) * 34 // 32 + 4 * small
    assert inspect(capsys, file) == found  # an opened file is kept


def test_what_is_left_out_is_said(tmp_path: Path, capsys):
    folder = tiny.write_folder(tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    stored["score.weight"] = np.ones((2, 64), np.float32)
    save_file(stored, folder / "model.safetensors")
    (note,) = inspect(capsys, folder)["notes"]
    assert "score.weight (1 tensor)" in note
    (folder / "tokenizer.json").write_text("{")
    found = inspect(capsys, folder)
    assert not found["tokenizer"] and "is no tokenizer" in found["tokenizer_problem"]


def test_an_adapter_is_described_and_held_against_a_base(
    base: Path, tmp_path: Path, capsys
):
    adapter = save(tmp_path / "a", tiny.decoder(), targets="q_proj,v_proj")
    found = inspect(capsys, adapter)
    assert (found["kind"], found["rank"], found["arrays"]) == ("adapter", 4, 8)
    assert found["parameters"] == 2 * 4 * (64 + 64 + 64 + 32)
    found = inspect(capsys, adapter, "--model", base)
    assert found["fits"] and not found["misfits"]

    other = tiny.decoder(seed=1)
    found = inspect(
        capsys,
        adapter,
        "--model",
        tiny.write_folder(tmp_path / "other", other),
    )
    assert not found["fits"]
    assert "its base had other weights" in found["misfits"][0]


def test_a_base_of_another_shape_names_what_does_not_fit(
    base: Path, tmp_path: Path, capsys
):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
    )
    small = Decoder(config, key=jax.random.key(0), dtype="float32")
    found = inspect(capsys, save(tmp_path / "s", small), "--model", base)
    said = "\n".join(found["misfits"])
    assert "other parameter shapes" in said
    assert "layers.0.mlp.up_proj.lora_b: shape (4, 32), the model has (4, 128)" in said


def test_a_model_is_no_adapter(base: Path, tmp_path: Path, capsys):
    assert main(["inspect", str(base), "--model", str(base)]) == 2
    assert "is a model; --model goes with" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "holds no adapter" in capsys.readouterr().err
