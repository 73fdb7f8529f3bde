"""A converter that fails, aborts or does not end is one error; transformers' place is taken."""

import pytest

from qlora_jax.errors import CheckpointError
from qlora_jax.text.tokenizer import Tokenizer

FAKE = """
import sys
__version__ = "fake"
sys.modules["__main__"].SECONDS = 1
class AutoTokenizer:
    def from_pretrained(folder, local_files_only, trust_remote_code):
        assert local_files_only and trust_remote_code is False
        {does}
"""


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("raise ValueError('no pieces')", "by transformers fake: no pieces"),
        ("bytearray(4 << 30)", "by transformers fake: "),
        ("input('run its code? ')", "by transformers fake: EOF when reading a line"),
        ("import os; os.abort()", "ended with status -6"),
        ("while True: pass", "takes too long, or too much memory"),
    ],
)
def test_what_a_converter_does_ends_in_one_error(tmp_path, monkeypatch, does, message):
    fakes, folder = tmp_path / "fakes", tmp_path / "model"
    (fakes / "google").mkdir(parents=True)
    for name in ("sentencepiece", "google/__init__", "google/protobuf"):
        (fakes / f"{name}.py").write_text("")
    (fakes / "transformers.py").write_text(FAKE.format(does=does))
    monkeypatch.syspath_prepend(fakes)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(folder)
