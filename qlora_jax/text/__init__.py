"""Text: a model folder's tokenizer, its chat templates, and which part of a chat trains."""

from qlora_jax.text.tokenizer import Tokenizer as Tokenizer
