"""The whole train step, compiled for an H200 that is not there."""

import dataclasses
import itertools
import re

import aot
import jax
import jax.numpy as jnp
import optax
import pytest

import qlora_jax as qlora
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import choose
from qlora_jax.budget.setup import Setup
from qlora_jax.models import Decoder, DecoderConfig
from qlora_jax.models.spec import AttentionSpec, LayerSpec
from qlora_jax.nn.rope import Rope
from qlora_jax.train.compiled import absent_gpu
from qlora_jax.train.compiled import compile_step as setup_step

pytestmark = pytest.mark.aot

BATCH, SEQ = 1, 512
CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


KERNEL = 'custom_call_target="mosaic_gpu'


def needs_compiler() -> None:
    """Skips where no step with fused kernels can be compiled for a GPU."""
    # An older jax has not the kernels' dialect, so no step there has them.
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU kernels need jax >= 0.11.2")
    # CUDA's compiler is there where .ci/run installed it (two of its stacks run this).
    if reason := aot.available():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")


def compile_step(config: DecoderConfig):
    """Returns the compiled step of a quantized, adapted model, and its base."""
    needs_compiler()
    model = qlora.quantize(Decoder(config, key=jax.random.key(0)))
    lora = qlora.LoRAConfig(rank=16, alpha=32, targets="all-linear")
    model = qlora.attach(model, lora, key=jax.random.key(1))
    graphdef, lora, base = qlora.split(model)
    tx = optax.adamw(2e-4)
    step = qlora.make_train_step(graphdef, tx, checkpoint="layer")
    batch = {
        "tokens": jnp.zeros((BATCH, SEQ), jnp.int32),
        "weights": jnp.ones((BATCH, SEQ), jnp.float32),
    }
    arguments = (lora, base, tx.init(lora), batch)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    return aot.compile_for("h200", step, *specs), base


@pytest.fixture(scope="module")
def compiled():
    return compile_step(CONFIG)


def test_it_uses_the_fused_kernels(compiled):
    program, _ = compiled
    # Seven linears: forward, again when backward recomputes the layer (the last one's
    # product is not needed for that), and backward.
    kernels = program.as_text().count(KERNEL)
    assert kernels == 7 + 6 + 7


def test_no_dense_weight_is_made(compiled):
    program, _ = compiled
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    kv = CONFIG.num_kv_heads * CONFIG.head_dim
    shapes = [(inner, hidden), (hidden, inner), (hidden, hidden), (kv, hidden)]
    for n, k in shapes:
        for dense in (f"[{n},{k}]", f"[1,{n},{k}]", f"[{CONFIG.num_layers},{n},{k}]"):
            found = re.findall(
                rf"(?:bf16|f32|f16){re.escape(dense)}", program.as_text()
            )
            assert not found, f"{found[0]} in the compiled step"


def test_its_memory_is_the_packed_base_and_activations(compiled):
    program, base = compiled
    analysis = program.memory_analysis()
    packed = sum(x.nbytes for x in jax.tree.leaves(base))
    weights = CONFIG.num_layers * (
        3 * CONFIG.hidden_size * CONFIG.intermediate_size
        + 2 * CONFIG.hidden_size**2
        + 2 * CONFIG.hidden_size * CONFIG.num_kv_heads * CONFIG.head_dim
    )
    dense = 2 * weights
    assert packed < 0.35 * dense  # embeddings and norms are in it, unquantized
    # All of the step's temporaries are less than the dense weights alone would be.
    assert analysis.temp_size_in_bytes < 0.75 * dense


def test_attention_is_cudnns(compiled):
    if reason := aot.without_cudnn():
        pytest.skip(f"NOT COMPILED WITH FUSED ATTENTION: {reason}")
    program, _ = compiled
    calls = re.findall(r'custom_call_target="__cudnn\$(\w+)"', program.as_text())
    # Forward, again when backward recomputes the layer, and backward.
    assert sorted(calls) == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]


