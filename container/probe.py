"""Evaluates frozen features with k nearest neighbours and a linear classifier, on any folder of class folders.

`container probe DIR [--model NAME[.tag]]` does not train the model. Both classifiers use the input of the model's own
classifier: one feature vector per image.
"""

import importlib.util
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from . import weights
from .training.data import Images, create_datasets
from .training.loader import create_val_loader, default_workers
from .training.run import tell_unreadable

__all__ = ["describe", "features", "hold_out", "knn", "linear", "probe", "wilson"]

_BATCH = 64
_CS = [10.0**power for power in range(-4, 3)]


def features(model: nn.Module, images: Images, config: dict[str, Any], workers: int) -> tuple[Tensor, Tensor]:
    """Computes the pooled features of all images; unreadable images are reported and left out.

    Args:
        model: A timm model in evaluation mode.
        images: Images without augmentation.
        config: Preprocessing: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        workers: Number of loader processes.

    Returns:
        Features (images, features) and classes (images,), on the CPU, in the order of the data.

    Raises:
        OSError: Ten images in a row cannot be read.
        ValueError: Too many images cannot be read, the model does not take that size, or features are not finite.
    """
    device = next(model.parameters()).device
    loader = create_val_loader(images, config, _BATCH, workers, device)
    found, targets = [], []
    with torch.inference_mode():
        for batch, labels in tqdm(loader, unit="batch", delay=2, leave=False, disable=None, dynamic_ncols=True):
            try:
                of_batch = model.forward_head(model.forward_features(batch), pre_logits=True)  # type: ignore[operator]
            except AssertionError as error:  # raised by timm for a side that patches do not tile
                raise ValueError(f"{type(model).__name__} does not take these images: {error}") from None
            found.append(of_batch.flatten(1).float().cpu())
            targets.append(labels.cpu())
    tell_unreadable(images, "does not count")
    x, y = torch.cat(found), torch.cat(targets)
    if not x.isfinite().all():
        raise ValueError(f"features of {type(model).__name__} are not finite")
    return x[y >= 0], y[y >= 0]


