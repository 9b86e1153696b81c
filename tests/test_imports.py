"""Imports of the package run from upper rooms to lower ones, and stand where one sees them."""

import ast
import subprocess
import sys

from conftest import ROOT

# From the lowest up; a module may import those before it.
ROOMS = ["errors", "files", "images", "affinity", "aggregation", "container", "weights", "fuse", "runtimes"]
ROOMS += ["detection", "yolo", "figures", "zoo", "predict", "explore"]
TRAINING = [
    "seeding",
    "depthwise",
    "distributed",
    "recipe",
    "curves",
    "data",
    "loader",
    "loop",
    "distill",
    "checkpoint",
    "plan",
    "report",
    "run",
]
# Uses of a model that read data as a training does.
TOP = ["probe", "int8", "deploy"]
MODEL = ("affinity", "aggregation", "container")


def imported(path):
    """Dotted names of the package's modules that a file imports, and whether the statement is at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            if name.split(".")[0] == "container":
                for target in [name] if name != package else [f"{name}.{alias.name}" for alias in node.names]:
                    yield target, node in tree.body


def test_no_arrow_leads_up():
    order = [f"container.{name}" for name in ROOMS] + [f"container.training.{name}" for name in TRAINING]
    order += [f"container.{name}" for name in TOP]
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "container").rglob("*.py")
        if not path.stem.startswith("__") and path.parent.name != "children"  # which Python reads by itself
    }
    assert set(files) == set(order)
    for name, path in files.items():
        for target, at_top in imported(path):
            assert at_top, f"{name} imports {target} inside of something"
            assert order.index(target) < order.index(name), f"{name} imports {target}"


def test_the_model_is_three_files(tmp_path):
    """Vendored without the rest, in a package of another name, they are timm models; weights are then timm's affair."""
    (tmp_path / "vendored").mkdir()
    (tmp_path / "vendored" / "__init__.py").write_text("from . import container")
    for name in MODEL:
        assert {target.split(".")[1] for target, _ in imported(ROOT / "container" / f"{name}.py")} <= set(MODEL)
        (tmp_path / "vendored" / f"{name}.py").write_bytes((ROOT / "container" / f"{name}.py").read_bytes())
    code = (
        "import sys, timm, torch, vendored; print('container' in sys.modules, "
        "tuple(timm.create_model('container_nano', num_classes=3)(torch.zeros(2, 3, 32, 32)).shape))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout == "False (2, 3)\n", result.stderr
