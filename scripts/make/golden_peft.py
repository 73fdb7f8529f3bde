"""Makes tests/golden/peft: PEFT's own adapters of every kind, with PEFT's logits.

Run in a venv with torch, transformers and peft (scripts/interop_venv makes one):

    python -m scripts.make.golden_peft

Two tiny Qwen2 models (they have biases), one tied; for each adapter the folder as
`save_pretrained` writes it, its logits, and the loss's gradients where they matter.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from scripts.bench import harness

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "peft"
QV = ["q_proj", "v_proj"]
CASES = {
    "dora": ("untied", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora_rslora": (
        "tied",
        {"target_modules": QV, "use_dora": True, "use_rslora": True},
    ),
    "bias_all": ("untied", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias_lora_only": ("tied", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "saved": (
        "untied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "saved_final_norm": (
        "untied",
        {"target_modules": QV, "modules_to_save": ["model.norm"]},
    ),
    "saved_embedding_untied_by_peft": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
    ),
    "saved_head_untied_by_peft": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
    ),
    "saved_embedding_tied": (
        "tied",
        {
            "target_modules": QV,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding_tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "tokens": ("untied", {"target_modules": QV, "trainable_token_indices": [60, 3]}),
    "tokens_tied": ("tied", {"target_modules": QV, "trainable_token_indices": [3, 60]}),
    "tokens_both": (
        "untied",
        {
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [3, 60], "lm_head": [7]},
        },
    ),
    "some_layers": ("untied", {"target_modules": QV, "layers_to_transform": [1]}),
    "some_layers_dora": (
        "untied",
        {"target_modules": QV, "layers_to_transform": [0], "use_dora": True},
    ),
    "new_tokens": ("tied", {"target_modules": QV, "trainable_token_indices": [64, 65]}),
    "new_tokens_saved": (
        "untied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}
"""Name -> (base, LoraConfig's options)."""

RESIZED = {"new_tokens": 66, "new_tokens_saved": 66}
"""Cases whose vocabulary grows to so many rows."""

IDS = [[5, 3, 60, 7, 12, 33, 3, 1], [9, 60, 60, 2, 7, 41, 8, 63]]


def base(name: str) -> transformers.PreTrainedModel:
    """Makes or opens a base."""
    folder = OUT / name
    if not folder.exists():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=name == "tied",
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                size = 0.5 if "embed" in key else 0.2
                value.add_(torch.randn_like(value) * size)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(name: str, base_name: str, options: dict) -> None:
    """Writes one case."""
    model = base(base_name)
    ids = torch.tensor(IDS)
    if name in RESIZED:
        model.resize_token_embeddings(RESIZED[name], mean_resizing=False)
        ids = ids.clone()
        ids[:, 2] = torch.tensor([64, 65])
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    adapted.eval()
    out = OUT / name
    adapted.save_pretrained(out)
    (out / "README.md").unlink()
    settings = json.loads((out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base_name
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    result = adapted(input_ids=ids, labels=ids)
    arrays = {"ids": ids.numpy(), "logits": result.logits.detach().numpy()}
    result.loss.backward()
    arrays["loss"] = result.loss.detach().numpy()
    for key, value in adapted.named_parameters():
        if value.requires_grad and value.grad is not None:
            short = key.replace(".default", "").replace(".modules_to_save", "")
            arrays[f"grad:{short}"] = value.grad.numpy()
    np.savez_compressed(out / "golden.npz", **arrays)


def main() -> None:
    """Makes the folder anew."""
    harness.only_help(__doc__)
    warnings.simplefilter("ignore")
    shutil.rmtree(OUT, ignore_errors=True)
    for name, (base_name, options) in CASES.items():
        make(name, base_name, options)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, np)}
    cases = {name: base_name for name, (base_name, _) in CASES.items()}
    said = {"made_with": versions, "cases": cases}
    (OUT / "index.json").write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
