"""The command line of `container`: help and mistakes, which need no torch."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import container_cli
from container import explore
from container.runtimes import RUNTIMES


@pytest.mark.parametrize(
    "words, status, printed",
    [
        ([], 0, "usage: container COMMAND ..."),
        (["--help"], 0, "usage: container COMMAND ..."),
        (["--version"], 0, r"container-timm \S+, timm [\d.]+, torch [\d.]+\S*, torchvision [\d.]+\S*, Python [\d.]+"),
        (["predict", "--help"], 0, "usage: container predict "),
        (["run", "--help"], 0, "usage: container run SCRIPT"),
        (["run"], 2, r"container: usage: container run SCRIPT \| -m MODULE \| COMMAND"),
        (["predcit"], 2, r"container: no command 'predcit': did you mean predict\?\n$"),
        (["predict", "no.jpg"], 2, "container predict: argument PHOTO: no file no.jpg\n$"),
        (["predict", "https://example.com/cat.jpg"], 2, ".*no file https://example.com/cat.jpg\n$"),
        (["export", "x", "y.onnx"], 2, "container export: the following arguments are required: --format\n$"),
        (["weights"], 2, "container weights: the following arguments are required: COMMAND\n$"),
    ],
)
def test_without_torch(words, status, printed, tmp_path):
    """In a process of its own, in which an import of torch, or of what brings it, would fail."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'timm', 'container']); import container_cli as c; c.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    output = done.stderr if status else done.stdout
    assert done.returncode == status and re.match(printed, output), done
    assert not status or len(output.splitlines()) == 1


def test_help_of_every_command_that_the_first_screen_names(capsys):
    with pytest.raises(SystemExit):
        container_cli.parse_args([])
    screen = capsys.readouterr().out
    named = [line.split()[1:3] for line in screen.splitlines() if line.startswith("  container ")]
    commands = [words if words[0] == "weights" else words[:1] for words in named]
    assert len(commands) == 14
    for words in commands:
        if words != ["train"]:  # a program of its own
            with pytest.raises(SystemExit) as end:
                container_cli.parse_args([*words, "--help"])
            assert not end.value.code and capsys.readouterr().out.startswith(f"usage: container {' '.join(words)} ")


def test_what_is_said_before_the_package_is_imported_is_what_it_does():
    assert {name: runtime.suffix for name, runtime in RUNTIMES.items()} == container_cli.FORMATS
    assert explore.MODELS[0] == container_cli.DEFAULT_MODEL


@pytest.mark.parametrize("program", ["import train_imagenet", "import container_cli; container_cli.main()"])
@pytest.mark.parametrize(
    "own, spins", [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_idle_threads_wait_briefly_unless_the_user_says_how(program, own, spins):
    """Known before torch is imported, which reads it once."""
    code = f"""
import os, sys
sys.modules |= dict.fromkeys(["container", "timm", "torch"])  # an import of one of them raises
sys.argv[1:] = ["list"]
try:
    {program}
except ImportError:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""
    environment = {"PYTHONPATH": str(ROOT), **own}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{spins}\n", done.stderr
