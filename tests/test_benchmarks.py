"""The benchmarks measure what they say. Nothing here depends on how fast this machine is."""

import functools
import itertools
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_imagenet
from benchmarks import cifar, gpu, measure, memory, parts, roofline, speed, transfer
from benchmarks.workers import Worker, descendants, end, first_answers

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def command(name, *words, code=0):
    """Runs a benchmark as a user would; returns what it wrote to the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(module, *words):
    """The line with which a benchmark, called in this process, ends at a mistake."""
    with pytest.raises(SystemExit) as stop:
        module.main([str(word) for word in words])
    return str(stop.value)


def is_a_picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0)) > 50 and (pixels != 255).any(axis=1).mean() > 0.01


# --------------------------------------------------------------------------------------------------------- measure


def test_works_take_turns():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.interleave(works, rounds=4, seconds=0.0)
    assert {name: len(seconds) for name, seconds in times.items()} == dict(a=4, b=4, c=4)
    turns = "".join(name for name, _ in itertools.groupby(calls))  # a turn is some calls of the same work
    assert turns == "abc" + "abc" + "bca" + "cab" + "abc"  # warm-up, then rounds that begin with another work each


def test_a_turn_is_as_long_as_asked_for():
    count = []
    measure.interleave({"sleep": lambda: (count.append(1), torch.rand(300, 300) @ torch.rand(300, 300))}, 3, 0.05)
    assert len(count) > 3 * 3


def test_spread_and_ratios():
    values = [4.0, 1.0, 2.0, 3.0, 10.0]
    assert measure.spread(values) == tuple(np.quantile(values, [0.25, 0.5, 0.75]))
    assert measure.spread([2.0]) == (2.0, 2.0, 2.0)
    assert measure.ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]


def test_peak_memory_is_that_of_the_call():
    if measure.peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not tell a process's peak of resident pages")
    size = 96 * 2**20

    def work():
        a = torch.ones(size // 4)
        b = a * 2
        del a
        return (b + 1).sum()

    work()
    kept = torch.ones(size // 4)  # before the call, so not counted
    assert 1.9 * size < measure.peak_memory(work, CPU) < 2.4 * size
    assert kept.sum() == size // 4


def test_environment_is_recorded():
    record = measure.environment(CPU)
    assert record["torch"] == torch.__version__ and record["timm"] == timm.__version__
    assert record["threads"] == torch.get_num_threads() and record["cpu"]
    assert record["torch"] in measure.device_name(record)


def test_table():
    lines = measure.table(["name", "ms"], [["a", "1.0"], ["longer", "20.0"]]).splitlines()
    assert lines == ["| name   |   ms |", "|--------|-----:|", "| a      |  1.0 |", "| longer | 20.0 |"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_such_device():
    done = command("speed", "container_light_nano", "--device", "cuda", code=1)
    assert "no GPU here" in done.stderr


def test_device_time_on_a_cpu_is_that_of_the_call():
    seconds = measure.device_seconds(lambda: time.sleep(0.02), CPU, 3)
    assert 0.02 <= seconds < 0.2


def test_kernels_are_counted_and_sorted():
    a = torch.randn(300, 300)
    found = measure.kernels(lambda: torch.mm(a, a) + 1, CPU, 4)
    runs = {name: count for name, _, count in found}
    assert runs["aten::mm"] == runs["aten::add"] == 4
    assert [seconds for _, seconds, _ in found] == sorted((seconds for _, seconds, _ in found), reverse=True)


# --------------------------------------------------------------------------------------------------------- workers


def test_a_worker_answers_and_keeps_its_variables():
    worker = Worker()
    worker.order(os.getpid)
    assert first_answers({"a": worker}, 60) == [("a", worker)]
    pid = worker.answer()
    assert pid != os.getpid()
    worker.order(os.getpid)
    assert worker.answer() == pid
    end([worker])
    assert not worker.process.is_alive()


def test_what_goes_wrong_in_a_worker_is_told():
    worker = Worker()
    worker.order(int, "seven")
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        worker.answer()
    worker.order(os._exit, 3)
    with pytest.raises(RuntimeError, match=r"its process died \(exit code 3\)"):
        worker.answer()
    worker.order(int, "7")  # is not heard
    with pytest.raises(RuntimeError, match="its process died"):
        worker.answer()


def test_a_worker_at_work_is_killed_with_what_it_started(tmp_path):
    worker = Worker()
    command = f"import time; open(r'{tmp_path}/pid', 'w').write('here'); time.sleep(1000)"
    worker.order(subprocess.run, [sys.executable, "-c", command])
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    assert first_answers({"a": worker}, 0.0) == []
    child = descendants(worker.process.pid)[-1]
    end([worker])
    assert not worker.process.is_alive()
    deadline = time.monotonic() + 5  # its new parent reaps it when it likes to; a zombie has no command line
    while (line := Path(f"/proc/{child}/cmdline")).exists() and line.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not line.exists() or not line.read_bytes()


# ----------------------------------------------------------------------------------------------------------- speed


def test_entries():
    found = [str(entry) for entry in speed.parse(["resnet18", "container_light:fused,fused+channels_last"])]
    assert found == ["resnet18:eager", "container_light:fused", "container_light:fused+channels_last"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["container_light_nano:fast"], "unknown setting 'fast'"),
        (["no_such_model"], "timm knows no model 'no_such_model'"),
        (["released"], "needs --released PATH"),
        (["released", "--released", "nowhere"], "no released code at nowhere"),
        (["resnet18", "resnet18:eager"], "named twice: resnet18:eager"),
    ],
)
def test_bad_entries(words, said):
    assert said in refused(speed, *words, "--device", "cpu")


@pytest.mark.slow
def test_side_by_side(tmp_path):
    entries = ["container_light_nano:eager,fused,fused+channels_last,bf16,amp", "resnet10t"]
    options = ["--batch-size", 2, "--img-size", 32, "--rounds", 3, "--seconds", 0.01, "--device", "cpu"]
    done = command("speed", *entries, *options, "--work", "infer", "latency", "train", "--out", tmp_path, code=1)
    record = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["work"], row["entry"]): row for row in record["rows"]}
    assert len(rows) == 3 * 6
    for (work, entry), row in rows.items():
        if work == "train" and "fused" in entry:
            assert "is for inference" in row["error"] and row["error"] in done.stderr  # nothing is dropped silently
            continue
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        first = rows[work, "container_light_nano:eager"]
        assert row["faster"] == pytest.approx([a / b for a, b in zip(first["seconds"], row["seconds"])])
        assert row["batch_size"] == (1 if work == "latency" else 2)
        if work != "train":
            assert row["difference"] < (0.1 if "bf16" in entry or "amp" in entry else 1e-5)
        median = np.median(row["seconds"])
        figure = median * 1e3 if work == "latency" else row["batch_size"] / median
        assert f" {figure:.{2 if work == 'latency' else 1}f} |" in done.stdout
    assert rows["infer", "container_light_nano:eager"]["difference"] == 0
    assert rows["infer", "resnet10t:eager"]["parameters"] == sum(
        p.numel() for p in timm.create_model("resnet10t").parameters()
    )
    assert is_a_picture(tmp_path / "speed.png")


STAND_IN = """
import torch
from timm.models.registry import register_model

