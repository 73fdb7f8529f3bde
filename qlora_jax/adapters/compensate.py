"""Starting an adapter from what quantization lost, instead of from zero.

A linear's output is off by E x, E = W - dequantize(NF4(W)). The factors start as the
rank-r matrix that takes away most of it over the inputs x that the linear sees:

    minimise |(E - L) C^(1/2)|_F  over rank(L) = r,   C = mean of x x^T

whose solution is L = V V^T E, V the top r eigenvectors of E C E^T. The base itself is
not touched, so it stays shared, and the same as any other tool's.

Source: LoftQ (arXiv 2310.08659), its first iteration, is C = identity ('loftq'); QERA
(arXiv 2410.06040), its exact solution, has the second moments of the inputs ('qera'),
its approximate one their diagonal ('qera-diagonal').
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.adapters.names import dotted
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.nn import Linear, LoRA, QuantizedLinear
from qlora_jax.nn.dora import row_norms
from qlora_jax.quant import Quantized, dequantize

M = TypeVar("M", bound=nnx.Module)

Original = Callable[[str, tuple[int, ...]], Array | np.ndarray]
"""(dotted path of a linear, index in its stack, such as a layer) -> its dense kernel."""

Moments = Mapping[str, Array]
"""Dotted path -> mean of x x^T, float32 (..., in, in), or of x**2, (..., in)."""

_OVERSAMPLE = 16
_ITERATIONS = 12
"""Subspace iterations: within 1 % of the best reduction (tests/adapters)."""


class Compensation(NamedTuple):
    """What quantization lost of a linear's output, relative to it, root mean square.

    Attributes:
      before: Of the quantized linear alone.
      after: With the new adapter.
    """

    before: float
    after: float


def overall(errors: Mapping[str, Compensation]) -> Compensation:
    """Returns the root mean square of both errors over linears."""
    return Compensation(*np.sqrt(np.mean(np.square(list(errors.values())), 0)).tolist())


def describe(errors: Mapping[str, Compensation]) -> str:
    """Says what compensation did, in a line."""
    before, after = overall(errors)
    return (
        f"quantization changes a linear's output by {before:.2%}, with the new adapter by "
        f"{after:.2%}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(diagonal: bool, x: Array, moment: Array) -> Array:
    """Returns x; the "gradient" of `moment` is the sum of x x^T over rows."""
    del diagonal, moment
    return x


def _tap_forward(diagonal, x, moment):
    del moment
    return x, x


def _tap_backward(diagonal, x, dy):
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if diagonal:
        return dy, jnp.sum(rows**2, axis=0)
    return dy, jnp.matmul(rows.T, rows, precision="highest")


_tap.defvjp(_tap_forward, _tap_backward)


class _Moment(nnx.Variable):
    """What a backward pass sums up; no parameter of anybody's model."""


class _Tap(nnx.Module):
    """Wraps a linear so that a backward pass sums up its inputs' second moments."""

    def __init__(self, base: Linear | QuantizedLinear, diagonal: bool):
        features = base.in_features
        shape = (features,) if diagonal else (features, features)
        self.base = base
        self.diagonal = diagonal
        self.moment = _Moment(jnp.zeros((*base.stack, *shape), jnp.float32))

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        return self.base(_tap(self.diagonal, x, self.moment[...]), **kwargs)


def input_moments(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    paths: Callable[[str], bool] = lambda path: path.rpartition(".")[2] != "lm_head",
    diagonal: bool = False,
    outputs: Callable[[Any, Any], Array] | None = None,
) -> Moments:
    """Measures the second moments of every linear's inputs.

    Works on any module, inside scans and checkpoints: the moments come out of a backward
    pass, whose real gradients are not computed.

    Args:
      model: Without adapters.
      batches: Inputs; token ids (batch, seq) without padding for a Decoder.
      paths: Which linears, by dotted path.
      diagonal: Only the squares' means: in rather than in * in floats a linear.
      outputs: (model, batch) -> what the model makes of a batch; None for a Decoder's
        hidden states.

    Returns:
      Float32, on the device; full moments take 4 * in**2 bytes a linear and layer.
    """
    apply = outputs or (
        lambda model, tokens: model.hidden_states(tokens, checkpoint="layer")
    )

    def replace(path: tuple, node: Any) -> Any:
        if isinstance(node, (Linear, QuantizedLinear)) and paths(dotted(path)):
            return _Tap(node, diagonal)
        return node

    tapped = nnx.recursive_map(replace, model)
    graphdef, moments, frozen = nnx.split(tapped, _Moment, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, moments, frozen, batch):
        def scalar(moments):
            y = apply(nnx.merge(graphdef, moments, frozen), batch)
            return jnp.sum(y.astype(jnp.float32)), jnp.float32(y.size / y.shape[-1])

        grads, rows = jax.grad(scalar, has_aux=True)(moments)
        return jax.tree.map(jnp.add, total, (grads, rows))

    total = (jax.tree.map(jnp.zeros_like, moments), jnp.float32(0))
    for batch in batches:
        total = add(total, moments, frozen, batch)
    sums, rows = total
    if not rows:
        raise ConfigError("no batch to measure inputs on; give at least one")
    return {
        dotted(path[:-1]): variable.get_value() / rows
        for path, variable in nnx.to_flat_state(sums)
    }


