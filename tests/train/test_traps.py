"""The places where fine-tuning is commonly got wrong: BOS, EOS, held-out rows, options without
effect.

The traps of file formats are in tests/io/test_traps.py.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tokenizers import processors

from qlora_jax.cli.main import main
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.inference import SampleConfig, generate
from qlora_jax.sources.load import load
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.optimizer import make_optimizer

BOS, EOS = tiny.BOS, tiny.EOS
ROWS: tuple[dict[str, Any], ...] = (
    {"input": "ab", "output": "cd"},
    {"input": "", "output": "efgh"},
    {"instruction": "i", "output": "j"},
    {"text": "klmnopq"},
    {
        "messages": [
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "stuvwxyz"},
        ]
    },
)
"""Each format once; of different lengths."""


def wordy_tokenizer(folder: Path) -> Tokenizer:
    """Opens a tokenizer that would put BOS and EOS around a text by itself, as Llama's."""
    tiny.write_folder(folder)
    raw = tiny.byte_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    raw.save(str(folder / "tokenizer.json"))
    assert raw.encode("a").ids[0] == BOS
    opened = Tokenizer.open(folder)
    assert opened is not None
    return opened


def test_each_row_has_one_bos_and_one_eos_whatever_the_tokenizer_adds(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    dataset = read_dataset(path, wordy_tokenizer(tmp_path / "base"), DataConfig())
    assert len(dataset) == len(ROWS)
    for row in dataset.rows:
        ids = row.tokens.tolist()
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert (ids.count(BOS), ids.count(EOS)) == (1, 1)
        assert (row.weights[0], row.weights[-1]) == (0, 1)


def test_a_prompt_has_one_bos_with_and_without_its_template(tmp_path, capsys):
    tokenizer = wordy_tokenizer(tmp_path / "base")
    prompts = [[BOS, *tokenizer.encode("ab")]]
    prompts += [[BOS, tiny.USER, *tokenizer.encode("ab"), tiny.ASSISTANT]]
    model, _ = load(tmp_path / "base", dtype="float32")
    said = []
    for more in ([], ["--chat"]):
        args = ["generate", "--model", str(tmp_path / "base"), "--prompt", "ab", *more]
        args += ["--max-new-tokens", "6", "--dtype", "float32"]
        assert main(args) == 0, capsys.readouterr().err
        said += json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]
    # One by one, as the command's: its compiled program serves here too.
    config = SampleConfig(max_new_tokens=6)
    once, twice = (
        [
            generate(model, [more + prompt], config, eos_ids=(EOS,))[0]
            for prompt in prompts
        ]
        for more in ([], [BOS])
    )
    assert said == [tokenizer.decode(ids) for ids in once]
    assert all(one != other for one, other in zip(once, twice, strict=True))


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_only_rows_that_were_counted_as_cut_lose_their_eos(tmp_path, caplog, too_long):
    # In qlora.py a long target ends without EOS, and nothing says so.
    rows = [{"input": "a", "output": "b" * size} for size in range(1, 13)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(max_tokens=10, too_long=too_long)
    dataset = read_dataset(path, tiny.tokenizer(), config)
    # BOS, a, the answer, EOS: 7 letters fit.
    whole = [row for row in dataset.rows if row.tokens[-1] == EOS]
    assert [len(row.answer) for row in whole] == list(range(1, 8))
    assert all(row.weights[-1] == 1 for row in whole)
    cut = len(dataset) - len(whole)
    assert cut == (5 if too_long == "truncate" else 0)
    assert dataset.dropped == 5 - cut
    assert "5 rows over 10 tokens were" in caplog.text


def test_rows_with_an_evaluation_file_of_their_own_are_not_split(tmp_path, capsys):
    # qlora.py splits the training rows once more, and its test file is never read.
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sums(6))
    held = tiny.write_jsonl(tmp_path / "held.jsonl", tiny.sums(3, low=20))
    args = ["train", "--model", tiny.write_folder(tmp_path / "base"), "--data", rows]
    args += ["--out", tmp_path / "run", "--data.eval-rows", 6, "--memory", "1KiB"]

    def refusal(*more: object) -> str:
        assert main([str(arg) for arg in (*args, *more)]) == 2
        return capsys.readouterr().err

    assert "--data.eval-rows 6 leaves nothing to train on: 6 rows" in refusal()
    # What comes behind the rows is reached: all six of them are there to train.
    assert "this run needs about" in refusal("--eval-data", held)
    held.write_text("{}\n")
    assert "held.jsonl:1: has no keys" in refusal("--eval-data", held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", 1e-3),
        ("schedule", "cosine"),
        ("warmup_ratio", 0.5),
        ("max_grad_norm", None),
        ("weight_decay", 0.1),
        ("beta1", 0.5),
        ("beta2", 0.9),
    ],
)
def test_every_option_of_the_optimizer_changes_the_steps(option, value):
    # qlora.py has options that nothing reads, such as adam8bit.
    def after(**config: Any) -> np.ndarray:
        tx = make_optimizer(TrainConfig(**config), steps := 4)
        params = {"w": np.ones((2, 3), np.float32)}
        state = tx.init(params)
        for step in range(steps):
            grads = {"w": np.full((2, 3), 1.0 + 3 * (step % 2), np.float32)}
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
        return params["w"]

    plain = {"max_grad_norm": 5.0}  # which clips every second gradient
    changed = after(**plain | {option: value})
    assert np.isfinite(changed).all()
    assert np.abs(changed - after(**plain)).max() > 1e-6
