"""Does an adapter trained here say the same in PEFT? A real model, end to end.

    python -m scripts.bench.adapter_travels --model MODEL --data ROWS.jsonl \\
        --torch-python "$(scripts/interop_venv)" --out FOLDER

With MODEL a dense Hugging Face folder: `qlora quantize` makes a 4-bit folder, `qlora
generate` answers a prompt, `qlora train` fine-tunes an adapter on it, `qlora export`
writes that for PEFT. Then the 4-bit folder and the exported adapter are opened by
transformers, bitsandbytes and PEFT, the same folder and our own adapter here, both
computing in float32: greedy answers token by token, and the logits of prompt and answer.
Ends with one JSON line; status 1 where the answers differ.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import harness
from scripts.bench.harness import Row

PROMPT = (
    "A pen costs 3 dollars and a book costs 12 dollars. Ann buys 4 pens and 2 books and "
    "pays with a 50 dollar note. How many dollars does she get back?"
)


def theirs(args: argparse.Namespace) -> Row:
    """Opens both folders with PEFT, in a Python that has torch; returns its versions.

    args.worker: the 4-bit folder, the exported adapter, the tokens whose logits are asked
    for, and the file that prompt, answer and logits are written to.
    """
    import bitsandbytes
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter, asked, found = args.worker
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
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
            input_ids=ids,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_k=None,
            top_p=None,
        )[0, ids.shape[1] :]
    np.savez(found, prompt=ids[0], answer=answer, logits=logits, bare=bare)
    return harness.versions("torch", "transformers", "peft", "bitsandbytes")


def timed(name: str, seconds: dict[str, float], call: Callable[[], Any]) -> Any:
    """Returns what a call does, and notes how long it took."""
    print(f"== {name}", file=sys.stderr)
    start = time.monotonic()
    found = call()
    seconds[name] = round(time.monotonic() - start, 1)
    return found


def agreeing(ours: list[int], theirs: list[int]) -> int:
    """Returns how many tokens are the same before the first that is not."""
    equal = [a == b for a, b in zip(ours, theirs, strict=False)]
    return equal.index(False) if False in equal else len(equal)


def commands(args: argparse.Namespace, work: Path) -> dict[str, list[Any]]:
    """Returns what is done with the `qlora` command, in that order."""
    base, run, exported = work / "nf4", work / "run", work / "peft"
    rows = ["--data.max-tokens", args.max_tokens, "--data.too-long", "drop"]
    rows += ["--data.input-key", args.input_key, "--data.output-key", args.output_key]
    steps = ["--train.max-steps", args.steps, "--train.micro-batch", args.micro_batch]
    steps += ["--train.grad-accum", 1, "--lora.rank", args.rank, "--lora.alpha", 32]
    new = ["--max-new-tokens", args.new_tokens, "--dtype", "float32"]
    return {
        "quantize": ["--model", args.model, "--out", base],
        "generate": ["--model", base, "--chat", "--prompt", args.prompt, *new],
        "train": ["--model", base, "--data", args.data, "--out", run, *rows, *steps],
        "export": ["--model", base, "--adapter", run, "--out", exported],
    }


def ours(args: argparse.Namespace, base: Path, run: Path) -> tuple[Any, ...]:
    """Returns prompt and answer in tokens, the tokenizer, and the logits of both."""
    import qlora_jax as qlora
    from qlora_jax.cli.options import open_model
    from qlora_jax.config.quant import QuantOptions

    model, tokenizer, _ = open_model(str(base), str(run), QuantOptions(), "float32")
    assert tokenizer is not None
    turn = [{"role": "user", "content": args.prompt}]
    prompt = tokenizer.encode(tokenizer.chat(turn, add_generation_prompt=True))
    config = qlora.SampleConfig(max_new_tokens=args.new_tokens)
    answer = qlora.generate(model, [prompt], config, eos_ids=tokenizer.eos_ids)[0]
    whole = np.array([prompt + answer], np.int32)
    return prompt, answer, tokenizer, np.asarray(model(whole))[0]


def check(args: argparse.Namespace, work: Path) -> Row:
    """Does all of it in a folder; returns the figures."""
    seconds: dict[str, float] = {}
    sources = harness.commit()  # before anyone goes on to the next
    said = {}
    for name, flags in commands(args, work).items():
        command = [sys.executable, "-m", "qlora_jax.cli.main", name, *flags]
        said[name] = timed(
            name, seconds, lambda c=command: harness.told(c, HF_HUB_OFFLINE="1")
        )
    base, run, found = work / "nf4", work / "run", work / "theirs.npz"
    prompt, answer, tokenizer, logits = timed(
        "ours", seconds, lambda: ours(args, base, run)
    )
    np.save(work / "whole.npy", np.array([prompt + answer], np.int32))
    command = harness.worker(
        *("adapter_travels", base, work / "peft", work / "whole.npy", found),
        python=args.torch_python,
    )
    peft = timed("PEFT", seconds, lambda: harness.told(command, HF_HUB_OFFLINE="1"))
    theirs = np.load(found)
    new = [int(token) for token in theirs["answer"]]
    while new and new[-1] in tokenizer.eos_ids:  # which generate leaves out here
        new.pop()
    return {
        "commit": sources,
        "versions": peft | harness.versions(*harness.PACKAGES),
        "seconds": seconds,
        "steps": args.steps,
        "loss_first": first_loss(run),
        "loss_last": said["train"].get("loss"),
        "prompt_ids_equal": theirs["prompt"].tolist() == prompt,
        "new_tokens": [len(answer), len(new)],
        "new_tokens_agreeing": agreeing(answer, new),
        "answers_equal": answer == new,
        "logits_of_tokens": len(logits),
        "largest_logit": float(np.abs(logits).max()),
        "max_logit_difference": float(np.abs(logits - theirs["logits"]).max()),
        "adapters_effect_on_logits": float(np.abs(theirs["bare"] - logits).max()),
        "answer_before": said["generate"]["texts"][0],
        "answer": tokenizer.decode(answer),
    }


def first_loss(run: Path) -> float:
    """Returns the first loss of a run."""
    for row in harness.read_rows(run / "metrics.jsonl"):
        if row.get("loss") is not None:
            return row["loss"]
    raise ValueError(f"{run} has no loss")


def main() -> None:
    """Checks; prints one JSON line."""
    parser = harness.parser(__doc__)
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
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(theirs(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.out is not None:
            args.out.mkdir(parents=True)
        figures = check(args, args.out or Path(folder))
    harness.record("adapter_travels", args.append, **figures)
    sys.exit(not figures["answers_equal"])


if __name__ == "__main__":
    main()
