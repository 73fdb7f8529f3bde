"""Makes tests/golden/combine: adapters, and what PEFT's merging methods make of them.

Run in a venv with torch, transformers and peft (scripts/interop_venv makes one), after
make/golden_peft.py, whose Qwen2 is the base:

    python -m scripts.make.golden_combine

`a`, `b` and `c` are PEFT folders; combined.npz has the tensors of each result, named
CASE:TENSOR. The methods with dare are not here: their draws are torch's.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from scripts.bench import harness

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
OUT = GOLDEN / "combine"
ADAPTERS = {
    "a": {"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 6},
    "b": {
        "target_modules": ["q_proj", "o_proj", "embed_tokens"],
        "lora_alpha": 5,
        "use_rslora": True,
    },
    "c": {"target_modules": ["q_proj", "o_proj"], "lora_alpha": 4},
}
THREE = {"adapters": ["a", "b", "c"], "weights": [0.7, 0.4, -0.3]}
TWO = {"adapters": ["a", "b"], "weights": [0.7, 0.4]}
CASES = {
    "cat": {**THREE, "combination_type": "cat"},
    "linear": {**TWO, "combination_type": "linear"},
    "linear_negative": {**THREE, "combination_type": "linear"},
    "svd": {**THREE, "combination_type": "svd"},
    "svd_rank_2": {**THREE, "combination_type": "svd", "svd_rank": 2},
    "ties": {**THREE, "combination_type": "ties", "density": 0.5},
    "ties_frequency": {
        **THREE,
        "combination_type": "ties",
        "density": 0.7,
        "majority_sign_method": "frequency",
    },
    "magnitude_prune": {**TWO, "combination_type": "magnitude_prune", "density": 0.3},
    "ties_svd": {**THREE, "combination_type": "ties_svd", "density": 0.5},
    "ties_svd_frequency": {
        **THREE,
        "combination_type": "ties_svd",
        "density": 0.6,
        "majority_sign_method": "frequency",
        "svd_rank": 6,
    },
    "magnitude_prune_svd": {
        **THREE,
        "combination_type": "magnitude_prune_svd",
        "density": 0.4,
    },
}


def main() -> None:
    """Makes the folder anew."""
    harness.only_help(__doc__)
    warnings.simplefilter("ignore")
    shutil.rmtree(OUT, ignore_errors=True)
    base = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "peft" / "untied", dtype=torch.float32
    )
    model = None
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **options)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if key.endswith((f".{name}", f".{name}.weight")):
                    value.add_(torch.randn_like(value) * 0.1)
    assert model is not None
    model.save_pretrained(OUT)
    arrays = {}
    for name, options in CASES.items():
        model.add_weighted_adapter(adapter_name=name, **options)
        for key, value in get_peft_model_state_dict(model, adapter_name=name).items():
            if "lora_" in key:
                arrays[f"{name}:{key}"] = value.numpy()
    np.savez_compressed(OUT / "combined.npz", **arrays)
    (OUT / "README.md").unlink(missing_ok=True)
    for name in ADAPTERS:
        path = OUT / name / "adapter_config.json"
        settings = json.loads(path.read_text()) | {"base_model_name_or_path": "untied"}
        path.write_text(json.dumps(settings, indent=2) + "\n")
        (OUT / name / "README.md").unlink(missing_ok=True)
    cases = json.dumps(CASES, indent=2)
    (OUT / "cases.json").write_text(cases + "\n")


if __name__ == "__main__":
    main()
