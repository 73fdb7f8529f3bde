"""qlora combine, compress and inspect --compare, on folders."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from command import call

from qlora_jax.cli.main import main
from qlora_jax.exchange.ours import load_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapters(tmp_path_factory.mktemp("combine"))


def update(model, name: str = "q_proj") -> np.ndarray:
    node = getattr(model.layers.attn, name)
    a, b = (np.asarray(x[...], np.float64) for x in (node.lora_a, node.lora_b))
    return node.scale * (a @ b)


def test_a_sum_of_folders_is_the_sum_of_their_updates(folders: Path, tmp_path, capsys):
    figures = call(
        *(capsys, "combine", "--adapters", folders / "a", folders / "b-peft"),
        *(
            "--weights",
            0.7,
            -0.4,
            "--out",
            tmp_path / "ab",
            "--model",
            folders / "base",
        ),
    )
    assert figures["rank"] == 6
    a, b, both = (
        update(load_adapter(path, tiny.decoder()))
        for path in (folders / "a", folders / "b", tmp_path / "ab")
    )
    np.testing.assert_allclose(both, 0.7 * a - 0.4 * b, atol=1e-6)


@pytest.mark.slow
def test_methods_and_their_settings_reach_the_algebra(folders: Path, tmp_path, capsys):
    two = ("--adapters", folders / "a", folders / "b")
    svd = call(
        *(capsys, "combine", *two, "--method", "ties_svd", "--rank", 3),
        *("--density", 0.5, "--out", tmp_path / "ties"),
    )
    assert svd["rank"] == 3
    chained = call(
        capsys, "combine", *two, "--method", "chain", "--out", tmp_path / "c"
    )
    plain = call(capsys, "combine", *two, "--out", tmp_path / "d")
    assert chained["norm"] == pytest.approx(plain["norm"], rel=1e-6)
    a, b = (
        load_adapter(tmp_path / name, tiny.decoder())(tiny.tokens()) for name in "cd"
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_lower_rank_states_its_error(folders: Path, tmp_path, capsys):
    figures = call(
        *(capsys, "compress", "--adapter", folders / "a", "--rank", 2),
        *("--out", tmp_path / "a2"),
    )
    whole, low = (
        update(load_adapter(path, tiny.decoder()))
        for path in (folders / "a", tmp_path / "a2")
    )
    lost = np.linalg.norm(whole - low, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    assert 0.1 < lost.max() <= figures["largest_relative_error"] + 1e-6
    assert "layers.0.attn.q_proj" in figures["table"]
    exact = call(
        *(capsys, "compress", "--adapter", folders / "a", "--tolerance", 1e-5),
        *("--out", tmp_path / "same"),
    )
    assert exact["rank"] == 4 and exact["relative_error"] < 1e-5


def test_two_adapters_are_compared(folders: Path, capsys):
    a, b = folders / "a", folders / "b"
    assert call(capsys, "inspect", "--compare", a, a)["cosine"] == pytest.approx(1)
    found = call(capsys, "inspect", "--compare", a, b)
    assert abs(found["cosine"]) < 0.2
    assert found["table"].count("layers.1.mlp.down_proj") == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--weights", 1.0), "1 weights for 2 adapters"),
        (("--method", "linear"), "linear works on the factors"),
        (("--method", "chain", "--weights", 1.0, 1.0), "and no --weights"),
        (("--method", "svd", "--rank", 1000), "rank 1000 is above min"),
    ],
)
def test_what_cannot_be_combined_is_one_message(
    folders, tmp_path, capsys, args, expected
):
    two = ("--adapters", folders / "a", folders / "b", "--out", tmp_path / "x")
    assert main(["combine", *map(str, (*two, *args))]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_folders_that_cannot_be_read_are_named(folders: Path, tmp_path, capsys):
    out = ("--out", str(tmp_path / "x"))
    peft = str(folders / "a-peft")
    assert main(["combine", "--adapters", peft, peft, *out]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main(["compress", "--adapter", str(tmp_path), "--rank", "1", *out]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert "give a folder, or --compare" in capsys.readouterr().err
