"""The picture of a run."""

import numpy as np
from PIL import Image

from container.training import plot_curves


def count(picture, color):
    return (np.abs(np.asarray(Image.open(picture).convert("RGB"), dtype=int) - color).sum(-1) < 30).sum()


def test_averaged_weights_have_their_own_curve(tmp_path):
    rows = [(0, 2.0, 1.9, 30, 10), (1, 1.0, 0.9, 60, 70)]
    header = "epoch,train_loss,eval_loss,eval_top1,eval_ema_top1\n"
    (tmp_path / "summary.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
    plot_curves(tmp_path / "summary.csv", tmp_path / "curves.png")
    assert count(tmp_path / "curves.png", (0x00, 0x9E, 0x73)) > 200


def test_curves_show_the_run_and_are_reproducible(tmp_path):
    summary = tmp_path / "summary.csv"
    header = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n"
    pictures = []
    for top1 in (90, 90, 60):
        summary.write_text(header + "0,2.0,1.9,30,80,0.1\n" + f"1,1.0,0.9,{top1},99,0.1\n")
        plot_curves(summary, tmp_path / "curves.png")
        pictures.append(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), dtype=int))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both curves are drawn
        assert (np.abs(pictures[0] - color).sum(-1) < 30).sum() > 200