def compensate(
    model: M,
    original: Original | nnx.Module,
    moments: Moments | None = None,
    *,
    key: Array,
) -> tuple[M, dict[str, Compensation]]:
    """Starts every adapter of a 4-bit linear from what quantization lost.

    lora_a gets the size that a new one has, so that learning rates carry over.

    Args:
      model: With new adapters on a quantized base. It is left as it was.
      original: The dense weights: a model of the same structure, or a function that
        reads one kernel at a time.
      moments: From `input_moments`; None weighs all input directions alike.
      key: For the subspace iteration's start.

    Returns:
      The model, and the relative error of each linear before and after, by path; over
      all layers of a stack.

    Raises:
      AdapterMismatchError: an adapter has been trained already, its base is dense, or
        the original does not fit.
    """
    read = _reader(original) if isinstance(original, nnx.Module) else original
    errors: dict[str, Compensation] = {}

    factors: dict[tuple, Array] = {}
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, LoRA):
            continue
        name, base = dotted(path), node.base
        if not isinstance(base, QuantizedLinear):
            raise AdapterMismatchError(
                f"{name} is dense, so quantization lost nothing of it; quantize the base, "
                "or start the adapter from zero"
            )
        if np.asarray(jnp.any(node.lora_b[...] != 0)):
            raise AdapterMismatchError(
                f"the adapter at {name} has been trained; compensate a new one"
            )
        moment = None if moments is None else moments[name]
        made = _stack(name, node, base, read, moment, key)
        a, b, errors[name] = made
        factors[*path, "lora_a"], factors[*path, "lora_b"] = a, b
        if node.magnitude is not None:
            factors[*path, "magnitude"] = row_norms(base, a, b, node.scale)

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(factors[path]) if path in factors else variable

    graphdef, state = nnx.split(model)
    flat = [(path, fill(path, v)) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), errors


def _reader(dense: nnx.Module) -> Original:
    linears = {
        dotted(path): node
        for path, node in nnx.iter_graph(dense)
        if isinstance(node, Linear)
    }

    def read(path: str, index: tuple[int, ...]) -> Array:
        if path not in linears:
            raise AdapterMismatchError(f"the original model has no dense {path}")
        return linears[path].kernel[index or ...]

    return read


def _stack(
    name: str,
    node: LoRA,
    base: QuantizedLinear,
    read: Original,
    moment: Array | None,
    key: Array,
) -> tuple[Array, Array, Compensation]:
    """Returns both factors, stacked, and the error over the whole stack."""
    made = []
    for index in np.ndindex(*base.stack):
        q, c = jax.tree.map(operator.itemgetter(index), (base.quantized, moment))
        w = jnp.asarray(read(name, index))
        if w.shape != q.shape:
            raise AdapterMismatchError(
                f"{name}: the original has shape {w.shape}, the base {q.shape}"
            )
        made.append(_factors(w, q, c, key, rank=node.rank, scale=node.scale))
    a, b, energies = (jnp.stack(parts) for parts in zip(*made, strict=True))
    a, b = (x.reshape(*base.stack, *x.shape[1:]) for x in (a, b))
    whole, before, after = np.asarray(energies, np.float64).sum(axis=0)
    whole = max(whole, np.finfo(np.float64).tiny)
    return a, b, Compensation((before / whole) ** 0.5, (max(after, 0) / whole) ** 0.5)


@functools.partial(jax.jit, static_argnames=("rank", "scale"))
def _factors(
    w: Float[Array, "out in"],
    q: Quantized,
    moment: Array | None,
    key: Array,
    *,
    rank: int,
    scale: float,
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"], Float[Array, "3"]]:
    """Returns lora_a, lora_b, and the energies of the output and of both errors."""
    dot = functools.partial(jnp.matmul, precision="highest")
    w = w.astype(jnp.float32)
    error = w - dequantize(q, "float32")
    out, features = error.shape

    def weigh(y: Float[Array, "in columns"]) -> Float[Array, "in columns"]:
        if moment is None:
            return y
        return moment[:, None] * y if moment.ndim == 1 else dot(moment, y)

    columns = min(rank + _OVERSAMPLE, out)
    start = jax.random.normal(key, (out, columns))

    def iterate(_, v):
        return jnp.linalg.qr(dot(error, weigh(dot(error.T, v))))[0]

    v = jax.lax.fori_loop(0, _ITERATIONS, iterate, iterate(0, start))
    hidden = dot(error.T, v)
    values, vectors = jnp.linalg.eigh(dot(hidden.T, weigh(hidden)))
    keep = min(rank, columns)
    v = dot(v, vectors[:, ::-1][:, :keep])
    a, b = dot(error.T, v), v.T
    # The size of a new lora_a: uniform in +-1/sqrt(in) has this root mean square.
    size = (3 * features) ** -0.5
    norm = jnp.sqrt(jnp.mean(a**2))
    factor = jnp.where(norm > 0, size / jnp.where(norm > 0, norm, 1.0), 1.0)
    a, b = a * factor, b / (factor * scale)
    spare = ((0, 0), (0, rank - keep))  # a rank above out leaves columns at zero
    a, b = jnp.pad(a, spare), jnp.pad(b.T, spare).T
    before = jnp.sum(error.T * weigh(error.T))
    energies = (jnp.sum(w.T * weigh(w.T)), before, before - jnp.sum(values[-keep:]))
    return a, b, jnp.stack(energies)
