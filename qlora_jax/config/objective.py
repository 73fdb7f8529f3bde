"""ObjectiveConfig: what training minimizes."""

import dataclasses
import math
from typing import Literal

from qlora_jax.errors import ConfigError, gathered

Rows = Literal["texts", "pairs", "judged", "teacher"]
"""An objective takes one kind of rows: texts to learn; pairs of a chosen and a rejected answer
to a prompt; answers that are judged, each as good or bad; or texts with what a teacher says of
their tokens."""

PairLoss = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"]

READS: dict[str, tuple[str, ...]] = {
    "sft": ("label_smoothing",),
    "dpo": ("loss", "beta", "label_smoothing", "sft_weight", "precompute_reference"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "precompute_reference"),
    "simpo": ("beta", "gamma", "label_smoothing", "sft_weight"),
    "distill": ("temperature", "sft_weight"),
}
"""The objectives of this package, and the settings that each reads."""

BETA = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}
"""An objective that reads beta takes this value where none is given."""

SMOOTHED: tuple[PairLoss, ...] = ("sigmoid", "robust")
"""Losses of DPO that read label_smoothing."""

WITH_REFERENCE = ("dpo", "kto")
"""Objectives that compare with the base without its adapter."""

COMPARING = ("dpo", "orpo", "kto", "simpo")
"""Objectives on whole answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """These settings say what training minimizes. A setting that the objective does not read
    is refused unless it has its default."""

    name: str = "sft"
    """Training minimizes this: sft (the cross-entropy of each token given those before it);
    dpo, orpo or simpo (pairs of a chosen and a rejected answer); kto (answers that are judged);
    distill (a teacher's most probable tokens); or package.module:name of an objective of your
    own, in a module on Python's path (PYTHONPATH). CONTRIBUTING.md shows one. `--objective dpo`
    is short for `--objective.name dpo`."""

    loss: PairLoss = "sigmoid"
    """The loss of DPO: sigmoid (the paper's), ipo (a token's margin, squared in its distance
    from 1 / (2 beta)), hinge, robust (which expects that label_smoothing of the pairs are the
    wrong way round), or sigmoid_norm (the margin of a token, so that long answers count no more
    than short ones)."""

    beta: float | None = None
    """How strongly the adapter is held to the reference (dpo, kto), the weight of the odds
    ratio (orpo), or the scale of the margin (simpo). None stands for 0.1, of simpo for 2.0."""

    label_smoothing: float = 0.0
    """Of sft, the part of the probability that goes to all tokens alike. Of dpo (sigmoid,
    robust) and simpo, the part of the pairs that are taken to be the wrong way round."""

    sft_weight: float = 0.0
    """The cross-entropy of the chosen answers, a token, is added so many times (dpo, simpo); of
    distill, that of the text."""

    gamma: float = 0.5
    """By so much the chosen answer's reward has to exceed the rejected one's (simpo)."""

    desirable_weight: float = 1.0
    """The losses of good answers are multiplied by this number (kto)."""

    undesirable_weight: float = 1.0
    """The losses of bad answers are multiplied by this number (kto)."""

    temperature: float = 1.0
    """The teacher's logits were divided by this number, and so are the model's (distill)."""

    precompute_reference: bool = False
    """Run the reference over all rows once, before training, and keep what it says of them, so
    that a step has no second forward pass (dpo, kto)."""

    def __post_init__(self):
        problems = self._unread()
        least = {"gamma": 0, "sft_weight": 0, "label_smoothing": 0}
        least |= {"desirable_weight": 0, "undesirable_weight": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not low <= value < math.inf:
                problems.append(f"{_flag(name)} is {value}, expected {low} or more")
        for name in ("beta", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{_flag(name)} is {value}, expected > 0")
        highest = 1.0 if self.name == "sft" else 0.5
        if self.label_smoothing >= highest:
            problems.append(
                f"{_flag('label_smoothing')} is {self.label_smoothing}, expected less than "
                f"{highest}"
            )
        if problems:
            if len(problems) == 1:
                raise ConfigError(problems[0])
            raise ConfigError(gathered("the objective cannot be used", problems))

    def _unread(self) -> list[str]:
        """Returns a sentence for each setting that is given and has no effect."""
        if self.name not in READS and ":" not in self.name:
            return []  # there is no such objective, and `make_objective` says so
        read = READS.get(self.name, ())
        problems = []
        for field in dataclasses.fields(self)[1:]:
            if getattr(self, field.name) == field.default or field.name in read:
                continue
            readers = [name for name, names in READS.items() if field.name in names]
            problems.append(
                f"{_flag(field.name)} is {getattr(self, field.name)}, and --objective "
                f"{self.name} does not read it; it is for {', '.join(readers)}"
            )
        if self.name == "dpo" and self.label_smoothing and self.loss not in SMOOTHED:
            problems.append(
                f"{_flag('label_smoothing')} is {self.label_smoothing}, and --objective.loss "
                f"{self.loss} does not read it; it is for {', '.join(SMOOTHED)}"
            )
        return problems

    @property
    def strength(self) -> float:
        """Beta, or what it is where it is not given."""
        return BETA[self.name] if self.beta is None else self.beta

    @property
    def settings(self) -> dict[str, float | str]:
        """These settings, by name, are what the objective's arithmetic follows from, so that a
        run that goes on has to have them as it began."""
        found = {
            name: getattr(self, name)
            for name in READS.get(self.name, ())
            if name != "precompute_reference"
        }
        return found | ({"beta": self.strength} if "beta" in found else {})


def _flag(name: str) -> str:
    return f"--objective.{name.replace('_', '-')}"
