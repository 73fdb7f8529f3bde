"""Progress on stderr, of rows and of training; plain lines where that is no terminal."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from qlora_jax.objectives.base import RESERVED

LINE_SECONDS = 10.0
"""Between lines where there is no terminal."""


class RowsProgress:
    """Counts rows as they are tokenized; a context manager. Short work shows nothing."""

    def __init__(self, done: str = "tokenized"):
        self._done = done
        self._console = Console(stderr=True)
        self._status = None
        self._began = self._last = time.monotonic()
        self._name = ""

    def __enter__(self) -> "RowsProgress":
        """Begins."""
        return self

    def __exit__(self, *error: object) -> None:
        """Takes the line away."""
        if self._status is not None:
            self._status.stop()

    def __call__(self, name: str, done: int) -> None:
        """Takes how many rows of a source are done."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._began, self._last = name, now, now
        if sys.stderr.isatty():
            text = f"{name}: {done:,} rows {self._done}"
            if self._status is None:
                self._status = self._console.status(text)
                self._status.start()
            self._status.update(text)
        elif now - self._last > LINE_SECONDS:
            self._last = now
            rate = done / (now - self._began)
            self._console.print(
                f"{name}: {done:,} rows {self._done}, {rate:,.0f} a second",
                highlight=False,
            )


class TrainProgress:
    """Shows metrics as they come; a context manager."""

    def __init__(self):
        self._console = Console(stderr=True)
        self._live = sys.stderr.isatty()
        self._steps, self._last, self._eval = 0, 0.0, ""
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=None, text="compiling")

    def expect(self, steps: int) -> None:
        """Takes the number of steps of the run."""
        self._steps = steps
        self._bar.update(self._task, total=steps)

    def __enter__(self) -> "TrainProgress":
        """Starts the bar."""
        self._bar.start()
        self._say("compiling the evaluation and the step")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the bar."""
        self._bar.stop()

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Takes a step's metrics or an eval loss."""
        if "eval_loss" in metrics:
            self._eval = f"  eval {metrics['eval_loss']:.4f}"
            text = f"step {metrics['step']}: eval loss {metrics['eval_loss']:.4f}"
            for name, value in metrics.items():
                if name not in RESERVED:  # the objective's own
                    text += f"  {name.removeprefix('eval_')} {value:.4f}"
            self._say(text)
            return
        text = f"loss {metrics['loss']:.4f}{self._eval}"
        for name, value in metrics.items():
            if name not in RESERVED:  # the objective's own
                text += f"  {name} {value:.4f}"
        text += f"  {metrics['tokens_per_s']:.0f} tok/s"
        self._bar.update(self._task, completed=metrics["step"], text=text)
        now = time.monotonic()
        if now - self._last > LINE_SECONDS or metrics["step"] == self._steps:
            self._last = now
            self._say(f"step {metrics['step']}/{self._steps}: {text}")

    def _say(self, text: str) -> None:
        if not self._live:
            self._console.print(text, highlight=False)
