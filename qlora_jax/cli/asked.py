"""The reference is asked once before a run trains (--objective.precompute-reference)."""

import dataclasses
import functools
import sys
from typing import Any

from qlora_jax.cli import options
from qlora_jax.cli.progress import RowsProgress
from qlora_jax.config.run import RunConfig
from qlora_jax.data import Dataset
from qlora_jax.objectives.reference import with_reference
from qlora_jax.sources.identity import identity_of
from qlora_jax.sources.source import Source


def asked_beforehand(
    config: RunConfig, source: Source, model: Any, rows: Dataset, held: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Returns the rows with what the reference says of them, said once or kept from before."""
    identity = {
        **identity_of(source),
        "quant": dataclasses.asdict(config.quant),
        "dtype": config.train.compute_dtype,
        "tokens": config.add_tokens,
    }
    found: list[Dataset | None] = []
    with RowsProgress("done") as progress:
        for name, some in (("training", rows), ("evaluation", held)):
            if some is None:
                found.append(None)
                continue
            print(
                f"the reference is asked once about {len(some)} rows of {name}, so that a step "
                "does not run it",
                file=sys.stderr,
            )
            told = functools.partial(progress, f"the reference, rows of {name}")
            found.append(
                with_reference(
                    *(some, model, config.train.micro_batch),
                    keep=options.rows_folder(),
                    identity=identity,
                    progress=told,
                )
            )
    assert found[0] is not None  # there are rows to train on
    return found[0], found[1]
