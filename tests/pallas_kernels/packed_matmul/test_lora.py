"""nf4_lora_matmul: the adapter in the same pass, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

from pallas_kernels.packed_matmul import nf4_lora_matmul

BF16 = jnp.dtype(jnp.bfloat16)

SCALE = 2.0


def factors(w, rank: int, dtype: str = "float32"):
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.normal(size=(w.shape[1], rank)) * 0.1, dtype)
    b = jnp.asarray(rng.normal(size=(rank, w.shape[0])) * 0.1, dtype)
    x = jnp.asarray(rng.normal(size=(5, w.shape[1])), "float32")
    return x, a, b


def plainly(w, x, a, b):
    dense = w.decode_one(x.dtype)
    return x @ dense.T + SCALE * (x @ a) @ b


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "two_pass", "xla"])
@pytest.mark.parametrize("shape", [(24, 512), (24, 192), (21, 72)])
def test_the_adapter_and_its_gradients_are_those_of_the_dense_formula(shape, name):
    w = oracle.quantized(shape)
    x, a, b = factors(w, 4)

    def fused(x, a, b):
        return nf4_lora_matmul(x, w, a, b, SCALE, name)

    y, pull = jax.vjp(jax.jit(fused), x, a, b)
    want, pull_plain = jax.vjp(functools.partial(plainly, w), x, a, b)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    dy = jnp.asarray(np.random.default_rng(4).normal(size=y.shape), "float32")
    for got, expected in zip(pull(dy), pull_plain(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_gradients_are_those_of_finite_differences():
    w = oracle.quantized((8, 256))
    x, a, b = factors(w, 2)

    def product(*args):  # which check_grads calls with numpy arrays too
        x, a, b = map(jnp.asarray, args)
        return nf4_lora_matmul(x, w, a, b, SCALE)

    check_grads(
        product,
        (x, a, b),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


def test_factors_keep_their_dtype_beside_a_short_compute_dtype():
    w = oracle.quantized((24, 512))
    x, a, b = factors(w, 4)
    x = x.astype(BF16)
    y, pull = jax.vjp(lambda x, a, b: nf4_lora_matmul(x, w, a, b, SCALE), x, a, b)
    dx, da, db = pull(y)
    assert (y.dtype, dx.dtype) == (BF16, BF16)
    assert (da.dtype, db.dtype) == ("float32", "float32")


def test_factors_that_do_not_fit_are_refused():
    w = oracle.quantized((24, 192))
    x, a, b = factors(w, 4)
    with pytest.raises(ValueError, match=r"takes \(192, rank\) and \(rank, 24\)"):
        nf4_lora_matmul(x, w, a, b[:, :20], SCALE)
