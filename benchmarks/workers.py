"""Where the works of a benchmark live: in this process, or each in one of its own. And how processes end.

A process of its own lets models be prepared side by side (compilers take a minute a model), and keeps what goes wrong
with one, a crash of its kernels too, from the others. Only one computes while it is timed.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["Inline", "Worker", "descendants", "end", "first_answers", "kill"]


class Inline:
    """A worker that is this process: an order is carried out when it is given."""

    def order(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function."""
        self._answer = function(*arguments)

    def answer(self) -> Any:
        """What the function returned."""
        return self._answer


class Worker:
    """A process that carries out one order after the other, and keeps its module's variables between them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent uses
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has a function of a module called there, and does not wait for it."""
        with contextlib.suppress(OSError):  # it is dead, as its answer will say
            self.pipe.send((function, arguments))

    def answer(self) -> Any:
        """What the function returned, once it has.

        Raises:
            RuntimeError: It raised something, or its process died.
        """
        try:
            done, result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"its process died (exit code {self.process.exitcode})") from None
        if not done:
            raise RuntimeError(result)
        return result


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            result = (True, function(*arguments))
        except BaseException as error:
            traceback.print_exc()
            result = (False, f"{type(error).__name__}: {error}")
        pipe.send(result)


def end(workers: Iterable[Inline | Worker]) -> None:
    """Ends processes, and kills those that are at work and do not hear within a second, with all that they started."""
    processes = [worker for worker in workers if isinstance(worker, Worker)]
    for worker in processes:
        worker.pipe.close()
    deadline = time.monotonic() + 1
    for worker in processes:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            assert worker.process.pid is not None
            kill([*descendants(worker.process.pid), worker.process.pid])
        worker.process.join()


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and those that they started, also in sessions of their own.

    Its own children come first. Empty where there is no /proc.
    """
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = children.get(pid, [])
    for child in found:  # which grows
        found += children.get(child, [])
    return found


def kill(pids: Iterable[int]) -> None:
    """Kills processes; those that have ended by themselves are no mistake."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def first_answers(workers: dict[str, Any], seconds: float) -> list[tuple[str, Any]]:
    """Those workers, by name, that have an answer: the first to have one, or none if it takes longer than that."""
    inline = [(name, worker) for name, worker in workers.items() if isinstance(worker, Inline)]
    if inline:
        return inline
    pipes = {worker.pipe: (name, worker) for name, worker in workers.items()}
    timeout = None if seconds == math.inf else max(0.0, seconds)
    return [pipes[pipe] for pipe in wait(list(pipes), timeout)]
