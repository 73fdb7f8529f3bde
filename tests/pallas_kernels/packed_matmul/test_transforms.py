"""nf4_matmul under vmap, scan, checkpoint and shard_map: numbers here, kernels for a GPU."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.packed_matmul import nf4_matmul

PARTS = 4
N, K, M = 512, 1024, 40


def along_n(x, parts):
    """A linear whose outputs are spread: each device has its rows of W."""
    return nf4_matmul(x, jax.tree.map(lambda leaf: leaf[0], parts))


def along_k(x, parts):
    """A linear whose inputs are spread: the devices' products are summed."""
    return jax.lax.psum(along_n(x, parts), "d")


SHARDINGS = {
    "n": (along_n, P(), P(None, "d"), (N // PARTS, K)),
    "k": (along_k, P(None, "d"), P(), (N, K // PARTS)),
}


def sharded(axis: str, mesh):
    """Returns (x, stacked parts) -> y, and the shape of a part."""
    f, x_spec, y_spec, shape = SHARDINGS[axis]
    f = jax.shard_map(
        f, mesh=mesh, in_specs=(x_spec, P("d")), out_specs=y_spec, check_vma=False
    )
    return f, shape


def stacked(count: int, shape: tuple[int, int]):
    parts = [oracle.quantized(shape, seed=seed) for seed in range(count)]
    return parts, jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def loss(f, x, w):
    return jnp.sum(f(x, w).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("axis", list(SHARDINGS))
def test_shard_map_gives_the_whole_product_and_gradient(axis):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((PARTS,), ("d",), axis_types=auto)
    f, shape = sharded(axis, mesh)
    parts, stack = stacked(PARTS, shape)
    dense = np.concatenate([oracle.decoded(w) for w in parts], "nk".index(axis))
    x = np.random.default_rng(0).standard_normal((M, K))
    with jax.set_mesh(mesh):
        y, dx = jax.jit(
            lambda x: (f(x, stack), jax.grad(functools.partial(loss, f))(x, stack))
        )(jnp.asarray(x, jnp.float32))
    want = x @ dense.T
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    want = 2 * want @ dense
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def mapped(x, w):
    return jax.vmap(nf4_matmul, (None, 0))(x, w)


def scanned(x, w):
    def body(x, w):
        y = jax.checkpoint(nf4_matmul)(x, w)
        return x + jnp.pad(y, ((0, 0), (0, K - N))), None

    return jax.lax.scan(body, x, w)[0]


@pytest.mark.aot
@pytest.mark.parametrize("m", [4, 256])
@pytest.mark.parametrize("transform", ["vmap", "scan and checkpoint", "n", "k"])
def test_the_kernels_run_under_it_on_a_gpu(transform, m):
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU kernels need jax >= 0.11.2")
    if reason := aot.available():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")
    shape, devices = (N, K), 1
    f = {"vmap": mapped, "scan and checkpoint": scanned}.get(transform)
    if f is None:
        f, shape = sharded(transform, None)
        devices = PARTS
    parts = jax.eval_shape(lambda: stacked(PARTS, shape)[1])
    x = jax.ShapeDtypeStruct((m, K), jnp.bfloat16)
    run = jax.value_and_grad(functools.partial(loss, f))
    program = aot.compile_for("h200", run, x, parts, devices=devices).as_text()
    # Forward (twice under checkpoint, which may drop one again) and backward.
    assert program.count('custom_call_target="mosaic_gpu') >= 2
    assert f"bf16[{shape[0]},{shape[1]}]" not in program
