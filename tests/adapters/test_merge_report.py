"""What a merge says it lost is what it lost, and correction loses less."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.adapters import (
    Adapter,
    LoRAConfig,
    attach,
    detach,
    merge,
    merge_corrected,
)
from qlora_jax.adapters.merge import unmerge
from qlora_jax.adapters.merge_report import merge_report
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.exchange.peft import import_peft
from qlora_jax.models import Decoder
from qlora_jax.nn.packing import dequantize
from qlora_jax.sources.load import load

NAME = "layers.1.mlp.down_proj"


def exact(model, index: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the merged weight and the base's of NAME, in float64."""
    node = model.layers.mlp.down_proj
    value = node.base.kernel.get_value()
    one = jax.tree.map(lambda x: x[index], value)
    base = one if isinstance(value, jax.Array) else dequantize(one, "float32")
    a, b = (np.asarray(x[index], np.float64) for x in (node.lora_a, node.lora_b))
    base = np.asarray(base, np.float64)
    return base + node.scale * (a @ b).T, base


@pytest.mark.parametrize("base", [tiny.decoder, tiny.quantized])
def test_errors_are_numpys(base):
    model = tiny.adapted(base())
    whole, before = exact(model)
    merged = merge(model, dtype="bfloat16")
    report = merge_report(model, merged)
    lost = np.linalg.norm(
        np.asarray(merged.layers.mlp.down_proj.kernel[1], np.float64) - whole
    )
    assert report.relative[NAME] == pytest.approx(
        lost / np.linalg.norm(whole), rel=1e-4
    )
    of_update = lost / np.linalg.norm(whole - before)
    assert report.of_update[NAME] == pytest.approx(of_update, rel=1e-4)
    assert len(report.relative) == 14
    assert 1e-3 < report.total[0] < 2**-8  # a rounding to bfloat16
    assert report.to_json()["linears"][NAME]["relative_error"] == report.relative[NAME]


@pytest.mark.slow
def test_a_float32_merge_loses_nothing_to_speak_of():
    for config in ({}, {"dora": True}, {"layers": (0,)}):
        model = tiny.moved(tiny.quantized(), **config)
        assert merge_report(model, merge(model, dtype="float32")).total[0] < 1e-6


def test_what_has_no_update_has_no_error():
    model = attach(
        tiny.decoder(), LoRAConfig(targets="", tokens=(3,)), key=jax.random.key(0)
    )
    report = merge_report(model, merge(model, dtype="bfloat16"))
    assert report.relative == {} and report.total == (0, 0)


@pytest.mark.slow
def test_quantizing_again_loses_more_and_correction_gives_it_back():
    model = tiny.adapted(tiny.quantized())
    again = merge(model, requantize=QuantConfig())
    errors = [merge_report(model, again).total[0]]
    for rank in (8, 64):
        corrected = merge_corrected(model, QuantConfig(), rank=rank)
        for one, other in zip(
            tiny.frozen(detach(corrected)), tiny.frozen(again), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        errors.append(merge_report(model, corrected).total[0])
    assert errors[0] > 0.05
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5  # a rank of min(in, out) leaves nothing


@pytest.mark.slow
def test_correction_keeps_more_of_a_peft_adapter_than_pefts_merge(
    golden: Callable[[str], Path],
):
    folder = "models/adapters/lora_all_r8_on_nf4"
    base, _ = load(golden("models/llama_bnb_nf4_dq_float32"), dtype="float32")
    model = import_peft(golden(folder), base)
    ids = jnp.asarray(np.load(golden("models/input_ids.npy")).astype(np.int32))
    wanted, pefts = (
        np.load(golden(f"{folder}/{name}.npy")) for name in ("logits", "logits_merged")
    )

    def off(logits) -> float:
        difference = np.asarray(logits, np.float64) - wanted
        return float(np.linalg.norm(difference) / np.linalg.norm(wanted))

    errors = [
        off(tiny.logits(merge_corrected(model, QuantConfig(), rank=16, **more), ids))
        for more in ({}, {"iterations": 4})
    ]
    assert off(pefts) > 0.1
    assert errors[1] < 0.98 * errors[0] < 0.75 * off(pefts)
    assert off(tiny.logits(merge(model, dtype="float32"), ids)) < 1e-4


def test_an_embedding_with_an_adapter_has_an_error_too():
    model = tiny.moved(tiny.quantized(), targets="embed_tokens,q_proj")
    merged = merge(model, dtype="bfloat16")
    report = merge_report(model, merged)
    assert set(report.relative) == {"embed_tokens", *(
        f"layers.{i}.attn.q_proj" for i in range(2)
    )}  # fmt: skip
    node = model.embed_tokens
    table = np.asarray(node.base.weight[...], np.float64)
    a, b = (np.asarray(x[...], np.float64) for x in (node.lora_a, node.lora_b))
    whole = table + node.scale * a @ b
    lost = np.linalg.norm(np.asarray(merged.embed_tokens.weight[...], float) - whole)
    assert report.relative["embed_tokens"] == pytest.approx(
        lost / np.linalg.norm(whole), rel=1e-4
    )
    assert report.of_update["embed_tokens"] == pytest.approx(
        lost / np.linalg.norm(whole - table), rel=1e-4
    )


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_what_was_merged_comes_out_again(dtype, bound):
    base = tiny.decoder(dtype)
    model = tiny.adapted(base)
    back = unmerge(merge(model, dtype=dtype), Adapter.of(model))
    for one, other in zip(tiny.frozen(base), tiny.frozen(back), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= bound * np.linalg.norm(one)


def test_what_cannot_be_taken_out_or_compared_is_refused():
    model = tiny.moved(tiny.decoder(), dora=True)
    with pytest.raises(AdapterMismatchError, match="magnitude"):
        unmerge(merge(model, dtype="float32"), Adapter.of(model))
    config = dataclasses.replace(tiny.CONFIG, intermediate_size=64)
    narrow = Decoder(config, key=jax.random.key(0), dtype="float32")
    with pytest.raises(AdapterMismatchError, match="no such linear"):
        merge_report(model, narrow)
