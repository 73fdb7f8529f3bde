"""Checkpoints: whole or named, and never fewer than before."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny

from qlora_jax import digests, files
from qlora_jax.adapters import split
from qlora_jax.errors import CheckpointError, SaveError
from qlora_jax.exchange.steps import damage
from qlora_jax.train import checkpoints as module
from qlora_jax.train.checkpoints import RunCheckpoints
from qlora_jax.train.state import TrainState

POSITION = {"seed": 0, "eval_loss": None}
TX = optax.adam(1e-3)


def state_at(step: int) -> TrainState:
    lora = split(tiny.adapted(tiny.decoder(), targets="q_proj", seed=step))[1]
    return TrainState(step, lora, TX.init(lora))


@pytest.fixture(scope="module")
def states() -> dict[int, TrainState]:
    return {step: state_at(step) for step in (0, 2, 4)}


@pytest.fixture(scope="module")
def made(states, tmp_path_factory) -> Path:
    """A folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    several = RunCheckpoints(folder, keep=2)
    for step in (2, 4):
        several.save(states[step], POSITION | {"objective": "sft"})
    several.close()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoints")


def restored(folder: Path, states: dict[int, TrainState]) -> TrainState:
    several = RunCheckpoints(folder, keep=2)
    try:
        return several.restore(states[0], POSITION | {"objective": "sft"})
    finally:
        several.close()


def same(one: TrainState, other: TrainState) -> None:
    for x, y in zip(tiny.arrays(one), tiny.arrays(other), strict=True):
        np.testing.assert_array_equal(x, y)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_comes_back_bit_for_bit(folder: Path, states, caplog):
    same(restored(folder, states), states[4])
    assert caplog.text == ""


def flipped(data: bytes, random_: random.Random) -> bytes:
    at, changed = random_.randrange(len(data)), bytearray(data)
    changed[at] ^= 1 << random_.randrange(8)
    return bytes(changed)


def test_damage_to_any_file_is_named(made: Path, tmp_path: Path):
    chance, tried = random.Random(0), 0
    whole = shutil.copytree(made / "4", tmp_path / "4")
    assert damage(whole) == []
    for path in [path for path in whole.rglob("*") if path.is_file()]:
        data, name = path.read_bytes(), path.relative_to(whole).as_posix()
        damaged = [b"", data[: len(data) // 2], b"\0" * len(data)]
        damaged += [flipped(data, chance) for _ in range(8)]
        for other in damaged:
            path.write_bytes(other)
            found, tried = damage(whole), tried + 1
            # A changed list of digests may say it of the files that it lists.
            assert found and (name == digests.NAME or found[0].startswith(name))
        path.unlink()
        assert any(f"{name} is missing" in problem for problem in damage(whole))
        path.write_bytes(data)
    assert damage(whole) == [] and tried > 200


def break_file(folder: Path) -> None:
    (folder / "optimizer" / "manifest.ocdbt").write_bytes(b"")


def break_array(folder: Path) -> None:
    """Writes an array's digest that is another's, and a list of files that fits."""
    place = folder / "position" / "metadata"
    position = json.loads(place.read_text())
    adapter = position["digests"]["adapter"]
    adapter["layers.0.attn.q_proj.lora_a"] = adapter["layers.1.attn.q_proj.lora_a"]
    place.write_text(json.dumps(position))
    (folder / digests.NAME).unlink()
    digests.write(folder, {})


def break_older(folder: Path) -> None:
    """Damages what has no digests."""
    (folder / digests.NAME).unlink()
    place = folder / "position" / "metadata"
    position = json.loads(place.read_text())
    del position["digests"]
    place.write_text(json.dumps(position))
    (folder / "adapter" / "_METADATA").write_text("{")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_file, "4: optimizer/manifest.ocdbt is not as it was written: 0 bytes"),
        (break_array, "4: adapter: array layers.0.attn.q_proj.lora_a is not as it was"),
        (break_older, "4: adapter/ cannot be read: "),
        (empty, "4: the folder is empty"),
    ],
)
def test_the_older_one_is_used_and_said(folder: Path, states, caplog, harm, message):
    harm(folder / "4")
    same(restored(folder, states), states[2])
    assert "checkpoint 2 is used, as newer ones are damaged" in caplog.text
    assert message in caplog.text
    assert names(folder) == {"2", "4"}  # nothing goes before a newer one is there


def test_what_was_damaged_goes_when_a_newer_one_is_there(folder: Path, states):
    break_file(folder / "4")
    (folder / "99").mkdir()  # someone else's
    several = RunCheckpoints(folder, keep=2)
    assert several.restore(states[0], POSITION | {"objective": "sft"}).step == 2
    several.save(TrainState(3, states[4].lora, states[4].opt_state), POSITION)
    several.close()
    assert names(folder) == {"2", "3", "99"}


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(folder: Path, states):
    break_file(folder / "4")
    several = RunCheckpoints(folder, keep=2)
    several.restore(states[0], POSITION | {"objective": "sft"})
    several.save(states[4], POSITION | {"objective": "sft"})
    several.close()
    assert names(folder) == {"2", "4"}
    same(restored(folder, states), states[4])


