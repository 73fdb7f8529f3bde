"""`qlora doctor`: devices, versions, and which kernels will run and why."""

import dataclasses
import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import IMPLEMENTATIONS, choose
from qlora_jax.cli import options
from qlora_jax.nn.attention import choose_attention

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
)
# Tokens, as in a training step, a short batch, a prompt and one new token.
_ROWS = (2048, 512, 64, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Show devices, versions, and which kernels will run and why."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints the findings; returns them."""
    platform_name = jax.default_backend()
    weight = QuantizedTensor.abstract((4096, 4096))
    kernels = {
        f"{direction} {m}": dataclasses.asdict(
            choose(direction, m, weight, jnp.dtype(jnp.bfloat16))
        )
        for m in _ROWS
        for direction in ("forward", "backward")
    }
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform_name,
        "devices": [
            {
                "kind": d.device_kind,
                "memories": [m.kind for m in d.addressable_memories()],
            }
            for d in jax.devices()
        ],
        "implementations": list(IMPLEMENTATIONS),
        "nf4_matmul": kernels,
        "attention": dict(
            zip(
                ("implementation", "why"),
                choose_attention((1, 2048, 32, 128), 8, jnp.dtype(jnp.bfloat16)),
                strict=True,
            )
        ),
    }
    for device in found["devices"]:
        print(f"device      {device['kind']}  ({', '.join(device['memories'])})")
    print(f"python      {found['python']}")
    for name, version in found["packages"].items():
        print(f"{name:<18}{version}")
    print(f"nf4_matmul on {platform_name}, a weight of 4096 x 4096 in bfloat16:")
    for product, choice in kernels.items():
        direction, m = product.split()
        fields = ", ".join(f"{k}={v}" for k, v in choice["config"])
        print(
            f"  {direction:<8} of {m:>4} tokens  {choice['implementation']:<8} "
            f"{choice['why']}{f' ({fields})' if fields else ''}"
        )
    attention = found["attention"]
    print(f"attention   {attention['implementation']}  ({attention['why']})")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
