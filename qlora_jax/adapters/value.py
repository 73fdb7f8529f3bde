"""Adapter: an adapter apart from any model, as a value to compute with."""

import dataclasses
import json
from typing import Any, TypeVar

import jax
from flax import nnx

from qlora_jax.adapters.attach import attach_zero, detach, split
from qlora_jax.adapters.attached import base_fingerprint, lora_config
from qlora_jax.adapters.fingerprint import difference, fingerprint
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError

M = TypeVar("M", bound=nnx.Module)


def other_base(model: nnx.Module, mark: dict[str, Any] | None) -> str | None:
    """Returns how a model differs from the base that an adapter's mark is of, or None."""
    if mark is None:
        return None
    ours = fingerprint(model, scales="scales" in mark)
    return None if ours is None else difference(json.loads(ours), mark)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's parameters and what they mean; a pytree, so that jit takes it.

    Attributes:
      lora: The parameters, as `split` gives them: float32 factors, layers stacked.
      config: The LoRAConfig that it is attached with; static.
    """

    lora: nnx.State
    config: LoRAConfig = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, model: nnx.Module) -> "Adapter":
        """Takes a model's adapter; the model is left as it was.

        Raises:
          AdapterMismatchError: the model has none.
        """
        return cls(split(model)[1], lora_config(model))

    def on(self, model: M) -> M:
        """Returns the model with this adapter attached, in place of one that it has.

        Raises:
          ConfigError: the targets are not in the model.
          AdapterMismatchError: it was made for another base, or shapes differ; every one
            is named.
        """
        if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            model = detach(model)
        if problem := other_base(model, base_fingerprint(self.lora)):
            raise AdapterMismatchError(f"the adapter does not fit: {problem}")
        model = attach_zero(model, self.config, key=jax.random.key(0))
        graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        return nnx.merge(graphdef, unflatten(flatten(self.lora), lora), rest)
