"""Evaluation: perplexity of text, loss and exact match of rows, choices by likelihood."""

from qlora_jax.evaluate.answers import extractor as extractor
from qlora_jax.evaluate.choices import ask as ask
from qlora_jax.evaluate.choices import choice_figures as choice_figures
from qlora_jax.evaluate.choices import score_choices as score_choices
from qlora_jax.evaluate.exact_match import answer_figures as answer_figures
from qlora_jax.evaluate.exact_match import exact_match as exact_match
from qlora_jax.evaluate.perplexity import perplexity as perplexity
from qlora_jax.evaluate.perplexity import row_loss as row_loss
from qlora_jax.evaluate.perplexity import row_losses as row_losses
from qlora_jax.evaluate.perplexity import window_losses as window_losses
