"""`container export`: files for other runtimes, with the model's answers."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT
from test_weights import OURS
from torch import nn

from container import deploy, weights
from container.__main__ import main
from container.predict import SAMPLE, class_names, predict
from container.runtimes import RUNTIMES, OpenVino, TorchScript, openvino_core

# torch says of TorchScript that it is deprecated; deployments that have it are why the format is there.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def loaded(path):
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


def answers(path, x):
    """Of a file, by its runtime alone."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]
    if path.suffix == ".xml":
        compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return [torch.from_numpy(np.array(compiled({"images": x.numpy()})[i])) for i in range(len(compiled.outputs))]
    if path.suffix == ".pte":
        program = loaded(path)  # a method reads its memory
        return program.load_method("forward").execute([x])
    run = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path)
    return run(x)


def told(path):
    """What a file says under `container`, by its runtime alone."""
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["container"])
    if path.suffix == ".xml":
        return json.loads(openvino_core().read_model(path).get_rt_info(["container"]).value)
    if path.suffix == ".pte":
        program = loaded(path)
        return json.loads(program.load_method("container").execute([])[0])
    extra = {"container": ""}
    torch.export.load(path, extra_files=extra) if path.suffix == ".pt2" else torch.jit.load(path, _extra_files=extra)
    return json.loads(extra["container"])


@pytest.fixture(scope="module")
def model():
    return timm.create_model(OURS, pretrained=True).eval()


no_executorch = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="pip install executorch")
MARKS = dict(openvino=pytest.mark.slow, pt2=pytest.mark.slow, executorch=(no_executorch, pytest.mark.slow))
FORMATS = [pytest.param(format, marks=MARKS.get(format, ())) for format in RUNTIMES]


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_file_gives_the_answers_and_says_how_photos_are_prepared(model, format, tmp_path):
    """At batches and sizes that it was not made with, where the format has such, by the runtime alone."""
    path, fixed = tmp_path / f"model{RUNTIMES[format].suffix}", format == "executorch"
    found = deploy.export(model, path, format, batch=2 if fixed else None, dynamic_size=not fixed)
    assert found.files[-1] == path and sorted(tmp_path.iterdir()) == found.files
    assert (
        found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        and 0 < found.differences["float32"] < 1e-5
    )
    for shape in ((2, 3, 32, 32),) if fixed else ((1, 3, 32, 32), (5, 3, 41, 64)):
        (y,) = answers(path, images(*shape))
        torch.testing.assert_close(y, model(images(*shape)), rtol=1e-4, atol=1e-4)
    said = told(path)
    config = timm.data.resolve_model_data_config(model)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert said[key] == (list(config[key]) if isinstance(config[key], tuple) else config[key])
    assert said["classes"] == class_names(model) and said["channels"] == "RGB" and said["range"] == [0, 1]


