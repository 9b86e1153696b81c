"""Files that are there whole and right, or not at all: written here, or brought from the network."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Optional, Union

from filelock import FileLock
from tqdm import tqdm

__all__ = ["download", "sha256_of", "web_page", "write_atomically"]

_ATTEMPTS = 5  # in a row that bring nothing
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 0.1  # seconds; doubles with every attempt that brings nothing
_CHUNK = 1 << 18


def sha256_of(path: Union[str, Path]) -> str:
    """The sha256 of a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def web_page(path: Union[str, Path]) -> Optional[str]:
    """What a file is if it is a web page, with its title; None for any other file."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if not re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return None
    title = re.search(rb"<title[^>]*>(.*?)</title>", head, re.DOTALL | re.IGNORECASE)
    return f'a web page, "{" ".join(title[1].decode(errors="replace").split())}"' if title else "a web page"


def write_atomically(path: Union[str, Path], data: Union[bytes, memoryview]) -> None:
    """Writes a file under a temporary name, to the disk, and then gives it its own.

    Args:
        path: The file.
        data: Its content.

    Raises:
        OSError: The disk is full, or cannot be written; a file that was there is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def download(url: str, path: Union[str, Path], size: int, sha256: str) -> None:
    """Brings a file, verified, to its place; of several processes that ask at once, one downloads.

    The content goes to a temporary name beside `path`, and is moved there in one step when size and hash are right. A
    dropped connection is taken up again where it ended, also by a later call; what turns out wrong is deleted.

    Args:
        url: Where it is: http or https, redirected or not.
        path: Where it goes.
        size: Its bytes.
        sha256: Its hash.

    Raises:
        OSError: It cannot be had, or is another file; the message says which in one line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{sha256[:16]}.part")  # a part of nothing but this content
    lock = path.with_name(f"{path.name}.lock")
    with FileLock(lock):
        try:
            if path.is_file() and sha256_of(path) == sha256:
                return  # brought by the process that had the lock before
            resumed = part.exists()
            _Transfer(url, part, size).run()
            if resumed and sha256_of(part) != sha256:
                part.unlink()  # what an earlier call left may have come from elsewhere
                _Transfer(url, part, size).run()
            if (found := sha256_of(part)) != sha256:
                page = web_page(part)
                part.unlink()
                raise OSError(f"{url} is {page}, not the file" if page else f"{url} has sha256 {found}, not {sha256}")
            os.replace(part, path)
        finally:
            with suppress(OSError):  # where a waiting process that has it open prevents its removal
                lock.unlink()


class _DroppedError(Exception):
    """The connection ended before the file did, or there was none."""


class _Transfer:
    """The way of a URL's content into a file, over as many connections as it takes."""

    def __init__(self, url: str, part: Path, size: int) -> None:
        self.url, self.part, self.size = url, part, size
        self.resumable = True  # until the server is seen to begin anew

    def here(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def run(self) -> None:
        """Connects until everything is here, or several times in a row have brought nothing."""
        fruitless = 0
        while (before := self.here()) != self.size:
            try:
                self.connect(before)
            except _DroppedError as error:
                fruitless = 0 if self.here() > before else fruitless + 1
                if fruitless == _ATTEMPTS:
                    kept = self.resumable and self.here()
                    if not kept:
                        self.part.unlink(missing_ok=True)
                    note = f"; {kept} of {self.size} bytes are kept in {self.part} to go on from" if kept else ""
                    raise OSError(f"{self.url}: {error}{note}") from None
                time.sleep(_PAUSE * 2**fruitless)
            except OSError as error:  # it is another file, or the disk is full
                self.part.unlink(missing_ok=True)
                raise OSError(f"{self.url}: {error}") from None

    def connect(self, start: int) -> None:
        """Asks for what is missing, and keeps what comes."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "container-timm"})
        if 0 < start < self.size:
            request.add_header("Range", f"bytes={start}-")
        try:
            answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 416, 429) or error.code >= 500:
                if error.code == 416:  # it has less than is here
                    self.part.unlink()
                raise _DroppedError(f"the server answers {error.code} {error.reason}") from None
            raise OSError(f"the server answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _DroppedError(f"no connection ({getattr(error, 'reason', error) or type(error).__name__})") from None
        with answer:
            goes_on = start > 0 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")
            self.resumable = goes_on or answer.headers.get("Accept-Ranges") == "bytes"
            self.receive(answer, start if goes_on else 0)

    def receive(self, answer: http.client.HTTPResponse, start: int) -> None:
        """Writes an answer behind the first `start` bytes of the file."""
        bar = tqdm(total=self.size, initial=start, unit="B", unit_scale=True, disable=None, desc=self.part.name[:24])
        with open(self.part, "ab" if start else "wb") as file, bar:
            while file.tell() <= self.size:
                try:
                    chunk = answer.read(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _DroppedError(f"connection lost after {file.tell()} bytes ({error})") from None
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        here = self.here()
        if here < self.size and answer.length:  # of what was announced, so much did not come
            raise _DroppedError(f"connection lost after {here} bytes")
        if here != self.size:
            count = f"more than {self.size}" if here > self.size else f"{here}, not {self.size}"
            raise OSError(f"this is {web_page(self.part) or f'another file, of {count} bytes'}")
