"""Does an adapter trained here say the same in PEFT? A real model, end to end.

    python scripts/check_adapter_travels.py --model MODEL --data ROWS.jsonl \\
        --torch-python "$(scripts/interop_venv)" --out FOLDER

With MODEL a dense Hugging Face folder: `qlora quantize` makes a 4-bit folder, `qlora
generate` answers a prompt, `qlora train` fine-tunes an adapter on it, `qlora export`
writes that for PEFT. Then the 4-bit folder and the exported adapter are opened by
transformers, bitsandbytes and PEFT, the same folder and our own adapter here, both
computing in float32: greedy answers token by token, and the logits of prompt and answer.
Ends with one JSON line; status 1 where the answers differ.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import qlora_jax as qlora
from qlora_jax.cli.options import open_model
from qlora_jax.config.quant import QuantOptions

ROOT = Path(__file__).parents[1]
PROMPT = (
    "A pen costs 3 dollars and a book costs 12 dollars. Ann buys 4 pens and 2 books and "
    "pays with a 50 dollar note. How many dollars does she get back?"
)

_TORCH = """
import json, sys
import bitsandbytes, numpy as np, peft, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompt, count, asked, found = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
turn = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(
    turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32, attn_implementation="eager")
for module in model.modules():
    # On some CPUs it would pack weights anew and round absmax to bfloat16; and the
    # folder may say that bitsandbytes' linears compute in bfloat16.
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = torch.float32
for value in model.parameters():
    # What is dense stays as stored, whatever dtype was asked for.
    if value.is_floating_point():
        value.data = value.data.float()
model = model.eval()
whole = torch.tensor(np.load(asked), dtype=torch.long)
with torch.no_grad():
    bare = model(whole).logits[0].numpy()
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    logits = model(input_ids=whole).logits[0].numpy()
    answer = model.generate(
        input_ids=ids, max_new_tokens=int(count), do_sample=False, repetition_penalty=1.0,
        temperature=None, top_k=None, top_p=None)[0, ids.shape[1]:]
np.savez(found, prompt=ids[0].numpy(), answer=answer.numpy(), logits=logits, bare=bare)
print(json.dumps({m.__name__: m.__version__
                  for m in (torch, transformers, peft, bitsandbytes)}))
"""


def told(command: list[Any], name: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Runs a program; returns the JSON of its last line."""
    print(f"== {name}", file=sys.stderr)
    start = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    seconds[name] = round(time.monotonic() - start, 1)
    if done.returncode:
        sys.exit(f"error: {name} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def agreeing(ours: list[int], theirs: list[int]) -> int:
    """Returns how many tokens are the same before the first that is not."""
    equal = [a == b for a, b in zip(ours, theirs, strict=False)]
    return equal.index(False) if False in equal else len(equal)


def versions() -> dict[str, str]:
    packages = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax")}
    return packages | {"python": platform.python_version()}


def commit() -> str:
    """Returns the commit of the sources, where they are a checkout."""
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return said.stdout.strip()


def check(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Does all of it in a folder; returns the figures."""
    seconds: dict[str, float] = {}
    sources = commit()  # before anyone goes on to the next
    program = [sys.executable, "-m", "qlora_jax.cli.main"]
    base, run, exported = work / "nf4", work / "run", work / "peft"
    rows = ["--data.max-tokens", args.max_tokens, "--data.too-long", "drop"]
    rows += ["--data.input-key", args.input_key, "--data.output-key", args.output_key]
    steps = ["--train.max-steps", args.steps, "--train.micro-batch", args.micro_batch]
    steps += ["--train.grad-accum", 1, "--lora.rank", args.rank, "--lora.alpha", 32]
    new = ["--max-new-tokens", args.new_tokens, "--dtype", "float32"]
    told(
        [*program, "quantize", "--model", args.model, "--out", base],
        *("quantize", seconds),
    )
    before = told(
        [
            *program,
            "generate",
            "--model",
            base,
            "--chat",
            "--prompt",
            args.prompt,
            *new,
        ],
        *("generate", seconds),
    )
    trained = told(
        [*program, "train", "--model", base, "--data", args.data, "--out", run]
        + [*rows, *steps],
        *("train", seconds),
    )
    told(
        [*program, "export", "--model", base, "--adapter", run, "--out", exported],
        *("export", seconds),
    )

    start = time.monotonic()
    model, tokenizer, _ = open_model(str(base), str(run), QuantOptions(), "float32")
    assert tokenizer is not None
    turn = [{"role": "user", "content": args.prompt}]
    prompt = tokenizer.encode(tokenizer.chat(turn, add_generation_prompt=True))
    config = qlora.SampleConfig(max_new_tokens=args.new_tokens)
    answer = qlora.generate(model, [prompt], config, eos_ids=tokenizer.eos_ids)[0]
    whole = np.array([prompt + answer], np.int32)
    logits = np.asarray(model(whole))[0]
    seconds["ours"] = round(time.monotonic() - start, 1)
    del model

    np.save(work / "whole.npy", whole)
    command = [args.torch_python, "-c", _TORCH, base, exported, args.prompt]
    command += [args.new_tokens, work / "whole.npy", work / "theirs.npz"]
    theirs_versions = told(command, "PEFT", seconds)
    theirs = np.load(work / "theirs.npz")
    said = [int(token) for token in theirs["answer"]]
    while said and said[-1] in tokenizer.eos_ids:  # which generate leaves out here
        said.pop()
    return {
        "check": "adapter_travels",
        "date": datetime.date.today().isoformat(),
        "commit": sources,
        "command": shlex.join(
            ["python", "scripts/check_adapter_travels.py", *shown(args)]
        ),
        "versions": versions() | theirs_versions,
        "seconds": seconds,
        "steps": args.steps,
        "loss_first": first_loss(run),
        "loss_last": trained.get("loss"),
        "prompt_ids_equal": theirs["prompt"].tolist() == prompt,
        "new_tokens": [len(answer), len(said)],
        "new_tokens_agreeing": agreeing(answer, said),
        "answers_equal": answer == said,
        "logits_of_tokens": len(logits),
        "largest_logit": float(np.abs(logits).max()),
        "max_logit_difference": float(np.abs(logits - theirs["logits"]).max()),
        "adapters_effect_on_logits": float(np.abs(theirs["bare"] - logits).max()),
        "answer_before": before["texts"][0],
        "answer": tokenizer.decode(answer),
    }


def first_loss(run: Path) -> float:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        if (loss := json.loads(line).get("loss")) is not None:
            return loss
    raise ValueError(f"{run} has no loss")


def shown(args: argparse.Namespace) -> list[str]:
    """Returns the flags, with names for paths of this machine."""
    flags = []
    for name, value in vars(args).items():
        if value is not None and name not in ("torch_python", "out"):
            if name in ("model", "data"):
                value = Path(*Path(value).parts[-2 if name == "data" else -1 :])
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="dense folder")
    parser.add_argument("--data", required=True, help="rows to train on (.jsonl)")
    parser.add_argument("--torch-python", required=True, help="of scripts/interop_venv")
    parser.add_argument("--out", type=Path, help="keep what is made, in a new folder")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--input-key", default="question")
    parser.add_argument("--output-key", default="answer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.out is not None:
            args.out.mkdir(parents=True)
        figures = check(args, args.out or Path(folder))
    print(json.dumps(figures))
    sys.exit(not figures["answers_equal"])


if __name__ == "__main__":
    main()
