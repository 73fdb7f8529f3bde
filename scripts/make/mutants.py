"""Breaks the code on purpose, a line at a time, and says which test notices.

    python -m scripts.make.mutants                  # all of them; exits 1 if one survives
    python -m scripts.make.mutants --only lora-scale double-quant
    python -m scripts.make.mutants --list

A test that cannot fail proves nothing. Each mutant changes one line in a copy of the tree
and runs the tests that should notice it, until the first one fails. That test is then run
on the copy without the change, where it has to pass: otherwise it says nothing about the
change. Takes some minutes on two CPU cores; `pytest` has to be installed beside the package.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (".git", ".venv*", "runs", "__pycache__", ".*_cache", "*.egg-info", "build")
TIMEOUT_S = 900
TESTS_FAILED = 1  # pytest's status; 2 and up are errors of the run itself


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One changed line, and the tests that should notice.

    Attributes:
      name: What it breaks.
      file: The file to change.
      old: Text that the file has exactly once.
      new: What takes its place.
      tests: Files, or single tests, as pytest takes them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "kernel-decode",
        "pallas_kernels/packed_matmul/registers.py",
        "words = bits[low] | bits[high] << 16",
        "words = bits[high] | bits[low] << 16",
        "tests/pallas_kernels/packed_matmul/test_registers.py",
    ),
    Mutant(
        "codes-layout",
        "pallas_kernels/formats/absmax4/layout.py",
        "return (f0 | (f1 << 4) | (f2 << 8) | (f3 << 12))",
        "return (f0 | (f2 << 4) | (f1 << 8) | (f3 << 12))",
        "tests/pallas_kernels/formats/absmax4/test_layout.py",
    ),
    Mutant(
        "absmax-decode",
        "pallas_kernels/formats/absmax4/decode.py",
        "return product + offset",
        "return product",
        "tests/pallas_kernels/formats/test_formats.py "
        "tests/pallas_kernels/formats/absmax4/test_golden.py",
    ),
    Mutant(
        "lora-gradient",
        "pallas_kernels/packed_matmul/api.py",
        "db = dot(hidden, dy, 0, 0).astype(b.dtype)",
        "db = dot(hidden, dy * jnp.float32(scale).astype(dy.dtype), 0, 0).astype(b.dtype)",
        "tests/pallas_kernels/packed_matmul/test_lora.py",
    ),
    Mutant(
        "double-quant",
        "pallas_kernels/formats/absmax4/encode.py",
        "offset = absmax.mean()",
        "offset = absmax.min()",
        "tests/pallas_kernels/formats/absmax4/test_golden.py "
        "tests/pallas_kernels/formats/absmax4/test_quantize.py",
    ),
    Mutant(
        "merge",
        "qlora_jax/nn/folding.py",
        "merged = kernel + scale * jnp.matmul",
        "merged = kernel - scale * jnp.matmul",
        "tests/adapters/test_merge.py",
    ),
    Mutant(
        "loss-weights",
        "qlora_jax/objectives/logprobs.py",
        "return (total + jnp.sum(chunk[2] * nll), d_lora), d_h",
        "return (total + jnp.sum(nll), d_lora), d_h",
        "tests/objectives/test_logprobs.py",
    ),
    Mutant(
        "first-token",
        "qlora_jax/objectives/logprobs.py",
        "jnp.roll(predicted_weights(batch).at[:, 0].set(0), -1, axis=1)",
        "jnp.roll(predicted_weights(batch), -1, axis=1)",
        "tests/train/test_step.py::test_the_first_token_of_a_row_is_ignored",
    ),
    Mutant(
        "data-order",
        "qlora_jax/data/order.py",
        "np.random.default_rng((seed, 0, epoch))",
        "np.random.default_rng((seed, 0, 0))",
        "tests/data/test_batches.py",
    ),
    Mutant(
        "packed-first-token",
        "qlora_jax/data/layout.py",
        'batch["weights"][i, start] = 0',
        "pass",
        "tests/data/test_batches.py",
    ),
    Mutant(
        "step-of-an-epoch",
        "qlora_jax/data/batches.py",
        "lead = -begin % self.rows",
        "lead = 0",
        "tests/data/test_batches.py",
    ),
    Mutant(
        "resume-figures",
        "qlora_jax/train/loop.py",
        'rows = [row for row in log.kept if "loss" in row]',
        "rows = []",
        "tests/train/test_trainer.py::test_a_finished_run_can_be_resumed_and_stays_as_it_is",
    ),
    Mutant(
        "resume-dropout",
        "qlora_jax/train/steps.py",
        "None if self._key is None else jax.random.fold_in(self._key, step)",
        "self._key",
        "tests/train/test_trainer.py::"
        "test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped",
    ),
    Mutant(
        "peft-names",
        "qlora_jax/exchange/peft/write.py",
        'else names[first].rpartition(".")[2]',
        'else names[first].rpartition(".")[0]',
        "tests/exchange/test_peft.py",
    ),
    Mutant(
        "lora-scale",
        "qlora_jax/nn/lora.py",
        "return alpha / (math.sqrt(rank) if rslora else rank)",
        "return alpha / (rank if rslora else math.sqrt(rank))",
        "tests/nn/test_lora.py tests/adapters/test_variants.py",
    ),
    Mutant(
        "rope",
        "qlora_jax/nn/rope.py",
        "rotated = [first * cos - second * sin, second * cos + first * sin, rest]",
        "rotated = [first * cos + second * sin, second * cos - first * sin, rest]",
        "tests/nn/test_rope.py",
    ),
    Mutant(
        "attention-window",
        "qlora_jax/nn/attention.py",
        "seen & (q - k < window)",
        "seen & (q - k <= window)",
        "tests/nn/test_attention.py",
    ),
    Mutant(
        "blocks-of-documents",
        "qlora_jax/nn/blocked.py",
        "seen = (apart >= 0) & (apart <= reach[:, :, None])",
        "seen = (apart >= 0) & (apart <= reach[:, :, None] + 1)",
        "tests/nn/test_attention.py",
    ),
    Mutant(
        "blocks-all-met",
        "qlora_jax/nn/blocked.py",
        "return jnp.min(own - reach, axis=(1, 2)) // size",
        "return jnp.min(own - reach, axis=(1, 2)) * 0",
        "tests/nn/test_attention.py",
    ),
    Mutant(
        "experts-all-met",
        "qlora_jax/nn/grouped.py",
        "lax.fori_loop(0, jnp.sum(ends > starts), expert, y)",
        "lax.fori_loop(0, len(ends), expert, y)",
        "tests/nn/test_moe.py",
    ),
    Mutant(
        "experts-gradient",
        "qlora_jax/nn/grouped.py",
        "return jnp.sum(each.astype(jnp.float32), axis=1).astype(dy.dtype), None, None",
        "return each[:, 0], None, None",
        "tests/nn/test_moe.py",
    ),
    Mutant(
        "optimizer-offload",
        "qlora_jax/optim/offload.py",
        "leaves[i] = jax.device_put(leaves[i], rest)",
        "leaves[i] = jax.device_put(leaves[i], jax.memory.Space.Device)",
        "tests/optim/test_offload.py",
    ),
    Mutant(
        "lora-plus",
        "qlora_jax/optim/lora_plus.py",
        "return FASTER in names and EMBEDDING not in names",
        "return FASTER in names",
        "tests/optim/test_lora_plus.py",
    ),
    Mutant(
        "gptq-zeros",
        "qlora_jax/sources/encoded/gptq.py",
        "stored = stored + np.uint32(_ONES[bits])",
        "stored = stored | np.uint32(_ONES[bits])",
        "tests/sources/test_encoded.py",
    ),
    Mutant(
        "gguf-rows",
        "qlora_jax/sources/gguf/forms.py",
        "halves = (-1, 2) if undo else (2, -1)",
        "halves = (2, -1)",
        "tests/sources/test_gguf.py",
    ),
    Mutant(
        "chat-mask",
        "qlora_jax/data/tokenize.py",
        "outside = float(config.train_on_prompt)",
        "outside = 1.0",
        "tests/data/test_dataset.py",
    ),
    Mutant(
        "adapter-algebra",
        "qlora_jax/adapters/algebra.py",
        "assemble(concatenated(read([a, b]), [1.0, -1.0])",
        "assemble(concatenated(read([a, b]), [1.0, 1.0])",
        "tests/adapters/test_algebra.py",
    ),
    Mutant(
        "fingerprint",
        "qlora_jax/adapters/fingerprint.py",
        "if wrong.any():",
        "if wrong.any() and a.sum() < b.sum():",
        "tests/adapters/test_fingerprint.py",
    ),
    Mutant(
        "segments",
        "qlora_jax/models/spec.py",
        "return range(self.start + slot, self.start + self.repeats * step, step)",
        "return range(self.start, self.start + self.repeats * step, step)",
        "tests/models/test_segments.py",
    ),
    Mutant(
        "memory-model",
        "qlora_jax/budget/estimate.py",
        '("layer", "turn"): a_layer * (turns - 1)',
        '("layer", "turn"): a_layer * turns',
        "tests/budget/test_memory.py",
    ),
    Mutant(
        "plans-margin",
        "qlora_jax/budget/plan.py",
        "if need.safe_bytes <= memory and",
        "if need.device_bytes <= memory and",
        "tests/budget/test_memory.py",
    ),
    Mutant(
        "import-circle",
        "qlora_jax/sources/gguf/config.py",
        "from qlora_jax.models import DecoderConfig, read_config",
        "from qlora_jax.models import DecoderConfig, read_config\n"
        "from qlora_jax.sources import load",
        "tests/test_imports.py",
    ),
)


def change(text: str, mutant: Mutant) -> str:
    """Returns a file's text with a mutant's change.

    Raises:
      SystemExit: the file does not have the old text exactly once.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} has {mutant.old!r} {count} times, expected "
            "once; change the table of scripts/make/mutants.py"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests of a tree until one fails; returns pytest's status and its output."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a change may keep a file's size and second
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stdout


