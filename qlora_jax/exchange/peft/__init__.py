"""PEFT adapter folders: read one onto a model, write one from a model.

Source: peft 0.21.2, tuners/lora/config.py, tuners/tuners_utils.py, utils/save_and_load.py
and other.py (how names and patterns match).
"""

from qlora_jax.exchange.peft.names import is_peft as is_peft
from qlora_jax.exchange.peft.names import module_names as module_names
from qlora_jax.exchange.peft.read import describe_peft as describe_peft
from qlora_jax.exchange.peft.read import fit_peft as fit_peft
from qlora_jax.exchange.peft.read import import_peft as import_peft
from qlora_jax.exchange.peft.read import peft_misfits as peft_misfits
from qlora_jax.exchange.peft.write import export_peft as export_peft
