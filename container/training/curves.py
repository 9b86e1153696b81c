"""The picture of a run."""

import csv
from pathlib import Path
from typing import Union

__all__ = ["plot_curves"]


def plot_curves(summary: Union[str, Path], picture: Union[str, Path]) -> None:
    """Draws loss and accuracy over epochs.

    Args:
        summary: The run's `summary.csv`, as `timm.utils.update_summary` writes it, with columns `epoch`, `train_loss`,
            `eval_loss`, `eval_top1`.
        picture: The PNG to write.
    """
    # Not pyplot: it would choose a window system, and training machines have none.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with open(summary, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [float(row[key]) for row in rows] for key in ("train_loss", "eval_loss", "eval_top1")}
    epochs = [int(row["epoch"]) + 1 for row in rows]
    best = max(range(len(rows)), key=columns["eval_top1"].__getitem__)

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    losses.plot(epochs, columns["train_loss"], marker=".", color="#0072B2", label="training (augmented)")
    losses.plot(epochs, columns["eval_loss"], marker=".", color="#D55E00", label="validation")
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    accuracy.plot(epochs, columns["eval_top1"], marker=".", color="#D55E00")
    accuracy.set(
        xlabel="epoch",
        ylabel="validation top-1, %",
        title=f"best {columns['eval_top1'][best]:.2f} % in epoch {epochs[best]}",
    )
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
