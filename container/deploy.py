"""Exports models to other runtimes.

Files are exported from the fused model, and kept only if their outputs match those of the unfused model. Each file
stores what is needed to run it: preprocessing and class names, as JSON under `container` in its metadata.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from . import int8
from .fuse import fuse
from .images import pixels_per_token
from .predict import class_names
from .runtimes import RUNTIMES, OpenVino, Run, Work, quiet

__all__ = ["BOUNDS", "Exported", "Speed", "export", "measure", "preprocessing", "verify", "write"]

BOUNDS = dict(float32=1e-3, bfloat16=5e-2)
"""Largest allowed difference of an output, relative to its largest value, by the precision that a file runs in."""


class Speed(NamedTuple):
    """Speed of a file on this machine.

    Attributes:
        milliseconds: Latency at batch size 1, or None if the file does not accept it.
        images_per_second: Throughput in batches of `batch`.
        batch: Batch size.
    """

    milliseconds: float | None
    images_per_second: float
    batch: int


class Exported(NamedTuple):
    """Exported file and its measurements on this machine.

    Attributes:
        files: The file, and any files that belong to it.
        differences: Largest difference of the file's outputs from the model's, relative to their largest value, by the
            precision that the file runs in: float32, and that which its runtime takes by default if it is another.
        bytes: Total size of the files.
        load_seconds: Time until its runtime is ready.
        speed: Its speed in the default precision; an int8 file's other layers are in float32.
        agreement: For int8, the share of photos for which file and model predict the same class. The file was not
            calibrated on these photos.
        photos: Their number.
        in_float: Layers left in float, because int8 would cost too much accuracy.
        accuracy: Top-1 accuracy of the model and of the file in percent, and the number of photos.
    """

    files: list[Path]
    differences: dict[str, float]
    bytes: int
    load_seconds: float
    speed: Speed
    agreement: float | None = None
    photos: int = 0
    in_float: Sequence[str] = ()
    accuracy: tuple[float, float, int] | None = None


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Returns the preprocessing and the class names of a model, stored under `container` in its file.

    Args:
        model: A timm model.
    """
    network: Any = model
    config = resolve_model_data_config(model)
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    names = class_names(model) if getattr(network, "num_classes", 0) else None
    return dict({key: config[key] for key in wanted}, channels="RGB", range=[0, 1], classes=names)


class _Outputs(nn.Module):
    """Wrapper that returns the outputs of a model as a tuple, whether they are logits or feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        answer = self.model(images)
        return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def export(
    model: nn.Module,
    out: str | Path,
    format: str,
    batch: int | None = None,
    dynamic_size: bool = False,
    calibrate: str | Path | None = None,
    evaluate: str | Path | None = None,
) -> Exported:
    """Exports a model to another runtime, and compares the file's outputs with those of the unfused model.

    The input is `images`, float32 (batch, channels, height, width), prepared according to `preprocessing`. The outputs
    are `logits`, or `stage1` to `stage4` for a model created with `features_only=True`.

    Args:
        model: A timm model in evaluation mode, in float32.
        out: Output file, with the suffix of its format.
        format: A key of `RUNTIMES`.
        batch: Batch size, or None for any.
        dynamic_size: Whether to accept any height and width.
        calibrate: Folder of photos for int8, for ONNX and OpenVINO; None for float32. An int8 file must predict the
            model's class for 95 % of those photos that it was not calibrated on; it is refused if their share is
            lower beyond chance.
        evaluate: Folder of class folders on which to measure the top-1 accuracy of model and file.

    Raises:
        ImportError: The format's package, or NNCF for int8, is not installed.
        OSError: The file cannot be written.
        ValueError: The model is in training mode or cannot be converted, the suffix is not the format's, or the outputs
            differ by more than `BOUND`. With `dynamic_size`: the model is tied to its image size. For ExecuTorch: the
            input shape is not fixed. For int8: the format does not support it, the outputs are feature maps, or too
            many predicted classes differ. No file is left behind.
    """
    out, network, runtime = Path(out), model, RUNTIMES[format]
    if model.training:
        raise ValueError("a model in training mode cannot be exported: call eval() first")
    if out.suffix != runtime.suffix:
        raise ValueError(f"{out} should end in {runtime.suffix}, as files of {format} do")
    if format == "executorch" and (dynamic_size or not batch):
        raise ValueError("executorch plans its memory for one size of a batch: --batch N, without --dynamic-size")
    metadata = preprocessing(model)
    channels, *side = metadata["input_size"]
    cfg: Any = getattr(network, "pretrained_cfg", {})
    if dynamic_size and cfg.get("fixed_input_size"):
        raise ValueError(f"{cfg.get('architecture')} is tied to images of {side[0]} x {side[1]} pixels")
    count = batch or 2  # torch.export treats a dimension of size 1 as a constant
    wrapped, example = _Outputs(fuse(model)).eval(), _draw(count, channels, *side)
    names = _output_names(wrapped, example)
    if evaluate is not None and names != ["logits"]:
        raise ValueError("feature maps have no classes to evaluate")
    labelled = None if evaluate is None else int8.labelled(model, evaluate)
    photos = None
    if calibrate is not None:
        if format not in ("onnx", "openvino"):
            raise ValueError(f"{format} has no int8 here: onnx and openvino do")
        if names != ["logits"]:
            raise ValueError("--int8 compares the classes of photos, and --features-only has no classes")
        photos = int8.calibration(model, calibrate)
        metadata["precision"] = "f32"  # of the layers not in int8; OpenVINO is slower with bfloat16
    work = Work(wrapped, example, _dynamic(model, batch, dynamic_size), names, json.dumps(metadata))
    shapes = [(count, channels, *side)] + ([] if batch else [(n, channels, *side) for n in (1, 3)])
    if dynamic_size:
        shapes += [(count, channels, side[0] + 32, side[1] + 64), (count, channels, side[0] - 7, side[1] + 9)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, torch.no_grad(), quiet():
        file = Path(folder, out.name)
        agreement: float | None = None
        in_float: list[str] = []
        if photos is None:
            write(format, work, file)
            differences = verify(model, format, file, shapes)
        else:
            differences, in_float = _write_int8(model, format, work, file, photos[0], shapes)
            agreement = int8.verify(model, runtime, file, photos[1], batch or 8)
        start = time.perf_counter()
        run = runtime.load_default(file)[0] if photos is None else runtime.load(file)
        loaded = time.perf_counter() - start
        accuracy = None if labelled is None else int8.accuracy(model, run, *labelled, batch or 8)
        speed = measure(run, channels, side, batch)
        del run
        files = [Path(shutil.move(path, out.parent / path.name)) for path in sorted(Path(folder).iterdir())]
    size, held_out = sum(file.stat().st_size for file in files), 0 if photos is None else len(photos[1])
    return Exported(files, differences, size, loaded, speed, agreement, held_out, in_float, accuracy)


def write(format: str, work: Work, path: Path) -> None:
    """Writes a file.

    Args:
        format: A key of `RUNTIMES`.
        work: The model and its shapes.
        path: The file.

    Raises:
        ImportError: The format's package is not installed.
        ValueError: The model cannot be converted.
    """
    try:
        RUNTIMES[format].write(work, path)
    except (RuntimeError, torch._dynamo.exc.UserError) as error:  # raised by the exporters and OpenVINO's converter
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{format} cannot write this model: {reason}") from error


def verify(model: nn.Module, format: str, path: Path, shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Compares all outputs of a file with the model's, in float32 and in the precision that the runtime takes itself.

    Args:
        model: A timm model in evaluation mode.
        format: A key of `RUNTIMES`.
        path: The file.
        shapes: Shapes of images (batch, channels, height, width) to compare on.

    Returns:
        By precision, the largest difference of any output, relative to its largest value.

    Raises:
        ValueError: A difference is above its bound, or an output is not a number.
    """
    default, precision = RUNTIMES[format].load_default(path)
    runs = {"float32": default if precision == "float32" else RUNTIMES[format].load(path), precision: default}
    differences = {}
    for precision, run in runs.items():
        # The maximum of a tensor is NaN if any of its values is; that of Python need not be.
        differences[precision] = torch.tensor([_difference(model, run, _draw(*shape)) for shape in shapes]).max().item()
        if not differences[precision] <= (bound := BOUNDS.get(precision, BOUNDS["bfloat16"])):
            raise ValueError(
                f"{format} gives other outputs in {precision}: they differ by {differences[precision]:.1e} of the "
                f"largest, and {bound:g} is allowed"
            )
    return differences