@register_model
def container_v1_light(pretrained=False, **kwargs):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
"""


@pytest.mark.slow
def test_released_code_from_a_path(tmp_path):
    """A file in the authors' layout, which imports from where timm had its registry in 2021."""
    (tmp_path / "models.py").write_text(STAND_IN)
    words = ["released", "container_light_nano", "--batch-size", 1, "--img-size", 64, "--rounds", 1, "--seconds", 0]
    done = command("speed", *words, "--released", tmp_path, "--device", "cpu")
    assert "released:eager" in done.stdout
    (tmp_path / "models.py").write_text("import torch\n")
    for path in (tmp_path, tmp_path / "models.py"):
        assert "no container_v1_light" in refused(speed, *words, "--released", path)


@pytest.mark.parametrize(
    "name, blocks",
    [("container_light", 18), ("container_nano", 13), ("resnet50", 16), ("convnext_tiny", 18), ("pvt_v2_b2", 16)],
)
def test_blocks_of_a_model(name, blocks):
    """Those of its stages, and no list of stages around them."""
    with torch.device("meta"):
        assert len(speed.repeated(timm.create_model(name))) == blocks


@pytest.mark.slow
def test_equal_blocks_are_compiled_once():
    """Thirteen blocks, fewer graphs; and eager mode's answers."""
    torch._dynamo.utils.counters.clear()
    model, images = timm.create_model("container_light_nano", num_classes=10), torch.randn(2, 3, 64, 64)
    eager, compiled = (
        speed.prepare(speed.Entry("", (setting,)), model, images, False, "aot_eager")[0]()
        for setting in ("eager", "blocks")
    )
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 7
    assert torch.allclose(eager, compiled, atol=1e-5)


