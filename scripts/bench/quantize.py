"""Memory of making a 4-bit copy of a folder: tensor by tensor, and by way of the model.

    python -m scripts.bench.quantize [--layers 2] [--vocab 32000] [--append FILE]

Makes a bfloat16 folder with layers of a 70B Llama (hidden 8192, 28672 inside), and
quantizes it in a process each way: `quantize_folder`, as `qlora quantize` does it, and `load`
then `save_model`. Memory is the peak of what the process itself holds (RssAnon, sampled
every 5 ms; pages of mapped files, which the kernel takes back, do not count), above that of one
that has only imported the library. The copies are compared byte by byte.
"""

import argparse
import filecmp
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from scripts.bench import harness


def watched(call: Callable[[], None]) -> tuple[float, int]:
    """Returns a call's seconds, and the most that this process held meanwhile, in bytes."""
    most = [harness.held_bytes("RssAnon")]

    def watch() -> None:
        while True:
            most[0] = max(most[0], harness.held_bytes("RssAnon"))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began, most[0]


def work(way: str, folder: str, out: Path, shard: int) -> dict[str, float]:
    """Quantizes a folder one way, in this process; returns the figures."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as qlora
    from qlora_jax.sources.quantize import quantize_folder
    from qlora_jax.sources.source import open_source

    def streamed() -> None:
        source = open_source(folder)
        quantize_folder(source, out, qlora.QuantConfig(), shard_bytes=shard)

    def whole() -> None:
        model, _ = qlora.load(folder, qlora.QuantConfig())
        qlora.save_model(model, out, source=folder, shard_bytes=shard)

    jax.block_until_ready(jnp.zeros(8) + 1)
    idle = harness.held_bytes("RssAnon")
    seconds, most = watched(streamed if way == "streamed" else whole)
    return {"s": round(seconds, 1), "bytes": most - idle}


def write_model(folder: Path, layers: int, vocab: int) -> dict[str, int]:
    """Writes a folder, a file a layer; returns its bytes and its largest tensor's."""
    hidden, inner, kv = 8192, 28672, 1024
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    drawn = (0.02 * rng.standard_normal(1 << 24)).astype(ml_dtypes.bfloat16)

    def matrix(*shape: int) -> np.ndarray:
        return np.resize(drawn, shape)

    files: dict[str, dict[str, np.ndarray]] = {
        "outer": {
            "model.embed_tokens.weight": matrix(vocab, hidden),
            "model.norm.weight": np.ones(hidden, ml_dtypes.bfloat16),
        }
    }
    weights, total, largest = {}, 0, 0
    for i in range(layers + 1):
        name = f"model-{i}.safetensors"
        if i == layers:
            tensors = files["outer"]
        else:
            at = f"model.layers.{i}."
            tensors = {
                f"{at}self_attn.q_proj.weight": matrix(hidden, hidden),
                f"{at}self_attn.k_proj.weight": matrix(kv, hidden),
                f"{at}self_attn.v_proj.weight": matrix(kv, hidden),
                f"{at}self_attn.o_proj.weight": matrix(hidden, hidden),
                f"{at}mlp.gate_proj.weight": matrix(inner, hidden),
                f"{at}mlp.up_proj.weight": matrix(inner, hidden),
                f"{at}mlp.down_proj.weight": matrix(hidden, inner),
                f"{at}input_layernorm.weight": np.ones(hidden, ml_dtypes.bfloat16),
                f"{at}post_attention_layernorm.weight": np.ones(
                    hidden, ml_dtypes.bfloat16
                ),
            }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weights |= dict.fromkeys(tensors, name)
        total += sum(x.nbytes for x in tensors.values())
        largest = max(largest, *(x.nbytes for x in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"folder_bytes": total, "largest_tensor_bytes": largest}


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-mb", type=int, default=512)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shard = args.shard_mb << 20
    if args.worker:
        way, given, out = args.worker
        print(json.dumps(work(way, given, Path(out), shard)))
        return
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        folder = here / "model"
        folder.mkdir()
        figures |= write_model(folder, args.layers, args.vocab)
        for way in ("streamed", "whole"):
            command = harness.worker("quantize", way, folder, here / way)
            figures[way] = harness.told(command)
            print(f"{way:<10}{figures[way]}", flush=True)
        whole, streamed = here / "whole", here / "streamed"
        names = sorted(path.name for path in whole.iterdir())
        same = filecmp.cmpfiles(whole, streamed, names, shallow=False)
        assert same[0] == names, same
    harness.record("quantize", args.append, shard_mb=args.shard_mb, figures=figures)


if __name__ == "__main__":
    main()
