"""Exports models to other runtimes.

Files are exported from the fused model, and kept only if their outputs match those of the unfused model. Each file
stores what is needed to run it: preprocessing and class names, as JSON under `container` in its metadata.
"""

import contextlib
import copy
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from . import int8
from .fuse import fuse
from .images import pixels_per_token
from .predict import class_names

__all__ = ["FORMATS", "Exported", "export", "preprocessing"]

FORMATS = dict(onnx=".onnx", openvino=".xml", executorch=".pte", pt2=".pt2", torchscript=".pt")
"""Export formats and the suffixes of their files."""
KEY = "container"  # key in the metadata
BOUND = 1e-3  # largest allowed difference of an output, relative to its largest value
_NEEDS = 'pip install "container-timm[deploy]"'

Run = Callable[[Tensor], list[Tensor]]


class Exported(NamedTuple):
    """Exported file and its measurements on this machine.

    Attributes:
        files: The file, and any files that belong to it.
        difference: Largest difference from the model's outputs, relative to their largest value.
        bytes: Total size of the files.
        load_seconds: Time until its runtime is ready.
        milliseconds: Latency at batch size 1, or None if the file does not accept it.
        images_per_second: Throughput in batches of `batch`.
        batch: Batch size.
        agreement: For int8, the share of calibration photos for which file and model predict the same class.
        in_float: Layers left in float, because int8 would cost too much accuracy.
        accuracy: Top-1 accuracy of the model and of the file in percent, and the number of photos.
    """

    files: list[Path]
    difference: float
    bytes: int
    load_seconds: float
    milliseconds: float | None
    images_per_second: float
    batch: int
    agreement: float | None = None
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
        format: One of `FORMATS`.
        batch: Batch size, or None for any.
        dynamic_size: Whether to accept any height and width.
        calibrate: Folder of photos for int8 calibration, for ONNX and OpenVINO; None for float32. int8 outputs are not
            compared with the model's. Instead, the file must predict the model's class for 95 % of these photos.
        evaluate: Folder of class folders on which to measure the top-1 accuracy of model and file.

    Raises:
        ImportError: The format's package, or NNCF for int8, is not installed.
        OSError: The file cannot be written.
        ValueError: The model is in training mode or cannot be converted, the suffix is not the format's, or the outputs
            differ by more than `BOUND`. With `dynamic_size`: the model is tied to its image size. For ExecuTorch: the
            input shape is not fixed. For int8: the format does not support it, the outputs are feature maps, or too
            many predicted classes differ. No file is left behind.
    """
    out, network = Path(out), model
    if model.training:
        raise ValueError("a model in training mode cannot be exported: call eval() first")
    if out.suffix != FORMATS[format]:
        raise ValueError(f"{out} should end in {FORMATS[format]}, as files of {format} do")
    if format == "executorch" and (dynamic_size or not batch):
        raise ValueError("executorch plans its memory for one size of a batch: --batch N, without --dynamic-size")
    told = preprocessing(model)
    channels, *side = told["input_size"]
    cfg: Any = getattr(network, "pretrained_cfg", {})
    if dynamic_size and cfg.get("fixed_input_size"):
        raise ValueError(f"{cfg.get('architecture')} is tied to images of {side[0]} x {side[1]} pixels")
    count = batch or 2  # torch.export treats a dimension of size 1 as a constant
    example = torch.randn(count, channels, *side)
    wrapped = _Outputs(fuse(model)).eval()
    names, dims = _output_names(wrapped, example), _dynamic(model, batch, dynamic_size)
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
        told["precision"] = "f32"  # of the layers not in int8; OpenVINO is slower with bfloat16
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, torch.no_grad(), _quiet():
        scratch, agreement, in_float = Path(folder, out.name), None, []
        first = format if photos is None else "onnx"  # OpenVINO's int8 file is converted from ONNX
        written = scratch.with_suffix(FORMATS[first])
        try:
            _WRITERS[first](wrapped, example, {"images": dims} if dims else None, names, json.dumps(told), written)
        except (RuntimeError, torch._dynamo.exc.UserError) as error:  # raised by the exporters and OpenVINO's converter
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"{first} cannot write this model: {reason}") from error
        run, loaded = _load(first, written)
        shapes = [(count, *side)] + ([] if batch else [(1, *side), (3, *side)])
        shapes += [(count, side[0] + 32, side[1] + 64), (count, side[0] - 7, side[1] + 9)] if dynamic_size else []
        # The maximum of a tensor is NaN if any of its values is; that of Python need not be.
        differences = [_difference(model, run, torch.randn(n, channels, h, w)) for n, h, w in shapes]
        difference = torch.tensor(differences).max().item()
        if not difference <= BOUND:
            raise ValueError(
                f"{first} gives other outputs: they differ by {difference:.1e} of the largest, and {BOUND:g} is allowed"
            )
        measured = batch or 8
        if photos is not None:
            named = torch.cat([model(some).argmax(1) for some in photos.split(8)])
            in_float = int8.quantize(written, photos, named, batch or 1)
            if format == "openvino":
                _save_openvino(written, names, json.dumps(told), scratch)
                written.unlink()
            run, loaded = _load(format, scratch)
            agreement = int8.agreement(run, photos, named, measured)
            if agreement < int8.LEAST:
                raise ValueError(
                    f"in int8 {agreement:.1%} of the photos in {calibrate} keep their class, and 95 % must"
                )
        accuracy = None if labelled is None else int8.accuracy(model, run, *labelled, measured)
        one = 1e3 * _seconds(run, torch.randn(1, channels, *side)) if batch in (None, 1) else None
        many = measured / _seconds(run, torch.randn(measured, channels, *side))
        del run
        files = [Path(shutil.move(path, out.parent / path.name)) for path in sorted(Path(folder).iterdir())]
    size = sum(file.stat().st_size for file in files)
    return Exported(files, difference, size, loaded, one, many, measured, agreement, in_float, accuracy)


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


def _load(format: str, path: Path) -> tuple[Run, float]:
    """Loads a file into its runtime, and returns the function that runs it and the load time in seconds."""
    start = time.perf_counter()
    return _RUNNERS[format](path), time.perf_counter() - start


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and log messages of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --------------------------------------------------------------------------------------------------- writing, by format


def _write_onnx(
    model: nn.Module, example: Tensor, dims: dict[str, Any] | None, names: list[str], told: str, path: Path
) -> None:
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError:
        raise ImportError(f"--format onnx needs onnxscript and onnxruntime: {_NEEDS}") from None
    program = torch.onnx.export(
        model, (example,), input_names=["images"], output_names=names, dynamic_shapes=dims, dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props[KEY] = told
    program.save(str(path))


def _write_openvino(
    model: nn.Module, example: Tensor, dims: dict[str, Any] | None, names: list[str], told: str, path: Path
) -> None:
    _save_openvino(torch.export.export(model, (example,), dynamic_shapes=dims, strict=False), names, told, path)


def _save_openvino(source: Any, names: list[str], told: str, path: Path) -> None:
    """Saves an exported program or an ONNX file in OpenVINO's format."""
    try:
        import openvino
    except ImportError:
        raise ImportError(f"--format openvino needs openvino: {_NEEDS}") from None
    converted = openvino.convert_model(source)
    for port, name in zip((*converted.inputs, *converted.outputs), ("images", *names), strict=True):
        port.get_tensor().set_names({name})
    converted.set_rt_info(told, [KEY])
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_executorch(
    model: nn.Module, example: Tensor, dims: dict[str, Any] | None, names: list[str], told: str, path: Path
) -> None:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.error import ExportError
    except ImportError:
        raise ImportError(f"--format executorch needs executorch: {_NEEDS.replace('deploy', 'executorch')}") from None
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # ExecuTorch cannot read channels_last
    exported = torch.export.export(plain, (example,), dynamic_shapes=dims, strict=False)
    try:  # its files have no metadata, so a method returns the text instead
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], constant_methods={KEY: told})
        path.write_bytes(edge.to_executorch().buffer)
    except ExportError as error:
        raise RuntimeError(str(error)) from error


