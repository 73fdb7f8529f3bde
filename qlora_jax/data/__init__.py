"""Datasets: forms of rows, tokenization with loss weights, deterministic batches."""

from qlora_jax.config.data import DataConfig as DataConfig
from qlora_jax.data.dataset import Dataset as Dataset
from qlora_jax.data.intake import check_ids as check_ids
from qlora_jax.data.intake import load_dataset as load_dataset
from qlora_jax.data.intake import read_dataset as read_dataset
