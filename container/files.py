"""Files that are written completely or not at all."""

import os
import secrets
from pathlib import Path

__all__ = ["check_new", "write_atomically"]


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
