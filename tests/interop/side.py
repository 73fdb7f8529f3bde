"""What runs on PyTorch's side: jobs from stdin, a JSON object a line, answers to stdout.

A job is {"do": one of JOBS, ...}; arrays go by .npz and .npy files. The answer is what the
job returns, or {"error": ...}. Imports nothing of qlora_jax.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig


def opened(job: dict[str, Any], **options: Any) -> Any:
    """Opens the folder `base` to compute in float32; refuses missing or unknown tensors.

    With `loose` unknown ones may be there, as transformers has it.
    """
    model, said = auto(job).from_pretrained(
        job["base"], dtype=torch.float32, output_loading_info=True, **options
    )
    said = {key: sorted(map(str, value)) for key, value in said.items() if value}
    if job.get("loose"):
        said.pop("unexpected_keys", None)
    if said:
        raise ValueError(f"{job['base']} did not load cleanly: {said}")
    in_float32(model)
    if "rows" in job:
        model.resize_token_embeddings(job["rows"], mean_resizing=False)
    return model.eval()


def auto(job: dict[str, Any]) -> Any:
    """Returns the class that `auto` names; that of causal models where it is missing."""
    return getattr(transformers, job.get("auto", "AutoModelForCausalLM"))


def in_float32(model: Any) -> None:
    """Lets a 4-bit model compute in float32, whatever dtype its folder was stored in."""
    for value in model.parameters():
        if value.is_floating_point() and not isinstance(value, Params4bit):
            value.data = value.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            # On some CPUs it would pack weights anew and round absmax to bfloat16.
            module.support_avx512bf16_for_cpu = False


def adapted(job: dict[str, Any], model: Any) -> Any:
    """Puts the PEFT folder `adapter` on a model; refuses what PEFT would ignore."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    said = [str(warning.message) for warning in caught]
    ignored = [text for text in said if "missing adapter keys" in text]
    if not job.get("converted"):  # whose names are not the stored ones
        stored = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
        own = {
            name.replace(".default", "").replace(".modules_to_save", "")
            for name, _ in made.named_parameters(remove_duplicate=False)
        }
        own |= {name.removesuffix(".weight") for name in own}
        ignored += sorted(name for name in stored if name not in own)
        if ignored:
            raise ValueError(f"PEFT did not take all of {job['adapter']}: {ignored}")
    return made.eval()


def make(job: dict[str, Any]) -> None:
    """Saves a random model of `config` (a config.json) to `out`."""
    torch.manual_seed(0)
    fields = dict(job["config"])
    model = auto(job).from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Logits far from uniform, biases that matter.
            size = 0.3 if "embed" in name or name.endswith("bias") else 0.12
            value.add_(torch.randn_like(value) * size)
    model.to(getattr(torch, job.get("dtype", "float32"))).save_pretrained(job["out"])


def quantize(job: dict[str, Any]) -> None:
    """Saves `base` in 4 bits to `out`, by transformers and bitsandbytes."""
    options = {"bnb_4bit_compute_dtype": torch.float32} | job["quant"]
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(
        job["base"],
        dtype=getattr(torch, job.get("dtype", "float32")),
        quantization_config=config,
    )
    model.save_pretrained(job["out"])


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the text model of `base`'s config.json, defaults written out."""
    config = AutoConfig.from_pretrained(job["base"])
    text = config.get_text_config().to_dict()
    return text | {"tie_word_embeddings": bool(config.tie_word_embeddings)}


def decoded(job: dict[str, Any]) -> None:
    """Saves every 4-bit weight of `base` to `out` as float32, as bitsandbytes has it."""
    arrays = {}
    for name, module in opened(job).named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            arrays[f"{name}.weight"] = weight.float().numpy()
    np.savez(job["out"], **arrays)


def logits(job: dict[str, Any]) -> dict[str, Any]:
    """Saves the logits of `ids` to `out`, and with `grads` loss and gradients.

    With `router_aux_loss`, a coefficient, the loss has that of the routers besides, and
    the second row is padding from `padded` on.

    Returns:
      {"tied": whether head and embedding are one tensor}.
    """
    model = opened(job)
    if job.get("adapter") is not None:
        model = adapted(job, model)
    ids = torch.tensor(np.load(job["ids"]), dtype=torch.long)
    labels, options = ids, {}
    if coefficient := job.get("router_aux_loss"):
        mask = torch.ones_like(ids)
        mask[1, job["padded"] :] = 0
        labels = torch.where(mask == 1, ids, -100)
        options = {"attention_mask": mask, "output_router_logits": True}
        for module in model.modules():
            if hasattr(module, "router_aux_loss_coef"):
                module.router_aux_loss_coef = coefficient
    result = model(input_ids=ids, labels=labels, **options)
    arrays = {"logits": result.logits.detach().numpy()}
    if options:
        arrays["router_aux_loss"] = result.aux_loss.detach().numpy()
    if job.get("grads"):
        result.loss.backward()
        arrays["loss"] = result.loss.detach().numpy()
        for name, value in model.named_parameters():
            if value.grad is not None:
                arrays[f"grad:{name.replace('.default', '')}"] = value.grad.numpy()
    np.savez(job["out"], **arrays)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return {"tied": head.weight is table.weight}


def adapter(job: dict[str, Any]) -> None:
    """Saves a PEFT adapter of `config` with random values to `out`; its logits beside."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **job["config"])
    model = get_peft_model(opened(job), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    model.eval().save_pretrained(job["out"])
    ids = torch.tensor(np.load(job["ids"]), dtype=torch.long)
    np.savez(Path(job["out"]) / "logits", logits=model(ids).logits.detach().numpy())


def chat(job: dict[str, Any]) -> dict[str, Any]:
    """Answers `messages` with `base` and its own tokenizer and generation config.

    Returns:
      {"prompt", "answer": token ids, "text": of the answer, "settings": of generation}.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    model = opened(job)
    prompt = tokenizer.apply_chat_template(
        job["messages"],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = model.generate(**prompt, max_new_tokens=job["count"])[0]
    answer = made[prompt["input_ids"].shape[1] :].tolist()
    return {
        "prompt": prompt["input_ids"][0].tolist(),
        "answer": answer,
        "text": tokenizer.decode(answer, skip_special_tokens=True),
        "settings": model.generation_config.to_diff_dict(),
    }


JOBS = {
    f.__name__: f for f in (make, quantize, settings, decoded, logits, adapter, chat)
}


def main() -> None:
    """Does jobs until stdin ends."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # Libraries that print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = JOBS[job["do"]](job) or {}
        except Exception as error:
            # The test decides whether this is one.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
