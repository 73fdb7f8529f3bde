"""A run's steps and evaluations are compiled, and fed with batches, before they are due."""

import logging
import time
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from qlora_jax.config.data import Packing
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import Dataset
from qlora_jax.data.batches import Batches, Every, resolve
from qlora_jax.objectives import Objective
from qlora_jax.train.feed import Feed
from qlora_jax.train.state import TrainState
from qlora_jax.train.step import make_eval_step, make_train_step

logger = logging.getLogger(__name__)

Program = tuple[str, Any]
"""A program is what lines call it, and its jitted function."""


def batches_of(
    data: Dataset,
    config: TrainConfig,
    objective: Objective,
    packing: Packing,
    late: Collection[str] = (),
) -> Batches:
    """Returns the batches of a run.

    Args:
      data: The rows.
      config: The settings of training.
      objective: What is minimized.
      packing: How rows make batches, see `DataConfig.packing`.
      late: What rows will have of what the objective needs, and have not yet.

    Raises:
      ConfigError: they cannot be packed as asked, or have not what the objective needs.
    """
    batches = data.batches(
        documents=config.micro_batch * config.grad_accum,
        micro_batch=config.micro_batch,
        seed=config.seed,
        packing=resolve(packing, data, objective.packs, objective.name),
    )
    objective.check({**dict.fromkeys(late), **batches.at(0)})
    return batches


class Fed(NamedTuple):
    """A step takes this beside a run's state.

    Attributes:
      batch: Its arrays, on the device.
      key: The random key for dropout; None switches it off.
      tokens: Tokens of its documents.
    """

    batch: dict[str, jax.Array]
    key: jax.Array | None
    tokens: int


class Steps:
    """Takes steps, and evaluates.

    The device does not wait for the host: a step's batch is made and put there by a thread
    while earlier steps run. A program for each length of the batches, of which there are
    three at most, is compiled ahead.

    Attributes:
      batches: What the steps take.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformation,
        batches: Batches,
        config: TrainConfig,
        objective: Objective,
        *,
        dropout: bool,
    ):
        """Makes the programs; nothing is compiled yet.

        Args:
          graphdef: The graphdef of the model, from `split`.
          tx: The optimizer.
          batches: What the steps take.
          config: The settings of training.
          objective: What is minimized.
          dropout: Whether the adapter has any.
        """
        self.batches, self._config = batches, config
        self._train_step: Any = make_train_step(
            graphdef,
            tx,
            checkpoint=config.checkpoint,
            objective=objective,
            sums_on_host=config.offload,
            router_aux_loss=config.router_aux_loss,
        )
        self._eval_step: Any = make_eval_step(graphdef, objective=objective)
        self._key = jax.random.key(config.seed) if dropout else None
        self._compiling: dict[Hashable, Future[None]] = {}
        self._evaluated: tuple[Dataset, Every] | None = None

    def key(self, step: int) -> jax.Array | None:
        """Returns the random key of a step's dropout."""
        return None if self._key is None else jax.random.fold_in(self._key, step)

    def compile(
        self,
        state: TrainState,
        base: nnx.State,
        evaluation: Dataset | None,
        *,
        evaluates_first: bool,
    ) -> None:
        """Begins to compile, each program in a thread; a line says when one is ready.

        Functions are traced here, in the caller's contexts. Rows as they are drawn have many
        lengths, of which a run may meet few: those are compiled when they come.

        Args:
          state, base: The run's state and its base, to compile for.
          evaluation: Rows that will be evaluated; None for none.
          evaluates_first: Whether that is before the first step.
        """
        if self.batches.packing == "drawn":
            return
        trains: Program = "the step", self._train_step
        evaluates: Program = "the evaluation", self._eval_step
        held = [] if evaluation is None else self._every(evaluation).examples()
        key, kept = self.key(0), (state.lora, base)
        programs = [
            (trains, batch, (*kept, state.opt_state, batch, key))
            for batch in self.batches.examples()
        ]
        evals = [(evaluates, batch, (*kept, batch)) for batch in held]
        programs = evals + programs if evaluates_first else programs + evals
        threads = ThreadPoolExecutor(len(programs), "compile")
        for (name, jitted), batch, arguments in programs:
            shape = batch["tokens"].shape
            began, lowered = time.monotonic(), jitted.lower(*arguments)
            done = threads.submit(_compiled, f"{name} for {shape}", lowered, began)
            self._compiling[jitted, shape] = done
        threads.shutdown(wait=False)

    def feed(self, end: int) -> Feed[Fed]:
        """Returns what makes the batches of the steps before `end` ahead."""
        return Feed(self._fed, end)

    def take(
        self, state: TrainState, base: nnx.State, fed: Fed
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Sends the device on its way to a run's next state.

        Returns:
          The state after the step, and the step's metrics; the device may be at it still.
        """
        self._wait(self._train_step, fed.batch)
        lora, opt_state, metrics = self._train_step(
            state.lora, base, state.opt_state, fed.batch, fed.key
        )
        return TrainState(state.step + 1, lora, opt_state), metrics

    def evaluate(
        self,
        lora: nnx.State,
        base: nnx.State,
        dataset: Dataset,
        going: Callable[[], None],
    ) -> dict[str, float]:
        """Measures the objective on rows.

        Returns:
          eval_loss, the mean loss, a token unless the objective has another normalizer; and
          the objective's own metrics under their names with eval_ before them.

        Args:
          lora, base: The adapter and its base.
          dataset: The rows; each counts once.
          going: Called before each batch; it may raise.
        """
        waiting, totals = [], dict[str, np.ndarray]()

        def add(loss: Any, normalizer: Any, metrics: dict[str, Any]) -> None:
            for name, pair in {"loss": (loss, normalizer), **metrics}.items():
                sums = np.array(pair, np.float64)
                totals[name] = totals.get(name, np.zeros(2)) + sums

        for batch in self._every(dataset):
            going()
            self._wait(self._eval_step, batch)
            waiting.append(self._eval_step(lora, base, batch))
            if len(waiting) > 1:  # the device is at the last one meanwhile
                add(*waiting.pop(0))
        add(*waiting.pop(0))
        return {
            f"eval_{name}": float(total / count) if count else 0.0
            for name, (total, count) in totals.items()
        }

    def _fed(self, step: int) -> Fed:
        batch = jax.device_put(self.batches.at(step))
        return Fed(batch, self.key(step), self.batches.tokens(step))

    def _every(self, dataset: Dataset) -> Every:
        """Returns the batches of an evaluation; those of the last dataset are kept."""
        if self._evaluated is None or self._evaluated[0] is not dataset:
            every = dataset.every(self._config.micro_batch, self.batches.packing)
            self._evaluated = dataset, every
        return self._evaluated[1]

    def _wait(self, jitted: Any, batch: dict[str, Any]) -> None:
        """Waits until a program is ready, if it was begun; raises what compiling it did."""
        compiling = self._compiling.get((jitted, batch["tokens"].shape))
        if compiling is not None:
            compiling.result()


def _compiled(what: str, lowered: Any, began: float) -> None:
    """Compiles a program, which calls of its function then find."""
    lowered.compile()
    logger.info("compiled %s in %.1f s", what, time.monotonic() - began)
