"""Starting an adapter from what quantization lost, instead of from zero.

A linear's output is off by E x, E = W - dequantize(NF4(W)). The factors start as the
rank-r matrix that takes away most of it over the inputs x that the linear sees
(low_rank.py). In one round the base itself is not touched, so it stays shared, and the
same as any other tool's; more rounds make a base of its own for the adapter.

Source: LoftQ (arXiv 2310.08659) weighs all inputs alike ('loftq' is its first round);
QERA (arXiv 2410.06040), its exact solution, has the second moments of the inputs
('qera'), its approximate one their diagonal ('qera-diagonal'). PiSSA (arXiv 2404.02948),
section 3.2, starts from the principal part of W ('pissa').
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters import low_rank
from qlora_jax.adapters.fingerprint import with_scales
from qlora_jax.adapters.names import at_place
from qlora_jax.config.lora import Init
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.names import Numbered, dotted, in_words, located, plain
from qlora_jax.nn import FrozenLinear, LoRA, QuantizedLinear
from qlora_jax.nn.dora import row_norms
from qlora_jax.nn.frozen import modules, replaced

M = TypeVar("M", bound=nnx.Module)

Original = Callable[[str, tuple[int, ...]], Array | np.ndarray]
"""(dotted path of a linear, its numbers: (), (layer,) or (layer, expert)) -> its dense kernel,
(out, in). Whatever stacks a model has its layers in, a number is the layer's in the model."""

Moments = Mapping[str, Array]
"""Dotted path -> mean of x x^T, float32 (..., in, in), or of x**2, (..., in)."""


PISSA_ROUNDS = 5
"""Init 'pissa' goes so many rounds, each of which quantizes what the adapter leaves and fits
the adapter again: T in its paper (arXiv 2404.02948, section 3.2)."""


class Compensation(NamedTuple):
    """What quantization lost of a linear's output, relative to it, root mean square.

    Attributes:
      before: The error of the quantized linear alone.
      after: The error with the new adapter.
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

    def __init__(self, base: FrozenLinear, diagonal: bool):
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
      model: A model without adapters.
      batches: Inputs; token ids (batch, seq) without padding for a Decoder.
      paths: Says of a linear's dotted path whether to measure that linear.
      diagonal: Whether to keep only the means of squares: in rather than in * in floats a
        linear.
      outputs: (model, batch) -> what the model makes of a batch; None for a Decoder's
        hidden states.

    Returns:
      The moments by dotted path, float32, on the device; full moments take 4 * in**2 bytes
      a linear and layer.
    """
    apply = outputs or (
        lambda model, tokens: model.hidden_states(tokens, checkpoint="layer")
    )

    def tap(path: tuple, node: FrozenLinear) -> nnx.Module:
        return _Tap(node, diagonal) if paths(plain(path)) else node

    tapped = replaced(model, FrozenLinear, tap)
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
    iterations: int = 1,
    principal: bool = False,
) -> tuple[M, dict[str, Compensation]]:
    """Starts every adapter of a 4-bit linear from what quantization lost.

    With one round the base stays as it is. With more, or from the principal part, the
    adapted linears get 4-bit weights of their own: quantized anew, less the adapter. Such
    a base goes with this adapter alone; save it (`detach`, `save_model`) beside it.
    lora_a gets the size that a new one has, so that learning rates carry over.

    Args:
      model: A model with new adapters on a quantized base. It is left as it was.
      original: The dense weights: a model of the same structure, or a function that
        reads one kernel at a time.
      moments: The second moments of the linears' inputs, from `input_moments`; None weighs
        all input directions alike.
      key: The random key for the subspace iteration's start.
      iterations: Rounds of LoftQ's alternation; a matrix keeps its best one.
      principal: Begin with the principal part of the original weights, as PiSSA does,
        and with its factors' sizes.

    Returns:
      The model, and the relative error of each linear before and after, by path; over
      all layers of a stack.

    Raises:
      ConfigError: less than one round.
      AdapterMismatchError: an adapter has been trained already, its base is dense, or
        the original does not fit.
    """
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}, expected at least 1")
    read = _reader(original) if isinstance(original, nnx.Module) else original
    rounds = low_rank.Rounds(iterations, principal)
    errors: dict[str, Compensation] = {}
    filled: dict[tuple, Any] = {}
    bases: dict[str, PackedWeight] = {}
    for path, node in modules(model, LoRA):
        name, base = in_words(path), node.base
        if not base.packed:
            raise AdapterMismatchError(
                f"{name} is dense, so quantization lost nothing of it; quantize the base, "
                "or start the adapter from zero"
            )
        if np.asarray(jnp.any(node.lora_b[...] != 0)):
            raise AdapterMismatchError(
                f"the adapter at {name} has been trained; compensate a new one"
            )
        moment = None if moments is None else moments[dotted(path)]
        made = _stack(path, node, read, moment, key, rounds)
        q, a, b, errors[name] = made
        filled[*path, "lora_a"], filled[*path, "lora_b"] = a, b
        if q is not None:
            base = QuantizedLinear(q)
            filled[*path, "base", "kernel"] = q
            bases[f"{dotted(path)}.kernel"] = q
            if node.squared_norms is not None:
                filled[*path, "squared_norms"] = row_norms(base) ** 2
        if node.magnitude is not None:
            filled[*path, "magnitude"] = row_norms(base, a, b, node.scale)

    changed = {located(name)[0] for name in bases}
    # Stacks of the same linears without an adapter count with them.
    for path, node in modules(model, FrozenLinear):
        name = f"{dotted(path)}.kernel"
        if node.packed and located(name)[0] in changed:
            bases.setdefault(name, node.stored)

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path in filled:
            variable = variable.replace(filled[path])
        if bases and isinstance(variable, nnx.LoRAParam):
            mark = with_scales(variable.get_metadata().get("base"), bases)
            variable = variable.replace(variable.get_value())
            variable.set_metadata(base=mark)
        return variable

    graphdef, state = nnx.split(model)
    flat = [(path, fill(path, v)) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), errors


