"""A training step of PEFT + bitsandbytes + transformers, for bench/train_step.py.

The transformers Llama (SDPA attention) with PEFT's LoRA on all seven linears.
`quantized` puts bitsandbytes' Linear4bit (NF4, double quantization, compute dtype =
the model's) in place of the layers' linears, which is what from_pretrained with a
BitsAndBytesConfig does. The fused AdamW of torch, eager mode, all cores.

prepare_model_for_kbit_training is left out: it would put the output layer and the
embeddings in float32, which is slower.

Options: `adapter`, how the LoRA factors of a bfloat16 model are kept.
  autocast: float32 factors, torch.autocast around the forward pass, as the
    Trainer does with bf16=True.
  float32: float32 factors and matmuls, PEFT's default without autocast.
  bfloat16: factors in bfloat16 too (the fastest, the least exact).
`compile=true` wraps the model in torch.compile (needs a C++ compiler).

Run by the parent, with the Python that has torch, peft and bitsandbytes.
"""

import contextlib
import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.peers.protocol import (
    LINEARS,
    MIB,
    Contestant,
    Task,
    run,
    versions,
)

DEFAULT_ADAPTER = "bfloat16"


def dense_llama(task: Task) -> LlamaForCausalLM:
    """Returns the task's Llama with its weights, in the task's dtype."""
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.hidden_size,
        intermediate_size=task.intermediate_size,
        num_hidden_layers=task.num_layers,
        num_attention_heads=task.num_heads,
        num_key_value_heads=task.num_kv_heads,
        head_dim=task.head_dim,
        rms_norm_eps=task.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": task.rope_theta},
        max_position_embeddings=max(2048, task.sequence_tokens),
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    dtype = getattr(torch, task.dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, matrix in task.weights():
            parameters[name].copy_(torch.from_numpy(matrix))
    return model


def packed(
    linear: torch.nn.Linear, weight: torch.Tensor, dtype: torch.dtype
) -> bnb.nn.Linear4bit:
    """Returns an NF4 linear of a weight, on the weight's device.

    Args:
      linear: The linear whose shape it has.
      weight: (out, in).
      dtype: The dtype of the computation.
    """
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    ).to(weight.device)  # this is what quantizes
    return made


def adapted(
    model: LlamaForCausalLM, rank: int, alpha: int, **options: Any
) -> torch.nn.Module:
    """Returns a model with LoRA on all seven linears.

    Args:
      model: The base, which is changed.
      rank: The rank of the factors.
      alpha: The scale's numerator.
      **options: Further arguments of get_peft_model.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(LINEARS),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, **options)


def quantize(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Replaces the layers' linears by NF4 ones, one at a time, in place."""
    for module in model.model.layers.modules():
        for name, linear in list(module.named_children()):
            if name in LINEARS:
                setattr(module, name, packed(linear, linear.weight.data, dtype))
    # What PEFT looks at before it chooses its Linear4bit.
    model.is_loaded_in_4bit = True


def base_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of the frozen parameters, quantization constants included."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for tensor in (state.absmax, state.state2.absmax):
                total += tensor.numel() * tensor.element_size()
    return total


def build(task: Task) -> Contestant:
    """Builds the model, its adapter and its optimizer."""
    torch.manual_seed(task.seed)
    dtype = getattr(torch, task.dtype)
    model = dense_llama(task)
    if task.quantized:
        quantize(model, dtype)
    for parameter in model.parameters():
        parameter.requires_grad = False
    adapter = task.options.get("adapter", DEFAULT_ADAPTER)
    if dtype == torch.float32:
        adapter = "float32"
    if task.checkpoint == "layer":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wide = adapter != "bfloat16"
    model = adapted(model, task.rank, task.alpha, autocast_adapter_dtype=wide)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if adapter == "bfloat16":
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    kind = {type(m).__name__ for m in layers}
    expected = "Linear4bit" if task.quantized else "Linear"
    if kind != {expected} or len(layers) != len(LINEARS) * task.num_layers:
        raise RuntimeError(
            f"expected LoRA on {expected} layers, got {len(layers)} x {kind}"
        )
    optimizer = torch.optim.AdamW(
        trained, lr=task.learning_rate, weight_decay=0.0, fused=True
    )
    frozen_bytes = base_bytes(model)
    forward = torch.compile(model) if task.options.get("compile") == "true" else model
    tokens = torch.from_numpy(task.tokens().astype(np.int64))
    autocast = (
        torch.autocast("cpu", dtype)
        if adapter == "autocast"
        else contextlib.nullcontext()
    )

    def step() -> float:
        with autocast:
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Contestant(
        step,
        {
            "adapter_dtype": str(trained[0].dtype).removeprefix("torch."),
            "adapter": adapter,
            "adapter_parameters": sum(p.numel() for p in trained),
            "base_mib": frozen_bytes / MIB,
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
        },
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run(build)