def failed_test(output: str) -> str | None:
    """Returns the test that pytest says failed, or whose fixture did."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S.*?)(?: - |$)", output, re.MULTILINE)
    return found and found[1]


def verdict(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Returns whether a mutant was caught, and by which test, or why it was not."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(change(original, mutant))
    try:
        # Single tests are run though they are slow; of files only what is quick.
        quick = [] if "::" in mutant.tests else ["-m", "not slow"]
        status, output = run_tests(tree, [*mutant.tests.split(), *quick])
    finally:
        path.write_text(original)
    test = failed_test(output)
    if status == 0:
        return False, f"SURVIVED {mutant.tests}"
    if status != TESTS_FAILED or test is None:
        return False, f"pytest ended with status {status}:\n{output[-3000:]}"
    status, output = run_tests(tree, [test])
    if status != 0:
        return False, f"{test} fails without the change too:\n{output[-3000:]}"
    return True, f"caught by {test}"


def main() -> None:
    """Runs the mutants that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what would be changed")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or m.name in args.only]
    for mutant in chosen:
        change((ROOT / mutant.file).read_text(), mutant)  # wrong tables end here
        if args.list:
            print(f"{mutant.name}\n  {mutant.file}: {mutant.old}\n  -> {mutant.new}")
    if args.list:
        return
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
        for mutant in chosen:
            began = time.monotonic()
            caught, said = verdict(tree, mutant)
            seconds = time.monotonic() - began
            print(f"{mutant.name:<20} {said} ({seconds:.0f} s)", flush=True)
            if not caught:
                survived.append(mutant.name)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants were caught")
    if survived:
        raise SystemExit(f"not caught: {', '.join(survived)}")


if __name__ == "__main__":
    main()