@pytest.mark.slow
def test_models_side_by_side_in_processes(tmp_path):
    """Rows in the order of the entries, whichever is ready first; a graph is refused where there is no GPU."""
    entries = ["container_light_nano:eager,compile,blocks,graph", "resnet10t"]
    options = ["--batch-size", 2, "--img-size", 32, "--rounds", 2, "--seconds", 0, "--device", "cpu", "--jobs", 2]
    done = command("speed", *entries, *options, "--backend", "eager", "--budget", 120, "--out", tmp_path, code=1)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["entry"].partition(":")[2] for row in rows] == ["eager", "compile", "blocks", "graph", "eager"]
    assert [len(row.get("seconds", [])) for row in rows] == [2, 2, 2, 0, 2]
    assert rows[3]["error"] == "ValueError: graph is for a GPU" and "4 of 5 rows measured" in done.stderr
    assert rows[0]["faster"] == [1.0, 1.0]


@pytest.mark.slow
def test_a_budget_is_kept(tmp_path):
    """Too short for anything: every row says so, and the command ends at once."""
    start = time.perf_counter()
    options = ["--img-size", 32, "--device", "cpu", "--jobs", 1, "--budget", 0.5, "--out", tmp_path]
    done = command("speed", "container_light_nano", "resnet10t", *options, code=1)
    assert done.stderr.count("not prepared in 0 s") == 2
    assert time.perf_counter() - start < 60
    assert all("error" in row for row in json.loads((tmp_path / "speed.json").read_text())["rows"])


def test_an_entry_without_memory_costs_itself(monkeypatch, capsys):
    real = speed.prepare

    def prepare(entry, *arguments):
        if "amp" in entry.settings:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return real(entry, *arguments)

    monkeypatch.setattr(speed, "prepare", prepare)
    words = ["container_light_nano:eager,amp", "--img-size", "32", "--rounds", "1", "--seconds", "0", "--device", "cpu"]
    with pytest.raises(SystemExit):
        speed.main([*words, "--batch-size", "1"])
    out = capsys.readouterr()
    assert "| container_light_nano:amp   |              failed |" in out.out
    assert "container_light_nano:amp, infer: OutOfMemoryError: CUDA out of memory" in out.err
    assert "1 of 2 rows measured" in out.err


