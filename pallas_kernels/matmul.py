"""`nf4_matmul`: the product with a 4-bit weight, differentiable to its input.

The weight is frozen: its residual for backward is the packed codes and scales it came
with (contract C3), and it has no gradient. `nf4_lora_matmul` is the same with a LoRA
adapter, which kernels that can add in the same pass. Implementations register in
`IMPLEMENTATIONS`; callers above choose by name or leave the choice to `choose`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import reference, tuning, two_pass
from pallas_kernels.annotations import Array, Float
from pallas_kernels.layout import QuantizedTensor
from pallas_kernels.tuning import Choice, Device, Direction, Problem

logger = logging.getLogger(__name__)

MOSAIC_JAX = (0, 11, 2)
"""The first jax whose Mosaic GPU dialect the kernels are written in."""

Addend = tuple[Array, Array] | None
"""A low-rank pair (u (m, r), v (width, r)) whose product u @ v.T is added."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """The two products, and when they can run.

    Attributes:
      forward: (x (m, k), w, addend, choice, device) -> (m, n) in x's dtype.
      backward: (dy (m, n), w, addend, choice, device) -> (m, k) in dy's dtype, or None
        where there is none; then backward is chosen freely.
      refuses: (problem, w, device, exact) -> why it cannot run, or None.
      configure: (problem, device, exact) -> Config fields where no table has them.
      suits: (problem, device) -> whether a free choice takes it, where it can run.
    """

    forward: Callable[..., Array]
    backward: Callable[..., Array] | None
    refuses: Callable[[Problem, QuantizedTensor, Device, bool], str | None]
    configure: Callable[[Problem, Device, bool], dict[str, Any]] = lambda *_: {}
    suits: Callable[[Problem, Device], bool] = lambda *_: True


def nf4_matmul(
    x: Float[Array, "*batch k"],
    w: QuantizedTensor,
    implementation: str | None = None,
    *,
    exact: bool = False,
) -> Float[Array, "*batch n"]:
    """Multiplies by a 4-bit weight: x @ w.T.

    Decoded weights are those of `reference.dequantize` in x's dtype; the fused kernels,
    unless `exact`, round codebook and absmax to that dtype before they multiply them (three
    roundings: a relative error of less than 3 * 2^-8 a weight in bfloat16). Products
    accumulate in float32. Differentiable to x only.

    Args:
      x: (..., k), bfloat16, float16 or float32; its dtype is the compute dtype.
      w: One (n, k) weight in any codebook and layout.
      implementation: A name of `IMPLEMENTATIONS`, or None to choose by device, shape
        and dtype. The named one also runs backward where it has one.
      exact: Whether decoded weights must equal bitsandbytes' bit for bit.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: shapes do not fit, x is no float array, or the named implementation is
        unknown or cannot run here (the message has its reason).
    """
    rows = _check(x, w)
    name = _check_name(rows, w, implementation, exact)
    y: Array = _matmul(rows, w, name, exact)
    return y.reshape(*x.shape[:-1], w.shape[0])


def nf4_lora_matmul(
    x: Float[Array, "*batch k"],
    w: QuantizedTensor,
    lora_a: Float[Array, "k rank"],
    lora_b: Float[Array, "rank n"],
    scale: float,
    implementation: str | None = None,
    *,
    exact: bool = False,
) -> Float[Array, "*batch n"]:
    """Multiplies by a 4-bit weight with its adapter: x @ w.T + scale * (x @ a) @ b.

    The fused kernels add the adapter's product into their accumulators, and in backward
    its part of dx, so that neither y nor dx takes another trip through memory.
    Differentiable to x and both factors, whose gradients accumulate in float32 and keep
    the factors' dtype.

    Args:
      x, w, implementation, exact: As in `nf4_matmul`.
      lora_a: (k, rank), any float dtype; multiplied in x's.
      lora_b: (rank, n).
      scale: alpha / rank.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: as in `nf4_matmul`, or the factors' shapes do not fit.
    """
    rows = _check(x, w)
    n, k = w.shape
    if lora_a.shape != (k, lora_b.shape[0]) or lora_b.shape[1] != n:
        raise ValueError(
            f"lora_a is {lora_a.shape} and lora_b {lora_b.shape}; a weight of {w.shape} "
            f"takes ({k}, rank) and (rank, {n})"
        )
    name = _check_name(rows, w, implementation, exact)
    y: Array = _lora_matmul(rows, w, lora_a, lora_b, scale, name, exact)
    return y.reshape(*x.shape[:-1], n)


def _check(x: Array, w: QuantizedTensor) -> Array:
    if len(w.shape) != 2:
        raise ValueError(f"nf4_matmul takes a matrix (n, k), got a weight of {w.shape}")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x has shape {x.shape}, its last axis must be k={w.shape[1]} of {w.shape}"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}, expected bfloat16, float16 or float32")
    return x.reshape(-1, w.shape[1])


def _check_name(
    x: Array, w: QuantizedTensor, name: str | None, exact: bool
) -> str | None:
    """Returns the name, having raised where it cannot run."""
    if name is not None:
        choose("forward", x.shape[0], w, x.dtype, name=name, exact=exact)
    return name


# --- Choosing -----------------------------------------------------------------------------


def choose(
    direction: Direction,
    m: int,
    w: QuantizedTensor,
    dtype: jnp.dtype,
    *,
    device: Device | None = None,
    name: str | None = None,
    exact: bool = False,
) -> Choice:
    """Returns what runs a product and how it is tiled; logs a free choice once.

    A free choice is the tuned table's, else the first of `IMPLEMENTATIONS` that can run
    and suits the problem.

    Args:
      direction: 'forward' or 'backward'.
      m: Tokens.
      w: The weight.
      dtype: Of x or dy.
      device: What to choose for; None is the one being traced for.
      name: An implementation to take.
      exact: Whether weights must be decoded exactly.

    Raises:
      ValueError: `name` is unknown or cannot run, with the reason (contract C7).
    """
    device = device or tuning.current_device()
    n, k = w.shape
    problem = Problem(direction, m, n, k, jnp.dtype(dtype).name)
    tuned = None if exact else tuning.look_up(problem, device)
    if name is not None:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(
                f"implementation {name!r} is not known here; known: {known}"
            )
        if reason := _refusal(name, problem, w, device, exact):
            raise ValueError(f"implementation {name!r} cannot run: {reason}")
        return _configured(name, problem, device, exact, tuned, "named by the caller")
    refused = {}
    preferred = [tuned.implementation] if tuned else []
    for candidate in [*preferred, *IMPLEMENTATIONS]:
        if (one := IMPLEMENTATIONS.get(candidate)) is None:
            refused[candidate] = "in the table, but not known here"
        elif reason := _refusal(candidate, problem, w, device, exact):
            refused[candidate] = reason
        elif candidate not in preferred and not one.suits(problem, device):
            refused[candidate] = "slower here"
        else:
            why = (
                tuned.why if tuned and candidate in preferred else "the best that runs"
            )
            choice = _configured(candidate, problem, device, exact, tuned, why)
            passed_over = "; ".join(f"{k}: {v}" for k, v in refused.items())
            _log_choice(
                direction, candidate, device.kind or device.platform, passed_over
            )
            return choice
    raise ValueError(f"no implementation can run this product: {refused}")


def _refusal(
    name: str, problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    one = IMPLEMENTATIONS[name]
    if problem.direction == "backward" and one.backward is None:
        return "it has no backward"
    return one.refuses(problem, w, device, exact)


def _configured(
    name: str,
    problem: Problem,
    device: Device,
    exact: bool,
    tuned: Choice | None,
    why: str,
) -> Choice:
    if tuned is not None and tuned.implementation == name:
        return dataclasses.replace(tuned, why=why)
    fields = IMPLEMENTATIONS[name].configure(problem, device, exact)
    return Choice(name, tuple(sorted(fields.items())), why)


@functools.cache
def _log_choice(direction: str, name: str, device: str, passed_over: str) -> None:
    why = f"passed over {passed_over}" if passed_over else "the best registered"
    logger.info("nf4_matmul runs %r %s on %s (%s)", name, direction, device, why)


def _run(
    direction: Direction,
    x: Array,
    w: QuantizedTensor,
    addend: Addend,
    name: str | None,
    exact: bool,
) -> Array:
    device = tuning.current_device()
    if direction == "backward" and name and IMPLEMENTATIONS[name].backward is None:
        name = None
    choice = choose(
        direction, x.shape[0], w, x.dtype, device=device, name=name, exact=exact
    )
    one = IMPLEMENTATIONS[choice.implementation]
    run = one.forward if direction == "forward" else one.backward
    assert run is not None
    return run(x, w, addend, choice, device)


# --- Differentiation ----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, w: QuantizedTensor, name: str | None, exact: bool) -> Array:
    # Tied to its input, a weight is not decoded before its turn: otherwise a scheduler
    # may decode all of a layer's weights at once.
    x, w = lax.optimization_barrier((x, w))
    return _run("forward", x, w, None, name, exact)


def _matmul_fwd(x, w, name, exact):
    return _matmul(x, w, name, exact), w


def _matmul_bwd(name, exact, w, dy):
    dy, w = lax.optimization_barrier((dy, w))
    return _run("backward", dy, w, None, name, exact), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _lora_matmul(x, w, a, b, scale, name, exact) -> Array:
    return _lora_fwd(x, w, a, b, scale, name, exact)[0]


def _lora_fwd(x, w, a, b, scale, name, exact):
    x, w = lax.optimization_barrier((x, w))
    hidden = _scaled(_dot(x, a.astype(x.dtype), 1, 0), scale, x.dtype)
    hidden = checkpoint_name(hidden, "lora_hidden")
    v = b.astype(x.dtype).T
    y = _run("forward", x, w, (hidden, v), name, exact)
    return y, (x, w, a, b, hidden)


def _lora_bwd(scale, name, exact, residuals, dy):
    x, w, a, b, hidden = residuals
    dy, w = lax.optimization_barrier((dy, w))
    d_hidden = _scaled(_dot(dy, b.astype(dy.dtype), 1, 1), scale, dy.dtype)
    dx = _run("backward", dy, w, (d_hidden, a.astype(dy.dtype)), name, exact)
    da = _dot(x, d_hidden, 0, 0).astype(a.dtype)
    db = _dot(hidden, dy, 0, 0).astype(b.dtype)
    return dx, None, da, db


_lora_matmul.defvjp(_lora_fwd, _lora_bwd)


def _scaled(product: Array, scale: float, dtype: jnp.dtype) -> Array:
    return (product * jnp.float32(scale)).astype(dtype)


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


# --- Implementations ----------------------------------------------------------------------


def _plain(product: Callable[[Array, QuantizedTensor], Array]) -> Callable[..., Array]:
    """Makes an implementation's product of one that knows no addend."""

    def run(x, w, addend: Addend, choice: Choice, device: Device) -> Array:
        y = product(x, w)
        if addend is None:
            return y
        u, v = addend
        return y + _dot(u, v, 1, 1).astype(y.dtype)

    return run


