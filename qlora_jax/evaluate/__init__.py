"""Evaluation: perplexity of text, loss and exact match of rows."""

from qlora_jax.evaluate.exact_match import exact_match as exact_match
from qlora_jax.evaluate.perplexity import perplexity as perplexity
from qlora_jax.evaluate.perplexity import row_loss as row_loss
from qlora_jax.evaluate.perplexity import row_losses as row_losses
