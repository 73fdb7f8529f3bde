"""Does `qlora evaluate` say of a model what transformers says of it?

    python -m scripts.bench.evaluate --model DIR --mmlu FILE --gsm8k FILE --examples FILE \\
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
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench import harness
from scripts.bench.harness import Row

TASKS = ("letters", "texts", "gsm8k")
STOP = "\n\nQuestion:"
TIE = 1e-3
"""A gap of logits of about 20 that float32 sums in another order may close."""


class Transformers:
    """Does the same tasks with transformers alone; it runs in a Python that has torch."""

    def __init__(self, folder: str, new_tokens: int, batch_size: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_grad_enabled(False)
        self.torch, self.new_tokens, self.batch_size = torch, new_tokens, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    def letters(self, rows: list[Row]) -> list[list[float]]:
        """Returns log-likelihoods of " A" to " D": a token each after the prompt."""
        found = []
        for row in rows:
            ids = self.tokenizer(row["prompt"]).input_ids
            texts = [f"{row['prompt']} {choice}" for choice in row["choices"]]
            whole = [self.tokenizer(text).input_ids for text in texts]
            assert all(one[:-1] == ids for one in whole)
            tokens = self.torch.tensor([ids])
            log = self.model(tokens, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            found.append([float(log[one[-1]]) for one in whole])
        return found

    def texts(self, rows: list[Row]) -> list[list[float]]:
        """Returns log-likelihoods of the choices' texts."""
        return [
            [
                self._log_likelihood(row["prompt"], f" {choice}")
                for choice in row["choices"]
            ]
            for row in rows
        ]

    def _log_likelihood(self, prompt: str, choice: str) -> float:
        first = len(self.tokenizer(prompt).input_ids)
        ids = self.torch.tensor([self.tokenizer(prompt + choice).input_ids])
        log = self.model(ids).logits[0].log_softmax(-1)
        return sum(float(log[at - 1, ids[0, at]]) for at in range(first, ids.shape[1]))

    def gsm8k(self, rows: list[Row]) -> list[Row]:
        """Returns greedy texts, whether they are right, and the gaps of their logits."""
        tokenizer = self.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        found: list[Row] = [{}] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            prompts = [rows[i]["prompt"] for i in some]
            for i, ids, gaps in zip(some, *self._generated(prompts), strict=True):
                found[i] = self._scored(ids, rows[i]["completion"]) | {"gaps": gaps}
        return found

    def _generated(self, prompts: list[str]) -> tuple[Any, list[list[float]]]:
        """Returns new tokens, and at each how far the two largest logits are apart."""
        given = self.tokenizer(prompts, return_tensors="pt", padding=True)
        made = self.model.generate(
            **given,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            stop_strings=[STOP],
            tokenizer=self.tokenizer,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        steps = [step.topk(2).values for step in made.logits]
        gaps = self.torch.stack(steps, 1)
        new = made.sequences[:, given.input_ids.shape[1] :]
        return new, (gaps[..., 0] - gaps[..., 1]).tolist()

    def _scored(self, ids: Any, wanted: str) -> Row:
        def text(count: int) -> str:
            return self.tokenizer.decode(ids[:count], skip_special_tokens=True)

        given = text(len(ids)).split(STOP)[0]
        # What gsm8k's own scoring looks for.
        match, right = (re.search(r"#### (-?[0-9.,]+)", x) for x in (given, wanted))
        number = match and match[1].replace(",", "").rstrip(".")
        assert right, wanted
        return {
            "text": given,
            "correct": bool(number)
            and float(number) == float(right[1].replace(",", "")),
            "ends": [len(text(n + 1)) for n in range(len(ids))],
        }


def read(path: str) -> list[Row]:
    """Returns the rows of a file of JSON lines."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prepared(args: argparse.Namespace) -> Row:
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
            "completion": f" {row['answer']}",
        }
        for row in read(args.gsm8k)[: args.questions]
    ]
    found = {"letters": letters, "texts": texts, "gsm8k": gsm8k}
    return {task: found[task] for task in args.tasks}


def ours(args: argparse.Namespace, folder: Path, rows: Row) -> Row:
    """Returns the command's figures and predictions for each task."""
    flags = {
        "letters": ["--choices"],
        "texts": ["--choices", "--choices-as", "texts"],
        "gsm8k": [
            *("--exact-match", "--answer-pattern", "gsm8k", "--stop", STOP),
            *("--max-new-tokens", str(args.new_tokens)),
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
        figures = harness.told(command)
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


def compare_answers(mine: dict, theirs: list[dict]) -> Row:
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
    parser = harness.parser(__doc__)
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
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        theirs = Transformers(args.model, args.new_tokens, args.batch_size)
        rows = json.loads(args.worker.read_text())
        found = {task: getattr(theirs, task)(rows[task]) for task in args.tasks}
        print(json.dumps(found))
        return
    rows = prepared(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = ours(args, folder, rows)
        (folder / "rows.json").write_text(json.dumps(rows))
        command = harness.worker(
            "evaluate", folder / "rows.json", python=args.torch_python
        )
        theirs = harness.told(command)
    compared = {}
    for task in args.tasks:
        if task == "gsm8k":
            compared[task] = compare_answers(mine[task], theirs[task])
            continue
        answers = [row["answer"] for row in rows[task]]
        compared[task] = compare_choices(mine[task], theirs[task], answers)
    harness.record(
        "evaluate",
        args.append,
        model=Path(args.model).name,
        questions=args.questions,
        shots=args.shots,
        new_tokens=args.new_tokens,
        **compared,
    )


if __name__ == "__main__":
    main()
