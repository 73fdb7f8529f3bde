"""Adapters of models whose layers are in several stacks: nothing of them says so."""

import json
from pathlib import Path

import apart
import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.fingerprint import difference, fingerprint
from qlora_jax.adapters.names import flatten
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.models import Decoder
from qlora_jax.nn.packing import dequantize

NF4 = qlora.QuantConfig()
IDS = tiny.tokens(1, 6) % 96


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Path:
    return apart.written(tmp_path_factory.mktemp("turns") / "base", apart.TURNS)


@pytest.fixture(scope="module")
def dense_first(tmp_path_factory) -> Path:
    return apart.written(tmp_path_factory.mktemp("moe") / "base", apart.DENSE_FIRST)


def load(folder: Path, quant: qlora.QuantConfig | None = NF4) -> Decoder:
    return qlora.load(folder, quant, dtype="float32")[0]


def logits(model: nnx.Module) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, ids: m(ids))(model, IDS))


def mark(model: nnx.Module) -> dict:
    text = fingerprint(model)
    assert text is not None
    return json.loads(text)


def test_a_base_is_the_same_however_its_layers_are_grouped(dense_first, tmp_path):
    packed = load(dense_first)
    qlora.save_model(packed, tmp_path, source=dense_first)
    # The same in 4 bits, but for one linear, which parts the last two layers.
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    kept = {k: v for k, v in tensors.items() if not k.startswith(name)}
    q = packed.layers["1:3"].attn.q_proj.quantized[1]
    save_file(
        kept | {name: np.asarray(dequantize(q, "float32"))},
        tmp_path / "model.safetensors",
    )
    mixed = load(tmp_path, None)
    assert len(mixed.stacks) == 3 and len(packed.stacks) == 2
    for other in (mixed, load(dense_first, None)):
        assert mark(other)["structure"] == mark(packed)["structure"]
        assert mark(other)["sample"] == mark(packed)["sample"]
        assert difference(mark(packed), mark(other)) is None
    np.testing.assert_allclose(logits(mixed), logits(packed), atol=1e-5)


def test_original_weights_are_asked_for_by_the_number_of_their_layer(turns):
    dense, asked = load(turns, None), []
    stored = qlora.original_kernels(turns)

    def read(path, index):
        asked.append((path, index))
        return stored(path, index)

    made = {}
    for name, original in (("function", read), ("model", dense)):
        made[name] = qlora.attach(
            load(turns),
            qlora.LoRAConfig(rank=4, targets=r"layers\.attn\.v_proj", init="loftq"),
            key=jax.random.key(0),
            original=original,
        )
    assert sorted(asked) == [("layers.attn.v_proj", (i,)) for i in range(5)]
    each = [tiny.arrays(flatten(qlora.split(model)[1])) for model in made.values()]
    assert all((a == b).all() for a, b in zip(*each, strict=True))
    # Nearer to the dense model than without.
    far, near = (
        np.abs(logits(x) - logits(dense)).mean() for x in (load(turns), made["model"])
    )
    assert near < far


def test_inputs_are_measured_where_an_expression_says(turns):
    model, found = load(turns), []

    def paths(path: str) -> bool:
        found.append(path)
        return path == "layers.mlp.down_proj"

    moments = qlora.input_moments(model, [IDS], paths=paths, diagonal=True)
    assert {"layers.attn.q_proj", "layers.mlp.down_proj"} <= {*found}
    assert sorted(x.shape for x in moments.values()) == [(1, 64), (2, 64), (2, 64)]


def test_what_trains_in_full_is_named_once(turns):
    config = qlora.LoRAConfig(rank=2, targets="q_proj", modules_to_save="attn_norm")
    model = qlora.attach(load(turns), config, key=jax.random.key(0))
    assert lora_config(model).modules_to_save == ("layers.attn_norm",)


def test_targets_that_none_of_the_layers_has_are_refused(dense_first):
    config = qlora.LoRAConfig(targets="q_proj,experts.up_proj", layers=(0,))
    with pytest.raises(ConfigError, match=r"experts.up_proj: none of .*\[1, 2\]"):
        qlora.attach(load(dense_first), config, key=jax.random.key(0))


def test_norms_are_of_the_layers_that_have_an_update(dense_first):
    model = tiny.moved(load(dense_first), targets="q_proj,up_proj", layers=(0, 2))
    adapter = qlora.Adapter.of(model)
    names = {name.rpartition(".")[0] for name in flatten(adapter.lora)}
    assert "layers.0.mlp.up_proj" in names and "layers.2.mlp.experts.1.up_proj" in names
    measured = qlora.update_norms(adapter).linears
    assert measured.keys() == names
    assert all(float(x) > 0 for x in measured.values())
    assert float(qlora.cosine_similarity(adapter, adapter).total) == pytest.approx(1)


def test_adapters_of_other_layers_add_up(dense_first):
    base = load(dense_first, None)
    parts = [
        qlora.Adapter.of(tiny.moved(base, targets="up_proj", layers=layers))
        for layers in ((), (0, 1), (2,))
    ]
    own = kernels(base)
    updates = [kernels(qlora.merge(x.on(base), dtype="float32")) for x in parts]
    for i, j in ((0, 1), (1, 2), (2, 0)):
        both = qlora.combine([parts[i], parts[j]], [0.5, 2.0])
        made = kernels(qlora.merge(both.on(base), dtype="float32"))
        for name, x in own.items():
            want = x + 0.5 * (updates[i][name] - x) + 2 * (updates[j][name] - x)
            np.testing.assert_allclose(made[name], want, atol=1e-5, err_msg=name)


def kernels(model: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(node.kernel[...])
        for path, node in nnx.iter_graph(model)
        if hasattr(node, "kernel") and path[-1] == "up_proj"
    }


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_peft_takes_them_and_gives_them_back(dense_first, layers, tmp_path):
    base = load(dense_first)
    targets = "q_proj,gate_proj,up_proj"
    model = tiny.moved(base, targets=targets, layers=layers)
    export_peft(tmp_path / "peft", model)
    back = import_peft(tmp_path / "peft", base)
    np.testing.assert_allclose(logits(back), logits(model), atol=1e-6)
    adapter = qlora.Adapter.of(back)
    save_adapter(tmp_path / "ours", adapter.lora, adapter.config)
    again = qlora.load_adapter(tmp_path / "ours", base)
    np.testing.assert_array_equal(logits(again), logits(back))