def test_experts_and_layers_that_differ_use_the_kernels_too():
    mixers = (
        AttentionSpec(window=128, rope=Rope(theta=1e4, dim=128)),
        AttentionSpec(),
        AttentionSpec(window=128),
    )
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=768,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        layers=tuple(LayerSpec(mixer=mixer) for mixer in mixers),
        num_experts=4,
        qk_norm="head",
    )
    program = compile_step(config)[0].as_text()
    assert program.count(KERNEL) >= 3 * 7
    if aot.without_cudnn() is None:  # windows go through cuDNN too
        assert program.count("__cudnn$fmhaSoftmaxBackward") == 3
    for dense in ("[768,512]", "[256,512]"):  # others are shapes of activations too
        assert not re.findall(rf"(?:bf16|f32|f16){re.escape(dense)}", program)


@pytest.mark.slow
@pytest.mark.rotates
def test_a_models_shapes_go_by_the_tuned_table():
    """Returns a model of shapes alone: two layers of Llama-3 8B, whose linears the table
    has."""
    needs_compiler()
    config = dataclasses.replace(
        CONFIG,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=2,
        num_heads=32,
        num_kv_heads=8,
    )
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    with absent_gpu("h200"):  # what the step is traced for
        for shape, direction in itertools.product(shapes, ("forward", "backward")):
            w = QuantizedTensor.abstract(shape)
            choice = choose(direction, BATCH * SEQ, w, jnp.dtype(jnp.bfloat16))
            assert choice.implementation == "hopper"
            assert choice.why.startswith("measured on NVIDIA H200"), choice
    lora = qlora.LoRAConfig(rank=16, targets="all-linear")
    setup = Setup(config=config, lora=lora, micro_batch=BATCH, max_tokens=SEQ)
    program = setup_step(setup, "h200").as_text()
    assert program.count(KERNEL) == 7 + 6 + 7
    for n, k in shapes[2:]:  # others are shapes of activations or of gradients, too
        assert not re.findall(rf"(?:bf16|f32|f16)\[(?:[12],)?{n},{k}\]", program)


@pytest.mark.slow
@pytest.mark.rotates
def test_the_next_layer_is_copied_by_dma_while_one_computes():
    needs_compiler()
    lora = qlora.LoRAConfig(rank=16, targets="all-linear")
    config = dataclasses.replace(CONFIG, num_layers=4)
    setup = Setup(
        config=config,
        lora=lora,
        micro_batch=BATCH,
        max_tokens=SEQ,
        stream=True,
        checkpoint="host",
    )
    program = re.split(r"\n(?=%|ENTRY)", setup_step(setup, "h200").as_text())
    bodies = {
        direction: found[0].splitlines()
        for direction, kernels in (("forward", 7), ("backward", 6 + 7))
        if (found := [part for part in program if part.count(KERNEL) == kernels])
    }
    assert len(bodies) == 2
    codes = config.hidden_size * config.intermediate_size // 2
    for direction, lines in bodies.items():
        kernels = [i for i, line in enumerate(lines) if KERNEL in line]
        # Layers' codes, in host memory (S(5)); gate, up and down among them.
        copies = [
            (re.search(r"%([\w.-]+) = ", line)[1], i)
            for i, line in enumerate(lines)
            if re.search(r"= \(\(u16\[4,\d+,\d+\]\S*:S\(5\)\}.* fusion-start\(", line)
        ]
        assert len(copies) == 7, direction
        for name, i in copies:
            done = next(
                j for j, line in enumerate(lines) if f"fusion-done(%{name})" in line
            )
            # XLA places the starts; of layers of Llama's size, before all kernels.
            assert i < kernels[-3], (direction, name)
            assert done > kernels[-1], (direction, name)
            # What makes it a DMA; from the layer after the first, from the last but one.
            called = re.search(r"calls=%([\w.-]+)", lines[i])[1]
            body = next(part for part in program if part.startswith(f"%{called} "))
            # jax 0.12 has them one level down, under "linear", and zeros above.
            moves = re.search(
                r'dynamic_slice_config":{.*"byte_offset":"(\d+)","byte_stride":"(-?\d+)"',
                body,
            )
            offset, stride = int(moves[1]), int(moves[2])
            assert 0 < abs(stride) <= codes
            assert offset == (stride if direction == "forward" else -2 * stride)
