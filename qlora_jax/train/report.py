"""The loss curve and the report of a run."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from qlora_jax.files import write_file
from qlora_jax.objectives import SFT, Objective
from qlora_jax.train.metrics import eval_losses, read_metrics


def plot_loss(run: Path, objective: Objective = SFT) -> Path:
    """Draws loss.png of a run folder from its metrics.jsonl.

    Args:
      run: The run folder.
      objective: What was minimized; the axis of one other than sft has its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run / "metrics.jsonl")
    losses = ((row["step"], row.get("loss")) for row in rows)
    train = [(step, loss) for step, loss in losses if loss is not None]
    held = eval_losses(rows)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    if train:
        axes.plot(
            *zip(*train, strict=True), color="#9db7d5", lw=0.8, label="train, each step"
        )
        axes.plot(
            *zip(*_smooth(train), strict=True),
            color="#1f5fa8",
            lw=1.6,
            label="train, smoothed",
        )
    if held:
        axes.plot(
            *zip(*held, strict=True), "o-", color="#c2571a", lw=1.2, label="held-out"
        )
    axes.set_xlabel("step")
    unit = "nats a token" if objective.name == SFT.name else objective.name
    axes.set_ylabel(f"loss ({unit})")
    # A loss of other objectives may be less than 0.
    axes.set_ylim(bottom=min([0.0, *(loss for _, loss in train + held)]))
    axes.spines[["top", "right"]].set_visible(False)
    if train or held:
        axes.legend(frameon=False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    write_file(run / "loss.png", picture.getvalue())
    return run / "loss.png"


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean over about a twentieth of the run, corrected for its start."""
    decay = 1 - 1 / max(1.0, len(points) / 20)
    mean, weight, smoothed = 0.0, 0.0, []
    for step, loss in points:
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed


def write_report(
    run: Path, figures: dict[str, Any], objective: Objective = SFT
) -> Path:
    """Writes report.html: figures, curve and config of a run, in one file."""
    picture = base64.b64encode(plot_loss(run, objective).read_bytes()).decode()
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
        for key, value in figures.items()
    )
    config = html.escape((run / "config.toml").read_text(encoding="utf-8"))
    page = (
        '<!doctype html><meta charset="utf-8"><title>qlora run</title>'
        "<style>body{font:15px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.1rem 1rem .1rem 0}pre{background:#f4f4f4;padding:1rem;overflow:auto}"
        f"</style><h1>{html.escape(run.name)}</h1><table>{rows}</table>"
        f'<p><img alt="loss by step" style="max-width:100%" '
        f'src="data:image/png;base64,{picture}"></p><h2>Config</h2><pre>{config}</pre>'
    )
    path = run / "report.html"
    write_file(path, page)
    return path
