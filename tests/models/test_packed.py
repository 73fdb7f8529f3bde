"""Documents that share a row are as if each had its own: in every family and every mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import family_cases as cases
from models.family_folders import load, read
from models.test_golden_families import FAMILY

import qlora_jax as qlora
from pallas_kernels.device import SCORE_BYTES
from qlora_jax.adapters.names import flatten
from qlora_jax.nn import blocked
from qlora_jax.nn.documents import places_of
from qlora_jax.objectives import SFT
from qlora_jax.objectives.base import predicted

RTOL = 1e-5
LENGTHS = ((13, 4, 9), (17, 6))
"""Tokens of the documents of each row."""
MIXERS = (
    *("llama_llama3", "qwen2_window", "gemma2", "gpt_oss", "phi3_longrope"),
    *(FAMILY[name] for name in ("qwen3_5_text", "lfm2", "granitemoehybrid")),
    *(FAMILY[name] for name in ("deepseek_v3", "gemma4_text")),
)


def documents(case):
    tokens = cases.tokens(case).reshape(-1)
    ends = np.cumsum([n for row in LENGTHS for n in row])
    return [
        tokens[end - n : end] for n, end in zip(sum(LENGTHS, ()), ends, strict=True)
    ]


def packed(made, length=32):
    """Returns a batch of the documents, two rows of them, with padding behind."""
    batch = {
        name: np.zeros((len(LENGTHS), length), np.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    batch["weights"] = np.zeros((len(LENGTHS), length), np.float32)
    which = iter(made)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, n in enumerate(lengths, 1):
            to = slice(at, at + n)
            batch["tokens"][row, to] = next(which)
            batch["positions"][row, to] = np.arange(n)
            batch["segment_ids"][row, to] = number
            batch["weights"][row, to] = 1 + (np.arange(n) % 3)
            at += n
        batch["positions"][row, at:] = np.arange(length - at)
    return jax.tree.map(jnp.asarray, batch)


def alone(made, length=20):
    """Returns a batch with a row for each document."""
    tokens = np.zeros((len(made), length), np.int32)
    weights = np.zeros((len(made), length), np.float32)
    for row, one in enumerate(made):
        tokens[row, : len(one)] = one
        weights[row, : len(one)] = 1 + (np.arange(len(one)) % 3)
    return {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(weights)}


def gradient(model, batch, checkpoint="none"):
    graphdef, lora, base = qlora.split(model)

    def loss(lora):
        return SFT(qlora.join(graphdef, lora, base), batch, None, checkpoint)[0]

    total, grads = jax.jit(jax.value_and_grad(loss))(lora)
    return float(total), flatten(grads)


def check_equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=RTOL)
    scale = max(np.abs(x).max() for x in want[1].values())
    for name, x in want[1].items():
        np.testing.assert_allclose(
            got[1][name], x, rtol=0, atol=RTOL * scale, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_window", "gpt_oss", "deepseek_v3"])
def test_rows_of_several_blocks_are_rows_alone_too(case, golden, tmp_path, monkeypatch):
    """Windows, sinks, and values of another size than queries."""
    model = tiny.adapted(load(case, read(case, golden), tmp_path))
    made = documents(case)
    want = gradient(model, alone(made))
    monkeypatch.setattr(blocked, "BLOCK", 8)
    jax.clear_caches()  # programs that were traced with another size
    check_equal(gradient(model, packed(made)), want)


@pytest.mark.slow
@pytest.mark.rotates
@pytest.mark.parametrize("case", [*FAMILY.values(), "qwen2_window", "qwen3_moe_step"])
def test_loss_and_gradient_of_packed_rows_are_those_of_rows_alone(
    case, golden, tmp_path
):
    model = tiny.adapted(load(case, read(case, golden), tmp_path))
    made = documents(case)
    want = gradient(model, alone(made))
    check_equal(gradient(model, packed(made)), want)


@pytest.mark.parametrize("case", MIXERS)
def test_no_document_sees_another(case, golden, tmp_path):
    model = load(case, read(case, golden), tmp_path)
    made = documents(case)
    run = jax.jit(
        lambda b: model(b["tokens"], **{k: b[k] for k in ("positions", "segment_ids")})
    )
    before = run(packed(made))
    for changed in range(len(LENGTHS[0])):
        other = [*made]
        other[changed] = (made[changed] + 1) % cases.VOCAB
        after = run(packed(other))
        same = packed(other)["segment_ids"][0] != changed + 1
        np.testing.assert_array_equal(after[0, same], before[0, same])
        assert (np.asarray(after[0]) != np.asarray(before[0]))[~same].any(-1).all()
        np.testing.assert_array_equal(after[1], before[1])


def test_positions_or_segments_alone_tell_documents_apart(golden, tmp_path):
    case = "llama_llama3"
    model = tiny.adapted(load(case, read(case, golden), tmp_path))
    batch = packed(documents(case))
    want = gradient(model, batch)
    for name in ("positions", "segment_ids"):
        less = {key: x for key, x in batch.items() if key != name}
        got = gradient(model, less)
        assert got[0] == want[0]
        for key, x in want[1].items():
            np.testing.assert_array_equal(got[1][key], x)


def test_positions_beside_segments_are_what_heads_are_rotated_by(golden, tmp_path):
    """Rotary positions are relative: the same everywhere further on changes nothing."""
    case = "llama_llama3"
    model = load(case, read(case, golden), tmp_path)
    batch = packed(documents(case))
    told = {key: batch[key] for key in ("positions", "segment_ids")}
    want = model(batch["tokens"], **told)
    moved = told | {"positions": told["positions"] + 3}
    np.testing.assert_allclose(model(batch["tokens"], **moved), want, atol=2e-4)
    turned = told | {"positions": told["positions"] * 2}
    assert np.abs(np.asarray(model(batch["tokens"], **turned) - want)).max() > 1e-2


@pytest.mark.parametrize("checkpoint", ["none", "layer"])
def test_micro_batches_that_go_together_are_as_one_after_the_other(
    checkpoint, golden, tmp_path
):
    """As where layers come from host memory: a layer sees all micro-batches in turn."""
    case = FAMILY["gpt_oss"]
    model = tiny.adapted(load(case, read(case, golden), tmp_path))
    batch = packed(documents(case))
    micro = {name: x[:, None] for name, x in batch.items()}
    check_equal(gradient(model, micro, checkpoint), gradient(model, batch, checkpoint))


def test_blocks_of_queries_see_their_own_documents(golden, tmp_path, monkeypatch):
    case = "qwen2_window"
    model = tiny.adapted(load(case, read(case, golden), tmp_path))
    batch = packed(documents(case))
    want = gradient(model, batch)
    monkeypatch.setitem(SCORE_BYTES, "cpu", 1)
    check_equal(gradient(model, batch), want)


def test_what_nothing_predicts_does_not_count():
    made = [np.arange(n) for n in sum(LENGTHS, ())]
    batch = packed(made)
    want = sum(x["weights"][:, 1:].sum() for x in [alone(made)])
    assert float(predicted(batch)) == want
    assert float(predicted({k: x[:, None] for k, x in batch.items()})) == want


def test_places_follow_from_segments():
    ids = jnp.asarray([[3, 3, 1, 1, 1, 0, 0], [0, 2, 2, 2, 5, 2, 2]])
    want = [[0, 1, 0, 1, 2, 0, 1], [0, 0, 1, 2, 0, 0, 1]]
    np.testing.assert_array_equal(places_of(None, ids), want)
    np.testing.assert_array_equal(places_of(ids, None), ids)
    assert places_of(None, None) is None
