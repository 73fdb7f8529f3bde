"""What a program is traced for: of a mesh, of jax.default_device, of this process."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.device import Device, current_device, limit
from pallas_kernels.packed_matmul import choose
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
CPU = Device("cpu")
ONE = SimpleNamespace(
    platform="gpu",
    device_kind="NVIDIA H20",  # whose capability its name does not say
    compute_capability="9.0",
    core_count=78,
)


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a GPU the default of this process, which has CPUs too."""
    cpus = jax.local_devices()
    monkeypatch.setattr(
        jax, "local_devices", lambda backend=None: cpus if backend == "cpu" else [ONE]
    )


def mesh_of(kind: str, cores: int) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    return AbstractMesh((1,), ("d",), abstract_device=device)


def cpu_mesh() -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("d",), axis_types=auto, devices=jax.devices()[:1])


def traced_for() -> Device:
    """What a program sees while jit traces it."""
    seen = []

    @jax.jit
    def program(x):
        seen.append(current_device())
        return x

    program.trace(jax.ShapeDtypeStruct((), jnp.float32))
    return seen[0]


@pytest.mark.parametrize(
    "context",
    [
        lambda: jax.default_device(jax.devices("cpu")[0]),
        lambda: jax.default_device("cpu"),
        lambda: jax.set_mesh(cpu_mesh()),
    ],
    ids=["default_device", "default_device by name", "mesh"],
)
def test_a_host_with_a_gpu_may_trace_for_its_cpu(gpu_host, context):
    assert traced_for() == Device("gpu", "NVIDIA H20", (9, 0), 78)
    with context():
        assert traced_for() == current_device() == CPU
        assert limit({"cpu": 1, "gpu": 2}) == 1
    assert limit({"cpu": 1, "gpu": 2}) == 2


def test_a_mesh_goes_before_the_default_device(gpu_host):
    with jax.default_device("cpu"), use_abstract_mesh(mesh_of("NVIDIA H200", 132)):
        assert traced_for() == H200


def test_a_device_that_is_there_knows_its_own_capability(gpu_host):
    with use_abstract_mesh(mesh_of("NVIDIA H20", 78)):
        assert traced_for().capability == (9, 0)
    with use_abstract_mesh(mesh_of("NVIDIA H21", 78)):
        assert traced_for() == Device("gpu", "NVIDIA H21", (0, 0), 78)


@pytest.mark.skipif(jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2")
def test_a_product_is_chosen_for_the_device_of_an_abstract_mesh():
    w = jax.eval_shape(lambda: oracle.quantized((128, 256)))
    contexts = {
        "hopper": use_abstract_mesh(mesh_of("NVIDIA H200", 132)),
        "xla": contextlib.nullcontext(),
    }
    for name, context in contexts.items():
        with context:
            choice = choose("forward", 64, w, jnp.dtype(jnp.bfloat16))
            assert choice.implementation == name
