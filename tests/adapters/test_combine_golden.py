"""combine against PEFT: the tensors that its add_weighted_adapter made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.adapters.combine import METHODS, combine
from qlora_jax.adapters.names import flatten
from qlora_jax.adapters.value import Adapter
from qlora_jax.exchange.peft import import_peft, module_names
from qlora_jax.sources.load import load

ORDER = 2e-6
"""Relative to the largest value: float32 products and sums in another order."""
SVD = 1e-5
"""Relative to the largest value of an update: a float32 SVD on each side."""
NAMES = {"cat": "concat"}
ENDS = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_a",
    ".lora_embedding_B": "lora_b",
}
CASES = (
    *("cat", "linear", "linear_negative", "svd", "svd_rank_2", "ties"),
    *("ties_frequency", "magnitude_prune", "ties_svd", "ties_svd_frequency"),
    "magnitude_prune_svd",
)
SHARED = {
    "combo_cat/cat": "cat",
    "combo_linear/linear": "linear",
    "combo_svd/svd": "svd",
    "combo_ties/ties": "ties",
}


def ours(tensors: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, Any]:
    """Returns PEFT's tensors by our names, turned as ours are."""
    found = {}
    for name, array in tensors.items():
        end = next(end for end in ENDS if name.endswith(end))
        module = name.removeprefix("base_model.model.").removesuffix(end)
        found[f"{names[module]}.{ENDS[end]}"] = array.T
    return found


def near(have: Any, want: Any, tolerance: float, name: str) -> None:
    """Compares arrays to within a part of the largest value."""
    atol = tolerance * np.abs(want).max()
    np.testing.assert_allclose(have, want, atol=atol, rtol=0, err_msg=name)


def compare(made: Adapter, want: dict[str, np.ndarray], method: str) -> None:
    """Compares factors where the method gives these, and always updates."""
    have = {name: np.asarray(x) for name, x in flatten(made.lora).items()}
    assert have.keys() == want.keys()
    assert made.config.rank == made.config.alpha
    for name in (n.removesuffix(".lora_a") for n in have if n.endswith(".lora_a")):
        (a, b), (their_a, their_b) = (
            (x[f"{name}.lora_a"].astype(np.float64), x[f"{name}.lora_b"])
            for x in (have, want)
        )
        svd = method.endswith("svd")
        near(a @ b, their_a @ their_b, SVD if svd else ORDER, name)
        if not svd and method != "cat":  # whose scales are in A, ours in lora_b
            near(a, their_a, ORDER, name)
            near(b, their_b, ORDER, name)


@pytest.fixture(scope="module")
def peft(golden) -> tuple[dict[str, Adapter], dict[str, str], Any]:
    """Our adapters of PEFT's, PEFT's module names -> ours, and the results."""
    model, _ = load(golden("peft/untied"), dtype="float32")
    folder = golden("combine")
    adapters = {x: Adapter.of(import_peft(folder / x, model)) for x in "abc"}
    names = {hf: name for name, hf in module_names(model.config).items()}
    return adapters, names, np.load(folder / "combined.npz")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_method_gives_the_tensors_of_peft(peft, golden, case):
    adapters, names, combined = peft
    options = json.loads((golden("combine") / "cases.json").read_text())[case]
    method = options["combination_type"]
    settings = {
        ours: options[theirs]
        for theirs, ours in (
            ("density", "density"),
            ("majority_sign_method", "majority_sign"),
            ("svd_rank", "rank"),
        )
        if theirs in options
    }
    made = combine(
        [adapters[name] for name in options["adapters"]],
        options["weights"],
        NAMES.get(method, method),
        **settings,
    )
    wanted = {
        name.removeprefix(f"{case}:"): combined[name]
        for name in combined.files
        if name.startswith(f"{case}:")
    }
    compare(made, ours(wanted, names), method)


def test_every_deterministic_method_has_a_case(golden):
    cases = json.loads((golden("combine") / "cases.json").read_text())
    assert cases.keys() == set(CASES)
    tried = {x["combination_type"].replace("cat", "concat") for x in cases.values()}
    assert tried == {method for method in METHODS if "dare" not in method}


@pytest.fixture(scope="module")
def shared_pair(golden) -> tuple[list[Adapter], dict[str, str]]:
    """The two adapters that the shared combinations are of, and PEFT's module names."""
    folders = [
        golden(f"models/adapters/{name}_on_fp32")
        for name in ("lora_all_r8", "lora_all_r8b")
    ]
    model, _ = load(golden("models/llama_fp32"), dtype="float32")
    pair = [Adapter.of(import_peft(folder, model)) for folder in folders]
    return pair, {hf: name for name, hf in module_names(model.config).items()}


@pytest.mark.parametrize("folder", SHARED)
def test_the_shared_combinations_are_those_of_peft(shared_pair, golden, folder: str):
    pair, names = shared_pair
    path: Path = golden(f"models/adapters/{folder}")
    method = SHARED[folder]
    density = 0.5 if method == "ties" else 1.0
    made = combine(pair, [0.7, 0.4], NAMES.get(method, method), density=density)
    compare(made, ours(load_file(path / "adapter_model.safetensors"), names), method)
