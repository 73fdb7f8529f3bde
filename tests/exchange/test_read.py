"""read_adapter: a folder as a value, without its model."""

import json
from pathlib import Path
from typing import Any

import drawn
import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters.combine import combine
from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.exchange.metadata import METADATA
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import export_peft
from qlora_jax.exchange.read import read_adapter

EVERYTHING: dict[str, Any] = {
    "targets": "q_proj,lm_head",
    "dora": True,
    "bias": "all",
    "modules_to_save": "norm,layers.mlp_norm",
    "tokens": (7, 3),
    "head_tokens": (),
}


def same(one: Adapter, other: Adapter) -> None:
    """Compares values, paths, metadata and configs."""
    assert one.config == other.config
    assert jax.tree.structure(one.lora) == jax.tree.structure(other.lora)
    jax.tree.map(np.testing.assert_array_equal, one.lora, other.lora)


@pytest.mark.parametrize("config", [EVERYTHING, {"targets": "o_proj,embed_tokens"}])
def test_an_adapter_comes_back_as_it_was_and_is_saved_as_it_is(config, tmp_path: Path):
    adapter = Adapter.of(tiny.moved(tiny.decoder(bias=True), **config))
    folder = save_adapter(tmp_path / "one", adapter.lora, adapter.config)
    again = read_adapter(folder)
    same(again, adapter)
    other = save_adapter(tmp_path / "other", again.lora, again.config)
    assert (folder / METADATA).read_text() == (other / METADATA).read_text()


def test_layers_and_experts_are_stacked(tmp_path: Path):
    shapes = {
        "layers.mlp.experts.up_proj": (2, 3, 6, 5),
        "layers.attn.q_proj": (2, 6, 6),
        "lm_head": (6, 9),
    }
    adapter = drawn.adapter(shapes=shapes, rank_pattern={"up_proj": 2})
    same(
        read_adapter(save_adapter(tmp_path / "a", adapter.lora, adapter.config)),
        adapter,
    )


def test_a_stack_ends_with_the_last_layer_that_has_an_adapter(tmp_path: Path):
    shapes = {"layers.attn.q_proj": (5, 8, 8)}
    parts = [
        drawn.adapter(i, shapes=shapes, layers=layers)
        for i, layers in enumerate([(0, 2), (3,), ()])
    ]
    read = []
    for number, part in enumerate(parts):
        folder = save_adapter(tmp_path / str(number), part.lora, part.config)
        read.append(read_adapter(folder))
    assert [jax.tree.leaves(r.lora)[0].shape[0] for r in read] == [3, 4, 5]
    for chosen in ((0, 1), (0, 1, 2)):
        few = [[x[i] for i in chosen] for x in (read, parts)]
        made, wanted = (combine(x, [1.0] * len(x)) for x in few)
        drawn.assert_near(drawn.updates(made), drawn.updates(wanted), 1e-6)
        assert made.config == wanted.config


def test_what_is_read_goes_on_a_model_and_a_run_folder_will_do(tmp_path: Path):
    config = {"targets": "q_proj", "layers": (0,)}
    model = tiny.adapted(tiny.decoder(), **config)
    adapter = Adapter.of(model)
    save_adapter(tmp_path / "adapter", adapter.lora, adapter.config)
    on = read_adapter(tmp_path).on(tiny.decoder())
    tokens = tiny.tokens()
    np.testing.assert_array_equal(tiny.logits(on, tokens), tiny.logits(model, tokens))


def test_a_peft_folder_needs_a_model(tmp_path: Path):
    export_peft(tmp_path, tiny.adapted(tiny.decoder(), targets="q_proj"))
    with pytest.raises(AdapterMismatchError, match=r"import_peft\(path, model\)"):
        read_adapter(tmp_path)


def test_folders_that_cannot_be_read_say_why(tmp_path: Path):
    with pytest.raises(AdapterMismatchError, match="holds no adapter"):
        read_adapter(tmp_path)
    adapter = drawn.adapter(shapes={"layers.attn.q_proj": (2, 6, 6)})
    flat = [
        ((path[0], layer, *path[1:]), nnx.LoRAParam(v[...][layer][: 6 - layer]))
        for path, v in nnx.to_flat_state(adapter.lora)
        for layer in range(2)
    ]
    uneven = nnx.from_flat_state(flat)
    folder = save_adapter(tmp_path / "a", uneven, adapter.config)
    with pytest.raises(
        AdapterMismatchError, match=r"lora_a: shapes \(5, 3\) and \(6, 3\)"
    ):
        read_adapter(folder)
    metadata = json.loads((folder / METADATA).read_text())
    metadata["format"] = 99
    (folder / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(AdapterMismatchError, match="has format 99"):
        read_adapter(folder)


def test_a_layer_that_is_missing_is_named(tmp_path: Path):
    adapter = drawn.adapter(shapes={"layers.attn.q_proj": (3, 6, 6)}, layers=(0, 2))
    folder = save_adapter(tmp_path / "a", adapter.lora, adapter.config)
    metadata = json.loads((folder / METADATA).read_text())
    metadata["lora"]["layers"] = []
    (folder / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(AdapterMismatchError, match=r"q_proj.lora_b: nothing of \(1,\)"):
        read_adapter(folder)
