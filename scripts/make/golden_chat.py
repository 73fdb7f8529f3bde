"""Writes tests/golden/chat.json: chats as transformers renders, tokenizes and masks them.

Needs transformers (5.24 wrote the file) without torch, and what the tests share:

    PYTHONPATH=tests python -m scripts.make.golden_chat

For each template and row: the text; by tokenizer the ids' number and crc32; where the
template marks what is generated, the tokens of the assistant mask as (first, end) runs;
and the prompt of each assistant turn, as serving shows it. For each folder of
tests/folder_cases.py: the ids of its text without and with what the tokenizer adds.
"""

import itertools
import json
import tempfile
import zlib
from pathlib import Path

import chat_cases
import folder_cases
import transformers
from chat_templates import TEMPLATES

from scripts.bench import harness

ROOT = Path(__file__).resolve().parents[2]


def runs(mask: list[int]) -> list[list[int]]:
    """Returns (first, end) of each run of ones."""
    found, at = [], 0
    for value, group in itertools.groupby(mask):
        size = len(list(group))
        if value:
            found.append([at, at + size])
        at += size
    return found


def crc(ids: list[int]) -> int:
    return zlib.crc32(",".join(map(str, ids)).encode())


def case(template: str, row: dict) -> dict | None:
    messages = row.pop("messages")
    made: dict = {"ids": {}}
    marks = "generation" in template and "endgeneration" in template
    for name, raw in chat_cases.all_tokenizers().items():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<s>",
            eos_token="</s>",
            chat_template=template,
        )
        try:
            made["text"] = tokenizer.apply_chat_template(
                messages, tokenize=False, **row
            )
        except Exception:
            return None
        out = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=marks, **row
        )
        made["ids"][name] = [len(out["input_ids"]), crc(out["input_ids"])]
        if marks:
            made.setdefault("mask", {})[name] = runs(out["assistant_masks"])
        if "prompts" not in made:
            made["prompts"] = [
                tokenizer.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True, **row
                )
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
    return made


def folder(case: folder_cases.Case) -> dict:
    with tempfile.TemporaryDirectory() as path:
        folder_cases.write(Path(path), case)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return {
        "ids": tokenizer.encode(folder_cases.TEXT, add_special_tokens=False),
        "plain": tokenizer.encode("Blue b"),
        "special": tokenizer.special_tokens_map,
    }


def main() -> None:
    """Writes the file."""
    harness.only_help(__doc__)
    golden = {
        name: {row: case(template, chat_cases.row_of(row)) for row in chat_cases.ROWS}
        for name, template in TEMPLATES.items()
    }
    out = ROOT / "tests" / "golden" / "chat.json"
    lines = [
        f"{json.dumps(n)}: {{\n"
        + ",\n".join(
            f" {json.dumps(r)}: {json.dumps(c, ensure_ascii=False)}"
            for r, c in rows.items()
        )
        + "\n}"
        for n, rows in golden.items()
    ]
    version = json.dumps(transformers.__version__)
    folders = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(folder(case), ensure_ascii=False)}"
        for name, case in folder_cases.CASES.items()
    )
    cases = ",\n".join(lines)
    text = f'{{"transformers": {version}, "cases": {{\n{cases}\n}},\n"folders": {{\n'
    text += f"{folders}\n}}}}\n"
    out.write_text(text, encoding="utf-8")
    refused = [
        f"{n}/{r}" for n, rows in golden.items() for r, c in rows.items() if not c
    ]
    print(out, out.stat().st_size, "bytes;", len(refused), "refused:", *refused)


if __name__ == "__main__":
    main()
