"""Quantizes ONNX files to int8 with calibration photos, and measures how many photos keep their class."""

import ast
import contextlib
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .images import open_photo
from .predict import label_names
from .probe import wilson
from .runtimes import Run, Runtime
from .training.data import Images, Photos, check_classes, open_validation
from .training.loader import create_val_loader, default_workers
from .training.run import tell_unreadable

__all__ = ["accuracy", "agreement", "calibration", "labelled", "quantize", "to_int8", "verify"]

PHOTOS = 300  # maximum number of calibration photos, from which activation ranges are measured, and of held-out ones
HELD_OUT = 50  # minimum number of held-out photos, which judge the file
LEAST = 0.95  # minimum share of photos for which the file must predict the model's class
_RANKED = 100  # number of photos on which the accuracy loss is judged, in total and per layer
_PRODUCTS = {"Conv", "Gemm", "MatMul"}  # operators that are fast in int8 and tolerate it; sums and norms do not
_SHAPES = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def calibration(model: nn.Module, folder: str | Path) -> tuple[Tensor, Tensor]:
    """Loads photos of a folder as a model's input: some to calibrate on, and others to judge the file by.

    Up to 600 photos, evenly spaced over the folder, go to the two in turn.

    Args:
        model: A timm model.
        folder: Folder with photos at any depth.

    Returns:
        Two tensors (photos, channels, height, width).

    Raises:
        OSError: The folder is missing or unreadable.
        ValueError: The folder has fewer than 100 photos, or one of its files is not a photo.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    photos = Photos([Path(folder)])
    if len(photos) < 2 * HELD_OUT:
        raise ValueError(
            f"{folder} has {len(photos)} photos, and int8 needs {2 * HELD_OUT}: half to calibrate on, half to judge by"
        )
    transform = create_transform(**resolve_model_data_config(model))
    chosen = np.linspace(0, len(photos) - 1, min(2 * PHOTOS, len(photos))).astype(int)
    every = torch.stack([transform(open_photo(photos.filename(i, absolute=True))) for i in chosen])
    return every[::2], every[1::2]


def verify(model: nn.Module, runtime: Runtime, path: Path, photos: Tensor, batch: int) -> float:
    """Returns the share of photos for which an int8 file predicts the model's class.

    It is the smaller one of two, if the runtime's default precision for the layers in float is not float32.

    Args:
        model: A timm model in evaluation mode.
        runtime: The file's runtime.
        path: The file.
        photos: Photos that the file was not calibrated on, (photos, channels, height, width).
        batch: Batch size of the file.

    Raises:
        ValueError: The share is below 95 %, beyond chance: so is the upper end of its 95 % interval.
    """
    named = torch.cat([model(some).argmax(1) for some in photos.split(batch)])
    share = min(agreement(run, photos, named, batch) for run in (runtime.load(path), runtime.load_default(path)[0]))
    low, high = wilson(round(share * len(photos)), len(photos))
    if high < LEAST:
        raise ValueError(
            f"in int8 {share:.1%} of {len(photos)} other photos keep their class (95 % interval "
            f"{low:.1%} to {high:.1%}), and {LEAST:.0%} must"
        )
    return share


def agreement(run: Run, photos: Tensor, named: Tensor, batch: int) -> float:
    """Returns the share of photos for which an exported file and its model predict the same class.

    Args:
        run: Function that runs the file.
        photos: (photos, channels, height, width).
        named: Classes predicted by the model, (photos,).
        batch: Batch size of the file.
    """
    found = torch.cat([_logits(run, some, batch).argmax(1) for some in photos.split(batch)])
    return (found == named).double().mean().item()


def labelled(model: nn.Module, folder: str | Path) -> tuple[Images, Tensor]:
    """Opens labelled photos for evaluation, and returns them with the model's indices of their classes.

    Args:
        model: A timm model.
        folder: Folder with one folder per class, directly or in `val`, `validation` or `test`. A subset of the model's
            classes is enough.

    Raises:
        OSError: The folder is missing or unreadable.
        ValueError: The model does not have these classes, or has no classifier.
    """
    images, _ = open_validation(folder)
    known = label_names(model)
    if not set(images.classes) <= set(known):
        check_classes(type(model).__name__, known, images.classes)
    return images, torch.tensor([known.index(name) for name in images.classes])


def accuracy(model: nn.Module, run: Run, images: Images, number: Tensor, batch: int) -> tuple[float, float, int]:
    """Returns the top-1 accuracy of a model and of its file in percent, and the number of photos.

    Args:
        model: A timm model in evaluation mode.
        run: Function that runs the file.
        images: From `labelled`.
        number: From `labelled`.
        batch: Batch size of the file.
    """
    loader = create_val_loader(images, resolve_model_data_config(model), batch, default_workers(), torch.device("cpu"))
    by_model, by_file, count = 0.0, 0.0, 0
    with torch.inference_mode():
        for photos, labels in loader:
            readable = labels >= 0
            wanted, photos = number[labels[readable]], photos[readable].contiguous()
            if len(wanted):
                by_model += (model(photos).argmax(1) == wanted).sum().item()
                by_file += (_logits(run, photos, batch).argmax(1) == wanted).sum().item()
                count += len(wanted)
    tell_unreadable(images, "does not count")
    return 100 * by_model / count, 100 * by_file / count, count


def _logits(run: Run, photos: Tensor, batch: int) -> Tensor:
    """Returns the logits of up to `batch` photos, padded to `batch` because the file may accept no other number."""
    rest = photos.new_zeros(batch - len(photos), *photos.shape[1:])
    return run(torch.cat([photos, rest]))[0][: len(photos)]


def to_int8(model: Any, photos: Tensor, batch: int, judge: Callable[..., Any] | None = None) -> Any:
    """Quantizes the convolutions and matrix products of an ONNX model to int8 with NNCF: weights and activations.

    Args:
        model: An `onnx.ModelProto` in float32.
        photos: (photos, channels, height, width), for calibration.
        batch: Batch size of the model.
        judge: Function that returns a model's share of correct photos, and a list of it per batch, over the first 100
            photos. If given, layers go back to float until the share is at most 5 percentage points below that of the
            float32 model.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: There are fewer photos than `batch`.
    """
    try:
        import nncf
    except ImportError:
        raise ImportError("int8 needs nncf: pip install nncf") from None
    if len(photos) < batch:
        raise ValueError(f"{len(photos)} photos to choose int8 by, and batches of {batch}")
    others = {node.op_type for node in model.graph.node} - _PRODUCTS
    scope: dict[str, Any] = dict(ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False))
    scope |= dict(subset_size=len(photos) // batch)

    def data(count: int) -> Any:
        return nncf.Dataset([some.numpy() for some in _whole(photos, batch, count)], lambda images: {"images": images})

    with contextlib.redirect_stdout(io.StringIO()):  # hides NNCF's progress bars
        if judge is None:
            return nncf.quantize(model, data(len(photos)), **scope)
        return nncf.quantize_with_accuracy_control(
            model, data(len(photos)), data(_RANKED), judge,
            max_drop=1 - LEAST, drop_type=nncf.DropType.ABSOLUTE, **scope,
        )  # fmt: skip


def _whole(of: Tensor, batch: int, count: int) -> tuple[Tensor, ...]:
    """Splits the first `count` entries into full batches, at least one."""
    return of[: max(min(count, len(of)), batch) // batch * batch].split(batch)


def quantize(path: Path, photos: Tensor, named: Tensor, batch: int) -> list[str]:
    """Quantizes an ONNX file to int8, in place.

    If the predicted class of too many photos changes, layers go back to float.

    Args:
        path: The float32 file, from torch's exporter.
        photos: (photos, channels, height, width), for calibration.
        named: Classes predicted by the model, (photos,).
        batch: Batch size of the file.

    Returns:
        The layers left in float: those that lose the most accuracy.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: There are fewer photos than `batch`.
    """
    import onnx
    import onnxruntime

    def judge(candidate: Any, _: Any = None) -> tuple[float, list[float]]:
        session = onnxruntime.InferenceSession(candidate.SerializeToString(), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(session.run(None, {"images": images.numpy()})[0])]

        pairs = zip(_whole(photos, batch, _RANKED), _whole(named, batch, _RANKED), strict=True)
        shares = [agreement(run, some, classes, batch) for some, classes in pairs]
        return statistics.mean(shares), shares

    model = onnx.load(path)
    found = to_int8(model, photos, batch)
    every = _products(found)
    if judge(found)[0] < LEAST:
        found = to_int8(model, photos, batch, judge)
    found.metadata_props.extend(prop for prop in model.metadata_props if prop not in found.metadata_props)
    onnx.save(found, path)
    kept = _products(found)
    return [name for name in every if name not in kept]


def _products(model: Any) -> list[str]:
    """Returns the names of the modules whose convolution or matrix product an ONNX graph computes in int8."""
    makers = {name: node for node in model.graph.node for name in node.output}

    def in_int8(name: str) -> bool:
        node = makers.get(name)
        return node is not None and (
            node.op_type == "DequantizeLinear" or (node.op_type in _SHAPES and in_int8(node.input[0]))
        )

    names = []
    for node in model.graph.node:
        if node.op_type in _PRODUCTS and any(map(in_int8, node.input[:2])):
            scopes = {prop.key: prop.value for prop in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
            names.append(ast.literal_eval(scopes)[-2].removeprefix("model.") if scopes else node.name)
    return names
