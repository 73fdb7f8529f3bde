"""Plain numpy forms of what is under test: slow, obvious, and none of our code in them
beyond the layout and the codebooks, which have tests of their own."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.formats.absmax4 import layout


def quantized(
    shape: tuple[int, ...],
    *,
    block_size: int = 64,
    codebook: cb.Codebook = "nf4",
    double_quant: bool = True,
    seed: int = 0,
) -> QuantizedTensor:
    """Makes a tensor of random codes and scales, in the layout its shape wants."""
    rng = np.random.default_rng(seed)

    def filled(spec: jax.ShapeDtypeStruct) -> jax.Array:
        if spec.dtype == jnp.float32:
            return jnp.asarray(rng.uniform(0.01, 0.02, spec.shape), spec.dtype)
        largest = np.iinfo(spec.dtype).max
        return jnp.asarray(rng.integers(0, largest, spec.shape), spec.dtype)

    settings = {"codebook": codebook, "block_size": block_size}
    spec = QuantizedTensor.abstract(shape, **settings, double_quant=double_quant)
    return jax.tree.map(filled, spec)


def decoded(
    q: QuantizedTensor, codebook_dtype: Any = None, absmax_dtype: Any = None
) -> np.ndarray:
    """Decodes a tensor by its invariants, element by element, as it is to float32.

    The fused kernels round the codebook first, and some absmax and the product, too: with
    `codebook_dtype` alone the result is float64, with both it is of that dtype.
    """
    codes = layout.unpack(np.asarray(q.codes), q.layout, q.shape)
    absmax = q.absmax
    if q.double_quant:
        spread = np.repeat(np.asarray(q.absmax_scale), 256)[: q.blocks]
        codes8 = np.asarray(q.absmax_codes).reshape(-1)
        product = cb.dynamic_map()[codes8] * spread
        absmax = product + np.asarray(q.absmax_offset)
    values, absmax = cb.values(q.codebook), np.asarray(absmax).reshape(-1)
    if codebook_dtype is not None:
        product = absmax_dtype or np.float64
        values = values.astype(codebook_dtype).astype(product)
        absmax = absmax.astype(product)
    block = np.arange(math.prod(q.shape)) // q.block_size
    return (values[codes] * absmax[block]).reshape(q.shape)


def attended(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    window: int | None = None,
) -> np.ndarray:
    """Softmax attention in float64, all scores at once; arguments as in nn.attention."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) / math.sqrt(
        q.shape[-1]
    )
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (distance >= 0) & (k_positions >= 0)[:, None]
    if window is not None:
        seen &= distance < window
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def rope_frequencies(hf: dict, head_dim: int) -> np.ndarray:
    """Rotation speeds from a config.json, as transformers' modeling_rope_utils says."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = hf.get("rope_theta") or rope.get("rope_theta") or 10000.0
    speeds = []
    for i in range(0, head_dim, 2):
        speed = theta ** (-i / head_dim)
        if rope.get("rope_type") == "linear":
            speed /= rope["factor"]
        if rope.get("rope_type") == "llama3":
            # Turns made within the original context decide: many are left as they are,
            # few are slowed, and between the two it goes over linearly.
            turns = rope["original_max_position_embeddings"] * speed / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0), 1)
            speed = kept * speed + (1 - kept) * speed / rope["factor"]
        speeds.append(speed)
    return np.array(speeds)


def rotated(x: np.ndarray, positions: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Rotary embedding by complex numbers; x is (batch, seq, heads, head_dim)."""
    half = x.shape[-1] // 2
    turned = x[..., :half] + 1j * x[..., half:]
    turned = turned * np.exp(1j * positions[:, :, None, None] * speeds)
    return np.concatenate([turned.real, turned.imag], -1)


def logits(hf: dict, tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """A whole decoder in float64 from its config.json and Hugging Face tensors."""
    w = {name: np.asarray(x).astype(np.float64) for name, x in tensors.items()}
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads", heads)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    speeds = rope_frequencies(hf, head_dim)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + hf["rms_norm_eps"]) * w[f"{name}.weight"]

    def split(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(*ids.shape, count, head_dim)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(hf["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q = split(linear(y, f"{at}.self_attn.q_proj"), heads)
        k = split(linear(y, f"{at}.self_attn.k_proj"), kv_heads)
        v = split(linear(y, f"{at}.self_attn.v_proj"), kv_heads)
        q, k = (rotated(part, positions, speeds) for part in (q, k))
        y = attended(q, k, v, positions, positions, hf.get("sliding_window"))
        x = x + linear(y.reshape(*ids.shape, -1), f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(y, f"{at}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate)) * linear(y, f"{at}.mlp.up_proj")
        x = x + linear(gate, f"{at}.mlp.down_proj")
    x = norm(x, "model.norm")
    tied = hf.get("tie_word_embeddings", False)
    return linear(x, "model.embed_tokens" if tied else "lm_head")


def hf_config(**changes: Any) -> dict[str, Any]:
    """A small config.json: 2 layers, hidden 64, grouped heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | changes


def hf_tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors that fit a config.json, under Hugging Face names."""
    rng = np.random.default_rng(seed)
    hidden, wide = hf["hidden_size"], hf["intermediate_size"]
    head_dim = hf.get("head_dim") or hidden // hf["num_attention_heads"]
    heads = hf["num_attention_heads"] * head_dim
    kv_heads = hf["num_key_value_heads"] * head_dim
    qkv_bias = hf["model_type"] == "qwen2" or hf.get("attention_bias", False)
    made = {}

    def linear(name: str, out: int, features: int, bias: bool = False) -> None:
        made[f"{name}.weight"] = rng.normal(size=(out, features)) / math.sqrt(features)
        if bias:
            made[f"{name}.bias"] = rng.normal(size=out) * 0.3

    linear("model.embed_tokens", hf["vocab_size"], hidden)
    made["model.embed_tokens.weight"] *= math.sqrt(hidden)
    for i in range(hf["num_hidden_layers"]):
        at = f"model.layers.{i}"
        linear(f"{at}.self_attn.q_proj", heads, hidden, qkv_bias)
        linear(f"{at}.self_attn.k_proj", kv_heads, hidden, qkv_bias)
        linear(f"{at}.self_attn.v_proj", kv_heads, hidden, qkv_bias)
        linear(f"{at}.self_attn.o_proj", hidden, heads, hf.get("attention_bias", False))
        linear(f"{at}.mlp.gate_proj", wide, hidden)
        linear(f"{at}.mlp.up_proj", wide, hidden)
        linear(f"{at}.mlp.down_proj", hidden, wide)
        made[f"{at}.input_layernorm.weight"] = rng.uniform(0.5, 1.5, hidden)
        made[f"{at}.post_attention_layernorm.weight"] = rng.uniform(0.5, 1.5, hidden)
    made["model.norm.weight"] = rng.uniform(0.5, 1.5, hidden)
    if not hf.get("tie_word_embeddings", False):
        linear("lm_head", hf["vocab_size"], hidden)
    return {name: x.astype(np.float32) for name, x in made.items()}


def write_folder(out: Path, hf: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Writes a Hugging Face folder of one file, with safetensors' own writer."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(hf))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
