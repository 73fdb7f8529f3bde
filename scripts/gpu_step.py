"""The `step` section of gpu_suite.py: a training step of an 8B-shaped Llama, random weights.

Ours, and the same of PEFT + bitsandbytes + transformers; rank 16 on all linears.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

RANK = 16

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def our_step(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Tokens a second and peak memory of qlora_jax, layers recomputed in backward.

    Compiles from shapes alone; the GPU is used inside `with turn()`.
    """
    if task["what"] == "ours, attention by xla":
        os.environ["QLORA_JAX_ATTENTION"] = "xla"
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    import qlora_jax as qlora
    from pallas_kernels.formats import QuantizedTensor
    from qlora_jax.models import Decoder, DecoderConfig
    from qlora_jax.nn import Linear, QuantizedLinear

    config = DecoderConfig(rms_norm_eps=1e-5, rope_theta=5e5, **LLAMA_8B)
    # Only shapes: a dense 8B model would not fit, and is never made.
    skeleton = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))

    def quantized(path, node):
        if isinstance(node, Linear) and "lm_head" not in path:
            stack, n, k = node.kernel.get_value().shape
            q = QuantizedTensor.abstract((n, k), (stack,), dtype="bfloat16")
            return QuantizedLinear(q)
        return node

    graphdef, state = nnx.split(nnx.recursive_map(quantized, skeleton))

    @functools.partial(jax.jit, static_argnums=0)
    def fill(spec, key):
        if spec.dtype == jnp.float32:  # absmax scale and offset
            return jnp.full(spec.shape, 1e-3, jnp.float32)
        bits = jax.random.bits(
            key, spec.shape, jnp.uint8 if spec.dtype == jnp.uint8 else jnp.uint16
        )
        if spec.dtype == jnp.bfloat16:  # sign and mantissa random, about 0.01
            bits = (bits & np.uint16(0x807F)) | np.uint16(0x3C00)
            return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
        return bits

    def filled():
        specs, structure = jax.tree.flatten(state)
        # The largest first: what making them takes is then less than the step's peak.
        order = sorted(range(len(specs)), key=lambda i: -specs[i].size)
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(specs))
        made = {
            i: jax.block_until_ready(fill(bench_spec(specs[i]), keys[i])) for i in order
        }
        return jax.tree.unflatten(structure, [made[i] for i in range(len(specs))])

    def bench_spec(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    lora_config = qlora.LoRAConfig(rank=RANK, alpha=32, targets="all-linear")

    def adapted(state):
        model = nnx.merge(graphdef, state)
        return qlora.attach(model, lora_config, key=jax.random.key(1))

    def split(state):
        return qlora.split(adapted(state))[1:]

    adapted_graph = qlora.split(nnx.eval_shape(lambda: adapted(state)))[0]
    tx = optax.adamw(2e-4)
    shape = (task["batch"], task["seq"])
    lora, base = jax.eval_shape(split, state)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    step = qlora.make_train_step(adapted_graph, tx, checkpoint="layer")
    start = time.perf_counter()
    opt_state = jax.eval_shape(tx.init, lora)
    compiled = step.lower(lora, base, opt_state, batch).compile()
    compile_s = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    with turn():
        lora, base = jax.jit(split, donate_argnums=0)(filled())
        opt_state = tx.init(lora)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "weights": jnp.ones(shape, jnp.float32),
        }
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            lora, opt_state, metrics = jax.block_until_ready(
                compiled(lora, base, opt_state, batch)
            )
            seconds.append(time.perf_counter() - start)
        memory = jax.devices()[0].memory_stats() or {}
    second = sorted(seconds[2:])[1]
    return {
        "tokens_per_s": task["batch"] * task["seq"] / second,
        "step_s": second,
        "compile_s": compile_s,
        "loss": float(metrics["loss"]),
        "base_gib": sum(x.nbytes for x in jax.tree.leaves(base)) / 2**30,
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
        "arguments_gib": analysis.argument_size_in_bytes / 2**30,
        "temporaries_gib": analysis.temp_size_in_bytes / 2**30,
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def peft_step(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """The same of PEFT + bitsandbytes + transformers, gradient checkpointing on."""
    with turn():
        return _peft_step(task)


def _peft_step(task: dict[str, Any]) -> dict[str, Any]:
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LLAMA_8B["vocab_size"],
        hidden_size=LLAMA_8B["hidden_size"],
        intermediate_size=LLAMA_8B["intermediate_size"],
        num_hidden_layers=LLAMA_8B["num_layers"],
        num_attention_heads=LLAMA_8B["num_heads"],
        num_key_value_heads=LLAMA_8B["num_kv_heads"],
        head_dim=LLAMA_8B["head_dim"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in model.model.layers.modules():
        for name, linear in list(module.named_children()):
            if name not in LINEARS:
                continue
            new = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            shape = (linear.out_features, linear.in_features)
            dense = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02
            new.weight = bnb.nn.Params4bit(
                dense,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=new,
            ).to("cuda")
            setattr(module, name, new)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                real = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda")
                real = torch.ones_like(real) if real.ndim == 1 else real * 0.02
                setattr(module, name, torch.nn.Parameter(real, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config=config, device="cuda")
    model.model.rotary_emb = rotary
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=list(LINEARS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora).cuda()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    shape = (task["batch"], task["seq"])
    tokens = torch.randint(0, LLAMA_8B["vocab_size"], shape, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    second = sorted(seconds[2:])[1]
    return {
        "tokens_per_s": task["batch"] * task["seq"] / second,
        "step_s": second,
        "loss": float(loss),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "versions": {"bitsandbytes": bnb.__version__, "torch": torch.__version__},
    }