def test_without_a_whole_one_all_are_named_in_one_error(folder: Path, states):
    break_file(folder / "4")
    (folder / "2" / "position" / "metadata").unlink()
    with pytest.raises(CheckpointError) as error:
        restored(folder, states)
    text = str(error.value)
    assert "no checkpoint that is whole" in text and "2 problems" in text
    assert "4: optimizer/manifest.ocdbt" in text
    assert "2: position/metadata is missing" in text


def test_an_older_one_goes_only_when_the_new_one_is_flushed(
    folder: Path, states, monkeypatch
):
    seen: list[tuple[str, set[str]]] = []
    sync = files.sync

    def watched(path: Path) -> None:
        sync(path)
        seen.append((Path(path).relative_to(folder.parent).as_posix(), names(folder)))

    for one in (files, module):
        monkeypatch.setattr(one, "sync", watched)
    several = RunCheckpoints(folder, keep=1)
    new = TrainState(6, states[4].lora, states[4].opt_state)
    several.save(new, POSITION)
    several.close()
    assert names(folder) == {"6"}
    assert all({"2", "4"} <= there for _, there in seen)
    order = [path for path, _ in seen]
    written = [p for p in (folder / "6").rglob("*") if p.is_file()]
    flushed = {path.removeprefix("checkpoints/6.partial") for path in order[:-1]}
    assert {f"/{p.relative_to(folder / '6').as_posix()}" for p in written} <= flushed
    # The folder's own entries, then the name that the rename gave it.
    assert order[-2:] == ["checkpoints/6.partial", "checkpoints"]
    assert seen[-1][1] == {"2", "4", "6"} and seen[-2][1] == {"2", "4", "6.partial"}


def test_a_disk_that_is_full_leaves_the_older_ones(folder: Path, states, monkeypatch):
    def full(*args: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    monkeypatch.setattr(module, "_write_arrays", full)
    several = RunCheckpoints(folder, keep=1)
    several.save(TrainState(6, states[4].lora, states[4].opt_state), POSITION)
    with pytest.raises(SaveError, match="No space left on device. Checkpoint 4 is"):
        several.wait()
    several.close()
    assert names(folder) == {"2", "4"}
    same(restored(folder, states), states[4])


def test_what_a_killed_save_left_is_swept(folder: Path, states):
    left = ["6.partial", "4.old.partial", "5.orbax-checkpoint-tmp-1", "notes.partial"]
    for name in left:
        (folder / name / "adapter").mkdir(parents=True)
    several = RunCheckpoints(folder, keep=2)
    assert several.latest == 4
    several.save(TrainState(6, states[4].lora, states[4].opt_state), POSITION)
    several.close()
    assert names(folder) == {"4", "6", "notes.partial"}  # the last is not ours


def test_what_a_killed_removal_left_goes_when_the_run_goes_on(folder: Path, states):
    """The last checkpoint is there, so that none may follow that would take it away."""
    shutil.copytree(folder / "2", folder / "1")
    (folder / "3.old.partial" / "adapter").mkdir(parents=True)
    same(restored(folder, states), states[4])
    assert names(folder) == {"2", "4"}
    # But nothing goes while a newer one is damaged, which the next one replaces.
    (folder / "3.old.partial" / "adapter").mkdir(parents=True)
    (folder / "4" / "position" / "metadata").unlink()
    same(restored(folder, states), states[2])
    assert names(folder) == {"2", "3.old.partial", "4"}


def test_the_best_is_kept_besides(folder: Path, states):
    several = RunCheckpoints(folder, keep=1)
    for step, loss in ((5, 1.0), (6, 0.5), (7, 2.0), (8, 0.75)):
        state = TrainState(step, states[4].lora, states[4].opt_state)
        several.save(state, POSITION | {"eval_loss": loss})
        assert several.best == (min(step, 6), min(loss, 0.5) if step > 5 else loss)
    several.close()
    assert names(folder) == {"6", "8"}


def test_a_step_may_take_the_memory_of_what_is_being_saved(tmp_path: Path, states):
    kept = tiny.arrays(states[4].opt_state)
    taken = jax.tree.map(np.array, states[4].opt_state)
    several = RunCheckpoints(tmp_path / "c", keep=1)
    position = POSITION | {"objective": "sft"}
    several.save(TrainState(4, states[4].lora, taken), position)
    for x in jax.tree.leaves(taken):
        x[...] = 7
    found = several.restore(states[0], position)
    several.close()
    for x, y in zip(tiny.arrays(found.opt_state), kept, strict=True):
        np.testing.assert_array_equal(x, y)
