"""Memory of making a 4-bit copy of a folder: tensor by tensor, and by way of the model.

    python scripts/bench_quantize.py [--layers 2] [--vocab 32000] [--append FILE]

Makes a bfloat16 folder with layers of a 70B Llama (hidden 8192, 28672 inside), and
quantizes it in a process each way: `quantize_folder`, as `qlora quantize` does it, and `load`
then `save_model`. Memory is the peak of what the process itself holds (RssAnon, sampled
every 5 ms; pages of mapped files, which the kernel takes back, do not count), above that of one
that has only imported the library. The copies are compared byte by byte.
"""

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_record import record
from safetensors.numpy import save_file

WATCH = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
import qlora_jax as qlora
jax.block_until_ready(jnp.zeros(8) + 1)
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if l.startswith("RssAnon"))
idle = most = held()
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
"""
"""The beginning of a process whose memory is watched: `most` less `idle` bytes."""
CHILD = (
    WATCH
    + """
from qlora_jax.sources.quantize import quantize_folder
from qlora_jax.sources.source import open_source
way, folder, out, shard = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
began = time.perf_counter()
if way == "streamed":
    quantize_folder(open_source(folder), out, qlora.QuantConfig(), shard_bytes=shard)
else:
    model, _ = qlora.load(folder, qlora.QuantConfig())
    qlora.save_model(model, out, source=folder, shard_bytes=shard)
print(json.dumps({"s": round(time.perf_counter() - began, 1), "bytes": most - idle}))
"""
)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-mb", type=int, default=512)
    parser.add_argument("--append", help="a .jsonl file")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        folder.mkdir()
        figures |= write_model(folder, args.layers, args.vocab)
        for way in ("streamed", "whole"):
            command = [sys.executable, "-c", CHILD, way, folder, Path(work) / way]
            done = subprocess.run(
                [*command, str(args.shard_mb << 20)], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)
            figures[way] = json.loads(done.stdout.splitlines()[-1])
            print(f"{way:<10}{figures[way]}", flush=True)
        names = sorted(path.name for path in (Path(work) / "whole").iterdir())
        same = filecmp.cmpfiles(
            Path(work) / "whole", Path(work) / "streamed", names, shallow=False
        )
        assert same[0] == names, same
    row = record("bench_quantize", args.append, shard_mb=args.shard_mb, figures=figures)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