def test_models_tied_to_a_size_follow_it():
    model = speed.create("container_mixer", 64, None)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_checkpointing_keeps_less_for_the_backward_pass():
    model, images = speed.create("container_light_nano", 64, None), torch.randn(2, 3, 64, 64)
    kept = {}
    for setting in ("eager", "checkpointing"):
        step, _ = speed.prepare(speed.Entry("", (setting,)), model, images, True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            step()
        kept[setting] = sum(sizes)
    assert kept["checkpointing"] < kept["eager"] / 2
    with pytest.raises(ValueError, match="checkpointing is for training"):
        speed.prepare(speed.Entry("", ("checkpointing",)), model, images, False)


@pytest.mark.slow
def test_compiled_and_exported_entries(tmp_path):
    """Point by point the same answers as eager: inductor, its freezing, AOTInductor, ONNX Runtime."""
    entries = "container_light_nano:eager,fused+compile,fused+freeze,fused+freeze+channels_last,fused+aot,fused+onnx"
    entries += ",fused+openvino,fused+openvino+bf16,fused+openvino+int8,fused+onnx+int8"
    options = ["--batch-size", 2, "--img-size", 64, "--rounds", 2, "--seconds", 0.01, "--device", "cpu"]
    command("speed", entries, *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert len(rows) == 10 and all(row["difference"] < 1e-5 for row in rows[:7])
    assert all(1e-4 < row["difference"] < 0.5 for row in rows[7:])
    command("speed", "container_light_nano:compile,depthwise,depthwise+amp", *options, "--work", "train")


# -------------------------------------------------------------------------------------------------------- roofline


@torch.no_grad()
def test_bytes_and_operations_of_one_convolution():
    conv, x = nn.Conv2d(8, 16, 1), torch.randn(2, 8, 10, 12)
    found = roofline.record(lambda: conv(x), CPU, 2)
    (part,) = [part for name, part in found.items() if name == "convolution 1x1 @ 10x12"]
    assert part["runs"] == 1 and part["flops"] == 2 * 2 * 8 * 16 * 120
    assert part["bytes"] == 4 * (x.numel() + 2 * 16 * 120 + 8 * 16 + 16)
    summed, least = roofline.bounds(found, dict(bandwidth=1e9, rate=1e12))
    assert part["bound"] == pytest.approx(max(part["bytes"] / 1e9, part["flops"] / 1e12)) and least <= summed


@torch.no_grad()
def test_views_move_nothing():
    x = torch.randn(4, 6)
    assert roofline.record(lambda: x.t()[2:4].unsqueeze(0).expand(3, 2, 4), CPU, 1) == {}


@pytest.mark.parametrize("setting", ["eager", "fused"])
def test_all_operations_are_found(setting):
    model = speed.create("container_light_nano", 64, None)
    images = torch.randn(2, 3, 64, 64)
    work, _ = speed.prepare(speed.Entry("", (setting,)), model, images, False)
    work()  # whether a kernel is to be had is tried once, at the first call
    with FlopCounterMode(display=False) as counter:
        work()
    found = roofline.record(work, CPU, 1)
    assert sum(part["flops"] for part in found.values()) == counter.get_total_flops()


def test_a_training_step_has_its_backward_parts():
    model = speed.create("container_light_nano", 64, None)
    work, held = speed.prepare(speed.Entry("", ("eager",)), model, torch.randn(2, 3, 64, 64), True)
    names = set(roofline.record(work, CPU, 1))
    assert {"convolution depthwise 5x5 backward @ 16x16", "attention", "attention backward"} <= names
    weights = sum(p.numel() for p in model.parameters())
    assert held > 3 * 4 * weights  # AdamW keeps two numbers for each


@pytest.mark.parametrize("groups", [1, 8])
def test_operations_of_a_convolution_backward(groups):
    """A product for each gradient, of as many operations as its own; PyTorch's formula forgets groups."""
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 6, requires_grad=True)
    parts = roofline.record(lambda: conv(x).sum().backward(), CPU, 1)
    (forward,) = [part["flops"] for name, part in parts.items() if "3x3 @" in name]
    (backward,) = [part["flops"] for name, part in parts.items() if "3x3 backward @" in name]
    assert forward == 2 * 2 * 30 * 8 * (8 // groups) * 9 and backward == 2 * forward


def test_bounds_of_another_device(tmp_path, capsys):
    """By its data sheet: twice the rates are half of the bound, and nothing is timed."""
    words = ["container_light_nano:fused", *["--batch-size", "2", "--img-size", "64", "--device", "cpu", "--limits"]]
    found = []
    for limits in (["100", "50"], ["200", "100"]):
        roofline.main([*words, *limits, "--out", str(tmp_path)])
        (row,) = json.loads((tmp_path / "roofline.json").read_text())["rows"]
        assert "seconds" not in row and "busy" not in row
        found.append(row["sum_of_bounds"])
    assert found[0] == pytest.approx(2 * found[1])
    assert "| an image " in capsys.readouterr().out


@pytest.mark.slow
def test_roofline_command(tmp_path, monkeypatch, capsys):
    words = ["--batch-size", 1, "--img-size", 64, "--rounds", 2, "--seconds", 0, "--device", "cpu", "--out", tmp_path]
    monkeypatch.setattr(roofline, "limits", functools.partial(roofline.limits, rounds=1))
    roofline.main(["container_light_nano:eager,fused", *map(str, words)])
    record = json.loads((tmp_path / "roofline.json").read_text())
    assert record["limits"]["float32"]["bandwidth"] > 1e8 and record["limits"]["float32"]["rate"] > 1e9
    eager, fused = record["rows"]
    (norm,) = [part for name, part in fused["parts"].items() if "batch_norm" in name]
    assert norm["runs"] == 1 and fused["least_bound"] > 0  # the last one, which no block reads
    assert fused["sum_of_bounds"] < eager["sum_of_bounds"]
    stdout = capsys.readouterr().out
    assert "| container_light_nano:fused" in stdout and "bound ms" in stdout


# ------------------------------------------------------------------------------------------------- parts and memory


@pytest.mark.parametrize("part", list(parts.PARTS))
@pytest.mark.parametrize("backward", [False, True])
def test_ways_of_a_part_agree(part, backward):
    """`compare` ends the program where two ways differ."""
    args = parts.parser().parse_args(["--batch-size", "2", "--rounds", "1", "--seconds", "0"])
    args.backward = backward
    row = parts.compare(part, 3, args, CPU)
    assert len(row["seconds"]) >= 2
    assert parts.report(row).count("\n") == len(row["seconds"]) + len(row["failed"]) + 1


def test_ways_that_differ_are_refused(monkeypatch):
    ways = lambda dim, ratio, heads: {"one": lambda x: x, "other": lambda x: x * 1.01}  # noqa: E731
    monkeypatch.setitem(parts.PARTS, "norm", (ways, parts.STAGES))
    args = parts.parser().parse_args(["--rounds", "1", "--seconds", "0"])
    with pytest.raises(SystemExit, match=r"norm, other: answers differ by 1.0e-02"):
        parts.compare("norm", 3, args, CPU)


@pytest.mark.slow
def test_parts_command(tmp_path):
    words = ["--parts", "static 5x5", "--stages", 4, "--batch-size", 1, "--rounds", 1, "--seconds", 0]
    done = command("parts", *words, "--device", "cpu", "--out", tmp_path)
    assert "static 5x5, stage 4, 1 x 512 x 7 x 7" in done.stdout
    assert json.loads((tmp_path / "parts.json").read_text())["rows"][0]["stage"] == 4


def test_line_through_points():
    x, y = [1.0, 2.0, 4.0, 7.0], [3.0, 4.5, 9.5, 15.0]
    slope, intercept, r2 = memory.line(x, y)
    assert [slope, intercept] == pytest.approx(np.polyfit(x, y, 1).tolist())
    assert r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.slow
def test_memory_command(tmp_path):
    words = ["container_nano", "--sizes", "64x64", "96x160", "128x160", "--seconds", 0, "--device", "cpu"]
    done = command("memory", *words, "--out", tmp_path)
    record = json.loads((tmp_path / "memory.json").read_text())
    assert [row["tokens"] for row in record["rows"]] == [256, 960, 1280] * 2
    assert is_a_picture(tmp_path / "memory.png") and "container_nano, forward and backward" in done.stdout


def test_memory_of_no_size(capsys):
    assert refused(memory, "container_nano", "--sizes", "100") == "2"  # as argparse ends
    assert "'100' is not HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_tokens():
    """Attention in all stages on up to 16,384 tokens: a matrix of one head and block would take a GiB."""
    if measure.peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not tell a process's peak of resident pages")
    model = timm.create_model("container_nano", num_classes=0)
    memory.run(model, torch.randn(1, 3, 64, 64), True, 0)
    peaks = [memory.run(model, torch.randn(1, 3, s, s), True, 0)["peak_memory"] for s in (256, 512)]
    assert peaks[1] < 5 * peaks[0]  # four times the tokens
    assert peaks[1] < 2**30


# ------------------------------------------------------------------------------------------------- kernels and CIFAR


@pytest.mark.slow
def test_kernels_command(tmp_path):
    words = ["container_light_nano:amp", "--img-size", 32, "--batch-size", 2, "--steps", 2, "--device", "cpu"]
    done = command("kernels", *words, "--out", tmp_path)
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert sum(kernel["ms"] for kernel in row["kernels"]) == pytest.approx(1e3 * row["busy"])
    assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1)
    (attention,) = [k for k in row["kernels"] if k["name"] == "aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert attention["runs"] == 2  # blocks of the last stage
    assert "container_light_nano:amp:" in done.stdout


@pytest.mark.slow
def test_kernels_of_openvino(tmp_path):
    """Each node once a call: every block has two depthwise convolutions."""
    words = [
        "container_light_nano:fused+openvino",
        "--img-size",
        32,
        "--batch-size",
        2,
        "--steps",
        2,
        "--work",
        "infer",
    ]
    command("kernels", *words, "--device", "cpu", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    depthwise = [kernel for kernel in row["kernels"] if kernel["name"].startswith("GroupConvolution, ")]
    blocks = sum(len(stage.blocks) for stage in timm.create_model("container_light_nano").stages)
    assert sum(kernel["runs"] for kernel in depthwise) == 2 * blocks
    assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1)


@pytest.fixture
def images(tmp_path):
    gpu.make_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.mark.slow
def test_cifar_repeats_itself_and_leaves_its_weights(images, tmp_path):
    words = ["--data-dir", images, "--epochs", 2, "--batch-size", 64, "--device", "cpu", "--images", 128]
    outs = []
    for name, more in (("one", []), ("other", ["--compile", "eager"])):
        command("cifar", *words, *more, "--out", tmp_path / name)
        record = json.loads((tmp_path / name / "cifar.json").read_text())
        outs.append([(entry["train_loss"], entry["top1"]) for entry in record["history"]])
    assert np.allclose(outs[0], outs[1], rtol=1e-4) and len(outs[0]) == 2
    assert "--graph is for a GPU" in refused(cifar, *words, "--graph", "--out", tmp_path / "third")
    for name in ("mixed", "again"):  # an alpha of 1 mixes every batch, and pasted parts make the loss larger
        command("cifar", *words, "--cutmix", 1, "--out", tmp_path / name)
    mixed, again = (json.loads((tmp_path / name / "cifar.json").read_text())["history"] for name in ("mixed", "again"))
    assert [entry["train_loss"] for entry in mixed] == [entry["train_loss"] for entry in again]
    assert mixed[-1]["train_loss"] > outs[0][-1][0]
    path = tmp_path / "one" / "container_light_nano_32.safetensors"
    more = ["--cutmix", 1, "--cutmix-off", 0.5, "--checkpoint"]
    command("cifar", *words, *more[:-1], "--out", tmp_path / "plain at last")
    last = json.loads((tmp_path / "plain at last" / "cifar.json").read_text())["history"]
    assert last[0]["train_loss"] == mixed[0]["train_loss"] and last[1]["train_loss"] < mixed[1]["train_loss"]
    command("cifar", *words, *more, path, "--lr", 1e-9, "--out", tmp_path / "further")
    further = json.loads((tmp_path / "further" / "cifar.json").read_text())["history"]
    assert further[1]["train_loss"] < outs[0][1][0]
    assert "no checkpoint at nowhere" in refused(cifar, *words, *more, "nowhere", "--out", tmp_path / "third")
    other = timm.create_model("container_light_nano_32", num_classes=3).state_dict()
    safetensors.torch.save_file(other, tmp_path / "three.safetensors")
    said = refused(cifar, *words, *more, tmp_path / "three.safetensors", "--out", tmp_path / "third")
    assert "size mismatch" in said and said.count("\n") <= 1
    assert "--cutmix-off 2 is no share" in refused(cifar, *words, "--cutmix-off", 2, "--out", tmp_path / "third")
    model = timm.create_model("container_light_nano_32", num_classes=2, checkpoint_path=path).eval()
    pixels = [np.asarray(Image.open(file)) for file in sorted((images / "test" / "bright").glob("*.png"))]
    x = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    found = model(x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).argmax(1)
    assert abs((found == 0).float().mean().item() * 100 - record["history"][-1]["top1"]) <= 50


@pytest.mark.slow
def test_cifar_measures_its_speed_and_forgets_it(images, tmp_path):
    """Measuring how many epochs fit leaves weights and result as they would be without."""
    words = ["--data-dir", images, "--batch-size", 64, "--device", "cpu", "--images", 128]
    done = command("cifar", *words, "--seconds", 1, "--out", tmp_path / "timed")
    assert "1 fit in 1 s" in done.stderr
    command("cifar", *words, "--epochs", 1, "--out", tmp_path / "told")
    one, other = (json.loads((tmp_path / name / "cifar.json").read_text())["history"] for name in ("timed", "told"))
    assert one[0]["train_loss"] == pytest.approx(other[0]["train_loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------- fine-tuning side by side


def test_runs_for_the_data_there_are(tmp_path):
    """A run for each model and weights, three seeds where results are compared; their flags are known."""
    assert list(transfer.jobs(tmp_path, tmp_path, "cuda")) == []
    for name in ("cifar10", "trashnet", "bccd", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "tf_efficientnet_lite0.in1k.safetensors").touch()
    found = {job.name: job for job in transfer.jobs(tmp_path, tmp_path / "runs", "cuda")}
    assert len(found) == 2 + 11 + 3 * (6 + 11)
    command = found["trashnet-tf_efficientnet_lite0.in1k-2"].command
    assert train_imagenet.parse_args(command[2:]).checkpoint == str(tmp_path / "tf_efficientnet_lite0.in1k.safetensors")
    args = train_imagenet.parse_args(found["cifar10-container_nano.lite2_dist-0"].command[2:])
    assert (args.model, args.pretrained, args.epochs, args.seed) == ("container_nano.lite2_dist", True, 2, 0)
    assert found["bccd-yolov8n-container_light_nano-pretrained-1"].command[-2:] == ("--device", "0")


@pytest.mark.slow
def test_runs_leave_what_they_have(tmp_path):
    """Done, failed, stopped while it goes on, or not begun when the time is over: each is said, results are kept."""
    write = "import pathlib, sys, time; print('at work', flush=True); pathlib.Path(sys.argv[1]).write_text('[1]'); "
    codes = dict(done="", failed="raise SystemExit('no data')", stopped="time.sleep(99)", later="time.sleep(99)")
    todo = [
        transfer.Job(name, (sys.executable, "-c", write + code, str(tmp_path / name)), tmp_path / name)
        for name, code in codes.items()
    ]
    record = dict(device="cpu", runs={})
    transfer.run(todo[:3], 2, 6, tmp_path, record)
    runs = json.loads((tmp_path / "transfer.json").read_text())["runs"]
    assert {name: (one["outcome"], one["said"], one["result"]) for name, one in runs.items()} == dict(
        done=("done", "at work", [1]), failed=("failed", "no data", [1]), stopped=("stopped", "at work", [1])
    )
    transfer.run(todo[2:], 1, 0.5, tmp_path, record)
    assert json.loads((tmp_path / "transfer.json").read_text())["not_begun"] == ["later"]


@pytest.mark.slow
def test_fine_tuning_in_a_rehearsal(images, tmp_path):
    (tmp_path / "data").mkdir()
    images.rename(tmp_path / "data" / "cifar10")
    words = ["--data-dir", tmp_path / "data", "--rehearse", "--device", "cpu", "--only", "cifar10-*"]
    command("transfer", *words, "--out", tmp_path)
    runs = json.loads((tmp_path / "transfer.json").read_text())["runs"]
    assert list(runs) == ["cifar10-container_light_nano.lite2_dist-0"]
    assert runs["cifar10-container_light_nano.lite2_dist-0"]["result"]["best"]["top1"] >= 50
    assert "has no data for bccd-*" in refused(transfer, *words[:-1], "bccd-*", "--out", tmp_path)


# --------------------------------------------------------------------------------------- a quarter of an hour on a GPU


def steps(*commands, seconds=30.0, least=0.0):
    python = [[sys.executable, "-c", text] for text in commands]
    return [gpu.Step(f"step{i}", seconds, least, [words]) for i, words in enumerate(python)]


FAULTS = dict(
    fails="raise SystemExit('a wrong flag')",
    # It does not hear, and neither does what it has started in a session of its own.
    hangs="""import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)
print('begun', flush=True)
time.sleep(1000)""",
    memory="""import resource, torch
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
torch.ones(8 << 30)""",
    works="print('figures')",
)


@pytest.mark.slow
def test_a_fault_costs_its_own_step_alone(tmp_path):
    """One fails, one hangs, one asks for more memory than there is; what comes after them runs, and time is kept."""
    # A process of its own: it kills whatever it has started.
    plan = [gpu.Step(name, 8.0, 0.0, [[sys.executable, "-c", text]]) for name, text in FAULTS.items()]
    plan.append(gpu.Step("late", 30.0, 29.0, [[sys.executable, "-c", "print('never')"]]))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = f"""import ctypes, json, os, pathlib
from benchmarks import gpu
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
out = pathlib.Path(r'{tmp_path}')
plan = [gpu.Step(*step) for step in json.loads((out / 'plan.json').read_text())]
gpu.run(plan, out, 30, dict(os.environ))
assert not gpu.descendants(os.getpid())"""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
    assert time.perf_counter() - start < 30 + 5
    found = json.loads((tmp_path / "summary.json").read_text())["steps"]
    outcomes = {name: record["outcome"] for name, record in found.items()}
    assert outcomes == dict(fails="failed", hangs="killed", memory="failed", works="done", late="left out")
    assert found["fails"]["said"] == "a wrong flag" and found["hangs"]["said"] == "begun"
    assert "can't allocate memory" in (tmp_path / "memory.log").read_text() and found["works"]["said"] == "figures"
    assert 8 <= found["hangs"]["seconds"] < 8 + 5
    assert "29 needed" in found["late"]["said"]


def test_a_budget_that_is_over_ends_the_step_that_runs(tmp_path):
    start = time.perf_counter()
    gpu.run(steps("import time; time.sleep(1000)", seconds=900), tmp_path, 4.0, dict(os.environ))
    assert 2 < time.perf_counter() - start < 4 + 5


def test_a_second_call_goes_on(tmp_path):
    """What is done is not repeated, unless asked for by name; what is not has all of the time."""
    assert gpu.left_to_do(tmp_path, None) == list(gpu.STEPS)
    gpu.run(steps("pass", "raise SystemExit(1)"), tmp_path, 60, dict(os.environ))
    assert [record["outcome"] for record in gpu.summary(tmp_path).values()] == ["done", "failed"]
    gpu.write(
        tmp_path, {name: dict(outcome="done") for name in ("infer", "train")} | dict(tests=dict(outcome="killed"))
    )
    left = gpu.left_to_do(tmp_path, None)
    assert left == ["tests", "latency", "roofline", "transfer", "cifar"]
    assert gpu.left_to_do(tmp_path, ["infer", "tests"]) == ["tests", "infer"]
    plan = gpu.plan(tmp_path, 240, False, None, "cifar10", left)
    assert [step.name for step in plan] == left
    assert sum(step.seconds for step in plan[:-1]) == pytest.approx(240)
    assert max(step.least for step in plan) <= 60


def test_every_entry_of_the_plan_is_known(tmp_path):
    """What the rehearsal replaces by smaller models is read here as the GPU will read it."""
    plan = gpu.plan(tmp_path, 480, False, "models.py", "cifar10", transfer="d")
    assert [step.name for step in plan] == list(gpu.STEPS)
    entries = set()
    for words in (words for step in plan for words in step.commands):
        assert words[1] == "-m"
        if words[2] in ("benchmarks.speed", "benchmarks.roofline", "benchmarks.kernels"):
            end_of_entries = next(i for i, word in enumerate(words) if word.startswith("--"))
            entries |= {entry.model for entry in speed.parse(words[3:end_of_entries])}
    assert {"released", *gpu.OURS, *gpu.PEERS} == entries
    assert all(timm.is_model(entry) for entry in entries - {"released"})
    assert max(step.least for step in plan) <= 60 and sum(step.seconds for step in plan[:-1]) <= 480 + 1e-6


def test_every_command_of_a_rehearsal_has_something_to_measure(tmp_path):
    plan = gpu.plan(tmp_path, 480, True, None, "cifar10", transfer="data")
    measured = [words[3] for step in plan for words in step.commands if words[2] == "benchmarks.speed"]
    assert len(measured) == 4 and all(word.partition(":")[2] for word in measured)


def test_a_rehearsal_asks_nothing_that_a_cpu_may_lack(tmp_path):
    """No 16-bit types, no peak to be measured; and no step has less than all of the time."""
    plan = gpu.plan(tmp_path, 1200, True, "models.py", "cifar10", transfer="data")
    words = [word for step in plan for command in step.commands for word in command]
    assert not any(half in word.replace(":", "+").split("+") for word in words for half in ("bf16", "amp", "bfloat16"))
    for step in plan:
        for command in step.commands:
            assert command[2] != "benchmarks.roofline" or "--limits" in command
        assert step.seconds == 1200
    assert "amp+channels_last" in str(gpu.plan(tmp_path, 480, False, None, None)[2].commands)


def test_without_data_or_the_release_the_plan_says_so(tmp_path):
    plan = gpu.plan(tmp_path, 480, False, None, None)
    assert not any("released" in word for step in plan for words in step.commands for word in words)
    found = gpu.run([plan[0], plan[-1]], tmp_path, 60, dict(os.environ))
    assert found["cifar"] == dict(outcome="left out", seconds=0, said="needs --data")
    assert [step.commands for step in plan if step.name == "transfer"] == [[]]
    assert sum(step.seconds for step in plan[:-1]) == pytest.approx(480)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "requires", lambda name: ["timm>=99", "no-such-package", "seldom; extra == 'docs'"])
    found = gpu.check(True, {"--released": "nowhere/models.py", "--data": None})
    assert found["missing"] == [
        f"timm>=99 (here is {timm.__version__})",
        "no-such-package",
        "--released nowhere/models.py",
    ]

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu, "requires", absent)
    assert "container-timm itself" in gpu.check(True, {})["missing"][0]


@pytest.mark.parametrize("work", ["infer", "latency"])
def test_published_figures_are_the_measured_ones(work):
    """Every figure of the GPU's tables of models is the median in the JSON beside the page."""
    record = json.loads((ROOT / "docs/benchmarks" / f"gpu-{work}.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text().partition("## On a GPU")[2]
    for row in record["rows"]:
        median = np.median(row["seconds"])
        if "fused" in row["entry"] or row["model"] not in gpu.OURS:
            plain = f"{median * 1e3:.2f}" if "graph" in row["entry"] else f"{median * 1e3:.1f}"
            figure = f"{256 / median:,.0f}" if work == "infer" else plain
            assert f"| {figure} |" in page or row["model"] == "released", row["entry"]


def test_published_bounds_and_ratios_are_the_measured_ones():
    """The last row of the table of bounds, and every ratio of the table of inference on CPUs."""
    folder, page = ROOT / "docs/benchmarks", (ROOT / "docs/benchmarks.md").read_text()
    for work in ("infer", "train"):
        row = json.loads((folder / f"h100-bound-{work}.json").read_text())["rows"][0]
        moved = sum(part["bytes"] for part in row["parts"].values())
        assert f"| {moved / 2**20 / 128:.1f} | {row['sum_of_bounds'] * 1e6 / 128:.1f} |" in page
    rows: dict[str, list[str]] = {}
    for name, kinds in (("cpu-infer", ""), ("cpu-infer-amx", "bf16 int8")):  # the columns, from left to right
        for row in json.loads((folder / f"{name}.json").read_text())["rows"][1:]:
            if not kinds or row["entry"].rpartition("+")[2] in kinds.split():
                rows.setdefault(row["model"].partition("_patch4")[0], []).append(f"{np.median(row['faster']):.2f}")
    lines = page.splitlines()
    for model, ratios in rows.items():
        assert any(line.startswith(f"| `{model}` |") and line.endswith(f"| {' | '.join(ratios)} |") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_ends_in_a_line(tmp_path):
    done = subprocess.run(["bash", ROOT / "benchmarks/gpu.sh", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "benchmarks: missing: a GPU that PyTorch can use; --rehearse needs none"
    done = subprocess.run(["bash", ROOT / "benchmarks/gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("A quarter of an hour on a GPU")
