"""Tokens that a base does not have: added, trained, saved, loaded, merged, exported."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig, attach, merge, split
from qlora_jax.adapters.attached import base_fingerprint
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.cli.main import main
from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.models.vocabulary import resize_tokens

KEY = jax.random.key(0)
NEW = ("<tool>", "</tool>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tokens") / "base")


def test_new_rows_begin_as_the_mean_of_their_pieces(base: Path):
    model, tokenizer = qlora.load(base, dtype="float32")
    assert tokenizer is not None
    larger, grown, ids = qlora.add_tokens(model, tokenizer, [*NEW, "</s>"])
    pieces = tokenizer.encode("<tool>")
    assert len(pieces) == 6 and grown.encode("a<tool>b")[1] == ids[0]
    assert ids[2] == tiny.EOS  # a token already
    before = np.asarray(model.embed_tokens.weight[...])
    after = np.asarray(larger.embed_tokens.weight[...])
    np.testing.assert_allclose(after[ids[0]], before[pieces].mean(0), rtol=1e-6)
    # The byte tokenizer has 260 tokens, the table 272 rows: spare ones are used.
    assert ids[0] == 260 and after.shape == before.shape
    np.testing.assert_array_equal(after[: ids[0]], before[: ids[0]])
    many, _, more = qlora.add_tokens(model, tokenizer, [f"<{i}>" for i in range(20)])
    assert many.config.vocab_size == 280 == many.lm_head.out_features == more[-1] + 1
    assert tiny.logits(many, tiny.tokens()).shape[-1] == 280


def test_a_grown_base_is_still_that_base():
    model = tiny.decoder()
    assert fingerprint(resize_tokens(model, 300)) == fingerprint(model)
    again = resize_tokens(resize_tokens(model, 280), 300)
    assert fingerprint(again) == fingerprint(model)
    adapted = attach(again, LoRAConfig(tokens=(299,)), key=KEY)
    said = base_fingerprint(split(adapted)[1])
    assert said is not None and json.dumps(said) == fingerprint(model)
    assert resize_tokens(model, 5) is model
    with pytest.raises(ShapeError, match="resize before attach"):
        resize_tokens(adapted, 400)


def test_tokens_that_are_nothing_or_twice_are_refused():
    for wrong in (["<a>", ""], ["<a>", "<a>"]):
        with pytest.raises(ConfigError, match="named once and have a text"):
            qlora.add_tokens(tiny.decoder(), tiny.tokenizer(), wrong)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["", "embed_tokens,lm_head"])
def test_a_run_with_new_tokens_goes_all_the_way(base, tmp_path, capsys, saved):
    many = [f"<{i}>" for i in range(20)]  # more than the table has room for
    data = [
        {"input": f"{many[i % 20]}{many[(i + 1) % 20]}", "output": many[i % 20]}
        for i in range(24)
    ]
    tiny.write_jsonl(tmp_path / "data.jsonl", data)

    def call(*args: object) -> dict:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out.splitlines()[-1])

    run = tmp_path / "run"
    call(
        *("train", "--model", base, "--data", tmp_path / "data.jsonl", "--out", run),
        *("--add-tokens", *many, "--lora.modules-to-save", saved, "--lora.rank", 4),
        *("--train.max-steps", 4, "--train.micro-batch", 4, "--train.save-every", 2),
        *("--train.learning-rate", 1e-2, "--train.grad-accum", 1),
    )
    adapter = run / "adapter"
    tokenizer = qlora.load_tokenizer(run)
    assert tokenizer is not None and len(tokenizer.encode("<3><19>")) == 2
    model = qlora.load_adapter(run, qlora.load(base, dtype="float32")[0])
    assert model.config.vocab_size == 280
    ids = np.asarray([tokenizer.encode("<3><19>a<7>")], np.int32)
    said = tiny.logits(model, ids)
    merged = tmp_path / "merged"
    call(
        *("merge", "--model", base, "--adapter", run, "--out", merged),
        *("--dtype", "float32"),
    )
    again, own = qlora.load(merged, dtype="float32")
    assert own is not None and own.encode("<19>") == tokenizer.encode("<19>")
    np.testing.assert_allclose(tiny.logits(again, ids), said, atol=2e-5, rtol=0)
    np.testing.assert_allclose(
        tiny.logits(merge(model, dtype="float32"), ids), said, atol=2e-5, rtol=0
    )
    peft = tmp_path / "peft"
    call("export", "--model", base, "--adapter", adapter, "--out", peft)
    tensors = load_file(peft / "adapter_model.safetensors")
    beside = [name for name in tensors if "lora_" not in name]
    assert len(beside) == 2 and (peft / "tokenizer.json").exists()
    call("import", "--model", base, "--adapter", peft, "--out", tmp_path / "back")
    back = qlora.load_adapter(tmp_path / "back", qlora.load(base, dtype="float32")[0])
    np.testing.assert_allclose(tiny.logits(back, ids), said, atol=2e-5, rtol=0)
    found = call("inspect", peft, "--model", base)
    assert (found["kind"], found["fits"]) == ("PEFT adapter", True)
    answer = call(
        *("generate", "--model", base, "--adapter", run, "--prompt", "<3><4>"),
        *("--max-new-tokens", 3, "--dtype", "float32"),
    )
    # What the adapter says in this process, with its own tokenizer and its own rows.
    prompt = [tiny.BOS, *tokenizer.encode("<3><4>")]
    assert len(prompt) == 3
    new = qlora.generate(
        model,
        [prompt],
        qlora.SampleConfig(max_new_tokens=3),
        eos_ids=tokenizer.eos_ids,
    )
    assert answer["texts"] == [tokenizer.decode(new[0])]


@pytest.mark.slow
def test_a_run_with_new_tokens_resumes_as_it_was(base, tmp_path, capsys):
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.sums(8))
    args = [
        *("train", "--model", base, "--data", tmp_path / "data.jsonl"),
        *("--add-tokens", "after", "--lora.rank", 2, "--train.micro-batch", 2),
        *("--train.grad-accum", 1, "--train.save-every", 2, "--train.max-steps"),
    ]
    assert main([str(a) for a in (*args, 4, "--out", tmp_path / "whole")]) == 0
    assert main([str(a) for a in (*args, 4, "--out", tmp_path / "cut")]) == 0
    import shutil

    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0, capsys.readouterr()
    one, other = (
        qlora.load_adapter(tmp_path / name, qlora.load(base)[0])
        for name in ("whole", "cut")
    )
    for a, b in zip(
        tiny.arrays(split(one)[1]), tiny.arrays(split(other)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
