"""Our decoders against transformers: logits of tiny models of every family."""

import functools
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from models import family_cases as cases
from models.family_folders import load, read
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.adapters.attached import lora_config
from qlora_jax.models import FAMILIES
from qlora_jax.models.cache import Cache
from qlora_jax.nn import Linear, QuantizedLinear

LOGITS_RTOL = 2e-5
"""The error allowed, relative to the largest logit. Both sides compute in float32 and differ in
the order of their sums: 2e-6 here. The nearest wrong formula, erf for tanh in GELU, is off by
1e-4."""
FAMILY = {cases.CASES[case]["model_type"]: case for case in reversed(cases.CASES)}
"""Model type -> its first case."""
# Not llama_dynamic: its frequencies change with each token, and keys in a cache stay.
CACHED = [
    *FAMILY.values(),
    *("qwen2_window", "phi3_longrope", "smollm3_window", "qwen3_moe_step"),
    *("gemma4_text_told", "gemma4_text_moe"),
]


ALWAYS = (
    *("llama_llama3", "qwen2_window", "gemma2", "gpt_oss", "phi3_longrope", "mixtral"),
    *(FAMILY[name] for name in ("qwen3_5_text", "lfm2", "granitemoehybrid", "cohere")),
    *(FAMILY[name] for name in ("deepseek_v3", "gemma4_text", "qwen3")),
)
"""A case of each mixer, of each kind of norm and of a mixture: what `scripts/test` tries."""


def sometimes(some: Iterable[str]) -> list[Any]:
    """Returns cases, of which those that are not in ALWAYS are slow, and rotate."""
    marks = [pytest.mark.slow, pytest.mark.rotates]
    return [
        case if case in ALWAYS else pytest.param(case, marks=marks) for case in some
    ]


def check(got: Any, want: np.ndarray) -> None:
    atol = LOGITS_RTOL * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def decode(
    graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array, at: jax.Array, c: Cache
) -> tuple[jax.Array, Cache]:
    return nnx.merge(graphdef, state).decode(ids, at, c)


@pytest.mark.parametrize("case", sometimes(cases.CASES))
def test_logits_are_those_of_transformers(case, golden, tmp_path):
    made = read(case, golden)
    model = load(case, made, tmp_path)
    got = tiny.logits(model, jnp.asarray(cases.tokens(case)))
    check(got[:, cases.positions(cases.SEQ)], made["logits"])
    got = tiny.logits(model, jnp.asarray(cases.padded_tokens(case)))
    check(got[1, cases.PADDED - 1], made["logits_padded"])
    if length := cases.SHORTER.get(case):
        got = tiny.logits(model, jnp.asarray(cases.tokens(case, length)))
        check(got[:, cases.positions(length)], made["logits_shorter"])


@pytest.mark.slow
@pytest.mark.rotates
@pytest.mark.parametrize("case", CACHED)
def test_a_cache_gives_the_same_logits(case, golden, tmp_path):
    made = read(case, golden)
    graphdef, state = nnx.split(model := load(case, made, tmp_path))
    ids, at = cases.tokens(case), np.tile(np.arange(cases.SEQ, dtype=np.int32), (2, 1))
    # The second row is the padded one, with its padding on the left.
    shift = cases.SEQ - cases.PADDED
    ids[1], at[1] = np.roll(ids[1], shift), np.roll(at[1], shift)
    at[1, :shift] = -1
    cache = model.empty_cache(2, cases.SEQ + 3)
    for part in (slice(0, cases.SEQ - 1), slice(cases.SEQ - 1, cases.SEQ)):
        now = jnp.asarray(ids[:, part]), jnp.asarray(at[:, part])
        got, cache = decode(graphdef, state, *now, cache)
    check(got[0], made["logits"][0, -1])
    check(got[1], made["logits_padded"])


@pytest.mark.parametrize("case", cases.CASES)
def test_both_spellings_of_a_config_read_the_same(case, golden):
    saved = read(case, golden)["saved"]["config"]
    read_config = FAMILIES[saved["model_type"]].read_config
    config, problems = read_config(saved)
    assert not problems
    assert read_config(cases.CASES[case]) == (config, [])


@pytest.mark.parametrize("kind", FAMILY)
def test_what_a_config_leaves_out_is_as_transformers_has_it(kind, golden):
    saved = json.loads(golden("families/defaults.json").read_text())[kind]
    config, problems = FAMILIES[kind].read_config(saved)
    assert not problems
    assert (
        FAMILIES[kind].read_config({"model_type": kind} | cases.sizes(kind))[0]
        == config
    )


@pytest.mark.slow
@pytest.mark.rotates
@pytest.mark.parametrize("case", FAMILY.values())
def test_what_a_family_saves_it_loads_again(case, golden, tmp_path):
    """4-bit, as it quantizes while it loads, and an adapter merged into dense weights."""
    source = tmp_path / "source"
    source.mkdir()
    model = load(case, read(case, golden), source, quant=qlora.QuantConfig())
    linears = {
        ".".join(map(str, path)): isinstance(node, QuantizedLinear)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Linear | QuantizedLinear)
    }
    assert linears.pop("lm_head", False) is False
    assert len(linears) >= 4 and all(linears.values())
    assert np.isfinite(tiny.logits(model, jnp.asarray(cases.tokens(case)))).all()
    adapted = tiny.adapted(model)
    merged = qlora.merge(adapted, dtype="float32")
    for name, one in (("4-bit", model), ("merged", merged)):
        qlora.save_model(one, tmp_path / name, source=source)
        again, _ = qlora.load(tmp_path / name, dtype="float32")
        assert again.config == model.config
        for a, b in zip(tiny.frozen(again), tiny.frozen(one), strict=True):
            np.testing.assert_array_equal(a, b)
    lora = qlora.split(adapted)[1]
    config = lora_config(adapted)
    qlora.save_adapter(tmp_path / "adapter", lora, config)
    back = qlora.split(qlora.load_adapter(tmp_path / "adapter", model))[1]
    for a, b in zip(tiny.arrays(back), tiny.arrays(lora), strict=True):
        np.testing.assert_array_equal(a, b)


def test_experts_of_a_layer_that_are_together_open_inside_of_a_wrapper(
    golden, tmp_path
):
    made = read("gemma4_text_moe", golden)
    plain = load("gemma4_text_moe", made, tmp_path)
    text = made["saved"]["config"]
    config = {"model_type": "gemma4", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model."): array
        for name, array in load_file(file).items()
    }
    save_file(tensors, file)
    model, _ = qlora.load(tmp_path, dtype="float32")
    for one, other in zip(tiny.frozen(model), tiny.frozen(plain), strict=True):
        np.testing.assert_array_equal(one, other)
