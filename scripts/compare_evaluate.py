"""Does `qlora evaluate` say of a model what transformers says of it?

    python scripts/compare_evaluate.py --model DIR --mmlu FILE --gsm8k FILE --examples FILE \\
        --torch-python PY [--append FILE]

Takes questions of MMLU (rows as qlora.py has them) and of gsm8k, and computes in float32, once
by the command and once with transformers and none of our code:

    letters   MMLU, " A" to " D" after the prompt
    texts     the same questions, the choices' own texts after "Question: ...\\nAnswer:"
    gsm8k     greedy answers after --shots examples, cut at the next question; what follows ####

Prompts and scoring are written down again here. Where greedy texts differ, the gap between
transformers' two largest logits at the first different token says whether it was a tie.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_record import record

TASKS = ("letters", "texts", "gsm8k")
STOP = "\n\nQuestion:"
TIE = 1e-3
"""A gap of logits of about 20 that float32 sums in another order may close."""

_TORCH = r"""
import json, re, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, rows, out, new_tokens, batch_size = sys.argv[1:6]
rows = json.load(open(rows, encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

@torch.no_grad()
def letters(rows):
    # " A" is a token, so the logits after the prompt have all of them.
    found = []
    for row in rows:
        ids = tokenizer(row["prompt"]).input_ids
        whole = [tokenizer(row["prompt"] + " " + c).input_ids for c in row["choices"]]
        assert all(one[:-1] == ids for one in whole)
        log = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].log_softmax(-1)
        found.append([float(log[one[-1]]) for one in whole])
    return found

@torch.no_grad()
def log_likelihood(prompt, choice):
    first = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + choice).input_ids])
    log = model(ids).logits[0].log_softmax(-1)
    return sum(float(log[at - 1, ids[0, at]]) for at in range(first, ids.shape[1]))

def texts(rows):
    return [[log_likelihood(row["prompt"], " " + c) for c in row["choices"]] for row in rows]

@torch.no_grad()
def answer(rows, stop, size):
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        given = tokenizer([rows[i]["prompt"] for i in some], return_tensors="pt", padding=True)
        made = model.generate(
            **given, max_new_tokens=int(new_tokens), do_sample=False, repetition_penalty=1.0,
            stop_strings=[stop], tokenizer=tokenizer, output_logits=True,
            return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id)
        new = made.sequences[:, given.input_ids.shape[1] :]
        gaps = torch.stack([step.topk(2).values for step in made.logits], 1)
        gaps = (gaps[..., 0] - gaps[..., 1]).tolist()
        for i, ids, gap in zip(some, new, gaps):
            text = tokenizer.decode(ids, skip_special_tokens=True).split(stop)[0]
            ends = [len(tokenizer.decode(ids[: n + 1], skip_special_tokens=True))
                    for n in range(len(ids))]
            # What gsm8k's own scoring looks for.
            match = re.search(r"#### (-?[0-9.,]+)", text)
            number = match and match[1].replace(",", "").rstrip(".")
            wanted = re.search(r"#### (-?[0-9.,]+)", rows[i]["answer"])[1].replace(",", "")
            right = bool(number) and float(number) == float(wanted)
            found[i] = {"text": text, "correct": right, "ends": ends, "gaps": gap}
    return found

