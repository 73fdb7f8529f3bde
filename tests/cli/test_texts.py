"""Texts in the command: templates that are chosen, what ends an answer, ids that do not fit."""

import json
from pathlib import Path

import pytest
import tiny

from qlora_jax.cli import generate
from qlora_jax.cli.main import main
from qlora_jax.cli.options import run_template
from qlora_jax.data.prompts import Prompt


def args(**more: object) -> generate.Args:
    return generate.Args(**({"model": "m", "prompt": ("a",)} | more))


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="--stop has an empty text"):
        args(stop=("",))


def test_a_chat_ends_at_what_ends_its_turns():
    template = "{% for m in messages %}{{ m.content }}<assistant>{% endfor %}"
    tokenizer = tiny.Tokenizer(
        tiny.byte_tokenizer(), eos_ids=(tiny.EOS,), chat_template=template
    )
    text, chat = (Prompt.of({"prompt": "a"}, tokenizer, chat=c) for c in (False, True))
    assert generate._stop(args(), [text], tokenizer).ids == (tiny.EOS,)
    both = generate._stop(args(), [text, chat], tokenizer)
    assert both.ids == (tiny.EOS, tiny.ASSISTANT)


def test_the_template_of_the_adapters_run_is_taken(tmp_path: Path):
    (tmp_path / "config.toml").write_text('[data]\nchat_template = "of the run"\n')
    assert run_template(None, str(tmp_path)) == "of the run"
    assert run_template("mine", str(tmp_path)) == "mine"
    assert run_template(None, str(tmp_path / "none")) is None
    assert run_template(None, None) is None


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_ids_that_the_embedding_lacks_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    base = tiny.write_folder(tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    more = {str(260 + i): {"content": f"<{i}>", "special": False} for i in range(20)}
    settings["added_tokens_decoder"] = more
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"input": "a", "output": "<15>"}, {"input": "a", "output": "b"}]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = [command, "--model", str(base), "--data", str(data)]
    if command == "train":
        given += ["--out", str(tmp_path / "run")]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "1 of 2 rows have ids that the model's embedding of 272 rows" in said
    assert "id 275 ('<15>'), 1 times" in said and not (tmp_path / "run").exists()
