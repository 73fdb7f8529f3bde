"""What families of mixtures share: the names of experts, and which layers have them."""

from collections.abc import Collection
from typing import Any

from qlora_jax.models.fused import Fused
from qlora_jax.models.spec import ExpertsSpec, MLPSpec

LINEARS = ("gate_proj", "up_proj", "down_proj")
MLP = "model.layers.{}.mlp"


def names(mlp: str = MLP, linears: tuple[str, str, str] = LINEARS) -> dict[str, str]:
    """Returns the names of a router and of its experts' linears.

    Args:
      mlp: What the files call the mixture, with {} for the layer.
      linears: What they call the gate, up and down of an expert.
    """
    made = {"layers.mlp.router.weight": f"{mlp}.gate.weight"}
    return made | {
        f"layers.mlp.experts.{ours}.kernel": f"{mlp}.experts.{{}}.{theirs}.weight"
        for ours, theirs in zip(LINEARS, linears, strict=True)
    }


def correction(name: str) -> dict[str, str]:
    """Returns the name of what corrects the choice of experts."""
    return {"layers.mlp.router.correction.weight": name}


def shared(module: str, gate: str | None = None) -> dict[str, str]:
    """Returns the names of a feed-forward beside the experts, and of its gate."""
    made = {
        f"layers.mlp.shared.mlp.{linear}.kernel": f"{module}.{linear}.weight"
        for linear in LINEARS
    }
    return made | ({"layers.mlp.shared.gate.kernel": gate} if gate else {})


def parameters(
    mlp: str = MLP, linears: tuple[str, str, str] = LINEARS, module: str = MLP
) -> tuple[Fused, Fused]:
    """Returns the parameters that transformers makes of the experts of a layer.

    Args:
      mlp, linears: See `names`.
      module: What transformers calls the mixture.
    """
    gate, up, down = (f"{mlp}.experts.{{}}.{name}.weight" for name in linears)
    return (
        Fused(f"{module}.experts.gate_up_proj", (gate, up)),
        Fused(f"{module}.experts.down_proj", (down,)),
    )


def layers(
    hf: dict[str, Any], dense: Collection[int], experts: ExpertsSpec
) -> list[MLPSpec | ExpertsSpec]:
    """Returns the feed-forward of each layer.

    Args:
      hf: The object of config.json, whose intermediate_size those without experts have.
      dense: The layers without experts.
      experts: The feed-forward of the others.
    """
    mlp = MLPSpec(intermediate_size=hf.get("intermediate_size"))
    count = hf.get("num_hidden_layers") or 0
    return [mlp if i in dense else experts for i in range(count)]


def qwen_dense(hf: dict[str, Any]) -> set[int]:
    """Returns Qwen's layers without experts."""
    count, every = hf.get("num_hidden_layers") or 0, hf["decoder_sparse_step"]
    step = {i for i in range(count) if (i + 1) % every}
    return step | {*(hf.get("mlp_only_layers") or ())}


def group_problems(hf: dict[str, Any], best: int = 2) -> list[str]:
    """Returns what does not go together in the groups that experts are in.

    Args:
      hf: The object of config.json, in DeepSeek's names.
      best: How many of a group's experts rank it.
    """
    names = "n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"
    experts, groups, taken, chosen = (hf[name] for name in names)
    size = experts // groups
    if not experts % groups and taken <= groups and best <= size:
        if chosen <= taken * size:
            return []
    found = ", ".join(f"{name} is {hf[name]}" for name in names)
    return [
        f"{found}; expected groups of as many experts each, at least {best}, no more groups "
        "to choose than there are, and enough experts in them for each token"
    ]
