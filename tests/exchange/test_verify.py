"""Folders that we write prove that they are as they were written: on loading, by --verify."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from qlora_jax import digests
from qlora_jax.adapters import Adapter
from qlora_jax.errors import AdapterMismatchError, CheckpointError
from qlora_jax.exchange.metadata import read_metadata, restored
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.exchange.verify import verify
from qlora_jax.sources.load import load
from qlora_jax.sources.safetensors import INDEX
from qlora_jax.sources.save import save_model

KINDS = ("model", "shards", "adapter", "peft", "run")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """One folder of each kind that we write."""
    root = tmp_path_factory.mktemp("written")
    base = tiny.write_folder(root / "base")
    packed = tiny.quantized()
    save_model(packed, root / "model", source=base)
    save_model(packed, root / "shards", source=base, shard_bytes=30_000)
    adapted = tiny.adapted(packed)
    adapter = Adapter.of(adapted)
    save_adapter(root / "adapter", adapter.lora, adapter.config)
    export_peft(root / "peft", adapted)
    (root / "run").mkdir()
    (root / "run" / "config.toml").write_text("")
    save_adapter(root / "run" / "adapter", adapter.lora, adapter.config)
    return root


def damages(folder: Path, files: list[str]) -> Iterator[str]:
    """Damages a folder in one way after another; yields what must be named."""
    rng = np.random.default_rng(0)
    for name in files:
        path = folder / name
        whole = path.read_bytes()
        for at in (0, len(whole) - 1, *rng.integers(0, len(whole), 6)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            yield name
        for other in (b"", whole[: len(whole) // 2], whole + b"\0", bytes(len(whole))):
            if other != whole:
                path.write_bytes(other)
                yield name
        path.unlink()
        yield name
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_damaged_is_named(written: Path, tmp_path: Path, kind: str):
    folder = shutil.copytree(written / kind, tmp_path / kind)
    files = digests.files_in(folder)
    if kind == "run":
        files.remove("config.toml")
    assert verify(folder)["files"] == len([f for f in files if digests.NAME not in f])
    count = 0
    for name in damages(folder, files):
        with pytest.raises(CheckpointError) as caught:
            verify(folder)
        assert name in str(caught.value), name
        count += 1
    assert count > 12 * len(files) and verify(folder)


@pytest.mark.parametrize("kind", ["model", "shards"])
def test_a_flip_in_weights_is_found_as_they_load(
    written: Path, tmp_path: Path, kind: str, caplog
):
    folder = shutil.copytree(written / kind, tmp_path / kind)
    rng = np.random.default_rng(1)
    files = sorted(folder.glob("*.safetensors"))
    for i in range(20):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        head = 8 + int.from_bytes(whole[:8], "little")
        at = rng.integers(head) if i % 4 == 0 else rng.integers(head, len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        caplog.clear()
        try:
            load(folder, None, "float32")
        except CheckpointError as error:
            assert "problem" in str(error)
        else:  # of the header's metadata, which say nothing of a tensor
            assert at < head and "not the file that qlora_jax wrote" in caplog.text
        path.write_bytes(whole)
    load(folder, None, "float32")


def test_a_flip_in_a_peft_adapter_is_found_as_it_loads(written: Path, tmp_path: Path):
    folder = shutil.copytree(written / "peft", tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(AdapterMismatchError, match=r"lora_B.weight is not as it was"):
        import_peft(folder, tiny.decoder())


def test_a_file_of_ours_may_be_changed_and_the_list_removed(written, tmp_path):
    folder = shutil.copytree(written / "model", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"x": 1}))
    load(folder, None, "float32")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not as it"):
        verify(folder)
    (folder / digests.NAME).unlink()
    load(folder, None, "float32")
    with pytest.raises(CheckpointError, match="no .*to compare with; an older version"):
        verify(folder)


def test_what_was_added_is_named(written: Path, tmp_path: Path):
    folder = shutil.copytree(written / "shards", tmp_path / "shards")
    (folder / "README.md").write_text("mine")
    assert verify(folder)["others"] == ["README.md"]
    for name in ("chat_template.jinja", "model.safetensors", "adapter_config.json"):
        (folder / name).write_text("mine")
        with pytest.raises(
            CheckpointError, match=f"{name} was added, and would be read"
        ):
            verify(folder)
        (folder / name).unlink()
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="index.json is missing"):
        verify(folder)


def test_a_list_that_names_other_places_reads_nothing_there(written, tmp_path):
    folder = shutil.copytree(written / "adapter", tmp_path / "adapter")
    listed = json.loads((folder / digests.NAME).read_text())
    listed["files"]["../secret"] = {"bytes": 1, "sha256": "x"}
    listed["sha256"] = digests.of_json(listed["files"])
    (folder / digests.NAME).write_text(json.dumps(listed))
    with pytest.raises(
        CheckpointError, match=r"'\.\./secret', which is no file in the"
    ):
        verify(folder)


@pytest.mark.parametrize(
    "head",
    [
        b"\xff" * 8,
        b"\0" * 8,
        b"\2\0\0\0\0\0\0\0{}",
        b'\x1f\0\0\0\0\0\0\0{"a": {"data_offsets": [-9, 9]}}',
        b'\x19\0\0\0\0\0\0\0{"a": {"data_offsets":1}}',
    ],
    ids=range(5),
)
def test_a_list_and_a_file_that_fit_each_other_and_nothing_else(tmp_path, head):
    # Whoever makes the one may make the other.
    (tmp_path / "model.safetensors").write_bytes(head)
    entry = {
        "bytes": len(head),
        "header": hashlib.sha256(head).hexdigest(),
        "tensors": {"a": "x"},
    }
    files = {"model.safetensors": entry}
    listed = {"format": 1, "files": files, "sha256": digests.of_json(files)}
    (tmp_path / digests.NAME).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="is not as it was written|has not$"):
        verify(tmp_path)


def test_arrays_that_are_far_larger_than_their_files_are_not_made(written, tmp_path):
    folder = shutil.copytree(written / "adapter", tmp_path / "adapter")
    (folder / digests.NAME).unlink()
    _, metadata = read_metadata(folder)
    name = next(iter(metadata["arrays"]))
    metadata["arrays"][name] = [2**15, 2**20]
    with pytest.raises(AdapterMismatchError, match="or made to fill the memory"):
        restored(folder, metadata)