def _tiled(module_name: str, direction: Direction) -> Callable[..., Array]:
    """Makes the product of a module with forward, backward and Config."""

    def run(x, w, addend: Addend, choice: Choice, device: Device) -> Array:
        module = _mosaic(module_name)
        config = module.Config(**dict(choice.config))

        # A batch of weights goes one by one: a kernel's grid has no axis for it.
        @jax.custom_batching.sequential_vmap
        def product(x, w, addend):
            m = x.shape[0]
            short = -m % config.block_m
            x = jnp.pad(x, ((0, short), (0, 0)))
            if addend is not None:
                u, v = addend
                rank = -u.shape[1] % 64
                addend = (
                    jnp.pad(u, ((0, short), (0, rank))),
                    jnp.pad(v, ((0, 0), (0, rank))),
                )
            y = getattr(module, direction)(
                x,
                w.codes,
                _scales(w, x.dtype if not config.exact else jnp.dtype(jnp.float32)),
                addend,
                config=config,
                codebook=w.codebook,
                num_sms=device.cores,
            )
            if y.ndim == 3:  # parts of the contraction, transposed
                y = y.sum(0).T.astype(x.dtype)
            return y[:m]

        return product(x, w, addend)

    return run


def _scales(w: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """Returns the absmax of every 64 elements, (k/64, n)."""
    absmax = reference.decode_absmax(w).reshape(w.shape[0], -1)
    if w.block_size > 64:
        absmax = jnp.repeat(absmax, w.block_size // 64, axis=1)
    return absmax.T.astype(dtype)


def _decode_forward(
    x: Array, w: QuantizedTensor, addend: Addend, choice: Choice, device: Device
) -> Array:
    module = _mosaic("decode")
    config = module.Config(**dict(choice.config))

    @jax.custom_batching.sequential_vmap
    def product(x, w):
        return module.forward(x, w, config=config, num_sms=device.cores)

    return _plain(product)(x, w, addend, choice, device)


def _mosaic(name: str) -> Any:
    """Imports a kernel module; older jax has not the dialect that they are written in."""
    import importlib

    return importlib.import_module(f"pallas_kernels.{name}")


def _refuses_mosaic(
    problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    """Returns what all Mosaic kernels refuse."""
    if jax.__version_info__ < MOSAIC_JAX:
        wanted = ".".join(map(str, MOSAIC_JAX))
        return f"needs jax >= {wanted}, this is {jax.__version__}"
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, this is {device.platform}"
    if problem.dtype == "float32":
        return "multiplies in 16 bits, x is float32"
    if w.layout != "planar256":
        return (
            f"reads the planar256 layout (k a multiple of 256 and of the block size), this "
            f"weight of k={problem.k}, block_size={w.block_size} is {w.layout}"
        )
    return None


def _refuses_hopper(problem, w, device, exact) -> str | None:
    if reason := _refuses_mosaic(problem, w, device, exact):
        return reason
    if device.capability != (9, 0):
        return f"needs an sm_90 GPU (H100, H200), this is {_name(device)}"
    least = 128 if problem.direction == "forward" else 64
    if problem.n % 8 or problem.n < least:
        return f"takes n in multiples of 8 from {least} on, this is {problem.n}"
    return None


def _refuses_ampere(problem, w, device, exact) -> str | None:
    if reason := _refuses_mosaic(problem, w, device, exact):
        return reason
    if device.capability not in ((8, 0), (8, 6), (8, 9)):
        return (
            f"needs an sm_80, 86 or 89 GPU (A100, 3090, 4090), this is {_name(device)}"
        )
    if exact:
        return "its exact decoder is too slow to be of use; take 'two_pass'"
    if problem.n % 128:
        return f"takes n in multiples of 128, this is {problem.n}"
    return None


def _refuses_decode(problem, w, device, exact) -> str | None:
    if reason := _refuses_mosaic(problem, w, device, exact):
        return reason
    if device.capability != (9, 0):
        return f"needs an sm_90 GPU (H100, H200), this is {_name(device)}"
    if problem.m > 32:
        return f"takes up to 32 tokens, these are {problem.m}"
    if exact:
        return "rounds the codebook to x's dtype, exact weights were asked for"
    if problem.n % 16:
        return f"takes n in multiples of 16, this is {problem.n}"
    return None


def _name(device: Device) -> str:
    major, minor = device.capability
    return f"{device.kind} (sm_{major}{minor})"


IMPLEMENTATIONS: dict[str, Implementation] = {
    "decode": Implementation(
        forward=_decode_forward,
        backward=None,
        refuses=_refuses_decode,
        configure=lambda problem, device, exact: tuning.decode_config(
            problem, device.cores
        ),
        suits=lambda problem, device: problem.m <= tuning.DECODE_TOKENS,
    ),
    "hopper": Implementation(
        forward=_tiled("hopper", "forward"),
        backward=_tiled("hopper", "backward"),
        refuses=_refuses_hopper,
        configure=lambda problem, device, exact: tuning.hopper_config(
            problem, device.cores, exact
        ),
    ),
    "ampere": Implementation(
        forward=_tiled("ampere", "forward"),
        backward=_tiled("ampere", "backward"),
        refuses=_refuses_ampere,
        configure=lambda problem, device, exact: tuning.ampere_config(
            problem, device.capability
        ),
        # Compiled for these cards, but not run on one yet: by name alone.
        suits=lambda problem, device: False,
    ),
    "two_pass": Implementation(
        forward=_plain(two_pass.matmul),
        backward=_plain(two_pass.matmul_dx),
        refuses=lambda problem, w, device, exact: None,
        suits=lambda problem, device: device.platform == "gpu",
    ),
    "xla": Implementation(
        forward=_plain(reference.matmul),
        backward=_plain(reference.matmul_dx),
        refuses=lambda problem, w, device, exact: None,
    ),
}
"""By name, best first. 'two_pass' and 'xla' run everywhere; 'xla' stays last."""
