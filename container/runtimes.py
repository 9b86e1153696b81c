"""Runtimes that models are exported to: one class for each writes its files and runs them."""

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "KEY",
    "RUNTIMES",
    "ExecuTorch",
    "OnnxRuntime",
    "OpenVino",
    "Pt2",
    "Run",
    "Runtime",
    "TorchScript",
    "Work",
    "openvino_core",
]

KEY = "container"
"""Key of the preprocessing and class names in a file's metadata."""
Run = Callable[[Tensor], list[Tensor]]
"""Function from a batch of images (batch, channels, height, width) to all outputs."""


class Work(NamedTuple):
    """What is to be written to a file.

    Attributes:
        model: Module in evaluation mode that returns a tuple of outputs.
        example: Images (batch, channels, height, width).
        dims: Dynamic dimensions of the images, or None.
        names: Names of the outputs.
        metadata: JSON for the file's metadata, under `KEY`.
    """

    model: nn.Module
    example: Tensor
    dims: dict[int, Any] | None
    names: list[str]
    metadata: str


class Runtime(Protocol):
    """Writes files of one format, and runs them on this machine's CPU.

    Attributes:
        suffix: Suffix of its files.
    """

    suffix: str

    def write(self, work: Work, path: Path) -> None:
        """Writes a file.

        Raises:
            ImportError: The runtime's packages are not installed.
            RuntimeError: The model cannot be converted.
        """

    def load(self, path: Path) -> Run:
        """Loads a file, to compute in float32."""

    def load_default(self, path: Path) -> tuple[Run, str]:
        """Loads a file as the runtime does by default, and returns the precision that it then computes in."""


class _Float32:
    """Runtime that computes in the precision of the file."""

    def load(self, path: Path) -> Run:
        raise NotImplementedError

    def load_default(self, path: Path) -> tuple[Run, str]:
        return self.load(path), "float32"


class OnnxRuntime(_Float32):
    """ONNX files, for ONNX Runtime."""

    suffix = ".onnx"

    def write(self, work: Work, path: Path) -> None:  # noqa: D102
        try:
            import onnxscript  # noqa: F401  (torch's exporter needs it)
        except ImportError:
            raise ImportError("--format onnx needs onnxscript: pip install onnxscript onnxruntime") from None
        names: dict[str, Any] = dict(input_names=["images"], output_names=work.names)
        dims = {"images": work.dims} if work.dims else None
        program = torch.onnx.export(
            work.model, (work.example,), **names, dynamic_shapes=dims, dynamo=True, verbose=False
        )
        assert program is not None
        program.model.metadata_props[KEY] = work.metadata
        program.save(str(path))

    def load(self, path: Path) -> Run:  # noqa: D102
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]


@functools.cache
def openvino_core() -> Any:
    """Returns the process's one `openvino.Core`, which is never freed.

    Each further Core replaces the process's stack for signals. If two are freed in the order in which they were made,
    that stack is freed memory, and the next signal, such as the end of a child process, is a segmentation fault.
    """
    import openvino

    return openvino.Core()


class OpenVino:
    """OpenVINO's files. Where the CPU has bfloat16, OpenVINO computes in it by default; a file cannot say otherwise."""

    suffix = ".xml"

    def write(self, work: Work, path: Path) -> None:  # noqa: D102
        self.convert(_export(work), work, path)

    def convert(self, source: Any, work: Work, path: Path) -> None:
        """Writes an exported program, or the ONNX file at a path."""
        try:
            import openvino
        except ImportError:
            raise ImportError("--format openvino needs openvino: pip install openvino") from None
        converted = openvino.convert_model(source)
        for port, name in zip((*converted.inputs, *converted.outputs), ("images", *work.names), strict=True):
            port.get_tensor().set_names({name})
        converted.set_rt_info(work.metadata, [KEY])
        openvino.save_model(converted, path, compress_to_fp16=False)

    def load(self, path: Path) -> Run:  # noqa: D102
        return self._compile(path, {"INFERENCE_PRECISION_HINT": "f32"})[0]

    def load_default(self, path: Path) -> tuple[Run, str]:  # noqa: D102
        return self._compile(path, {})

    def _compile(self, path: Path, settings: dict[str, str]) -> tuple[Run, str]:
        compiled = openvino_core().compile_model(path, "CPU", settings)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        return lambda images: [
            torch.from_numpy(np.array(array, np.float32)) for array in compiled(images.numpy()).to_tuple()
        ], dict(f32="float32", bf16="bfloat16", f16="float16").get(precision, precision)


class ExecuTorch(_Float32):
    """ExecuTorch's files, by XNNPACK."""

    suffix = ".pte"

    def write(self, work: Work, path: Path) -> None:  # noqa: D102
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.exir.error import ExportError
        except ImportError:
            raise ImportError("--format executorch needs executorch: pip install executorch") from None
        plain = copy.deepcopy(work.model).to(memory_format=torch.contiguous_format)  # it cannot read channels_last
        methods = {KEY: work.metadata}  # its files have no metadata, so a method returns the text instead
        try:
            exported = _export(work._replace(model=plain))
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], constant_methods=methods)
            path.write_bytes(edge.to_executorch().buffer)
        except ExportError as error:
            raise RuntimeError(str(error)) from error

    def load(self, path: Path) -> Run:  # noqa: D102
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

        def run(images: Tensor, _: Any = program) -> list[Tensor]:  # the method reads the program's memory
            return [answer.clone() for answer in method.execute([images])]

        return run


class Pt2(_Float32):
    """Files of `torch.export`."""

    suffix = ".pt2"

    def write(self, work: Work, path: Path) -> None:  # noqa: D102
        torch.export.save(_export(work), path, extra_files={KEY: work.metadata})

    def load(self, path: Path) -> Run:  # noqa: D102
        module = torch.export.load(path).module()
        return lambda images: list(module(images))


class TorchScript(_Float32):
    """Files of `torch.jit`."""

    suffix = ".pt"

    def write(self, work: Work, path: Path) -> None:  # noqa: D102
        torch.jit.trace(work.model, (work.example,)).save(str(path), _extra_files={KEY: work.metadata})

    def load(self, path: Path) -> Run:  # noqa: D102
        module = torch.jit.load(str(path))
        return lambda images: list(module(images))


def _export(work: Work) -> Any:
    dims = {"images": work.dims} if work.dims else None
    return torch.export.export(work.model, (work.example,), dynamic_shapes=dims, strict=False)


RUNTIMES: dict[str, Runtime] = dict(
    onnx=OnnxRuntime(), openvino=OpenVino(), executorch=ExecuTorch(), pt2=Pt2(), torchscript=TorchScript()
)
"""Runtimes by the name of their format."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings and log messages of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
