"""Safetensors folders: read tensor by tensor, written shard by shard."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import digests
from qlora_jax.errors import CheckpointError
from qlora_jax.sources.safetensors import INDEX, SINGLE, Checkpoint
from qlora_jax.sources.writer import Writer, write_tensors

DTYPES = (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
)


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {np.dtype(t).name: rng.integers(0, 2, (3, 5)).astype(t) for t in DTYPES}
    return made | {
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def write(
    folder: Path, values: dict[str, np.ndarray], shard_bytes: int = 1 << 30
) -> int:
    writer = Writer(folder, shard_bytes)
    for name, value in values.items():
        writer.add(name, value)
    return writer.close()


def test_a_file_is_the_one_that_the_package_writes(tmp_path):
    values = tensors() | {'odd "name" \u00e9': np.ones((2, 2), np.float32)}
    entry = write_tensors(tmp_path / "ours", values)
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry["tensors"].keys() == values.keys()
    assert not digests.damage(tmp_path, "ours", entry)
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def raw(folder: Path, header: object, body: bytes = b"") -> Path:
    """Writes a file with a header as given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def same(a, b) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(np.asarray(a[name]), b[name])


def test_every_dtype_is_read_as_safetensors_wrote_it(tmp_path):
    save_file(tensors(), tmp_path / SINGLE, {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint) == len(tensors())
    same(dict(checkpoint), tensors())


def test_a_tensor_is_mapped_and_not_read(tmp_path):
    save_file({"w": np.ones((64, 64), np.float32)}, tmp_path / SINGLE)
    w = Checkpoint(tmp_path)["w"]
    assert isinstance(w, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        w[0, 0] = 2


def test_what_is_written_safetensors_reads(tmp_path):
    size = write(tmp_path, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    same(load_file(tmp_path / SINGLE), tensors())
    assert size == sum(value.nbytes for value in tensors().values())


def test_shards_hold_the_same_as_a_single_file(tmp_path):
    values = {f"w{i}": np.full((i + 1, 8), i, np.float32) for i in range(6)}
    size = write(tmp_path, values, shard_bytes=200)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == size
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    same(dict(Checkpoint(tmp_path)), values)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    values = {
        name: np.zeros(n, np.uint8) for name, n in (("a", 10), ("b", 500), ("c", 10))
    }
    write(tmp_path, values, shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    same(dict(Checkpoint(tmp_path)), values)


def test_nothing_has_its_final_name_before_close(tmp_path):
    writer = Writer(tmp_path, shard_bytes=8)
    for i in range(3):
        writer.add(f"w{i}", np.zeros(8, np.uint8))
    assert not list(tmp_path.glob("*.safetensors"))
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"no {SINGLE} and no {INDEX}; expected"):
        Checkpoint(tmp_path)


def test_missing_shards_are_all_named(tmp_path):
    write(tmp_path, {f"w{i}": np.zeros(8, np.uint8) for i in range(4)}, shard_bytes=8)
    for i in (2, 4):
        (tmp_path / f"model-0000{i}-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*-00002-of.*-00004-of"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list, expected an object"),
        ("null", "holds NoneType, expected an object"),
        ("{}", "is no safetensors index"),
        ('{"weight_map": []}', "is no safetensors index"),
        ('{"weight_map": {"w": 3}}', "is no safetensors index"),
        ('{"weight_map": {"w": "a\\u0000b"}}', "is no safetensors index"),
        ('{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}', "the key .* twice"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} {message}|{INDEX} .*{message}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": (0, 4), "b": (2, 6)}, 6, "b overlaps a"),
        ({"a": (0, 4), "b": (0, 4)}, 4, "b overlaps a"),
        ({"a": (0, 4), "b": (6, 10)}, 10, "b does not follow a"),
        ({"a": (2, 6)}, 6, "a does not follow the header"),
        ({"a": (0, 4)}, 9, "5 bytes after the last tensor"),
    ],
)
def test_tensors_lie_one_after_another_and_fill_the_file(
    tmp_path, entries, size, message
):
    header = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in entries.items()
    }
    raw(tmp_path, header, bytes(size))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shape", [[0, 2**63], [1] * 70, [0, 10**40], [0, 2**40, 2**40]]
)
def test_shapes_that_no_array_has_are_refused(tmp_path, shape):
    end = 0 if 0 in shape else 1
    raw(
        tmp_path,
        {"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}},
        bytes(end),
    )
    with pytest.raises(CheckpointError, match="which no array has"):
        Checkpoint(tmp_path)


def test_a_truncated_file_names_every_tensor_that_is_cut(tmp_path):
    values = {name: np.zeros(100, np.float32) for name in "abc"}
    save_file(values, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:-500])
    with pytest.raises(CheckpointError, match="truncated; fetch it again") as caught:
        Checkpoint(tmp_path)
    message = str(caught.value)
    assert f"{SINGLE}: b ends at" in message and f"{SINGLE}: c ends at" in message
    assert ": a " not in message


@pytest.mark.parametrize("size", [0, 3, 8, 40])
def test_a_file_cut_inside_its_header_is_refused(tmp_path, size):
    save_file({"w": np.zeros(8, np.float32)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=rf"truncated or no .*\({size} bytes\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{{{{",
        b"\xff\xfe\x00\x01",
        [],
        7,
        {"w": 3},
        {"w": {"dtype": "F32", "shape": [2]}},
        {"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"w": {"dtype": "F32", "shape": [None], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header):
    raw(tmp_path, header, bytes(8))
    with pytest.raises(CheckpointError, match=f"{SINGLE}: "):
        Checkpoint(tmp_path)


def test_a_size_that_does_not_fit_its_shape_is_named(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    raw(tmp_path, {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match="w has 8 bytes, its shape needs 12"):
        Checkpoint(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    raw(
        tmp_path, {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)
    )
    with pytest.raises(CheckpointError, match="w has dtype 'F4', which is unknown"):
        Checkpoint(tmp_path)


def test_the_problems_of_all_shards_are_gathered(tmp_path):
    write(tmp_path, {f"w{i}": np.zeros(64, np.uint8) for i in range(3)}, shard_bytes=64)
    for i in (1, 3):
        path = tmp_path / f"model-0000{i}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"(?s)2 problems.*w0 ends at.*w2 ends at"
    ):
        Checkpoint(tmp_path)


def test_damage_anywhere_in_a_file_is_an_error_or_harmless(tmp_path):
    # Never another exception, and never memory beyond the file.
    values = {name: np.arange(6, dtype=np.float32) for name in ("a.weight", "b.weight")}
    save_file(values, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data) - 40, rng.integers(1, 4)):
            damaged[at] = rng.integers(32, 127)
        (tmp_path / SINGLE).write_bytes(
            damaged[: rng.integers(len(data) // 2, len(data) + 1)]
        )
        try:
            for value in dict(Checkpoint(tmp_path)).values():
                value.tobytes()
        except CheckpointError:
            refused += 1
    assert refused > 50
