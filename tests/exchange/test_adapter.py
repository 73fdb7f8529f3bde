"""Adapters on disk: what is in them, and what they refuse."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from qlora_jax import digests
from qlora_jax.adapters import LoRAConfig, split
from qlora_jax.adapters.names import flatten
from qlora_jax.errors import AdapterMismatchError, OutputExistsError
from qlora_jax.exchange.find import find_adapter, read_adapter_config
from qlora_jax.exchange.ours import (
    describe_adapter,
    load_adapter,
    misfits,
    save_adapter,
)
from qlora_jax.exchange.read import read_adapter

CONFIG = LoRAConfig(rank=4, alpha=8.0)
TOKENS = tiny.tokens()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = split(tiny.adapted(tiny.quantized()))[1]
    return save_adapter(tmp_path_factory.mktemp("run") / "adapter", lora, CONFIG)


def test_a_saved_adapter_comes_back_bit_for_bit(saved: Path):
    model = load_adapter(saved, tiny.quantized())
    expected = flatten(split(tiny.adapted(tiny.quantized()))[1])
    found = flatten(split(model)[1])
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(x, found[name])
    assert read_adapter_config(saved) == CONFIG


def test_a_run_folder_and_a_dense_copy_of_the_base_will_do(saved: Path):
    dense = load_adapter(saved.parent, tiny.decoder())
    expected = tiny.logits(tiny.adapted(tiny.decoder()), TOKENS)
    np.testing.assert_array_equal(tiny.logits(dense, TOKENS), expected)


def test_nothing_of_the_base_is_in_the_folder(saved: Path):
    # By what Orbax lists: the size of its own bookkeeping depends on the machine's load.
    wanted = flatten(split(tiny.adapted(tiny.quantized()))[1])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(saved / "arrays").item_metadata.tree
    assert {name: x.shape for name, x in stored.items()} == {
        name: x.shape for name, x in wanted.items()
    }
    assert {x.name for x in saved.iterdir()} == {
        *("arrays", "adapter.json", "qlora_jax.sha256.json")
    }
    metadata = json.loads((saved / "adapter.json").read_text())
    assert metadata["lora"]["rank"] == 4 and metadata["base"]["structure"]
    assert metadata["arrays"].keys() == wanted.keys()


def test_another_base_is_refused_with_what_differs(saved: Path):
    with pytest.raises(AdapterMismatchError, match="its base had other weights"):
        load_adapter(saved, tiny.decoder(seed=1))
    with pytest.raises(AdapterMismatchError, match="other parameter shapes"):
        load_adapter(saved, tiny.decoder(bias=True))


def test_another_rank_names_every_array(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    metadata = json.loads((folder / "adapter.json").read_text())
    metadata["lora"]["rank"] = 8
    (folder / "adapter.json").write_text(json.dumps(metadata))
    with pytest.raises(AdapterMismatchError) as error:
        load_adapter(folder, tiny.quantized())
    text = str(error.value)
    assert "28 problems" in text
    assert "layers.0.attn.k_proj.lora_a: shape (64, 4), the model has (64, 8)" in text


def test_a_taken_folder_is_kept(saved: Path, tmp_path: Path):
    lora = split(tiny.adapted(tiny.quantized()))[1]
    with pytest.raises(OutputExistsError, match="pass overwrite to replace it"):
        save_adapter(saved, lora, CONFIG)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is no adapter"):
        save_adapter(tmp_path, lora, CONFIG, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    save_adapter(saved, lora, CONFIG, overwrite=True)
    load_adapter(saved, tiny.quantized())


def test_folders_that_are_no_adapter_say_what_was_expected(tmp_path: Path):
    with pytest.raises(AdapterMismatchError, match="holds no adapter; expected a run"):
        load_adapter(tmp_path, tiny.quantized())
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(AdapterMismatchError, match=r"adapter\.json is not JSON"):
        load_adapter(tmp_path, tiny.quantized())
    (tmp_path / "adapter.json").write_text('{"format": 99, "lora": {}}')
    with pytest.raises(AdapterMismatchError, match="has format 99"):
        load_adapter(tmp_path, tiny.quantized())
    (tmp_path / "adapter.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterMismatchError, match="cannot be read as a PEFT adapter"):
        load_adapter(tmp_path, tiny.quantized())
    with pytest.raises(AdapterMismatchError, match="is a PEFT adapter; import it"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "1", "format is '1', expected a whole number"),
        (("lora",), [1], r"lora is \[1\], expected an object"),
        (("lora", "rank"), "4", "rank is '4', expected int"),
        (("lora", "alpha"), None, "alpha is unset, expected float"),
        (("lora", "rank_pattern"), {"q_proj": 0.5}, "rank_pattern is"),
        (("lora", "more"), 1, "more is no known key"),
        (("lora", "targets"), "(a+)+$", "is no pattern: .* repeats a group"),
        (("base",), "x", "base is 'x', expected null or an object"),
        (("base", "structure"), 3, "base.structure is 3, expected a text"),
        (
            ("base", "sample", "norm.weight"),
            ["x"],
            r"base.sample.norm.weight\[0\] is 'x'",
        ),
        (("arrays", "a"), [2**40], r"arrays.a\[0\] is 1099511627776"),
        (("arrays",), [], r"arrays is \[\], expected an object"),
        (("layers",), {"a": [10**9]}, r"layers.a\[0\] is 1000000000"),
    ],
)
def test_metadata_are_held_to_their_kinds(saved, tmp_path, place, value, message):
    shutil.copytree(saved, tmp_path / "a")
    metadata = json.loads((saved / "adapter.json").read_text())
    *outer, last = place
    inner = metadata
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(metadata))
    for read in (describe_adapter, read_adapter, read_adapter_config):
        with pytest.raises(AdapterMismatchError, match=message):
            read(tmp_path / "a")


def test_a_sample_of_another_length_is_damaged(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    metadata = json.loads((saved / "adapter.json").read_text())
    metadata["base"]["sample"]["norm.weight"].pop()
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(metadata))
    (problem, *_) = misfits(tmp_path / "a", tiny.decoder())
    assert "sampled values, here are" in problem and "it is damaged" in problem


def test_ids_that_no_vocabulary_has_make_no_rows(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    metadata = json.loads((saved / "adapter.json").read_text())
    metadata["lora"]["tokens"] = [10**9]
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(metadata))
    with pytest.raises(AdapterMismatchError, match="the row of token 1000000000"):
        load_adapter(tmp_path / "a", tiny.quantized())


def test_a_fifo_among_the_arrays_is_not_waited_for(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    (path := tmp_path / "a" / "arrays" / "_METADATA").unlink()
    os.mkfifo(path)
    for read in (read_adapter, lambda path: load_adapter(path, tiny.quantized())):
        with pytest.raises(AdapterMismatchError, match="_METADATA is a FIFO, expected"):
            read(tmp_path / "a")


def swapped(folder: Path) -> None:
    """Gives an array the digest of another one."""
    path = folder / "adapter.json"
    metadata = json.loads(path.read_text())
    names = [name for name in metadata["sha256"] if name.endswith("q_proj.lora_a")]
    metadata["sha256"][names[0]] = metadata["sha256"][names[1]]
    del metadata["metadata_sha256"]
    metadata["metadata_sha256"] = digests.of_json(metadata)
    path.write_text(json.dumps(metadata))


def changed(folder: Path) -> None:
    path = folder / "adapter.json"
    path.write_text(path.read_text().replace('"alpha": 8.0', '"alpha": 9.0'))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            swapped,
            r"layers\.0\.attn\.q_proj\.lora_a is not as it was written: its sha256",
        ),
        (changed, r"adapter\.json was changed after it was written, or is damaged"),
        (
            lambda folder: (folder / "arrays" / "manifest.ocdbt").unlink(),
            r"is damaged \(1 problem\):\n  arrays/manifest\.ocdbt is missing",
        ),
    ],
)
def test_what_is_damaged_is_named_as_it_is_read(saved: Path, tmp_path, harm, said):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    harm(folder)
    for read in (
        lambda: load_adapter(folder, tiny.quantized()),
        lambda: read_adapter(folder),
    ):
        with pytest.raises(AdapterMismatchError, match=said):
            read()