def measure(run: Run, channels: int, side: Sequence[int], batch: int | None) -> Speed:
    """Measures the speed of a file.

    Args:
        run: Function that runs the file.
        channels: Channels of the images.
        side: Height and width of the images.
        batch: Batch size of the file, or None for any.
    """
    one = 1e3 * _seconds(run, _draw(1, channels, *side)) if batch in (None, 1) else None
    many = batch or 8
    return Speed(one, many / _seconds(run, _draw(many, channels, *side)), many)


def _write_int8(
    model: nn.Module, format: str, work: Work, path: Path, photos: Tensor, shapes: Sequence[tuple[int, ...]]
) -> tuple[dict[str, float], list[str]]:
    """Writes an int8 file by way of a float32 file of ONNX, which is verified.

    Returns the differences of the file's logits on the calibration photos, and the layers left in float.
    """
    floats = path.with_suffix(".onnx")
    write("onnx", work, floats)
    verify(model, "onnx", floats, shapes)
    batch = work.example.shape[0] if 0 not in (work.dims or {}) else 1
    named = torch.cat([model(some).argmax(1) for some in photos.split(8)])
    in_float = int8.quantize(floats, photos, named, batch)
    if isinstance(runtime := RUNTIMES[format], OpenVino):
        runtime.convert(floats, work, path)
        floats.unlink()
    return {"int8": _difference(model, runtime.load(path), photos[:batch])}, in_float


def _draw(*shape: int) -> Tensor:
    """Returns the same random images for the same shape, without moving the caller's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _output_names(model: _Outputs, images: Tensor) -> list[str]:
    try:
        with torch.no_grad():
            answers = model(images)
    except (AssertionError, RuntimeError) as error:
        size = " x ".join(map(str, images.shape[-2:]))
        raise ValueError(f"{type(model.model).__name__} fails at {size} pixels: {error}") from error
    return ["logits"] if len(answers) == 1 else [f"stage{i + 1}" for i in range(len(answers))]


def _dynamic(model: nn.Module, batch: int | None, dynamic_size: bool) -> dict[int, Any]:
    """Returns the dynamic dimensions of the input."""
    dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch")}
    if dynamic_size:
        least = pixels_per_token(model) + 1  # two tokens in the last stage: torch.export treats size 1 as a constant
        dims |= {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    return dims


def _difference(model: nn.Module, run: Run, images: Tensor) -> float:
    """Returns the largest difference of any output from the model's, relative to its largest value; NaN if any is."""
    pairs = zip(run(images), _Outputs(model)(images), strict=True)
    differences = [(a - b).abs().max() / b.abs().max() if a.shape == b.shape else torch.inf for a, b in pairs]
    return torch.tensor(differences).max().item()


def _seconds(run: Run, images: Tensor, least: int = 5, budget: float = 2.0) -> float:
    """Returns the median time of a call, over at least `least` calls and `budget` seconds."""
    run(images)
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
