"""Makes tests/golden/objectives: losses, gradients and metrics of TRL's own trainers.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0 datasets==5.2.0
    PYTHONPATH=tests python -m scripts.make.golden_trl --out tests/golden/objectives

CPU, float32, eager attention. Model, adapter and rows follow from
tests/trl_cases.py and are not stored. NAME.npz holds `loss`, each metric by TRL's name, and the
gradient of each factor by PEFT's name, float32.
"""

import argparse
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import trl_cases as cases
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SHARED = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": 64}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cases or cases.CASES:
        made = make(cases.CASES[name])
        np.savez(options.out / f"{name}.npz", **made)
        print(f"{name}: loss {float(made['loss']):.6f}, {sorted(made)[-1]}")


def make(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of a case's golden."""
    name = settings["name"]
    kinds = {"sft": sft, "dpo": dpo, "orpo": orpo, "kto": kto, "simpo": simpo}
    with tempfile.TemporaryDirectory() as folder:
        model, loss, metrics = {**kinds, "distill": distill}[name](settings, folder)
    loss.backward()
    found = {"loss": np.float32(loss.item())}
    found |= {key: np.float32(value) for key, value in metrics.items()}
    for key, value in model.named_parameters():
        if value.grad is not None:
            found[key.replace(".default", "")] = value.grad.numpy()
    return found


LORA = LoraConfig(
    r=cases.RANK,
    lora_alpha=cases.ALPHA,
    target_modules=list(cases.TARGETS),
    task_type="CAUSAL_LM",
)


def base() -> Any:
    config = LlamaConfig(**cases.CONFIG, attn_implementation="eager")
    model = LlamaForCausalLM(config).float()
    tensors = {k: torch.from_numpy(v) for k, v in cases.weights().items()}
    model.load_state_dict(tensors, strict=True)
    return model


def filled(model: Any) -> Any:
    """Gives a new adapter its values: to a trainer, an old one would be the reference."""
    factors = {
        k.replace(".weight", ".default.weight"): torch.from_numpy(v)
        for k, v in cases.factors().items()
    }
    left = model.load_state_dict(factors, strict=False)
    if left.unexpected_keys:
        raise ValueError(f"no such factors: {left.unexpected_keys}")
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {f"t{i}": i for i in range(cases.VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="t2", bos_token="t3", pad_token="t0"
    )


def trainer_of(kind: Any, config: Any, rows: Dataset) -> Any:
    trainer = kind(
        base(),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    filled(trainer.model)
    return trainer


def texts(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def any_pairs() -> Dataset:
    """What a trainer is made with; what it computes is given to it later."""
    return Dataset.from_list(
        [{k: texts(v) for k, v in pair._asdict().items()} for pair in cases.pairs()]
    )


def logged(trainer: Any) -> dict[str, float]:
    found = trainer._metrics["train"]
    return {k: v[-1] for k, v in found.items() if k[:5] in ("rewar", "logps", "kl")}


def dpo(settings: dict[str, Any], folder: str) -> tuple:
    more = {"loss_type": [settings.get("loss", "sigmoid")]}
    if "sft_weight" in settings:
        more = {"loss_type": ["sigmoid", "sft"]}
        more["loss_weights"] = [1.0, settings["sft_weight"]]
    config = DPOConfig(
        output_dir=folder,
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        gradient_checkpointing=False,
        **more,
        **SHARED,
    )
    trainer = trainer_of(DPOTrainer, config, any_pairs())
    rows = [
        {f"{k}_ids": v for k, v in pair._asdict().items()} for pair in cases.pairs()
    ]
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    if settings.get("label_smoothing") and config.loss_type == ["sigmoid"]:
        # This DPOTrainer smooths no sigmoid; CPOTrainer does, of what it is given.
        scores = _ratios(trainer, batch)
        judge = types.SimpleNamespace(
            **{"alpha": 0.0, "loss_type": "sigmoid", "beta": config.beta},
            **{"label_smoothing": settings["label_smoothing"]},
            accelerator=trainer.accelerator,
        )
        loss = CPOTrainer.cpo_loss(judge, *scores)[0].mean()
    return trainer.model, loss, logged(trainer)


def _ratios(trainer: Any, batch: dict[str, Any]) -> tuple:
    """Returns log-ratios of chosen and of rejected answers, by the trainer's own forward."""

    def logps() -> torch.Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        made = trainer.model(**inputs, labels=labels, fused_lm_head=True)
        return made.log_probs.sum(dim=1)

    own = logps()
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = logps()
    return (own - reference).chunk(2)


def kto(settings: dict[str, Any], folder: str) -> tuple:
    config = KTOConfig(
        output_dir=folder,
        desirable_weight=settings["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        **SHARED,
    )
    given = [
        {
            **{"prompt": texts(row.prompt), "completion": texts(row.answer)},
            "label": row.good,
        }
        for row in cases.judged()
    ]
    trainer = trainer_of(KTOTrainer, config, Dataset.from_list(given))
    rows = [
        {
            "prompt_ids": row.prompt,
            "completion_ids": row.answer,
            "KL_completion_ids": row.other,
            "label": row.good,
        }
        for row in cases.judged()
    ]
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    return trainer.model, loss, logged(trainer)


def cpo(settings: dict[str, Any], folder: str) -> CPOTrainer:
    config = CPOConfig(
        output_dir=folder,
        beta=settings.get("beta", 2.0),
        loss_type=settings["loss"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        simpo_gamma=settings.get("gamma", 0.5),
        cpo_alpha=settings.get("sft_weight", 0.0),
        gradient_checkpointing=False,
        **SHARED,
    )
    return trainer_of(CPOTrainer, config, any_pairs())


def both_sides() -> dict[str, torch.Tensor]:
    """Returns the batch of pairs that ORPOTrainer and CPOTrainer take."""
    found = {}
    for side in ("chosen", "rejected"):
        rows = [(p.prompt, getattr(p, side)) for p in cases.pairs()]
        longest = max(len(a) + len(b) for a, b in rows)
        ids, labels, mask = [], [], []
        for prompt, answer in rows:
            left = longest - len(prompt) - len(answer)
            ids.append(prompt + answer + [0] * left)
            labels.append([-100] * len(prompt) + answer + [-100] * left)
            mask.append([1] * (longest - left) + [0] * left)
        found[f"{side}_input_ids"] = torch.tensor(ids)
        found[f"{side}_labels"] = torch.tensor(labels)
        found[f"{side}_attention_mask"] = torch.tensor(mask)
    return found


def simpo(settings: dict[str, Any], folder: str) -> tuple:
    trainer = cpo({**settings, "loss": "simpo"}, folder)
    return trainer.model, *trainer.get_batch_loss_metrics(trainer.model, both_sides())


def orpo(settings: dict[str, Any], folder: str) -> tuple:
    config = ORPOConfig(
        output_dir=folder,
        beta=settings["beta"],
        gradient_checkpointing=False,
        **SHARED,
    )
    trainer = trainer_of(ORPOTrainer, config, any_pairs())
    return trainer.model, *trainer.get_batch_loss_metrics(trainer.model, both_sides())


def sft(settings: dict[str, Any], folder: str) -> tuple:
    model, batch = filled(get_peft_model(base(), LORA)), both_sides()
    labels = batch["chosen_labels"]
    made = model(
        batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]
    )
    smoother = LabelSmoother(epsilon=settings["label_smoothing"])
    loss = smoother({"logits": made.logits}, labels, shift_labels=True)
    return model, loss, {}


def distill(settings: dict[str, Any], folder: str) -> tuple:
    model, batch = filled(get_peft_model(base(), LORA)), both_sides()
    made = model(
        batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]
    )
    loss = GKDTrainer.generalized_jsd_loss(
        made.logits[:, :-1],
        torch.from_numpy(cases.teacher_logits())[:, 1:],  # of each token itself
        labels=batch["chosen_labels"][:, 1:],
        beta=0,
        temperature=settings["temperature"],
    )
    return model, loss, {}


if __name__ == "__main__":
    main()
