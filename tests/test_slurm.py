"""examples/imagenet.slurm under a Slurm of its own: two nodes on this machine, each with an empty file for a GPU."""

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import pytest
from conftest import ROOT
from filelock import FileLock

from container.files import write_atomically

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun", "setpriv"]
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a Slurm of one's own needs root"),
]

# Slurm's defaults but for places, for what needs the kernel or a database, and for waits that only cost time.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
KillWait=30
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:1
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES
"""

# Read by every Python of a job: a checkpoint takes some seconds to be on the disk, in which what kills too early does.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(file):
    if "/checkpoint-" in os.readlink(f"/proc/self/fd/{file}"):
        time.sleep(float(open(os.path.dirname(__file__) + "/seconds").read()))
    fsync(file)
os.fsync = slow
"""
TRAINING = ["--model", "container_light_nano", "--img-size", "32", "--device", "cpu", "--workers", "1"]
TRAINING += ["--batch-size", "4", "--aug-repeats", "0"]
STEPS = 25  # of an epoch: 200 images, two processes


class Cluster:
    """munged, slurmctld and two slurmd, with all that they write in a folder of theirs.

    Args:
        folder: New; of a short name, for the sockets in it.
    """

    def __init__(self, folder):
        self.folder, self.daemons, host = folder, [], socket.gethostname().split(".")[0]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "TORCH", "PYTEST_"))}
        self.env |= dict(SLURM_CONF=str(folder / "slurm.conf"), PATH=path, PYTHONPATH=f"{folder}:{ROOT}")
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=ports))
        (folder / "gpu").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu\n")
        (folder / "sitecustomize.py").write_text(SLOW_DISK)
        self.slow(3)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        munge = dict(
            key_file="key", socket="munge.socket", pid_file="munged.pid", seed_file="seed", log_file="munge.log"
        )
        try:
            arguments = [f"--{key.replace('_', '-')}={folder / value}" for key, value in munge.items()]
            self.start("munged", "--foreground", "--force", *arguments)
            self.until(lambda: (folder / "munge.socket").exists(), 20, "munged is up")
            self.start("slurmctld", "-D")
            for name in (host, f"{host}-second"):
                self.start("slurmd", "-D", "-N", name)
            self.until(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60, "two nodes are idle")
        except BaseException:
            self.close()
            raise

    def slow(self, seconds):
        """How long a checkpoint takes from now on."""
        write_atomically(self.folder / "seconds", str(seconds).encode())

    def start(self, *command):
        """A daemon that ends with this process, whatever ends that."""
        with (self.folder / f"{command[0]}.out").open("a") as file:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=file, stderr=file))

    def ask(self, *command):
        """What a program of Slurm's says, of errors too."""
        result = subprocess.run(
            command, env=self.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return result.stdout.strip()

    def until(self, condition, seconds, what, log=None):
        """Waits, but not for ever."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not within {seconds} s: {what}\n{self.tell(log)}")
            time.sleep(0.3)

    def tell(self, log=None):
        """The ends of the logs."""
        files = [self.folder / "slurmctld.log", *self.folder.glob("*.out"), *([log] if log else [])]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-6000:]}" for file in files if file.exists())

    def close(self):
        """Ends the daemons, and what they started: jobs outlive them, and are known by the cluster they belong to."""
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):  # psutil reads no environment of slurmstepd, which renames itself
            with suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)


class Job:
    """The script, submitted.

    Args:
        cluster: Where.
        options: Of sbatch. The script's own are for GPUs: --nodes, --gpus-per-node and --time are others here.
        data: The script's first argument.
        output: The second one.
        more: The further ones.
    """

    def __init__(self, cluster, options, data, output, *more):
        self.cluster, self.output = cluster, output
        self.log = output.with_name(f"{time.monotonic_ns()}.log")
        options = ["--nodes=2", "--gpus-per-node=1", "--time=60", *options, f"--output={self.log}"]
        said = cluster.ask("sbatch", *options, "examples/imagenet.slurm", str(data), str(output), *more)
        assert said.startswith("Submitted batch job "), said
        self.id = said.split()[-1]

    def __getattr__(self, name):
        """JobState, Restarts, ExitCode and all else that `scontrol show job` knows."""
        return re.search(rf"\b{name}=(\S*)", self.cluster.ask("scontrol", "show", "job", self.id))[1]

    def lines(self, start):
        """Lines of the log that begin so; a progress bar may stand before them."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return re.findall(rf"{start}.*", text)

    def places(self, start):
        """Where the run stopped, or went on: (epochs, steps), each time."""
        return [tuple(map(int, re.findall(r"\d+", line)[:2])) for line in self.lines(f"{start} after")]

    def until(self, condition, seconds, what):
        self.cluster.until(condition, seconds, what, self.log)

    def until_end(self, state, seconds, restarts=0):
        """Waits for the end of the job, which is to be `state`, or for its being queued once more."""
        ends = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.JobState in ends or int(self.Restarts) > restarts, seconds, f"job {self.id} ends")
        found = (self.JobState, int(self.Restarts))
        assert found == (state, restarts), f"job {self.id}: {found}\n{self.cluster.tell(self.log)}"

    def rows(self):
        """Of the run's table: an epoch each."""
        file = self.output / "summary.csv"
        return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []

    def until_trains(self):
        """Waits for an epoch that is quite over after the job began, or went on."""
        epochs = len(self.rows())
        self.until(lambda: len(self.rows()) > epochs, 90, "an epoch is over")

    def checkpoint(self):
        """The newest one: its steps, and when it was written."""
        file = max(self.output.glob("checkpoint-*.pth"))
        return int(file.name.split("-")[1]), file.stat().st_mtime

    def until_saved(self, since, times=1):
        """Waits until the run has stopped for so many times. It saved where it did, after a moment."""
        self.until(lambda: len(self.places("told to stop")) == times, 100, "the run is told to stop, and saves")
        (epochs, steps), (step, written) = self.places("told to stop")[-1], self.checkpoint()
        found = (step, written > since, (self.output / "stopped").exists())
        assert found == (epochs * STEPS + steps, True, True), f"{found}\n{self.cluster.tell(self.log)}"


