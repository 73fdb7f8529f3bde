"""What a tokenizer.json makes the package do ends, in ids or in one error."""

import json
import threading

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qlora_jax.config.data import DataConfig
from qlora_jax.data.forming import Forming, _Workers
from qlora_jax.errors import CheckpointError
from qlora_jax.text import bounded
from qlora_jax.text.tokenizer import Tokenizer

SLOW = tokenizers.Regex("a+b")
"""The work of finding it in a run of one letter grows with the square of the run's length."""

LONG = "a" * 20_000


def made(**parts):
    vocabulary = {"a": 0, "b": 1, LONG: 2}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.Split(SLOW, "isolated")},
        {"normalizer": normalizers.Replace(SLOW, "b")},
        {"decoder": decoders.Replace(SLOW, "b")},
    ],
)
def test_a_pattern_that_takes_too_long_is_an_error(parts, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(bounded, "CHARACTERS_PER_SECOND", 1e9)
    tokenizer = Tokenizer(made(**parts))
    with pytest.raises(CheckpointError, match="takes more than 0 s for (20000|1) "):
        if "decoder" in parts:
            tokenizer.decode([2])
        else:
            tokenizer.encode(LONG)
    assert Tokenizer(made()).encode("ab") == [0, 1]


def test_other_threads_go_on_while_texts_are_encoded():
    rounds, done = [], threading.Event()

    def count():
        while not done.wait(0.001):
            rounds.append(1)

    thread = threading.Thread(target=count)
    thread.start()
    Tokenizer(made(normalizer=normalizers.Replace(SLOW, "b"))).encode(LONG[:5000])
    done.set()
    thread.join()
    assert len(rounds) > 3


@pytest.mark.parametrize("key", ["Regex", r"\u0052eg\u0065x"])
def test_patterns_that_would_take_memory_are_refused(tmp_path, key):
    part = pre_tokenizers.Split(tokenizers.Regex("!"), "isolated")
    whole = json.loads(made(pre_tokenizer=part).to_str())
    text = json.dumps(whole)
    (path := tmp_path / "tokenizer.json").write_text(text)
    assert Tokenizer.open(tmp_path) is not None
    much = r"(?i)" + r"[\\p{L}]" * 3000
    path.write_text(text.replace('"Regex": "!"', f'"{key}" : "{much}"'))
    with pytest.raises(CheckpointError, match="expressions of 24004 bytes"):
        Tokenizer.open(tmp_path)


def test_what_a_worker_fails_with_is_raised_here():
    split = pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    workers = _Workers(Forming(Tokenizer(made(pre_tokenizer=split)), DataConfig()))
    try:
        with pytest.raises(CheckpointError, match="retry-limit"):
            workers.make([(1, {"text": "a" * 50})])
    finally:
        workers.stop()


def test_an_id_that_would_take_memory_is_refused(tmp_path):
    whole = json.loads(made().to_str())
    whole["model"]["vocab"]["a"] = 2**31 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="has the id 2147483647"):
        Tokenizer.open(tmp_path)
