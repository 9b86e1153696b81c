"""Files that are written completely or not at all."""

import os
import re
import secrets
from pathlib import Path

__all__ = ["MAX_TEXT", "check_new", "read_text", "remove_leftovers", "write_atomically"]

MAX_TEXT = 1 << 20
"""Bytes of the largest record, recipe or summary that is read."""


def check_new(path: str | Path) -> None:
    """Checks that a file may be written: it does not exist yet.

    Raises:
        FileExistsError: It exists.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: delete it, or choose another name")


def write_atomically(path: str | Path, data: bytes | memoryview) -> None:
    """Writes a file under a temporary name of its own, syncs it to disk, and renames it.

    If several processes write the same file, each succeeds, and the content is that of one of them.

    Args:
        path: The file.
        data: Its content.

    Raises:
        OSError: The disk is full or not writable; an existing file is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may leave the name without the content
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files of `write_atomically` that a killed process left in a folder, and no others."""
    for path in Path(folder).iterdir():
        if re.fullmatch(r".+\.[0-9a-f]{16}\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """Reads a small text file in UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is larger than `MAX_TEXT`, or no UTF-8.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"{path} has more than {MAX_TEXT:,} bytes")
    return content.decode()