@pytest.fixture(scope="module")
def cluster():
    # One at a time: the script's port is fixed.
    with FileLock(Path(gettempdir()) / "container-slurm.lock"):
        folder = Path(mkdtemp(prefix="slurm-", dir="/tmp"))  # a short name
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            cluster.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def data(folder):
    """200 images to train on."""
    for image in [*(folder / "train").glob("*/*")]:
        for i in range(9):
            if len([*image.parent.iterdir()]) < 100:
                image.with_name(f"{image.stem}-{i}.jpg").hardlink_to(image)
    return folder


def test_it_can_be_cancelled_and_goes_on_by_itself_when_out_of_time(cluster, data, tmp_path):
    """scancel saves and is the end; the same command goes on. --signal saves before the time limit, and it goes on."""
    arguments = (data, tmp_path / "run", *TRAINING, "--epochs", "8")
    job = Job(cluster, [], *arguments)
    job.until_trains()
    now = time.time()
    cluster.ask("scancel", job.id)
    job.until_saved(now)
    job.until_end("CANCELLED", 60)
    stopped = job.places("told to stop")

    # The script's own --signal, 120 s ahead. Slurm looks every 30 s, so that it comes 30 to 60 s after the start: the
    # disk is so slow that no machine is at the end by then.
    cluster.slow(9)
    job, now = Job(cluster, ["--time=3"], *arguments), time.time()
    job.until_saved(now + 30)
    job.until(lambda: job.Restarts == "1", 60, "the job is queued again")
    cluster.slow(0)
    cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.until_end("COMPLETED", 180, restarts=1)
    assert job.places("going on") == [*stopped, *job.places("told to stop")] and len(job.rows()) == 8


def test_it_goes_on_after_any_other_signal_and_after_an_administrator(cluster, data, tmp_path):
    """SIGUSR1 to the training or to all, as `scancel --signal` sends it, and `scontrol requeue`, as preemption."""
    cluster.slow(3)
    job = Job(cluster, [], data, tmp_path / "run", *TRAINING, "--epochs", "6")
    for i, command in enumerate(("scancel --signal=USR1", "scancel --signal=USR1 --full", "scontrol requeue"), 1):
        job.until_trains()
        now = time.time()
        cluster.ask(*command.split(), job.id)
        job.until_saved(now, i)
        job.until(lambda: len(job.places("going on")) == i, 60, f"the job goes on after {command}")  # noqa: B023
    cluster.slow(0)
    job.until_end("COMPLETED", 180, restarts=3)
    assert job.places("going on") == job.places("told to stop") and len(job.rows()) == 6


def test_a_mistake_ends_the_job(cluster, data, tmp_path):
    """A missing folder, and an option that does not exist, also where a run was stopped before."""
    job = Job(cluster, [], tmp_path / "missing", tmp_path / "run")
    job.until_end("FAILED", 60)
    assert job.ExitCode == "2:0" and job.lines("usage: sbatch")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped").touch()
    job = Job(cluster, [], data, tmp_path / "run", *TRAINING, "--nonsense")
    job.until_end("FAILED", 240)
    assert job.lines(".*unrecognized arguments: --nonsense")
