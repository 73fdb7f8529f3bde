"""What runs on PyTorch's side: `python side.py JOBS.json`, for tests/interop.

A job is an object with `do` and what it needs; arrays go by .npz files. Nothing of
qlora_jax is imported here.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def open_base(job: dict[str, Any], **options: Any) -> Any:
    """Opens a folder in float32; a 4-bit one with bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.float32, **options
    )
    for module in model.modules():
        # On some CPUs it would pack weights anew and round absmax to bfloat16.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if "rows" in job:
        model.resize_token_embeddings(job["rows"], mean_resizing=False)
    return model.eval()


def adapted(job: dict[str, Any], model: Any) -> Any:
    """Puts a PEFT folder on a model; keys that do not fit are an error."""
    if job.get("adapter") is None:
        return model
    from peft import PeftModel

    made = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    stored = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
    own = {
        name.replace(".default", "").replace(".modules_to_save", "")
        for name, _ in made.named_parameters(remove_duplicate=False)
    }
    own |= {name.removesuffix(".weight") for name in own}
    missing = sorted(name for name in stored if name not in own)
    assert not missing, f"PEFT has no {missing}"
    return made.eval()


def logits(job: dict[str, Any]) -> None:
    """Saves the logits of `ids`, and with `grads` the loss and the adapter's gradients."""
    model = adapted(job, open_base(job))
    ids = torch.tensor(np.load(job["ids"]), dtype=torch.long)
    result = model(input_ids=ids, labels=ids)
    arrays = {"logits": result.logits.detach().numpy()}
    if job.get("grads"):
        result.loss.backward()
        arrays["loss"] = result.loss.detach().numpy()
        for name, value in model.named_parameters():
            if value.grad is not None:
                short = name.replace(".default", "")
                arrays[f"grad:{short}"] = value.grad.numpy()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    np.savez(job["out"], tied=np.asarray(tied), **arrays)


def decoded(job: dict[str, Any]) -> None:
    """Saves every 4-bit weight of a folder, as bitsandbytes decodes it."""
    import bitsandbytes.functional as F
    from bitsandbytes.nn import Linear4bit

    arrays = {}
    for name, module in open_base(job).named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            weight = F.dequantize_4bit(module.weight.data, state)
            arrays[f"{name}.weight"] = weight.float().numpy()
    np.savez(job["out"], **arrays)


def quantize(job: dict[str, Any]) -> None:
    """Quantizes a folder with transformers and bitsandbytes, and saves it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job["codebook"],
        bnb_4bit_use_double_quant=job["double_quant"],
        bnb_4bit_compute_dtype=torch.float32,
    )
    open_base(job, quantization_config=config).save_pretrained(job["out"])


def adapter(job: dict[str, Any]) -> None:
    """Makes a PEFT adapter with random values, and saves it and its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **job["config"])
    model = get_peft_model(open_base(job), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    model.eval().save_pretrained(job["out"])
    ids = torch.tensor(np.load(job["ids"]), dtype=torch.long)
    np.savez(Path(job["out"]) / "logits", logits=model(ids).logits.detach().numpy())


def main() -> None:
    """Does all jobs of a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = {f.__name__: f for f in (logits, decoded, quantize, adapter)}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        kinds[job["do"]](job)


if __name__ == "__main__":
    main()
