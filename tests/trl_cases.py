"""Cases that TRL has computed losses and gradients of: a tiny Llama, its adapter, its rows.

numpy alone, so that scripts/make/golden_trl.py can import it beside TRL.
"""

from typing import Any, NamedTuple

import numpy as np

VOCAB, HIDDEN, LAYERS, HEADS, RANK, ALPHA = 64, 32, 2, 4, 2, 4.0
TARGETS = ("q_proj", "v_proj", "down_proj")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_ROWS = {
    "q_proj": HIDDEN,
    "k_proj": HIDDEN // 2,
    "v_proj": HIDDEN // 2,
    "o_proj": HIDDEN,
    "gate_proj": 48,
    "up_proj": 48,
    "down_proj": HIDDEN,
}


def weights() -> dict[str, np.ndarray]:
    """Returns the tensors of the base, by transformers' names."""
    rng = np.random.default_rng(0)

    def draw(size: float, *shape: int) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    found = {"model.embed_tokens.weight": draw(0.5, VOCAB, HIDDEN)}
    for i in range(LAYERS):
        for name, rows in _ROWS.items():
            block = "mlp" if rows == 48 or name == "down_proj" else "self_attn"
            columns = 48 if name == "down_proj" else HIDDEN
            path = f"model.layers.{i}.{block}.{name}.weight"
            found[path] = draw(0.25, rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = 1 + draw(0.1, HIDDEN)
    found["model.norm.weight"] = 1 + draw(0.1, HIDDEN)
    found["lm_head.weight"] = draw(0.4, VOCAB, HIDDEN)
    return found


def factors() -> dict[str, np.ndarray]:
    """Returns the adapter's factors, by PEFT's names in a file; lora_B is not 0."""
    rng = np.random.default_rng(1)
    found = {}
    for name, kernel in weights().items():
        if not any(f".{target}." in name for target in TARGETS):
            continue
        path = f"base_model.model.{name.removesuffix('.weight')}"
        for factor, shape in (
            ("lora_A", (RANK, kernel.shape[1])),
            ("lora_B", (kernel.shape[0], RANK)),
        ):
            drawn = 0.3 * rng.standard_normal(shape)
            found[f"{path}.{factor}.weight"] = drawn.astype(np.float32)
    return found


class Pair(NamedTuple):
    """A prompt with two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pairs() -> list[Pair]:
    """Returns pairs of unequal lengths."""
    rng = np.random.default_rng(2)

    def draw(count: int) -> list[int]:
        return rng.integers(1, VOCAB, count).tolist()

    return [
        Pair(draw(a), draw(b), draw(c)) for a, b, c in ((3, 5, 2), (4, 2, 6), (2, 4, 4))
    ]


class Judged(NamedTuple):
    """A prompt with an answer, whether that is good, and an answer to another prompt."""

    prompt: list[int]
    answer: list[int]
    good: bool
    other: list[int]


def judged() -> list[Judged]:
    """Returns both answers of each pair, and one more good one."""
    rows = [(p.prompt, p.chosen, True) for p in pairs()]
    rows += [(p.prompt, p.rejected, False) for p in pairs()[:2]]
    return [
        Judged(*row, other[1])
        for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True)
    ]


def teacher_logits() -> np.ndarray:
    """Returns a teacher's logits of the chosen texts, (pairs, length, vocab)."""
    rng = np.random.default_rng(3)
    longest = max(len(p.prompt + p.chosen) for p in pairs())
    drawn = 2 * rng.standard_normal((len(pairs()), longest, VOCAB))
    return drawn.astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "sft_smoothed": {"name": "sft", "label_smoothing": 0.2},
    "dpo_sigmoid": {"name": "dpo"},
    "dpo_smoothed": {"name": "dpo", "label_smoothing": 0.2, "beta": 0.4},
    "dpo_ipo": {"name": "dpo", "loss": "ipo", "beta": 0.3},
    "dpo_hinge": {"name": "dpo", "loss": "hinge"},
    "dpo_robust": {"name": "dpo", "loss": "robust", "label_smoothing": 0.2},
    "dpo_sigmoid_norm": {"name": "dpo", "loss": "sigmoid_norm", "beta": 1.0},
    "dpo_with_sft": {"name": "dpo", "sft_weight": 0.7},
    "orpo": {"name": "orpo", "beta": 0.3},
    "kto": {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.6},
    "simpo": {"name": "simpo"},
    "simpo_smoothed": {
        **{"name": "simpo", "beta": 1.5, "gamma": 0.8},
        **{"label_smoothing": 0.1, "sft_weight": 0.5},
    },
    "distill": {"name": "distill", "temperature": 1.0},
    "distill_tempered": {"name": "distill", "temperature": 2.0},
}
"""Settings of an objective, by the name of their golden."""
