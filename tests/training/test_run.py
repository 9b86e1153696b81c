"""A run that is interrupted ends in the weights of one that is not, bit for bit."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from container.training import Checkpoints

KILLS = int(os.environ.get("CONTAINER_TEST_KILLS", 8))

# All that is random is on: augmentation, repeats, erasing, mixup, stochastic depth. A step is two passes of one
# process, or one of two.
SETTINGS = [
    *(
        "--model",
        "container_light_nano",
        "--img-size",
        "32",
        "--epochs",
        "5",
        "--ema-decay",
        "0.9",
        "--drop-path",
        "0.3",
    ),
    *("--batch-size", "4", "--save-steps", "2", "--clip-grad", "1", "--workers", "1", "--device", "cpu"),
]

# Starts runs as processes of their own, without the seconds that each would need to import torch. For two processes
# it is what torchrun does, with a function in place of a script.
SERVER = """
import json, os, sys
import torch
import matplotlib.backends.backend_agg, matplotlib.figure, torch.utils.tensorboard
import train_imagenet
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    arguments, processes, log = json.loads(line)
    if (pid := os.fork()) == 0:
        os.setsid()
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = 1
        try:
            if processes == 1:
                train_imagenet.main(arguments)
            else:
                config = LaunchConfig(
                    min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(os.getpid()), start_method="fork",
                    rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
                )
                elastic_launch(config, train_imagenet.main)(arguments)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Runs of the training script, one at a time."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.server.stdout.readline() == "ready\n"

    def say(self, line):
        self.server.stdin.write(f"{line}\n")
        self.server.stdin.flush()

    def start(self, output, processes):
        arguments = ["--data-dir", str(self.folder), *SETTINGS, "--grad-accum", str(2 // processes)]
        self.say(json.dumps([[*arguments, "--output", str(output), "--resume", "auto"], processes, str(self.log)]))
        return int(self.server.stdout.readline())

    def wait(self):
        self.say("wait")
        return int(self.server.stdout.readline()), self.log.read_text()


@pytest.fixture
def runs(folder, tmp_path):
    runs = Runs(folder, tmp_path / "log")
    yield runs
    runs.server.stdin.close()
    runs.server.wait(timeout=60)
    runs.server.stdout.close()


def numbers(output):
    """The curves, without the times in them."""
    with (output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in rows]


def assert_same_end(a, b):
    for key in ("state_dict", "state_dict_ema"):
        first, second = (Checkpoints(output).load()[key] for output in (a, b))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert numbers(a) == numbers(b) and len(numbers(a)) == 5
    best = [(output / "model_best.safetensors").read_bytes() for output in (a, b)]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(runs, tmp_path, processes):
    """SIGKILL to all processes at once, anywhere: in a step, an evaluation, the writing of a checkpoint or a report."""
    began = time.time()
    runs.start(tmp_path / "whole", processes)
    status, log = runs.wait()
    assert status == 0, log
    duration, moment = time.time() - began, random.Random(0)
    places = []
    for kill in range(KILLS):
        output = tmp_path / f"killed-{kill}"
        status = 0
        while status == 0:
            group = runs.start(output, processes)
            time.sleep(moment.uniform(0.1, 0.85) * duration)
            os.killpg(group, signal.SIGKILL)
            status, log = runs.wait()
            if status == 0:  # it came too late: the whole run had been slowed down by something
                duration *= 0.7
                shutil.rmtree(output)
        assert status == -signal.SIGKILL, log
        runs.start(output, processes)
        status, log = runs.wait()
        assert status == 0, log
        places += [line for line in log.splitlines() if "going on" in line] or ["from the start"]
        assert not list(output.glob("*.tmp"))
        assert_same_end(tmp_path / "whole", output)
    print("\n".join(places))
    assert len(set(places)) > 3  # the moments were spread over the run
