"""The train step of a setup, compiled from shapes alone: what XLA says it will need.

Nothing is allocated: the step of a 70B model compiles in half a minute and 1 GB of memory.
For a named GPU none has to be there; the CUDA wheels of jax have.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.budget.estimate import abstract_parts
from qlora_jax.budget.setup import Setup
from qlora_jax.errors import ConfigError
from qlora_jax.names import is_stacked
from qlora_jax.objectives.base import DOCUMENTS
from qlora_jax.optim.adamw import adamw, placed
from qlora_jax.optim.offload import paged
from qlora_jax.train.step import make_train_step

TARGETS = Path(__file__).parent / "targets"


class Account(NamedTuple):
    """Bytes by XLA's buffer assignment.

    Attributes:
      arguments: The bytes of device memory that are taken before the step.
      temporaries: The bytes of device memory that the step takes besides, at its peak.
      host: The bytes of host memory, arguments and temporaries together.
    """

    arguments: int
    temporaries: int
    host: int

    @property
    def device(self) -> int:
        """Device memory at the step's peak."""
        return self.arguments + self.temporaries


def account(compiled: Any) -> Account:
    """Reads XLA's account of a compiled program."""
    m = compiled.memory_analysis()
    return Account(
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.host_argument_size_in_bytes + m.host_temp_size_in_bytes,
    )


def compile_step(
    setup: Setup, target: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Compiles the step that `setup` describes.

    Args:
      setup: What is trained, and how.
      target: 'h200', 'a100', 'rtx4090', 'rtx3090'; None for this process's device.
      options: XLA's compiler options, by flag; None leaves its defaults.

    Returns:
      A jax.stages.Compiled.

    Raises:
      ConfigError: an unknown target, or jax's CUDA wheels are missing for it.
    """
    train = setup.train
    graphdef, lora, base = abstract_parts(setup)
    inner, clip = adamw(train.optimizer, 1e-4), optax.clip_by_global_norm(0.3)
    tx = optax.chain(clip, placed(inner, train.offload, train.resident_bytes))
    state = jax.eval_shape(optax.chain(clip, inner).init, lora)
    shape: tuple[int, ...] = (setup.micro_rows, setup.max_tokens)
    if setup.micro_batches > 1:
        shape = (setup.micro_batches, *shape)
    whole = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"tokens": whole, "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if setup.packed_rows is not None:
        batch |= dict.fromkeys(DOCUMENTS, whole)
    step: Any = make_train_step(
        graphdef, tx, checkpoint=train.checkpoint, sums_on_host=train.offload
    )
    with _placing(target) as (device, host):

        def put(tree: Any, where: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
            )

        entries = [
            (path, put(v, host if train.stream and is_stacked(path) else device))
            for path, v in nnx.to_flat_state(base)
        ]
        leaves, structure = jax.tree.flatten(state)
        away = paged(leaves, train.resident_bytes) if train.offload else []
        state = structure.unflatten(
            put(x, host if i in away else device) for i, x in enumerate(leaves)
        )
        arguments = (put(lora, device), nnx.from_flat_state(entries), state)
        outputs = (
            jax.tree.map(lambda x: x.sharding, arguments[0]),
            jax.tree.map(lambda x: x.sharding, state),
            None,
        )
        jitted = jax.jit(step.__wrapped__, donate_argnums=(0, 2), out_shardings=outputs)
        traced = jitted.trace(*arguments, put(batch, device))
        platforms = None if target is None else ("cuda",)
        lowered = traced.lower(lowering_platforms=platforms)
        return lowered.compile(compiler_options=options)


@contextlib.contextmanager
def _placing(target: str | None) -> Iterator[tuple[Any, Any]]:
    """Gives shardings for device and host memory of this device or of a named GPU."""
    if target is None:
        auto = (jax.sharding.AxisType.Auto,)
        here = jax.devices()[:1]
        mesh = jax.make_mesh((1,), ("d",), axis_types=auto, devices=here)
        here = NamedSharding(mesh, PartitionSpec())
        yield here, here.with_memory_kind("pinned_host")
        return
    with absent_gpu(target) as mesh:
        # The concrete mesh's devices report no memories, so only the abstract one can
        # name the host's.
        everywhere = PartitionSpec()
        host = NamedSharding(mesh.abstract_mesh, everywhere, memory_kind="pinned_host")
        yield NamedSharding(mesh, everywhere), host


@contextlib.contextmanager
def absent_gpu(target: str, devices: int = 1) -> Iterator[Any]:
    """Makes a mesh of GPUs that are not there, to compile for.

    Raises:
      ConfigError: an unknown target, or jax's CUDA wheels are missing.
    """
    from jax.experimental import topologies
    from jax.sharding import use_abstract_mesh

    path = TARGETS / f"{target}.txtpb"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in TARGETS.glob("*.txtpb")))
        raise ConfigError(f"no GPU {target!r} is known; there are {known}")
    text = path.read_text()
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=text, topology=f"1x1x{devices}"
        )
    except Exception as error:  # whatever the missing plugin raises
        raise ConfigError(
            f"nothing can be compiled for {target} here: jax's CUDA wheels are missing "
            f"(pip install 'jax[cuda13]'; no GPU is needed): {error}"
        ) from None
    mesh = topologies.make_mesh(topology, (devices,), ("d",))
    with use_abstract_mesh(mesh.abstract_mesh), _architecture(text):
        yield mesh


@contextlib.contextmanager
def _architecture(text: str) -> Iterator[None]:
    """Mosaic takes every absent device for a Hopper; tells it what the target is."""
    try:
        from jax.experimental.mosaic.gpu import utils
    except ImportError:
        yield
        return
    found = re.search(r"compute_capability \{ major: (\d+)", text)
    minor = re.search(r"compute_capability \{[^}]*minor: (\d+)", text)
    assert found is not None
    arch = (int(found.group(1)), int(minor.group(1)) if minor else 0)
    before = utils._infer_arch
    utils._infer_arch = lambda: arch
    try:
        yield
    finally:
        utils._infer_arch = before
