"""A merge weight by weight: the same bytes and figures as by way of the whole model."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apart
import jax
import pytest
import tiny
from flax import nnx

import qlora_jax as qlora
from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters import Adapter, LoRAConfig, attach, detach
from qlora_jax.adapters.names import flatten
from qlora_jax.config.quant import QuantConfig
from qlora_jax.digests import NAME as DIGESTS
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.exchange.merge import Merged, Merging, merge_folder
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft
from qlora_jax.exchange.read import read_adapter
from qlora_jax.models import Decoder
from qlora_jax.sources.load import load
from qlora_jax.sources.reader import Reader
from qlora_jax.sources.save import MERGE_REPORT, save_model
from qlora_jax.sources.source import open_source

NF4 = QuantConfig()
MIXTURE = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
}
EVERYTHING: dict[str, Any] = {
    "dora": True,
    "bias": "all",
    "modules_to_save": "norm,layers.mlp_norm,lm_head",
    "tokens": (7, 3),
    "head_tokens": (),
    "layers": (1,),
    "layers_pattern": {"q_proj": "all"},
    "rank_pattern": {"down_proj": 2},
}


def cast(model: Decoder, dtype: str) -> Decoder:
    """Returns a model whose every array is saved in a dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            return dataclasses.replace(value, dtype=dtype)
        return value.astype(dtype)

    graphdef, state = nnx.split(model)
    leaf = {"is_leaf": lambda x: isinstance(x, PackedWeight)}
    made = nnx.merge(graphdef, jax.tree.map(one, state, **leaf))
    made.dtype = dtype
    return made


def by_model(base: Path, adapter: Path, out: Path, how: Merging) -> Merged:
    """Merges with the whole model in memory."""
    model, _ = load(base, how.quant, "float32", **how.tables)
    model = load_adapter(adapter, model)
    if how.requantize is None:
        merged = qlora.merge(model, dtype=how.dtype)
    else:
        merged = qlora.merge(model, requantize=how.requantize)
    if how.requantize is None or how.correction_rank is None:
        saved = save_model(cast(merged, how.dtype), out, source=base)
        return Merged(saved, qlora.merge_report(model, merged), None)
    corrected = qlora.merge_corrected(
        model,
        how.requantize,
        rank=how.correction_rank,
        iterations=how.correction_iterations,
    )
    merged, own = detach(corrected), Adapter.of(corrected)
    saved = save_model(cast(merged, how.dtype), out, source=base)
    save_adapter(out / "adapter", own.lora, own.config)
    reports = (qlora.merge_report(model, x) for x in (merged, corrected))
    return Merged(saved, *reports)


def base_of(model: Callable[[], Decoder]) -> Callable[[Path], Path]:
    return lambda folder: tiny.write_folder(folder, model())


def tied() -> Decoder:
    return tiny.drawn(dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True))


