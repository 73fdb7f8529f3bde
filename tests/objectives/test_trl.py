"""Losses, gradients and metrics of objectives are TRL's, on the same batch in float32."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trl_cases as cases
from safetensors.numpy import save_file

from qlora_jax.adapters import detach, split
from qlora_jax.adapters.names import flatten
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.data.fields import REFERENCE
from qlora_jax.exchange.peft import import_peft
from qlora_jax.models.streaming import stream
from qlora_jax.objectives import make_objective
from qlora_jax.objectives.answers import answers_of
from qlora_jax.sources.load import load
from qlora_jax.train.gradient import make_gradient

GOLDEN = Path(__file__).parents[1] / "golden" / "objectives"
CLOSE = 1e-5
"""Relative, of a gradient to its largest value: the order of float32 sums."""
METRIC = 1e-4
"""Relative: some are small differences of sums."""
UNMEASURED = ("logits_chosen", "logits_rejected", "log_odds_ratio")
"""What TRL measures of whole logits, which are never held here; and what it has twice."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base with its adapter, as PEFT would have saved it."""
    base, peft = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("peft")
    (base / "config.json").write_text(json.dumps(cases.CONFIG))
    save_file(cases.weights(), base / "model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": cases.RANK, "lora_alpha": cases.ALPHA}
    config |= {"target_modules": list(cases.TARGETS), "task_type": "CAUSAL_LM"}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    save_file(cases.factors(), peft / "adapter_model.safetensors", {"format": "pt"})
    return import_peft(peft, load(base, dtype="float32")[0])


def batch_of(texts: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """Lays prompts and answers into a batch, padded beyond the longest."""
    length = max(len(a) + len(b) for a, b in texts) + 1
    tokens = np.zeros((len(texts), length), np.int32)
    weights, prompts = np.zeros((2, len(texts), length), np.float32)
    for i, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        tokens[i, :end] = prompt + answer
        prompts[i, : len(prompt)] = weights[i, len(prompt) : end] = 1
    return {"tokens": tokens, "weights": weights, "prompt_weights": prompts}


def batch_for(case: str) -> dict[str, np.ndarray]:
    kind = cases.CASES[case]["name"]
    if kind == "kto":
        rows = cases.judged()
        texts = [(r.prompt, a) for r in rows for a in (r.answer, r.other)]
        good = np.array([x for r in rows for x in (r.good, 0)], np.float32)
        return batch_of(texts) | {"label": good}
    pairs = cases.pairs()
    if kind in ("sft", "distill"):
        batch = batch_of([(p.prompt, p.chosen) for p in pairs])
        if kind == "sft":
            return batch
        length = batch["tokens"].shape[1]
        logits = cases.teacher_logits() / cases.CASES[case]["temperature"]
        logps = np.asarray(jax.nn.log_softmax(logits))
        left = ((0, 0), (0, length - logps.shape[1]), (0, 0))
        ids = np.broadcast_to(np.arange(cases.VOCAB), logps.shape)
        batch["teacher_ids"] = np.pad(ids, left).astype(np.int32)
        return batch | {"teacher_logprobs": np.pad(logps, left)}
    return batch_of([(p.prompt, a) for p in pairs for a in (p.chosen, p.rejected)])


def stepped(
    model: Any, case: str, batch: Any, *, streamed: bool = False
) -> tuple[float, dict, dict]:
    """Returns mean loss, metrics and gradients, as a step has them."""
    objective = make_objective(ObjectiveConfig(**cases.CASES[case]))
    graphdef, lora, base = split(model)
    base = stream(base) if streamed else base
    batch = {k: jnp.asarray(x) for k, x in batch.items()}
    if batch["tokens"].ndim == 2:
        batch = {k: x[None] for k, x in batch.items()}
    run = jax.jit(make_gradient(graphdef, objective, "none", optax.trace(1.0)))
    by = objective.normalizer_of(batch)
    loss, sums, grads = run(lora, base, objective.prepared(batch), None, 1 / by)
    means = {
        k: x[0] / x[1] if isinstance(x, tuple) else x / by for k, x in sums.items()
    }
    return float(loss), {k: float(x) for k, x in means.items()}, flatten(grads)


def ours(name: str) -> str:
    name = name.removeprefix("base_model.model.model.").removesuffix(".weight")
    name = name.replace(".self_attn.", ".attn.").replace(".lora_A", ".lora_a")
    return name.replace(".lora_B", ".lora_b")


def compare(made: tuple[float, dict, dict], case: str) -> None:
    loss, metrics, grads = made
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    assert loss == pytest.approx(float(golden.pop("loss")), rel=CLOSE)
    factors = {k: golden.pop(k) for k in list(golden) if ".lora_" in k}
    assert {ours(name) for name in factors} == set(grads)
    for name, want in factors.items():
        have = np.asarray(grads[ours(name)]).T
        atol = CLOSE * np.abs(want).max()
        np.testing.assert_allclose(have, want, atol=atol, rtol=0, err_msg=name)
    for name, want in golden.items():
        own = {"nll_loss": "nll"}.get(name, name.replace("/", "_"))
        if own in UNMEASURED or (case == "kto" and own == "rewards_margins"):
            continue
        if own == "nll" and own not in metrics:
            assert want == 0
            continue
        assert metrics[own] == pytest.approx(float(want), rel=METRIC), own


@pytest.mark.parametrize("case", cases.CASES)
def test_an_objective_is_trls(model: Any, case: str):
    compare(stepped(model, case, batch_for(case)), case)


def filled(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Appends rows that fill a batch and have nothing to learn."""
    return {
        k: np.concatenate([x, np.zeros((rows, *x.shape[1:]), x.dtype)])
        for k, x in batch.items()
    }


@pytest.mark.parametrize(
    "case", ["dpo_smoothed", "dpo_with_sft", "orpo", "kto", "simpo_smoothed"]
)
def test_rows_that_fill_a_batch_count_nothing(model: Any, case: str):
    compare(stepped(model, case, filled(batch_for(case), 4)), case)


@pytest.mark.parametrize("case", ["dpo_with_sft", "orpo", "simpo_smoothed"])
def test_micro_batches_are_one_batch(model: Any, case: str):
    batch = filled(batch_for(case), 2)
    micro = {k: x.reshape(2, 4, *x.shape[1:]) for k, x in batch.items()}
    compare(stepped(model, case, micro), case)


@pytest.mark.parametrize("case", ["dpo_with_sft", "kto", "orpo"])
def test_a_streamed_base_is_its_own_reference_too(model: Any, case: str):
    compare(stepped(model, case, batch_for(case), streamed=True), case)


@pytest.mark.parametrize("case", ["dpo_ipo", "kto"])
def test_a_reference_computed_beforehand_is_the_base(model: Any, case: str):
    batch, base = batch_for(case), detach(model)
    hidden = base.hidden_states(jnp.asarray(batch["tokens"]))
    held = {k: jnp.asarray(x) for k, x in batch.items()}
    answers = answers_of(base.head, hidden, held)
    assert REFERENCE not in batch
    batch[REFERENCE] = np.asarray(answers.logps)
    compare(stepped(model, case, batch), case)
    batch[REFERENCE] = batch[REFERENCE] + np.arange(len(batch["tokens"]))
    with pytest.raises(AssertionError):
        compare(stepped(model, case, batch), case)
