"""Trainer: steps, eval losses, metrics, checkpoints, and resuming exactly."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.attach import join, split
from qlora_jax.adapters.attached import base_fingerprint, lora_config
from qlora_jax.adapters.names import explicit_layers
from qlora_jax.config.data import Packing
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.run import FILE
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import Dataset
from qlora_jax.errors import OutputExistsError, QLoRAError
from qlora_jax.exchange.metadata import ADAPTER, METADATA, adapter_metadata
from qlora_jax.exchange.ours import check_free, save_adapter
from qlora_jax.exchange.steps import CHECKPOINTS, END, EVAL_LOSS
from qlora_jax.models.streaming import stream
from qlora_jax.objectives import SFT, Objective
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.checkpoints import RunCheckpoints
from qlora_jax.train.feed import Feed
from qlora_jax.train.figures import any_finite, figures_of, problem_of
from qlora_jax.train.lock import locked
from qlora_jax.train.metrics import MetricsLog, device_memory_bytes
from qlora_jax.train.not_finite import all_finite, first_not_finite
from qlora_jax.train.optimizer import make_optimizer, make_schedule
from qlora_jax.train.position import identity_of
from qlora_jax.train.state import TrainState, settled
from qlora_jax.train.steps import Fed, Steps, batches_of

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]
"""Called with each step's metrics, and with eval losses."""


class DivergedError(QLoRAError, ArithmeticError):
    """The loss became NaN or Inf."""


class _Taken(NamedTuple):
    """A step that the device may still be at.

    Attributes:
      number: Steps taken with it.
      metrics: What it measures, on the device.
      tokens: Tokens of its documents.
    """

    number: int
    metrics: dict[str, jax.Array]
    tokens: int