def knn(train: Tensor, targets: Tensor, val: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Predicts classes by a weighted vote of the nearest training images.

    Each of the k images with the largest cosine similarity s_i votes for its class with weight exp(s_i / temperature).

    Source: DINO, Caron et al. 2021 (arXiv 2104.14294), whose k and temperature are the defaults.

    Args:
        train: Features of the labelled images, (images, features).
        targets: Their classes, (images,).
        val: Features to classify, (images, features).
        k: Number of neighbours that vote, or all images if there are fewer.
        temperature: Temperature of the weights; the lower it is, the more the nearest neighbours count.

    Returns:
        Predicted classes, (images of `val`,).
    """
    known, found = normalize(train), []
    for some in normalize(val).split(256):  # in chunks, because all similarities of a large set need too much memory
        nearest = (some @ known.T).topk(min(k, len(train)))
        votes = some.new_zeros(len(some), int(targets.max()) + 1)
        votes.scatter_add_(1, targets[nearest.indices], (nearest.values / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def hold_out(targets: Tensor, seed: int) -> Tensor:
    """Holds out a random fifth of each class, and returns it as flags (images,).

    At least one image of each class is held out, but never the only one of a class.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique():
        own = order[targets[order] == target]
        held[own[: max(1, round(len(own) / 5)) if len(own) > 1 else 0]] = True
    return held


def linear(train: Tensor, targets: Tensor, val: Tensor, seed: int = 0) -> tuple[Tensor, float]:
    """Predicts classes by logistic regression on standardized features: argmax_c (W (x - mean) / std + b)_c.

    W and b minimise the mean cross-entropy over n images plus |W|^2 / (2 C n). C is chosen from 0.0001, 0.001, ..., 100
    on a held-out fifth of the training images; the smallest C wins ties. The classifier is then fitted to all of them.
    Mean and std are those of the images in the fit.

    Args:
        train: Features of the labelled images, (images, features).
        targets: Their classes, (images,), at least two different ones.
        val: Features to classify, (images, features). They do not influence C.
        seed: Seed of the held-out split.

    Returns:
        Predicted classes, (images of `val`,), and C. C is 1 if no class has an image to spare for the held-out split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("the probe needs scikit-learn: pip install scikit-learn") from error
    x, y, held = train.double().numpy(), targets.numpy(), hold_out(targets, seed).numpy()

    def fit(c: float, rows: Any) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x[rows], y[rows])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with a large C, separable classes do not converge
        c = max(_CS, key=lambda c: fit(c, ~held).score(x[held], y[held])) if held.any() else 1.0
        return torch.from_numpy(fit(c, slice(None)).predict(val.double().numpy())), c


def wilson(right: int, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % confidence interval of a proportion.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = right / n, n = count, z = 1.96.

    Args:
        right: Number of successes.
        count: Number of trials.
    """
    p, z = right / count, 1.959964
    center, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    return (center - half) / (1 + z * z / count), (center + half) / (1 + z * z / count)


def probe(
    data_dir: str | Path,
    model: str,
    checkpoint: str | Path = "",
    img_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    pretrained: bool = True,
) -> dict[str, Any]:
    """Measures how well `knn` and `linear` classify a folder's validation images from a model's frozen features.

    Images are prepared as in the model's evaluation, without augmentation.

    Source: the protocol of DINO, Caron et al. 2021 (arXiv 2104.14294), without its augmentation.

    Args:
        data_dir: Folder with `train` and `val` (or `validation`, `test`), each a folder or a tar file of class folders.
        model: timm name: `NAME.tag`, or `NAME` for its default weights.
        checkpoint: Weights file.
        img_size: Side of the images in pixels; the model's own if None.
        workers: Number of loader processes; `default_workers()` if None.
        seed: Seed of random weights and of the split in `linear`.
        pretrained: As in `weights.create`.

    Returns:
        Results and settings as plain values; accuracies and their 95 % intervals (`wilson`) in percent.

    Raises:
        ImportError: scikit-learn is not installed.
        OSError: The folder, a part of it, or the checkpoint is missing or unreadable.
        RuntimeError: `checkpoint` is not a checkpoint file, or the model cannot be created.
        ValueError: Data, checkpoint or image size do not fit.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("sklearn") is None:  # before the images are read
        raise ImportError("the probe needs scikit-learn: pip install scikit-learn")
    train, val, classes = create_datasets(data_dir)
    if classes < 2:
        raise ValueError(f"{data_dir} has one class: there is nothing to tell apart")
    train.train = False  # otherwise an unreadable image would be replaced by the next one, which would count twice
    network = weights.create(model, checkpoint, img_size, pretrained, seed)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve_model_data_config(network)
    parts = []
    for images in (train, val):
        if images.left_out:
            print(images.left_out, file=sys.stderr)
        parts.append(features(network, images, config, default_workers() if workers is None else workers))
    (x, y), (x_val, y_val) = parts

    def accuracy(found: Tensor) -> dict[str, Any]:
        right = int((found == y_val).sum())
        return dict(top1=100 * right / len(y_val), interval=[100 * end for end in wilson(right, len(y_val))])

    by_linear, c = linear(x, y, x_val, seed)
    return dict(
        model=weights.describe(model, checkpoint, pretrained),
        checkpoint=str(checkpoint) or None,
        data=str(data_dir),
        input_size=list(config["input_size"]),
        classes=classes,
        train_images=len(y),
        val_images=len(y_val),
        features=x.shape[1],
        knn=accuracy(knn(x, y, x_val)),
        linear=dict(accuracy(by_linear), C=c),
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def describe(found: dict[str, Any]) -> str:
    """Formats the results of `probe` in one line."""
    size = " x ".join(map(str, dict.fromkeys(found["input_size"][1:])))  # one number for a square
    return (
        f"{found['model']} at {size} px on {found['data']}: {found['classes']} classes, "
        f"{found['train_images']} + {found['val_images']} images, k-NN {found['knn']['top1']:.2f} %, "
        f"linear {found['linear']['top1']:.2f} % (C {found['linear']['C']:g}), {found['features']} features, "
        f"{found['seconds']:.0f} s"
    )