@pytest.mark.slow
@torch.no_grad()
def test_maps_in_place_of_logits(tmp_path):
    backbone = timm.create_model("container_light_nano", features_only=True, num_classes=0).eval()
    deploy.export(backbone, tmp_path / "maps.onnx", "onnx", batch=1)
    session = onnxruntime.InferenceSession(tmp_path / "maps.onnx")
    assert [output.name for output in session.get_outputs()] == ["stage1", "stage2", "stage3", "stage4"]
    x = images(1, 3, 128, 128)
    for found, wanted in zip(answers(tmp_path / "maps.onnx", x), backbone(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert told(tmp_path / "maps.onnx")["classes"] is None
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|expected: 1"):
        answers(tmp_path / "maps.onnx", images(2, 3, 128, 128))


@pytest.mark.parametrize(
    "format",
    [
        "torchscript",
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("executorch", marks=(no_executorch, pytest.mark.slow)),
    ],
)
@pytest.mark.parametrize("name", ["container_nano", pytest.param("container_mixer", marks=pytest.mark.slow)])
def test_other_members(name, format, tmp_path):
    file = tmp_path / f"m{RUNTIMES[format].suffix}"
    found = deploy.export(
        weights.create(name, img_size=64, pretrained=False), file, format, batch=1 if format == "executorch" else None
    )
    assert found.differences["float32"] < 1e-5


class Fickle(nn.Module):
    """Answers something else when it is traced."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = dict(timm.get_pretrained_cfg(OURS).to_dict(), input_size=(3, 8, 8))
        self.num_classes = 10
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * self.scale * (1.01 if torch.jit.is_tracing() else 1.0)


def test_a_file_with_other_answers_is_refused_and_not_left(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"torchscript gives other outputs in float32: they differ by 1\.0e-02 of the largest, and 0.001 is ",
    ):
        deploy.export(Fickle().eval(), tmp_path / "m.pt", "torchscript")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", [0, 2])
@pytest.mark.parametrize("images", [2, 3])
def test_a_nan_in_any_output_of_any_shape_is_a_difference(tmp_path, monkeypatch, output, images):
    """A file whose runtime gives NaN there is not kept."""
    load = TorchScript.load

    def load_wrong(self, path):
        right = load(self, path)

        def wrong(x):
            maps = right(x)
            if len(x) == images:
                maps[output][..., -1] = torch.nan
            return maps

        return wrong

    monkeypatch.setattr(TorchScript, "load", load_wrong)
    maps = timm.create_model("container_light_nano_32", features_only=True).eval()
    with pytest.raises(
        ValueError, match="torchscript gives other outputs in float32: they differ by nan of the largest"
    ):
        deploy.export(maps, tmp_path / "m.pt", "torchscript")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_precision_that_a_runtime_takes_by_default_is_compared_too(model, tmp_path, monkeypatch, capsys):
    """OpenVINO takes bfloat16 where the CPU has it, and float32 elsewhere."""
    main(["export", OURS, str(tmp_path / "m.xml"), "--format", "openvino"])
    _, precision = OpenVino().load_default(tmp_path / "m.xml")
    assert f" of the largest output in {precision}\n" in capsys.readouterr().out
    monkeypatch.setattr(
        OpenVino, "load_default", lambda self, path: (lambda x: [y * 1.06 for y in self.load(path)(x)], "bfloat16")
    )
    with pytest.raises(ValueError, match=r"in bfloat16: they differ by 6\.0e-02 of the largest, and 0.05 is allowed"):
        deploy.export(model, tmp_path / "other.xml", "openvino")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.slow
def test_the_generator_of_the_caller_is_not_moved(model, tmp_path):
    before = torch.get_rng_state()
    deploy.export(model, tmp_path / "m.pt", "torchscript", batch=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_feature_maps_have_no_classes_to_evaluate(tmp_path):
    maps = timm.create_model("container_light_nano_32", features_only=True).eval()
    with pytest.raises(ValueError, match="feature maps have no classes to evaluate"):
        deploy.export(maps, tmp_path / "m.pt", "torchscript", evaluate=tmp_path)


@pytest.mark.slow
def test_by_the_command_and_read_without_torch(model, tmp_path, monkeypatch, capsys):
    """The classes and probabilities of `predict`, from the file alone."""
    monkeypatch.chdir(tmp_path)
    ((expected),) = predict([SAMPLE], model)
    for format in ("onnx", "openvino"):
        file = f"model{RUNTIMES[format].suffix}"
        main(["export", OURS, file, "--format", format, "--batch", "1"])
        printed = capsys.readouterr().out
        assert (
            f"{file}: " in printed and f"largest difference from {OURS}: " in printed and "ms for one image" in printed
        )
        code = (
            "import runpy, sys; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__'); "
            "assert not {'torch', 'timm', 'container'} & set(sys.modules)"
        )
        read = subprocess.run(
            [sys.executable, "-c", code, ROOT / "examples" / "read_exported.py", file, SAMPLE],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert read.returncode == 0, read.stderr
        found = [(name, float(p)) for p, name in re.findall(r"^ *([\d.]+) %  (.+)$", read.stdout, re.MULTILINE)]
        # OpenVINO computes in bfloat16 where the CPU does, and may swap classes that are as likely.
        assert dict(found) == pytest.approx({name: 100 * p for name, p in expected}, abs=0.5)
        assert found[0][0] == expected[0][0] and (
            format == "openvino" or [n for n, _ in found] == [n for n, _ in expected]
        )


@pytest.mark.parametrize(
    "words, message",
    [
        ([OURS, "m.pt", "--format", "onnx"], "m.pt should end in .onnx, as files of onnx do"),
        ([OURS, "m.onnx", "--format", "onnx", "--batch", "0"], "--batch 0 is neither a number of images nor dynamic"),
        (
            [OURS, "m.onnx", "--format", "onnx", "--batch", "few"],
            "--batch few is neither a number of images nor dynamic",
        ),
        (
            [OURS, "m.pte", "--format", "executorch"],
            "executorch plans its memory for one size of a batch: --batch N, without --dynamic-size",
        ),
        (
            ["container_mixer", "m.pt", "--format", "torchscript"],
            "container_mixer has no pre-trained weights: there are ",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["export", *words])
    assert str(stop.value).startswith(f"container: {message}") and "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_exported_to_openvino_survives_the_end_of_its_children(tmp_path):
    """OpenVINO's plugins leave freed memory as the stack for signals, if two of them end in the order of their births.

    Files are compared at two precisions where the CPU has bfloat16, so that there are two models at a time.
    """
    script = """
import signal, subprocess, torch
from torch import nn
from container.runtimes import RUNTIMES, Work
work = Work(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.ones(1, 3, 8, 8), None, ["y"], "{}")
RUNTIMES["openvino"].write(work, "model.xml")
first = RUNTIMES["openvino"].load("model.xml")
second = RUNTIMES["openvino"].load("model.xml")
del first
del second
signal.signal(signal.SIGCHLD, lambda *_: None)
print(subprocess.run(["echo", "alive"], capture_output=True, text=True).stdout)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "alive\n\n", (result.returncode, result.stderr)


def test_a_model_that_is_tied_to_its_size_or_training_is_refused(tmp_path):
    mixer = weights.create("container_mixer", img_size=64, pretrained=False)
    with pytest.raises(ValueError, match="container_mixer is tied to images of 64 x 64 pixels"):
        deploy.export(mixer, tmp_path / "m.pt", "torchscript", None, True)
    mixer.pretrained_cfg["input_size"] = (3, 96, 96)
    with pytest.raises(ValueError, match="Container fails at 96 x 96 pixels: "):
        deploy.export(mixer, tmp_path / "m.pt", "torchscript")
    with pytest.raises(ValueError, match="training mode"):
        deploy.export(timm.create_model("container_light_nano"), tmp_path / "m.pt", "torchscript")


def test_without_the_runtime_the_line_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"--format openvino needs openvino: pip install openvino"):
        deploy.export(model, tmp_path / "m.xml", "openvino")