def folder_of(hf: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: apart.written(folder, hf)


CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], Merging]] = {
    "everything": (
        base_of(lambda: tiny.decoder(bias=True)),
        EVERYTHING,
        Merging(dtype="bfloat16"),
    ),
    "experts into 4 bits": (
        folder_of(MIXTURE),
        {"targets": "q_proj,down_proj"},
        Merging(dtype="float32", requantize=NF4),
    ),
    "a tied table, with a correction": (
        base_of(tied),
        {"targets": "q_proj,embed_tokens"},
        Merging(requantize=NF4, correction_rank=3, correction_iterations=2),
    ),
    "a head of its own, onto 4 bits": (
        base_of(tied),
        {"targets": "q_proj,lm_head", "tied": False},
        Merging(quant=NF4, tables={"embedding": "int8", "head": "none"}),
    ),
    "layers in turns": (
        folder_of(apart.TURNS),
        {"dora": True, "layers": (0, 1, 4), "modules_to_save": "attn_norm"},
        Merging(dtype="float32"),
    ),
    "dense layers before experts, with a correction": (
        folder_of(apart.DENSE_FIRST),
        {"targets": "q_proj,up_proj", "layers": (0, 2)},
        Merging(requantize=NF4, correction_rank=2),
    ),
    "layers of other sizes": (
        folder_of(apart.OF_OTHER_SIZES),
        {"targets": "q_proj,per_layer_model_projection"},
        Merging(quant=NF4, dtype="bfloat16"),
    ),
    "a base with a dense linear, into 4 bits": (
        apart.mixed,
        {"targets": "down_proj,q_proj"},
        Merging(dtype="float32", requantize=NF4),
    ),
    "a 4-bit base": (
        base_of(tiny.quantized),
        {"targets": "up_proj", "dora": True},
        Merging(dtype="float16"),
    ),
}
QUICK = ("everything", "a tied table, with a correction")


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CASES],
)
def test_the_folder_and_its_figures_are_those_of_the_model_merged(
    case: str, tmp_path: Path
):
    make, config, how = CASES[case]
    base = make(tmp_path / "base")
    model = tiny.moved(load(base, None, "float32")[0], **config)
    adapter = tmp_path / "a"
    if case == "a 4-bit base":
        export_peft(adapter, model)
    else:
        save_adapter(adapter, Adapter.of(model).lora, Adapter.of(model).config)
    want = by_model(base, adapter, tmp_path / "whole", how)
    got = merge_folder(open_source(base), adapter, tmp_path / "made", how)
    assert got.saved["bytes"] == want.saved["bytes"]
    assert got.report == want.report and len(got.report.relative) > 1
    assert list(got.report.relative) == list(want.report.relative)
    assert got.corrected == want.corrected
    assert files(tmp_path / "made") == files(tmp_path / "whole")
    if how.correction_rank is not None:
        made, whole = (
            read_adapter(tmp_path / x / "adapter") for x in ("made", "whole")
        )
        assert made.config == whole.config
        same = tiny.arrays(flatten(made.lora)), tiny.arrays(flatten(whole.lora))
        assert all((a == b).all() for a, b in zip(*same, strict=True))
        # Its mark is the folder's: it opens there.
        load_adapter(tmp_path / "made" / "adapter", load(tmp_path / "made")[0])


def files(folder: Path) -> dict[str, bytes]:
    """What a model's folder holds, but for what a merge alone has to say of it."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return {k: v for k, v in found.items() if k not in (MERGE_REPORT, DIGESTS)}


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch):
    base = tiny.write_folder(tmp_path / "base")
    adapter = Adapter.of(tiny.adapted(tiny.decoder()))
    save_adapter(tmp_path / "a", adapter.lora, adapter.config)
    seen, most, read = [], [], Reader.one

    def one(self, path, name, shape):
        most.append(sum(ref() is not None for ref in seen))
        value = read(self, path, name, shape)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Reader, "one", one)
    merge_folder(open_source(base), tmp_path / "a", tmp_path / "m", Merging())
    assert len(most) > 14 and max(most) <= 1


def test_an_adapter_of_other_4_bit_weights_is_refused(tmp_path: Path):
    base = tiny.write_folder(tmp_path / "base")
    dense, _ = load(base, None, "float32")
    config = LoRAConfig(rank=4, targets="q_proj", init="loftq")
    key = jax.random.key(0)
    model = attach(load(base, NF4, "float32")[0], config, key=key, original=dense)
    save_adapter(tmp_path / "a", Adapter.of(model).lora, Adapter.of(model).config)
    source, out = open_source(base), tmp_path / "m"
    other = Merging(quant=dataclasses.replace(NF4, block_size=32))
    with pytest.raises(
        AdapterMismatchError, match="other 4-bit weights: the mean absma"
    ):
        merge_folder(source, tmp_path / "a", out, other)
    with pytest.raises(AdapterMismatchError, match="belongs to the 4-bit base"):
        merge_folder(source, tmp_path / "a", out, Merging())
    assert not out.exists()
    merged = merge_folder(source, tmp_path / "a", out, Merging(quant=NF4))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert 0 < merged.report.total[0] < 2**-8  # of bfloat16
