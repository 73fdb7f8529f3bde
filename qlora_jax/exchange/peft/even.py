"""Ranks and alphas that differ between layers, brought to one for each linear.

Here the layers of a linear are one stack, with one rank and one alpha. Lower ranks are
padded with zeros: what is padded adds nothing, and learns nothing, as the gradient of each
factor is a product with the other. A scale that differs goes into lora_b.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from qlora_jax.names import Numbered
from qlora_jax.nn.lora import adapter_scale


def evened(
    flat: dict[str, np.ndarray], shapes: dict[str, tuple[int, float]], rslora: bool
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, float]], list[str]]:
    """Gives the layers of each linear one rank and one alpha; the function stays.

    Args:
      flat: {our name, numbered: array}, lora_a (in, rank) and lora_b (rank, out).
      shapes: {our path of an adapted module, numbered: (rank, alpha)}; alpha may be 0 or
        negative.
      rslora: Whether the scale is alpha / sqrt(rank).

    Returns:
      (arrays, {our path without numbers: (rank, alpha > 0)}, what was changed).
    """
    made, each = dict(flat), {}
    padded, scaled, off = [], [], []
    by_path: dict[str, list[str]] = {}
    for name in sorted(shapes):
        by_path.setdefault(Numbered.parse(name).path, []).append(name)
    for path, names in by_path.items():
        own = [shapes[name] for name in names]
        rank, alpha = each[path] = _common(own, rslora)
        scale = adapter_scale(rank, alpha, rslora)
        for name in names:
            part = adapter_scale(*shapes[name], rslora) / scale
            _even(made, name, rank, part)
        if len({r for r, _ in own}) > 1:
            padded.append(f"{path} ({_listed(r for r, _ in own)} to {rank})")
        scales = {adapter_scale(*shape, rslora) for shape in own}
        if scales != {scale}:
            scaled.append(f"{path} ({_listed(scales)} to {scale:g})")
        if any(a == 0 for _, a in own):
            off.append(path)
    notes = []
    if padded:
        notes.append(
            "ranks differ by layer and are padded with zeros, which add and learn nothing: "
            + ", ".join(padded)
        )
    if scaled:
        notes.append(
            "scales (alpha / rank) are brought to one of a linear, above 0, in lora_b, which "
            f"computes the same and learns at another rate: {', '.join(scaled)}"
        )
    if off:
        notes.append(
            f"alpha is 0 in {', '.join(off)}: its adapter did nothing, and would learn here"
        )
    return made, each, notes


def _common(shapes: list[tuple[int, float]], rslora: bool) -> tuple[int, float]:
    """Returns the largest rank, and the alpha that leaves most layers as they are."""
    rank = max(rank for rank, _ in shapes)
    scales = Counter(abs(adapter_scale(*shape, rslora)) for shape in shapes)
    del scales[0.0]
    if not scales:
        return rank, float(rank)
    # Of the scales that most have, that of the largest rank.
    most = max(scales.values())
    own, alpha = max(
        (own, abs(float(alpha)))
        for own, alpha in shapes
        if scales[abs(adapter_scale(own, alpha, rslora))] == most
    )
    if own == rank:  # without rounding
        return rank, alpha
    scale = adapter_scale(own, alpha, rslora)
    return rank, scale / adapter_scale(rank, 1.0, rslora)


def _even(flat: dict[str, np.ndarray], name: str, rank: int, part: float) -> None:
    a, b = flat[f"{name}.lora_a"], flat[f"{name}.lora_b"]
    spare = rank - a.shape[1]
    if part != 1:
        b = np.asarray(b, np.float32) * np.float32(part)
    flat[f"{name}.lora_a"] = np.pad(a, [(0, 0), (0, spare)]) if spare else a
    flat[f"{name}.lora_b"] = np.pad(b, [(0, spare), (0, 0)]) if spare else b


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted({*values}))
