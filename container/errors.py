"""Errors in one line, as the commands print them."""

import difflib
from collections.abc import Iterable

__all__ = ["in_one_line", "suggest"]


def in_one_line(error: BaseException) -> str:
    """Returns the line of an error that says what is wrong."""
    reason = getattr(error, "reason", None)  # of urllib's errors
    if isinstance(reason, OSError):
        error = reason
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    lines = str(error).strip().splitlines() or [repr(error)]
    # A loader's process wraps its error in a traceback, which ends with it.
    return lines[-1 if lines[0].startswith("Caught ") else 0]


def suggest(name: str, names: Iterable[str]) -> str:
    """Returns the question whether the most similar name was meant, or nothing if none is similar.

    Args:
        name: What was typed.
        names: What exists.
    """
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean {near[0]}?" if near else ""
