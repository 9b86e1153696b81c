"""Plots of a training run."""

import csv
from pathlib import Path

__all__ = ["plot_curves"]


def plot_curves(summary: str | Path, picture: str | Path) -> None:
    """Draws loss and accuracy over epochs.

    Args:
        summary: The run's `summary.csv`, with columns `epoch`, `train_loss`, `eval_loss`, `eval_top1`, and
            `eval_ema_top1` for averaged weights.
        picture: Output PNG.
    """
    # Not pyplot, which may select a GUI backend: training machines have no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with open(summary, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [float(row[key]) for row in rows] for key in rows[0]}
    epochs = [int(row["epoch"]) + 1 for row in rows]
    accuracies = {"eval_top1": ("weights", "#D55E00"), "eval_ema_top1": ("averaged weights", "#009E73")}
    shown = {key: style for key, style in accuracies.items() if key in columns}
    best, best_epoch = max((value, -epoch) for key in shown for value, epoch in zip(columns[key], epochs, strict=True))

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    losses.plot(epochs, columns["train_loss"], marker=".", color="#0072B2", label="training (augmented)")
    losses.plot(epochs, columns["eval_loss"], marker=".", color="#D55E00", label="validation")
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    for key, (label, color) in shown.items():
        accuracy.plot(epochs, columns[key], marker=".", color=color, label=label)
    if len(shown) > 1:
        accuracy.legend(frameon=False)
    accuracy.set(xlabel="epoch", ylabel="validation top-1, %", title=f"best {best:.2f} % in epoch {-best_epoch}")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
