"""Training: the step and its gradient, the loop with checkpoints and metrics."""

from qlora_jax.train.step import make_train_step as make_train_step