class Trainer:
    """Trains an adapter in a run folder.

    What a step has measured is read when the next is on its way, so that the device does not
    wait for that; what it takes is made ahead (`Steps`).

    Attributes:
      steps: Optimizer steps of the whole run.
      batches: What they take.
      objective: What is minimized.
      graphdef, base: The model's parts that stay.
      state: What the run is now: steps taken, adapter, the optimizer's state.
      start: Steps that were taken before this process.
    """

    def __init__(
        self,
        model: nnx.Module,
        train: Dataset,
        config: TrainConfig,
        out: Path,
        *,
        evaluation: Dataset | None = None,
        lora: LoRAConfig | None = None,
        objective: Objective | None = None,
        packing: Packing = "auto",
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
        identity: Mapping[str, Any] | None = None,
    ):
        """Prepares a run; nothing is written yet.

        Args:
          model: A model with an adapter attached.
          train: Rows to train on.
          config: The settings of training.
          out: The run folder.
          evaluation: Held-out rows.
          lora: The LoRAConfig that the adapter was attached with; None reads it off the
            model.
          objective: What is minimized; None for SFT.
          packing: How rows make batches, see `DataConfig.packing`.
          tokenizer: Saved with the adapter, where tokens were added.
          progress: Called with each step's metrics, and with eval losses.
          identity: What else tells this run from others, such as digests of its base: JSON
            values by name, which a checkpoint keeps and a resumed run has to have too.

        Raises:
          ConfigError: rows have not what the objective needs, or they cannot be packed as
            asked.
        """
        self.config, self.out = config, Path(out)
        self.train_data, self.eval_data = train, evaluation
        self.objective = objective or SFT
        self.batches = batches_of(train, config, self.objective, packing)
        self.lora_config = lora or lora_config(model)
        self._tokenizer = tokenizer
        self.steps = config.steps(self.batches.steps)
        schedule = make_schedule(config, self.steps)(np.arange(self.steps))
        self._learning_rates = np.broadcast_to(schedule, (self.steps,))
        tx = make_optimizer(config, self.steps)
        self.graphdef, lora_state, self.base = split(model)
        if config.stream:
            self.base = stream(self.base)
        # A copy, because the step donates it and the caller keeps the model.
        fresh = settled(jax.tree.map(jnp.copy, lora_state))
        self.state = TrainState(0, fresh, settled(tx.init(fresh)))
        self._steps = Steps(
            self.graphdef,
            tx,
            self.batches,
            config,
            self.objective,
            dropout=self.lora_config.dropout > 0,
        )
        self._progress = progress or (lambda metrics: None)
        self._identity = identity_of(
            config,
            train,
            evaluation,
            self.objective,
            self.lora_config,
            self.batches.packing,
        ) | dict(identity or {})
        self._taken: _Taken | None = None
        self._read_at = 0.0
        self._stop: Callable[[], bool] = lambda: False
        self._saved_at = time.monotonic()
        self._checkpoints = RunCheckpoints(
            self.out / CHECKPOINTS, config.keep_checkpoints
        )
        self._restored: Path | None = None
        self._before: nnx.State | None = None
        self.start = 0

    @property
    def lora(self) -> nnx.State:
        """The adapter as it is now."""
        return self.state.lora

    @property
    def opt_state(self) -> Any:
        """The optimizer's state as it is now."""
        return self.state.opt_state

    @property
    def model(self) -> Any:
        """The model with the adapter as it is now."""
        return join(self.graphdef, self.lora, self.base)

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.state.step >= self.steps

    def restore(self, *, may_differ: Collection[str] = ()) -> None:
        """Takes the state of the newest checkpoint of the run folder that is whole.

        Args:
          may_differ: What of the checkpoint's position may be otherwise: "steps", where the
            run is to end at another step.

        Raises:
          CheckpointError: there is none, none is whole, or it is of another run.
        """
        self.state = self._checkpoints.restore(
            self.state, self._position(None), may_differ=frozenset(may_differ)
        )
        self.start = self.state.step
        self._restored = self._checkpoints.folder / str(self.start)

    def fit(
        self, *, resume: bool = False, stop: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        """Runs to the last step, or until it is told to stop.

        Args:
          resume: Continue from the newest checkpoint of the run folder that is whole, if
            `restore` has not taken it yet.
          stop: Asked after each step, and between the batches of an evaluation; when it
            says yes, the run saves a checkpoint and its adapter, and returns.

        Returns:
          Figures of the whole run: steps taken, loss (mean of the last tenth), tokens, where
          rows are held out the best checkpoint; and the seconds that this call took.

        Raises:
          DivergedError: the loss is not finite; the last checkpoint is kept.
          CheckpointError: nothing to resume from, or a checkpoint of another run.
          OutputExistsError: the folder holds a run, and resume is false; or its adapter/ is
            no adapter.
          LockedError: another process trains in the folder.
          SaveError: a checkpoint could not be written.
        """
        self._stop = stop or self._stop
        check_free(self.out / ADAPTER, overwrite=True)  # and not after the last step
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out):
            failed = True
            try:
                with contextlib.closing(self._begun(resume)) as log:
                    figures = self._run(log)
                failed = False
            finally:
                self._checkpoints.close(failed)
        return figures

    def _begun(self, resume: bool) -> MetricsLog:
        """Restores the state of a run that goes on, if need be; opens the log."""
        path = self.out / "metrics.jsonl"
        if resume:
            if self._restored is None:
                self.restore()
            assert self._restored is not None
            copy = self._restored / path.name
            return MetricsLog(path, self.start, copy if copy.is_file() else None)
        if (latest := self._checkpoints.latest) is not None:
            raise OutputExistsError(
                f"{self.out} holds a run of {latest} steps; resume it, or choose another folder"
            )
        return MetricsLog(path, -1)

    def evaluate(self, dataset: Dataset) -> float:
        """Returns the objective's mean loss, a token unless it has another normalizer."""
        measured = self._steps.evaluate(self.lora, self.base, dataset, lambda: None)
        return measured["eval_loss"]

    def _run(self, log: MetricsLog) -> dict[str, Any]:
        began = time.monotonic()
        # Figures are of the whole run, also where this process took only its end.
        rows = [row for row in log.kept if "loss" in row]
        try:
            logger.info("%s", self.batches.said())
            self._steps.compile(
                self.state,
                self.base,
                self.eval_data,
                evaluates_first=self._eval_due(),
            )
            with contextlib.closing(self._steps.feed(self.steps)) as feed:
                self._take_steps(log, rows, feed)
        except _Stopped:
            self._save(log)
        if self.finished and rows and not any_finite(rows[-1:]):
            self._diverged(self.steps, "the loss is not finite")
        self._checkpoints.wait()
        save_adapter(
            self.out / ADAPTER,
            self.lora,
            self.lora_config,
            tokenizer=self._tokenizer,
            overwrite=True,
        )
        best = self._checkpoints.best
        return {
            "steps": self.state.step,
            **figures_of(rows),
            **({"best_checkpoint": best[0], "best_eval_loss": best[1]} if best else {}),
            "seconds": round(time.monotonic() - began, 1),
        }

    def _take_steps(
        self,
        log: MetricsLog,
        rows: list[dict[str, Any]],
        feed: Feed[Fed],
    ) -> None:
        """Takes what is left of the run's steps.

        Raises:
          _Stopped: it was told to stop.
        """
        config = self.config
        # A run may have been stopped, or killed, before it had measured this.
        if self._eval_due() and self._eval_loss(log) is None:
            self._log_eval(log)
        self._read_at = time.monotonic()
        while not self.finished:
            if self._stop():
                self._read(log, rows)
                raise _Stopped
            before, fed = self._taken, feed(self.state.step)
            if config.check_finite:
                self._before = jax.tree.map(jnp.copy, self.lora)
            self.state, metrics = self._steps.take(self.state, self.base, fed)
            self._taken = _Taken(self.state.step, metrics, fed.tokens)
            if before is not None:
                self._log_step(before, log, rows)
            save = self._due(config.save_every) or self._save_is_due()
            if save or self._eval_due() or config.check_finite:
                self._read(log, rows)
            if self._eval_due():
                self._log_eval(log)
            if save:
                self._save(log)
            if self._taken is None:
                self._read_at = time.monotonic()
            self._checkpoints.check()

    def _read(self, log: MetricsLog, rows: list[dict[str, Any]]) -> None:
        """Waits for the step that was taken last, and logs it."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._log_step(taken, log, rows)

    def _log_step(
        self, taken: _Taken, log: MetricsLog, rows: list[dict[str, Any]]
    ) -> None:
        """Waits for a step, and logs it."""
        measured = {name: float(value) for name, value in taken.metrics.items()}
        now = time.monotonic()
        seconds, self._read_at = now - self._read_at, now
        row = {
            "step": taken.number,
            **measured,
            "learning_rate": self._learning_rates[taken.number - 1].item(),
            "tokens_per_s": round(taken.tokens / seconds, 1),
            "device_memory_bytes": device_memory_bytes(),
        }
        log.write(**row)
        self._progress(row)
        rows.append(row)
        self._check_finite(rows)

    def _save_is_due(self) -> bool:
        """Whether a checkpoint is due besides those of `save_every`."""
        minutes = self.config.save_minutes
        waited = time.monotonic() - self._saved_at
        return self.state.step == 1 or (minutes is not None and waited >= 60 * minutes)

    def _save(self, log: MetricsLog) -> None:
        """Saves a checkpoint; it is on the disk when the next one is begun, or the run ends."""
        if not all_finite(self.lora):
            what = "the adapter has values that are not finite"
            self._diverged(self.state.step, what)
        metrics, lora, config = log.text, self.lora, self.out / FILE
        settings = config.read_bytes() if config.is_file() else None
        mark, layers = base_fingerprint(lora), explicit_layers(lora, self.lora_config)

        def beside(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
            text = adapter_metadata(arrays, self.lora_config, mark, layers)
            (folder / METADATA).write_text(text, encoding="utf-8")
            (folder / "metrics.jsonl").write_text(metrics, encoding="utf-8")
            if settings is not None:
                (folder / FILE).write_bytes(settings)
            if self._tokenizer is not None:
                self._tokenizer.save(folder)

        position = self._position(self._eval_loss(log))
        self._checkpoints.save(self.state, position, beside=beside)
        self._saved_at = time.monotonic()

    def _eval_due(self) -> bool:
        """Whether an eval loss is due now: it is before the first step, too."""
        if self.eval_data is None:
            return False
        return self.state.step == 0 or self._due(self.config.eval_every)

    def _eval_loss(self, log: MetricsLog) -> float | None:
        """Returns the eval loss that was measured after the step that was taken last."""
        return dict(log.eval_losses).get(self.state.step)

    def _due(self, every: int | None) -> bool:
        """Whether what happens after each so many steps, and the last, happens now."""
        step = self.state.step
        return step == self.steps or (every is not None and step % every == 0)

    def _check_finite(self, rows: list[dict[str, Any]]) -> None:
        """Ends a run that diverged."""
        what = problem_of(rows, self.config)
        if self.config.check_finite and not all_finite(self.lora):
            what = "the adapter has values that are not finite"
        if what is not None:
            self._diverged(rows[-1]["step"], what)

    def _diverged(self, step: int, what: str) -> None:
        latest = self._checkpoints.latest
        kept = (
            "There is no checkpoint yet."
            if latest is None
            else f"{self._checkpoints.folder / str(latest)} is the last good checkpoint."
        )
        if self._before is not None:
            what += f"; the first that is not finite is {self._first_not_finite(step)}"
        elif not self.config.check_finite:
            what += " (--train.check-finite names where it begins)"
        raise DivergedError(
            f"step {step}: {what}. Lower --train.learning-rate, or compute in bfloat16 or "
            f"float32. {kept}"
        )

    def _first_not_finite(self, step: int) -> str:
        assert self._before is not None
        key, batch = self._steps.key(step - 1), self.batches.at(step - 1)
        parts = (self.graphdef, self._before, self.lora, self.base)
        found = first_not_finite(*parts, batch, self.objective, key)
        return found or "not found again when the step is computed a second time"

    def _log_eval(self, log: MetricsLog) -> None:
        """Measures and logs the eval loss; saves a checkpoint where it is the least yet."""
        assert self.eval_data is not None
        step = self.state.step

        def going() -> None:
            if self._stop():
                raise _Stopped

        parts = self.lora, self.base, self.eval_data
        row = {"step": step, **self._steps.evaluate(*parts, going)}
        before = [loss for at, loss in log.eval_losses if at > 0]
        log.write(**row)
        self._progress(row)
        if not np.isfinite(row["eval_loss"]):
            what = f"the eval loss is {row['eval_loss']}"
            self._diverged(step, what)
        if step > 0 and row["eval_loss"] < min(before, default=np.inf):
            self._save(log)

    def _position(self, eval_loss: float | None) -> dict[str, Any]:
        return {**self._identity, END: self.steps, EVAL_LOSS: eval_loss}


class _Stopped(Exception):
    """The run was told to stop."""