def _write_pt2(
    model: nn.Module, example: Tensor, dims: dict[str, Any] | None, names: list[str], told: str, path: Path
) -> None:
    exported = torch.export.export(model, (example,), dynamic_shapes=dims, strict=False)
    torch.export.save(exported, path, extra_files={KEY: told})


def _write_torchscript(
    model: nn.Module, example: Tensor, dims: dict[str, Any] | None, names: list[str], told: str, path: Path
) -> None:
    torch.jit.trace(model, (example,)).save(str(path), _extra_files={KEY: told})


# --------------------------------------------------------------------------------------------------- running, by format


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]


def _run_openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(np.array(array)) for array in compiled(images.numpy()).to_tuple()]


def _run_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: [answer.clone() for answer in method.execute([images])]


def _run_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: list(module(images))


def _run_torchscript(path: Path) -> Run:
    module = torch.jit.load(str(path))
    return lambda images: list(module(images))


_WRITERS: dict[str, Callable[..., None]] = dict(
    onnx=_write_onnx,
    openvino=_write_openvino,
    executorch=_write_executorch,
    pt2=_write_pt2,
    torchscript=_write_torchscript,
)
_RUNNERS: dict[str, Callable[[Path], Run]] = dict(
    onnx=_run_onnx,
    openvino=_run_openvino,
    executorch=_run_executorch,
    pt2=_run_pt2,
    torchscript=_run_torchscript,
)