def start(
    model: M,
    init: Init,
    original: Original | nnx.Module | None,
    moments: Moments | None = None,
    *,
    key: Array,
) -> tuple[M, dict[str, Compensation]]:
    """Compensates as an init other than zero says.

    Args, returns and raises as `compensate`; and

    Raises:
      ConfigError: what the init needs is missing.
    """
    weighted = init.startswith("qera")
    if original is None or (weighted and moments is None):
        needs = "original and moments (input_moments)" if weighted else "original"
        raise ConfigError(f"init {init!r} needs {needs}")
    pissa = init == "pissa"
    return compensate(
        model,
        original,
        moments if weighted else None,
        key=key,
        iterations=PISSA_ROUNDS if pissa else 1,
        principal=pissa,
    )


def _reader(dense: nnx.Module) -> Original:
    linears = modules(dense, FrozenLinear)
    find = at_place({path: node for path, node in linears if not node.packed})

    def read(path: str, index: tuple[int, ...]) -> Array:
        try:
            linear, index = find(path, index)
        except KeyError as error:
            name = error.args[0]
            raise AdapterMismatchError(
                f"the original model has no dense {name}; give the dense folder or model "
                "that the base was quantized from"
            ) from None
        return linear.stored[index or ...]

    return read


def _stack(
    path: tuple,
    node: LoRA,
    read: Original,
    moment: Array | None,
    key: Array,
    rounds: low_rank.Rounds,
) -> tuple[PackedWeight | None, Array, Array, Compensation]:
    """Returns the new 4-bit weights if any, both factors, and the error; of a stack."""
    made, stack = [], node.base.stack
    for index in np.ndindex(*stack):
        quantized = node.base.stored
        q, c = jax.tree.map(operator.itemgetter(index), (quantized, moment))
        place = Numbered.at(path, index)
        w = jnp.asarray(read(*place))
        if w.shape != q.shape:
            raise AdapterMismatchError(
                f"{place}: the original has shape {w.shape}, the base {q.shape}"
            )
        adapted = node.active is None or node.active[...][index].item() > 0
        fit = low_rank.alternate(
            *(w, q, c, key),
            rank=node.rank,
            scale=node.scale,
            rounds=rounds if adapted else low_rank.Rounds(),
        )
        jax.block_until_ready(fit)  # else dense weights pile up in front of the device
        made.append(fit if rounds.change_base else fit._replace(base=None))
    fits = jax.tree.map(lambda *parts: jnp.stack(parts), *made)
    whole, before, after = np.asarray(fits.energies, np.float64).sum(axis=0)
    whole = max(whole, np.finfo(np.float64).tiny)
    error = Compensation((before / whole) ** 0.5, (max(after, 0) / whole) ** 0.5)
    q, a, b = jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), fits[:3])
    return q, a, b, error