tasks = {
    "letters": letters,
    "texts": texts,
    "gsm8k": lambda some: answer(some, rows["stop"], int(batch_size)),
}
json.dump({task: tasks[task](rows[task]) for task in rows["tasks"]}, open(out, "w"))
"""


def read(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prepared(args: argparse.Namespace) -> dict[str, Any]:
    """Returns rows for both sides."""
    mmlu = read(args.mmlu)
    every = len(mmlu) // args.questions
    mmlu = mmlu[::every][: args.questions]  # of all subjects
    letters, texts = [], []
    for row in mmlu:
        body = row["input"].split("\n\n", 1)[1].removesuffix("\nAnswer:")
        question, *choices = body.rsplit("\nA. ", 1)
        parts, rest = [], choices[0]
        for letter in "BCD":
            part, rest = rest.split(f"\n{letter}. ", 1)
            parts.append(part)
        listed = {"question": question, "choices": [*parts, rest]}
        right = "ABCD".index(row["output"])
        letters.append(
            row | {"prompt": row["input"], "choices": [*"ABCD"], "answer": right}
        )
        prompt = f"Question: {question}\nAnswer:"
        texts.append({**listed, "prompt": prompt, "answer": right})
    shots = "".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
        for row in read(args.examples)[: args.shots]
    )
    gsm8k = [
        {
            "prompt": f"{shots}Question: {row['question']}\nAnswer:",
            "answer": f" {row['answer']}",
        }
        for row in read(args.gsm8k)[: args.questions]
    ]
    found = {"letters": letters, "texts": texts, "gsm8k": gsm8k}
    return {task: found[task] for task in args.tasks} | {
        "stop": STOP,
        "tasks": args.tasks,
    }


def ours(
    args: argparse.Namespace, folder: Path, rows: dict[str, Any]
) -> dict[str, Any]:
    """Returns the command's figures and predictions for each task."""
    flags = {
        "letters": ["--choices"],
        "texts": ["--choices", "--choices-as", "texts"],
        "gsm8k": [
            *("--exact-match", "--answer-pattern", "gsm8k", "--stop", STOP),
            *("--max-new-tokens", str(args.new_tokens)),
            *("--data.input-key", "prompt", "--data.output-key", "answer"),
        ],
    }
    said = {}
    for task in args.tasks:
        more = flags[task]
        data, out = folder / f"{task}.json", folder / f"{task}.jsonl"
        given = rows[task]
        if task == "letters":  # the file's own form
            given = [{key: row[key] for key in ("input", "output")} for row in given]
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        command = [sys.executable, "-m", "qlora_jax.cli.main", "evaluate"]
        command += ["--model", args.model, "--data", str(data), "--dtype", "float32"]
        command += ["--predictions", str(out), "--data.max-tokens", "2048"]
        command += ["--batch-size", str(args.batch_size), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        figures = json.loads(done.stdout.splitlines()[-1])
        said[task] = {"figures": figures, "lines": read(str(out))}
        print(task, {k: v for k, v in figures.items() if "." in str(v)}, flush=True)
    return said


def compare_choices(mine: dict, theirs: list[list[float]], answers: list[int]) -> dict:
    """Returns accuracies of both sides and how far likelihoods are apart."""
    lines = mine["lines"]
    apart = [
        max(abs(a - b) for a, b in zip(line["log_likelihoods"], other, strict=True))
        for line, other in zip(lines, theirs, strict=True)
    ]
    best = [other.index(max(other)) for other in theirs]
    sizes = [[len(text.encode()) for text in line["choices"]] for line in lines]
    norms = [
        [p / n for p, n in zip(o, s, strict=True)]
        for o, s in zip(theirs, sizes, strict=True)
    ]
    best_norm = [norm.index(max(norm)) for norm in norms]

    def share(found: list[int]) -> float:
        right = [a == b for a, b in zip(found, answers, strict=True)]
        return sum(right) / len(right)

    chosen = [line["choices"].index(line["chosen"]) for line in lines]
    return {
        "accuracy": mine["figures"]["accuracy"],
        "accuracy_stderr": mine["figures"]["accuracy_stderr"],
        "acc_norm": mine["figures"]["acc_norm"],
        "transformers_accuracy": share(best),
        "transformers_acc_norm": share(best_norm),
        "chosen_differently": sum(a != b for a, b in zip(chosen, best, strict=True)),
        "log_likelihood_most_apart": max(apart),
    }


def compare_answers(mine: dict, theirs: list[dict]) -> dict[str, Any]:
    """Returns exact match of both sides, and at what gaps of logits their texts part."""
    gaps = []
    for line, other in zip(mine["lines"], theirs, strict=True):
        a, b = line["given"], other["text"]
        if a != b:
            at = len(os.path.commonprefix([a, b]))
            step = next((n for n, end in enumerate(other["ends"]) if end > at), -1)
            gaps.append(other["gaps"][step])
    figures = mine["figures"]
    return {
        "exact_match": figures["exact_match"],
        "exact_match_stderr": figures["exact_match_stderr"],
        "answers_without_match": figures["answers_without_match"],
        "transformers_exact_match": sum(o["correct"] for o in theirs) / len(theirs),
        "texts_that_differ": len(gaps),
        "of_those_at_a_tie": sum(gap < TIE for gap in gaps),
        "gaps": [round(gap, 6) for gap in gaps],
    }


def main() -> None:
    """Compares; prints one JSON line and appends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmlu", required=True)
    parser.add_argument("--gsm8k", required=True, help="questions")
    parser.add_argument("--examples", required=True, help="gsm8k rows to show before")
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--shots", type=int, default=2, help="gsm8k examples")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--append", help="a .jsonl file")
    args = parser.parse_args()
    rows = prepared(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = ours(args, folder, rows)
        (folder / "rows.json").write_text(json.dumps(rows))
        command = [args.torch_python, "-c", _TORCH, args.model]
        command += [str(folder / "rows.json"), str(folder / "theirs.json")]
        command += [str(args.new_tokens), str(args.batch_size)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(command, check=True, env=environment)
        theirs = json.loads((folder / "theirs.json").read_text())
    compared = {}
    for task in args.tasks:
        if task == "gsm8k":
            compared[task] = compare_answers(mine[task], theirs[task])
            continue
        answers = [row["answer"] for row in rows[task]]
        compared[task] = compare_choices(mine[task], theirs[task], answers)
    row = record(
        "compare_evaluate",
        args.append,
        model=Path(args.model).name,
        questions=args.questions,
        shots=args.shots,
        new_tokens=args.new_tokens,
        **compared,
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
