"""int8 quantization of ONNX files by photos, and how many photos keep their class."""

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
from .training.data import Images, Photos, check_classes, open_validation
from .training.loader import create_val_loader, default_workers
from .training.run import tell_unreadable

__all__ = ["accuracy", "agreement", "calibration", "labelled", "quantize", "to_int8"]

PHOTOS = 300  # that ranges of activations are read from
LEAST = 0.95  # of them are named as by the model
_RANKED = 100  # of them judge what a layer loses
_PRODUCTS = {"Conv", "Gemm", "MatMul"}  # what is fast in int8, and bears it; sums and norms do not
_SHAPES = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

Run = Callable[[Tensor], list[Tensor]]


def calibration(model: nn.Module, folder: str | Path) -> Tensor:
    """Up to 300 photos from across a folder, prepared for a model: (photos, channels, height, width).

    Args:
        model: Of timm's.
        folder: With photos at any depth.

    Raises:
        OSError: It is missing, or cannot be read.
        ValueError: It has no photos, or a file is none.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    photos = Photos([Path(folder)])
    transform = create_transform(**resolve_model_data_config(model))
    chosen = np.linspace(0, len(photos) - 1, min(PHOTOS, len(photos))).astype(int)
    return torch.stack([transform(open_photo(photos.filename(i, absolute=True))) for i in chosen])


def agreement(run: Run, photos: Tensor, named: Tensor, batch: int) -> float:
    """The share of photos to which a file and its model give the same class.

    Args:
        run: The file.
        photos: (photos, channels, height, width).
        named: Classes by the model, (photos,).
        batch: Images that the file takes at once.
    """
    found = torch.cat([_logits(run, some, batch).argmax(1) for some in photos.split(batch)])
    return (found == named).double().mean().item()


def labelled(model: nn.Module, folder: str | Path) -> tuple[Images, Tensor]:
    """Photos to evaluate a model on, and the model's indices of their classes.

    Args:
        model: Of timm's.
        folder: With a folder for each class, or `val`, `validation` or `test` that has them. Its classes may be a part
            of the model's.

    Raises:
        OSError: The folder is missing, or cannot be read.
        ValueError: The model does not know its classes, or has none.
    """
    images, _ = open_validation(folder)
    known = label_names(model)
    if not set(images.classes) <= set(known):
        check_classes(type(model).__name__, known, images.classes)
    return images, torch.tensor([known.index(name) for name in images.classes])


def accuracy(model: nn.Module, run: Run, images: Images, number: Tensor, batch: int) -> tuple[float, float, int]:
    """Top-1 of a model and of its file, both in percent, and over how many photos.

    Args:
        model: Of timm's, in evaluation mode.
        run: The file.
        images: Of `labelled`.
        number: Of the same.
        batch: Images that the file takes at once.
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
    """For as many photos as there are, by a file that may take `batch` of them and no other number."""
    rest = photos.new_zeros(batch - len(photos), *photos.shape[1:])
    return run(torch.cat([photos, rest]))[0][: len(photos)]


def to_int8(model: Any, photos: Tensor, batch: int, judge: Callable[..., Any] | None = None) -> Any:
    """An ONNX model with weights and activations of its convolutions and matrix products in int8, by NNCF.

    Args:
        model: In float32, an `onnx.ModelProto`.
        photos: (photos, channels, height, width), from which ranges are read.
        batch: Images that the model takes at once.
        judge: Of a model: the share of photos that it names right, and as a list by batches of the first 100 photos.
            With it, layers go back into float until that share is 95 %.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: There are fewer photos than a batch has.
    """
    try:
        import nncf
    except ImportError:
        raise ImportError('int8 needs nncf: pip install "container-timm[deploy]"') from None
    if len(photos) < batch:
        raise ValueError(f"{len(photos)} photos to choose int8 by, and batches of {batch}")
    others = {node.op_type for node in model.graph.node} - _PRODUCTS
    scope: dict[str, Any] = dict(ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False))
    scope |= dict(subset_size=len(photos) // batch)

    def data(count: int) -> Any:
        return nncf.Dataset([some.numpy() for some in _whole(photos, batch, count)], lambda images: {"images": images})

    with contextlib.redirect_stdout(io.StringIO()):  # bars of its progress
        if judge is None:
            return nncf.quantize(model, data(len(photos)), **scope)
        return nncf.quantize_with_accuracy_control(
            model, data(len(photos)), data(_RANKED), judge,
            max_drop=1 - LEAST, drop_type=nncf.DropType.ABSOLUTE, **scope,
        )  # fmt: skip


def _whole(of: Tensor, batch: int, count: int) -> tuple[Tensor, ...]:
    """The first `count` of them in whole batches, of which there is at least one."""
    return of[: max(min(count, len(of)), batch) // batch * batch].split(batch)


def quantize(path: Path, photos: Tensor, named: Tensor, batch: int) -> list[str]:
    """Rewrites an ONNX file in int8. If too many photos change their class, layers go back to float.

    Args:
        path: The file, in float32, as torch's exporter writes it.
        photos: (photos, channels, height, width), from which ranges are read.
        named: Classes by the model, (photos,).
        batch: Images that the file takes at once.

    Returns:
        The layers left in float, those that lose most.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: There are fewer photos than a batch has.
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
    """The modules whose products an ONNX graph computes in int8."""
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
