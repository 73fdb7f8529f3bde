"""Adapters as values: attach, split, join, names, merge, algebra, banks."""

from qlora_jax.adapters.attach import attach as attach
from qlora_jax.adapters.attach import detach as detach
from qlora_jax.adapters.attach import join as join
from qlora_jax.adapters.attach import split as split
from qlora_jax.adapters.bank import AdapterBank as AdapterBank
from qlora_jax.adapters.combine import combine as combine
from qlora_jax.adapters.merge import merge as merge
from qlora_jax.adapters.merge import merge_corrected as merge_corrected
from qlora_jax.adapters.value import Adapter as Adapter
from qlora_jax.config.lora import LoRAConfig as LoRAConfig
