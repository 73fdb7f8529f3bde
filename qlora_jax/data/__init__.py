"""Datasets: formats, tokenization with loss weights, deterministic batches."""

from qlora_jax.data.config import DataConfig as DataConfig
from qlora_jax.data.dataset import Dataset as Dataset
from qlora_jax.data.dataset import check_ids as check_ids
from qlora_jax.data.dataset import load_dataset as load_dataset
from qlora_jax.data.dataset import read_dataset as read_dataset
