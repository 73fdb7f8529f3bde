"""A training step of PEFT + bitsandbytes + transformers, as gpu/step.py runs ours.

An 8B-shaped Llama of random weights, rank 16 on all linears, gradient checkpointing on.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.harness import versions
from scripts.bench.peers import peft
from scripts.bench.peers.protocol import LINEARS
from scripts.gpu.step import timed

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def peft_step(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Returns tokens a second and peak memory; the GPU is used inside `with turn()`."""
    with turn():
        return measured(task["batch"], task["seq"])


def measured(batch: int, seq: int, device: str = "cuda") -> dict[str, Any]:
    """Does it, on a device by torch's name."""
    model = peft.adapted(packed_llama(device), rank=16, alpha=32).to(device)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    tokens = torch.randint(0, LLAMA_8B["vocab_size"], (batch, seq), device=device)
    torch.cuda.reset_peak_memory_stats()
    losses = []

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    step_s = timed(step)
    return {
        "tokens_per_s": batch * seq / step_s,
        "step_s": step_s,
        "loss": losses[-1],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "versions": versions("bitsandbytes", "torch", "peft", "transformers"),
    }


def packed_llama(device: str) -> LlamaForCausalLM:
    """Returns the base, packed a linear at a time: the dense model is never there."""
    config = LlamaConfig(
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
        **LLAMA_8B,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return 0.02 * torch.randn(like.shape, dtype=torch.bfloat16, device=device)

    def ones(like: torch.Tensor) -> torch.Tensor:
        return torch.ones(like.shape, dtype=torch.bfloat16, device=device)

    for module in model.model.layers.modules():
        for name, linear in list(module.named_children()):
            if name in LINEARS:
                dense = drawn(linear.weight)
                setattr(module, name, peft.packed(linear, dense, torch.bfloat16))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                real = drawn(parameter) if parameter.ndim > 1 else ones(parameter)
                setattr(module, name, torch.nn.Parameter(real, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model
