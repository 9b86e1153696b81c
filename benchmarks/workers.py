"""Workers that run a benchmark's functions in this process or in separate ones, and functions that end processes.

Separate processes can prepare models in parallel (compilers take a minute per model). They also keep a failure, even a
crash of a kernel, from affecting other models. Only one process computes during timing.
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
    """Worker in this process, which carries out an order at once."""

    def order(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function."""
        self._answer = function(*arguments)

    def answer(self) -> Any:
        """Returns the result of the function."""
        return self._answer


class Worker:
    """Worker process that carries out one order after the other, and keeps module variables between them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent uses
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Sends a module's function to the process, which calls it, and does not wait for the result."""
        with contextlib.suppress(OSError):  # the process is dead, as `answer` will say
            self.pipe.send((function, arguments))

    def answer(self) -> Any:
        """Waits for the function, and returns its result.

        Raises:
            RuntimeError: The function raised an exception, or the process died.
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
    """Ends worker processes. Those that are still busy after a second are killed, with all their descendants."""
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
    """Returns the IDs of all descendants of a process, including those in other sessions.

    Its own children come first. The list is empty if there is no /proc.
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
    for child in found:  # the list grows meanwhile
        found += children.get(child, [])
    return found


def kill(pids: Iterable[int]) -> None:
    """Kills processes by ID. Those that have already ended are ignored."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def first_answers(workers: dict[str, Any], seconds: float) -> list[tuple[str, Any]]:
    """Waits until a worker has an answer, and returns those that have one, with their names.

    Args:
        workers: The workers, by name.
        seconds: Time to wait. If no worker has an answer by then, the list is empty.
    """
    inline = [(name, worker) for name, worker in workers.items() if isinstance(worker, Inline)]
    if inline:
        return inline
    pipes = {worker.pipe: (name, worker) for name, worker in workers.items()}
    timeout = None if seconds == math.inf else max(0.0, seconds)
    return [pipes[pipe] for pipe in wait(list(pipes), timeout)]
