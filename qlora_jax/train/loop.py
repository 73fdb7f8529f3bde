"""Trainer: steps, eval losses, metrics, checkpoints, and resuming exactly."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.attach import join, split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import Dataset
from qlora_jax.errors import OutputExistsError, QLoRAError
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.models.streaming import stream
from qlora_jax.objectives import Objective, find_objective
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.checkpoints import RunCheckpoints
from qlora_jax.train.metrics import MetricsLog, device_memory_bytes
from qlora_jax.train.optimizer import make_optimizer, make_schedule
from qlora_jax.train.state import TrainState
from qlora_jax.train.step import make_eval_step, make_train_step

Progress = Callable[[dict[str, Any]], None]
"""Called with each step's metrics, and with eval losses."""


OVERFLOWS = 5
"""Losses in a row that are not finite, at which a float16 run ends."""


class DivergedError(QLoRAError, ArithmeticError):
    """The loss became NaN or Inf."""


class Trainer:
    """Trains an adapter in a run folder.

    Attributes:
      steps: Optimizer steps of the whole run.
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
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
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
          objective: What is minimized, in place of the one that `config` names.
          tokenizer: Saved with the adapter, where tokens were added.
          progress: Called with each step's metrics, and with eval losses.

        Raises:
          ConfigError: there is no such objective, or rows have not what it needs.
        """
        self.config, self.out = config, Path(out)
        self.train_data, self.eval_data = train, evaluation
        self.objective = objective or find_objective(config.objective)
        self.objective.check(train.batch(0, 1, config.seed))
        self.lora_config = lora or lora_config(model)
        self._tokenizer = tokenizer
        self.steps = config.steps(train.epoch_rows)
        self.schedule = make_schedule(config, self.steps)
        tx = make_optimizer(config, self.steps)
        self.graphdef, lora_state, self.base = split(model)
        if config.stream:
            self.base = stream(self.base)
        # A copy, because the step donates it and the caller keeps the model.
        fresh = _settled(jax.tree.map(jnp.copy, lora_state))
        self.state = TrainState(0, fresh, _settled(tx.init(fresh)))
        self._train_step = make_train_step(
            self.graphdef,
            tx,
            checkpoint=config.checkpoint,
            objective=self.objective,
            sums_on_host=config.offload,
        )
        self._eval_step = make_eval_step(self.graphdef, objective=self.objective)
        self._progress = progress or (lambda metrics: None)
        self._key = jax.random.key(config.seed)
        self._dropout = self.lora_config.dropout > 0
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

    def fit(self, *, resume: bool = False) -> dict[str, Any]:
        """Runs to the last step.

        Args:
          resume: Continue from the newest checkpoint of the run folder.

        Returns:
          Figures of the whole run: steps, loss (mean of the last tenth), tokens; and the
          seconds that this call took.

        Raises:
          DivergedError: the loss is not finite; the last checkpoint is kept.
          CheckpointError: nothing to resume from, or a checkpoint of another run.
          OutputExistsError: the folder holds a run, and resume is false.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoints = RunCheckpoints(
            self.out / "checkpoints", self.config.keep_checkpoints
        )
        try:
            if resume:
                self.state = checkpoints.restore(self.state, self._position())
                self.start = self.state.step
            elif checkpoints.latest is not None:
                raise OutputExistsError(
                    f"{self.out} holds a run of {checkpoints.latest} steps; resume it, or "
                    "choose another folder"
                )
            log = MetricsLog(self.out / "metrics.jsonl", self.start if resume else -1)
            try:
                return self._run(checkpoints, log)
            finally:
                log.close()
        finally:
            checkpoints.close()

    def evaluate(self, dataset: Dataset) -> float:
        """Returns the objective's mean loss, a token unless it has another normalizer."""
        total, count = 0.0, 0.0
        for batch in dataset.in_order(self.config.micro_batch):
            loss, normalizer = self._eval_step(self.lora, self.base, batch)
            total, count = total + float(loss), count + float(normalizer)
        return total / count

    def _run(self, checkpoints: RunCheckpoints, log: MetricsLog) -> dict[str, Any]:
        config, began = self.config, time.monotonic()
        evaluated = self.eval_data is not None
        if evaluated and self.start == 0:
            self._log_eval(log)
        # Figures are of the whole run, also where this process took only its end.
        rows, overflows = [row for row in log.kept if "loss" in row], 0
        while self.state.step < self.steps:
            row = self._take_step()
            log.write(**row)
            self._progress(row)
            overflows = self._check_finite(row, overflows)
            rows.append(row)
            if evaluated and self._due(config.eval_every):
                self._log_eval(log)
            if self._due(config.save_every):
                checkpoints.save(self.state, self._position())
        if overflows or not _finite(self.lora):
            self._diverged(self.steps, "the adapter has values that are not finite")
        save_adapter(
            self.out / "adapter",
            self.lora,
            self.lora_config,
            tokenizer=self._tokenizer,
            overwrite=True,
        )
        return {
            "steps": self.steps,
            **_figures(rows),
            "seconds": round(time.monotonic() - began, 1),
        }

    def _take_step(self) -> dict[str, Any]:
        """Moves the run's state on by a step; returns the step's metrics."""
        began, step = time.monotonic(), self.state.step
        batch = self._batch(step)
        key = jax.random.fold_in(self._key, step) if self._dropout else None
        lora, opt_state, metrics = self._train_step(
            self.lora, self.base, self.opt_state, batch, key
        )
        self.state = TrainState(step + 1, lora, opt_state)
        row = {name: float(value) for name, value in metrics.items()}
        seconds = time.monotonic() - began
        return {
            "step": step + 1,
            **row,
            "learning_rate": np.asarray(self.schedule(step)).item(),
            "tokens_per_s": round(float(batch["tokens"].size) / seconds, 1),
            "device_memory_bytes": device_memory_bytes(),
        }

    def _due(self, every: int | None) -> bool:
        """Whether what happens after each so many steps, and the last, happens now."""
        step = self.state.step
        return step == self.steps or (every is not None and step % every == 0)

    def _check_finite(self, row: dict[str, Any], overflows: int) -> int:
        """Ends a run that diverged; returns the losses in a row that were not finite.

        In float16 a step whose gradients overflow is skipped and the loss scale lowered. A
        loss is of the forward pass, which no scale mends: one batch may do that, not many.
        """
        values = {"loss": row["loss"]}
        if self.config.compute_dtype != "float16":
            values["grad_norm"] = row["grad_norm"]
        for name, value in values.items():
            if not np.isfinite(value):
                overflows += 1
                allowed = 1 if len(values) > 1 else OVERFLOWS
                if overflows >= allowed:
                    said = "gradient's norm" if name == "grad_norm" else name
                    self._diverged(row["step"], f"the {said} is {value}")
                return overflows
        return 0

    def _diverged(self, step: int, what: str) -> None:
        raise DivergedError(
            f"step {step}: {what}. Lower --train.learning-rate, or compute in bfloat16 or "
            f"float32. {self.out / 'checkpoints'} keeps the last good checkpoint."
        )

    def _log_eval(self, log: MetricsLog) -> None:
        assert self.eval_data is not None
        step = self.state.step
        row = {"step": step, "eval_loss": self.evaluate(self.eval_data)}
        log.write(**row)
        self._progress(row)
        if not np.isfinite(row["eval_loss"]):
            self._diverged(step, f"the eval loss is {row['eval_loss']}")

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        c = self.config
        batch = self.train_data.batch(step, c.micro_batch * c.grad_accum, c.seed)
        if c.grad_accum == 1:
            return batch
        return {
            name: x.reshape(c.grad_accum, c.micro_batch, *x.shape[1:])
            for name, x in batch.items()
        }

    def _position(self) -> dict[str, Any]:
        c, data = self.config, self.train_data
        # Runs without shares wrote no more than their number of rows.
        shares = [[len(one.rows), one.weight] for one in data.shares]
        return {
            **({"shares": shares} if shares else {}),
            "seed": c.seed,
            "batch": c.micro_batch * c.grad_accum,
            "rows": len(data),
            "steps": self.steps,
            "compute_dtype": c.compute_dtype,
            "optimizer": c.optimizer,
            "objective": self.objective.name,
            "lora": self.lora_config.as_json(),
        }


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean loss of the last tenth of a run's steps, and its tokens."""
    last = rows[-max(1, len(rows) // 10) :]
    loss = {"loss": float(np.mean([row["loss"] for row in last]))} if rows else {}
    return {**loss, "tokens": sum((row["tokens"] for row in rows), 0.0)}


def _settled(tree: Any) -> Any:
    """Ties arrays to the devices they are on, as the step's results are.

    jit tells arrays that may still move from those that may not: without this the second
    step, and the second evaluation, would compile everything again.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def _finite(lora: nnx.State) -> bool:
    """Whether every value of an adapter is finite."""
    leaves = jax.tree.leaves(jax.tree.map(lambda x: jnp.isfinite(x).all(), lora))
    return bool(jnp.stack(leaves).all())
