"""`qlora teach`: what a model says of rows, for another to learn by --objective distill."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qlora_jax.cli import options
from qlora_jax.cli.progress import RowsProgress
from qlora_jax.config.quant import QuantOptions
from qlora_jax.data import DataConfig, check_ids, read_dataset
from qlora_jax.data.layout import padded_length
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError

_DIGITS = 5
"""A log-probability has so many digits after the point in the file, which rounds it to 5e-6."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write rows with a teacher's most probable tokens, for `--objective distill`.

    The model that learns from them has to have the teacher's tokenizer.
    """

    model: str
    """Hugging Face folder, GGUF file or hub id of the teacher."""

    data_file: Annotated[tuple[str, ...], tyro.conf.arg(name="data")]
    """Rows, as `qlora train` takes them."""

    out: Path
    """File of JSON lines to write: input_ids, labels, teacher_ids and teacher_logprobs."""

    adapter: str | None = None
    """Run folder or adapter folder of the teacher."""

    top_k: int = 32
    """Tokens to write for each place; the others count as one in the loss."""

    temperature: float = 1.0
    """The logits are divided by this number; --objective.temperature has to be the same."""

    batch_size: int = 4
    """Rows in one forward pass."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Activations, and what stays dense of the model, have this dtype."""

    data: DataConfig = DataConfig()
    quant: QuantOptions = QuantOptions()


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    least = {"--top-k": args.top_k, "--batch-size": args.batch_size}
    for name, value in least.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    if not args.temperature > 0:
        raise ConfigError(f"--temperature is {args.temperature}, expected > 0")
    options.check_file("--out", args.out)
    model, tokenizer, said = options.open_model(
        args.model, args.adapter, args.quant, args.dtype
    )
    if tokenizer is None:
        raise DataError(
            f"{args.model} has no tokenizer.json, so rows are not tokenized"
        )
    size = model.head.out_features
    if args.top_k > size:
        raise ConfigError(f"--top-k is {args.top_k}, and the model has {size} tokens")
    with RowsProgress() as progress:
        rows = read_dataset(
            args.data_file,
            tokenizer,
            args.data,
            keep=options.rows_folder(),
            progress=progress,
        ).rows
    check_ids(rows, tokenizer, size)
    covered = []
    try:
        with (
            args.out.open("x", encoding="utf-8") as stream,
            RowsProgress("done") as progress,
        ):
            said_of = zip(rows, _said(model, rows, args), strict=True)
            for i, (row, (ids, logps)) in enumerate(said_of, 1):
                stream.write(_line(row, ids, logps) + "\n")
                covered += np.exp(logps[1:]).sum(axis=1).tolist()
                progress("the teacher", i)
    except BaseException:  # an interrupt, too
        args.out.unlink(missing_ok=True)
        raise
    return {
        **said,
        "out": str(args.out),
        "rows": len(rows),
        "tokens": len(covered),
        "probability_of_top": float(np.mean(covered)),
    }


def _line(row: Row, ids: np.ndarray, logps: np.ndarray) -> str:
    labels = np.where(row.weights > 0, row.tokens, -100)
    values = {
        "input_ids": row.tokens.tolist(),
        "labels": labels.tolist(),
        "teacher_ids": ids.tolist(),
        "teacher_logprobs": [
            [round(x, _DIGITS) for x in one] for one in logps.tolist()
        ],
    }
    return json.dumps(values, separators=(",", ":"))


def _said(
    model: Any, rows: list[Row], args: Args
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each row the teacher's tokens in the place of each, and what they have."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def top(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = nnx.merge(graphdef, state)
        hidden = model.hidden_states(tokens)

        def of_row(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.head(hidden).astype(jnp.float32) / args.temperature
            values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), args.top_k)
            return ids, values

        return jax.lax.map(of_row, hidden)  # a row's logits at a time

    for start in range(0, len(rows), args.batch_size):
        some = rows[start : start + args.batch_size]
        longest = max(len(row.tokens) for row in some)
        tokens = np.zeros(
            (args.batch_size, padded_length(longest, 2 * longest)), np.int32
        )
        for i, row in enumerate(some):
            tokens[i, : len(row.tokens)] = row.tokens
        ids, values = (np.asarray(x) for x in top(state, tokens))
        for i, row in enumerate(some):
            # What a place says is of the next token; the first has nothing before it.
            shifted = np.arange(len(row.tokens)) - 1
            shifted[0] = 0
            yield ids[i, shifted], values[i, shifted]
