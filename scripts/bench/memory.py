"""Compiles steps of many setups and records XLA's account.

    python -m scripts.bench.memory --target h200 --out scripts/results/memory_h200.jsonl
    python -m scripts.bench.memory --target cpu --out scripts/results/memory_cpu.jsonl
    python -m scripts.bench.memory --target h200 --unseen \\
        --out scripts/results/memory_unseen.jsonl    # and --target cpu

One JSON line a setup: the setup and XLA's bytes (arguments, temporaries, host).
Setups that the file has are not compiled again. The h200 needs no GPU, but jax's CUDA
wheels (.ci/run has them) and JAX_PLATFORMS=cpu. The coefficients of
qlora_jax/budget/estimate.py were fitted to the first two files. The last one has models
that no fit may ever see: the plan's error on them is what a user with a new model can expect.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax

from qlora_jax.adapters import LoRAConfig
from qlora_jax.budget.setup import Setup
from qlora_jax.config.quant import QuantConfig
from qlora_jax.models import DecoderConfig, read_config
from qlora_jax.models.spec import AttentionSpec, DeltaSpec, LayerSpec
from qlora_jax.train.compiled import account, compile_step
from scripts.bench import harness

_TURNS = (AttentionSpec(window=1024), AttentionSpec())
MODELS: dict[str, dict[str, Any]] = {
    "llama-70b": {"layers": 80, "hidden": 8192, "wide": 28672, "heads": (64, 8)},
    "llama-8b": {"layers": 32, "hidden": 4096, "wide": 14336, "heads": (32, 8)},
    "llama-1b": {"layers": 16, "hidden": 2048, "wide": 8192, "heads": (32, 8, 64)},
    "qwen2-7b": {
        **{"layers": 28, "hidden": 3584, "wide": 18944, "heads": (28, 4)},
        **{"vocab_size": 152064, "attention_bias": True},
    },
    "qwen2-0.5b": {
        **{"layers": 24, "hidden": 896, "wide": 4864, "heads": (14, 2, 64)},
        **{"vocab_size": 151936, "attention_bias": True, "tie_word_embeddings": True},
    },
    "smollm2-135m": {
        **{"layers": 30, "hidden": 576, "wide": 1536, "heads": (9, 3, 64)},
        **{"vocab_size": 49152, "tie_word_embeddings": True},
    },
    "gemma2-2b": {
        **{"layers": 26, "hidden": 2304, "wide": 9216, "heads": (8, 4, 256)},
        **{"vocab_size": 256000, "tie_word_embeddings": True, "norms": "both"},
        **{"mixers": _TURNS * 13, "norm_offset": 1.0, "activation": "gelu_tanh"},
        **{"attention_softcap": 50.0, "logit_softcap": 30.0},
    },
    "phi3-mini": {
        **{"layers": 32, "hidden": 3072, "wide": 8192, "heads": (32, 32, 96)},
        **{"vocab_size": 32064, "fused_qkv": True, "fused_gate_up": True},
    },
    "qwen3-0.6b": {
        **{"layers": 28, "hidden": 1024, "wide": 3072, "heads": (16, 8, 128)},
        **{"vocab_size": 151936, "qk_norm": "head", "tie_word_embeddings": True},
    },
}
# scripts/make/fit_memory.py never reads these: do not move one of them up.
UNSEEN: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        **{"layers": 36, "hidden": 2560, "wide": 9728, "heads": (32, 8, 128)},
        **{"vocab_size": 151936, "qk_norm": "head", "tie_word_embeddings": True},
    },
    "smollm2-360m": {
        **{"layers": 32, "hidden": 960, "wide": 2560, "heads": (15, 5, 64)},
        **{"vocab_size": 49152, "tie_word_embeddings": True},
    },
    "gemma3-1b": {
        **{"layers": 26, "hidden": 1152, "wide": 6912, "heads": (4, 1, 256)},
        **{"vocab_size": 262144, "tie_word_embeddings": True, "norms": "both"},
        **{"mixers": (*(AttentionSpec(window=512),) * 5, AttentionSpec()) * 4},
        **{"norm_offset": 1.0, "activation": "gelu_tanh", "qk_norm": "head"},
    },
    "qwen3-30b-a3b": {
        **{"layers": 48, "hidden": 2048, "wide": 768, "heads": (32, 4, 128)},
        **{"vocab_size": 151936, "qk_norm": "head"},
        **{"num_experts": 128, "experts_per_token": 8},
    },
}
_HYBRID = {"qk_norm": "head", "attention_gate": True, "rotary_dim": 64}
_DELTA = {"key_heads": 16, "key_dim": 128, "value_dim": 128}
UNSEEN |= {
    "qwen3.5-27b": {
        **{"layers": 64, "hidden": 5120, "wide": 17408, "heads": (24, 4, 256)},
        **{"vocab_size": 248320, "norm_offset": 1.0, **_HYBRID},
        "mixers": (
            *(DeltaSpec(value_heads=48, **_DELTA),) * 3,
            AttentionSpec(),
        )
        * 16,
    },
    "qwen3.5-2b": {
        **{"layers": 24, "hidden": 2048, "wide": 6144, "heads": (8, 2, 256)},
        **{"vocab_size": 248320, "norm_offset": 1.0, **_HYBRID},
        **{"tie_word_embeddings": True},
        "mixers": (
            *(DeltaSpec(value_heads=16, **_DELTA),) * 3,
            AttentionSpec(),
        )
        * 6,
    },
}
UNSEEN["gemma3-1b"]["mixers"] += (AttentionSpec(window=512),) * 2
_GEMMA4 = {
    **{"model_type": "gemma4_text", "vocab_size": 262144, "sliding_window": 1024},
    **{"attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
    "final_logit_softcapping": 30.0,
}
_GPT_OSS = {
    **{"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880},
    **{"intermediate_size": 2880, "num_attention_heads": 64},
}
UNSEEN |= {  # by a config.json
    "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "gemma4-31b": _GEMMA4
    | {
        **{"hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504},
        **{"num_attention_heads": 32, "num_key_value_heads": 16},
        "num_global_key_value_heads": 4,
    },
    "gemma4-26b-a4b": _GEMMA4
    | {
        **{"hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112},
        **{"num_attention_heads": 16, "num_key_value_heads": 8},
        **{"num_global_key_value_heads": 2, "enable_moe_block": True},
        **{"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    },
}
_SMALL_GEMMA4 = {
    **{"model_type": "gemma4_text", "vocab_size": 262144, "sliding_window": 512},
    **{"num_attention_heads": 8, "final_logit_softcapping": 30.0},
}
UNSEEN |= {
    "gemma4-e2b": _SMALL_GEMMA4
    | {
        **{"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144},
        **{"num_key_value_heads": 1, "num_kv_shared_layers": 20},
        "use_double_wide_mlp": True,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    },
    "gemma4-e4b": _SMALL_GEMMA4
    | {
        **{"hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240},
        **{"num_key_value_heads": 2, "num_kv_shared_layers": 18},
    },
}
TABLES = {"embedding": "4bit", "head": "4bit"}
INT8 = {"embedding": "int8", "head": "int8"}
ALL = {**TABLES, "checkpoint": "host", "offload": True}
GRID: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "h200": [
        ("llama-8b", {}),
        ("llama-8b", TABLES),
        ("llama-8b", {"max_tokens": 512}),
        ("llama-8b", {"max_tokens": 8192}),
        ("llama-8b", {"max_tokens": 8192, "checkpoint": "host"}),
        ("llama-8b", {"checkpoint": "none"}),
        ("llama-8b", {"checkpoint": "none", "max_tokens": 4096}),
        ("llama-8b", {"checkpoint": "attention", "max_tokens": 4096}),
        ("llama-8b", {"micro_batch": 4, "grad_accum": 4, "max_tokens": 512}),
        ("llama-8b", {"lora": {"rank": 64}}),
        ("llama-8b", {"lora": {"rank": 64}, "offload": True}),
        ("llama-8b", {"stream": True, "max_tokens": 4096}),
        ("llama-8b", {"quant": None, "max_tokens": 1024}),
        ("llama-70b", {}),
        ("llama-70b", ALL),
        ("llama-70b", {**ALL, "max_tokens": 8192}),
        ("llama-70b", {**ALL, "stream": True}),
        ("llama-70b", {**ALL, "stream": True, "max_tokens": 8192}),
        ("llama-70b", {"max_tokens": 512, "grad_accum": 16}),
        ("llama-1b", {}),
        ("llama-1b", {"checkpoint": "none", "micro_batch": 4}),
        ("qwen2-7b", {}),
        ("qwen2-7b", {**ALL, "micro_batch": 2}),
        ("qwen2-0.5b", {"micro_batch": 4, "max_tokens": 1024}),
        ("qwen2-0.5b", {"micro_batch": 8, "max_tokens": 1024, "checkpoint": "none"}),
        ("gemma2-2b", {}),
        ("gemma2-2b", {"micro_batch": 2, "checkpoint": "host", **TABLES}),
        ("phi3-mini", {}),
        ("phi3-mini", {"micro_batch": 2, "checkpoint": "none"}),
        ("qwen3-0.6b", {"micro_batch": 4}),
        ("qwen3-0.6b", {"micro_batch": 4, "stream": True, "offload": True}),
        ("smollm2-135m", {"micro_batch": 8, "max_tokens": 1024}),
        # Where the loss is the peak.
        ("qwen2-0.5b", {"max_tokens": 1024}),
        ("qwen2-0.5b", {"max_tokens": 256}),
        ("qwen2-0.5b", {"max_tokens": 1024, "embedding": "4bit"}),
        ("qwen2-0.5b", {"max_tokens": 256, "embedding": "4bit"}),
        ("smollm2-135m", {"max_tokens": 1024}),
        ("qwen3-0.6b", {"max_tokens": 512}),
        ("llama-1b", {"max_tokens": 256}),
        # Micro-batches that share the copy of a streamed layer.
        ("llama-1b", {"stream": True, "grad_accum": 8}),
        (
            "llama-1b",
            {"stream": True, "grad_accum": 8, "checkpoint": "none", "max_tokens": 512},
        ),
        ("llama-8b", {**TABLES, "stream": True, "grad_accum": 4}),
        ("llama-8b", {**ALL, "stream": True, "grad_accum": 4}),
        ("llama-70b", {**ALL, "stream": True, "grad_accum": 4}),
        ("llama-70b", {**ALL, "stream": True, "grad_accum": 16}),
        ("llama-8b", {**TABLES, "stream": True, "grad_accum": 16}),
        ("qwen2-7b", {**ALL, "stream": True, "grad_accum": 8, "max_tokens": 1024}),
        ("gemma2-2b", {"stream": True, "grad_accum": 4, "max_tokens": 1024}),
        # Gradients that add up on the host.
        ("llama-8b", {"lora": {"rank": 64}, "offload": True, "grad_accum": 4}),
        # 8-bit optimizer state.
        ("llama-8b", {"lora": {"rank": 64}, "optimizer": "adamw8bit"}),
        ("llama-70b", {**TABLES, "checkpoint": "host", "optimizer": "adamw8bit"}),
        # Tables in int8.
        ("llama-8b", INT8),
        ("qwen2-0.5b", {"max_tokens": 1024, "embedding": "int8"}),
        ("qwen2-0.5b", {"max_tokens": 256, "embedding": "int8"}),
        ("smollm2-135m", {"max_tokens": 1024, "embedding": "int8"}),
    ],
    "cpu": [
        ("llama-1b", {"max_tokens": 512}),
        ("llama-1b", {"max_tokens": 2048}),
        ("llama-1b", {"max_tokens": 1024, **TABLES}),
        ("llama-1b", {"max_tokens": 1024, "checkpoint": "none"}),
        ("llama-1b", {"max_tokens": 1024, "checkpoint": "attention"}),
        ("llama-1b", {"max_tokens": 1024, "checkpoint": "host", "offload": True}),
        ("llama-1b", {"max_tokens": 1024, "quant": None}),
        ("llama-1b", {"max_tokens": 512, "grad_accum": 4}),
        ("llama-1b", {"max_tokens": 512, "lora": {"rank": 64}}),
        ("llama-8b", {"max_tokens": 512}),
        ("llama-8b", {"max_tokens": 2048}),
        ("llama-8b", {"max_tokens": 2048, "checkpoint": "none"}),
        ("llama-8b", {"max_tokens": 1024, "stream": True, **TABLES}),
        ("qwen2-7b", {"max_tokens": 1024}),
        ("qwen2-0.5b", {"max_tokens": 512}),
        ("qwen2-0.5b", {"max_tokens": 2048, "checkpoint": "none"}),
        ("qwen2-0.5b", {"max_tokens": 512, "micro_batch": 4}),
        ("qwen2-0.5b", {"max_tokens": 512, "dtype": "float32"}),
        ("qwen2-0.5b", {"max_tokens": 256, "lora": {"rank": 64}, "offload": True}),
        ("smollm2-135m", {"max_tokens": 512, "micro_batch": 4}),
        ("smollm2-135m", {"max_tokens": 192, "micro_batch": 8, "checkpoint": "none"}),
        ("smollm2-135m", {"max_tokens": 2048}),
        ("smollm2-135m", {"max_tokens": 512, "quant": None}),
        ("smollm2-135m", {"max_tokens": 512, "dtype": "float32", "grad_accum": 2}),
        ("gemma2-2b", {"max_tokens": 1024}),
        ("gemma2-2b", {"max_tokens": 512, "checkpoint": "none"}),
        ("phi3-mini", {"max_tokens": 1024}),
        ("phi3-mini", {"max_tokens": 512, "checkpoint": "none"}),
        ("qwen3-0.6b", {"max_tokens": 1024}),
        ("qwen3-0.6b", {"max_tokens": 1024, "checkpoint": "none", "micro_batch": 2}),
        ("llama-1b", {"stream": True, "grad_accum": 4, "max_tokens": 512}),
        (
            "llama-1b",
            {"stream": True, "grad_accum": 4, "checkpoint": "none", "max_tokens": 512},
        ),
        ("smollm2-135m", {"stream": True, "grad_accum": 4, "max_tokens": 512}),
        ("gemma2-2b", {"stream": True, "grad_accum": 4, "max_tokens": 512}),
        ("llama-1b", {"max_tokens": 256, "offload": True, "grad_accum": 4}),
        (
            "qwen2-0.5b",
            {"max_tokens": 256, "lora": {"rank": 64}, "optimizer": "adamw8bit"},
        ),
        # Tables in int8, and one that is 4-bit for comparison.
        ("llama-1b", {"max_tokens": 1024, **INT8}),
        ("smollm2-135m", {"max_tokens": 512, "embedding": "int8"}),
        ("qwen2-0.5b", {"max_tokens": 512, "embedding": "int8"}),
        ("qwen2-0.5b", {"max_tokens": 512, "embedding": "4bit"}),
    ],
}
UNSEEN_GRID: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "h200": [
        ("smollm2-360m", {"max_tokens": 1024}),
        ("smollm2-360m", {"micro_batch": 4, "max_tokens": 1024, "offload": True}),
        ("qwen3-4b", {}),
        ("qwen3-4b", {"checkpoint": "none", "max_tokens": 1024}),
        ("qwen3-4b", {**ALL, "stream": True, "grad_accum": 4}),
        ("gemma3-1b", {}),
        ("qwen3-30b-a3b", {}),
        ("qwen3.5-27b", {}),
        ("qwen3.5-27b", {"max_tokens": 8192}),
        ("gemma4-31b", {}),
        ("gemma4-26b-a4b", {}),
        ("gemma4-e2b", {}),
        ("gemma4-e4b", {}),
        ("gpt-oss-20b", {"mxfp4": "keep"}),
        ("gpt-oss-120b", {"mxfp4": "keep"}),
        *(
            (model, {**changes, "lora": {"targets": "q_proj,k_proj,v_proj,o_proj"}})
            for model, changes in (
                *(("gpt-oss-20b", {"mxfp4": "keep"}), ("qwen3-30b-a3b", {})),
                *(("gpt-oss-120b", {"mxfp4": "keep"}), ("gemma4-26b-a4b", {})),
            )
        ),
    ],
    "cpu": [
        ("smollm2-360m", {"max_tokens": 512}),
        ("smollm2-360m", {"max_tokens": 512, "checkpoint": "none"}),
        ("smollm2-360m", {"max_tokens": 512, "grad_accum": 4, "embedding": "int8"}),
        ("qwen3-4b", {"max_tokens": 512}),
        ("qwen3-4b", {"max_tokens": 1024, "stream": True, **TABLES}),
        ("gemma3-1b", {"max_tokens": 512}),
        ("qwen3-30b-a3b", {"max_tokens": 512}),
        ("qwen3.5-2b", {"max_tokens": 512}),
    ],
}


def setup_of(model: str, changes: dict[str, Any]) -> Setup:
    """Returns the Setup of a line of the grid."""
    changes = dict(changes)
    lora = LoRAConfig(**changes.pop("lora", {}))
    quant = QuantConfig() if "quant" not in changes else changes.pop("quant")
    config = _config((MODELS | UNSEEN)[model])
    return Setup(config=config, lora=lora, quant=quant, **changes)


def _config(shape: dict[str, Any]) -> DecoderConfig:
    if "model_type" in shape:
        config, problems = read_config(shape)
        assert config is not None, problems
        return config
    shape = dict(shape)
    layers, hidden, wide = (shape.pop(k) for k in ("layers", "hidden", "wide"))
    heads, kv_heads, *rest = shape.pop("heads")
    mixers = shape.pop("mixers", ())
    return DecoderConfig(
        num_layers=layers,
        layers=tuple(LayerSpec(mixer=mixer) for mixer in mixers),
        hidden_size=hidden,
        intermediate_size=wide,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=rest[0] if rest else 128,
        **{"vocab_size": 128256, **shape},
    )


def main() -> None:
    """Runs the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=tuple(GRID), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--unseen", action="store_true", help="models of no fit")
    args = parser.parse_args()
    known = [
        (row["target"], row["model"], row["changes"])
        for row in harness.read_rows(args.out)
    ]
    for model, changes in (UNSEEN_GRID if args.unseen else GRID)[args.target]:
        if (args.target, model, changes) in known:
            continue
        setup, began = setup_of(model, changes), time.monotonic()
        compiled = compile_step(setup, None if args.target == "cpu" else args.target)
        row = {
            "target": args.target,
            "model": model,
            "changes": changes,
            "xla": account(compiled)._asdict(),
            "compile_s": round(time.monotonic() - began, 1),
            "jax": jax.__version__,
            "date": harness.today(),
        }
        harness.append_row(args.out, row)
        print(json.dumps(row), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
