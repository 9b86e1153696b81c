"""A run that is interrupted ends in the weights of one that is not, bit for bit."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from container.training import Checkpoints

KILLS = int(os.environ.get("CONTAINER_TEST_KILLS", 4))  # each costs a start of Python and torch

# All that is random is on: augmentation, repeats, erasing, mixup, stochastic depth; and two passes a step.
SETTINGS = [
    *(
        "--model",
        "container_light_nano",
        "--img-size",
        "32",
        "--epochs",
        "8",
        "--ema-decay",
        "0.9",
        "--drop-path",
        "0.3",
    ),
    *("--amp", "none", "--save-steps", "2", "--clip-grad", "1", "--device", "cpu", "--resume", "auto"),
]
ONE = [*SETTINGS, "--batch-size", "4", "--grad-accum", "2"]
TWO = [*SETTINGS, "--batch-size", "4"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(folder, output, arguments, launcher=(), workers=1):
    """Starts a run as its users do, in a process group of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train_imagenet.py"), "--data-dir", str(folder)]
    return subprocess.Popen(
        [*command, *arguments, "--workers", str(workers), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def numbers(output):
    """The curves, without the times in them."""
    with (output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in rows]


def assert_same_end(a, b):
    for key in ("state_dict", "state_dict_ema"):
        first, second = (Checkpoints(output).load()[key] for output in (a, b))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert numbers(a) == numbers(b) and len(numbers(a)) == 8
    best = [(output / "model_best.safetensors").read_bytes() for output in (a, b)]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, launcher", [(ONE, []), (TWO, TORCHRUN)], ids=["one process", "torchrun"])
def test_killed_at_random_moments(folder, tmp_path, arguments, launcher):
    """SIGKILL to all processes at once, anywhere: in a step, an evaluation, the writing of a checkpoint or a report."""
    finish(start(folder, tmp_path / "whole", arguments, launcher))
    kills, moment = 0, random.Random(0)
    while kills < KILLS:
        output = tmp_path / f"killed-{kills}"
        process, began = start(folder, output, arguments, launcher), time.time()
        while not (output / "args.yaml").exists():
            assert process.poll() is None and time.time() - began < 120, process.communicate()
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 4))
        assert process.poll() is None, "the run was over before its moment: let it last longer"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        out = finish(start(folder, output, arguments, launcher))
        print(f"kill {kills}: {[line for line in out.splitlines() if 'going on' in line] or 'from the start'}")
        assert not list(output.glob("*.tmp"))
        assert_same_end(tmp_path / "whole", output)
