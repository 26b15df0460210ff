"""A file on its way in: written in parts to a temporary file, within its limit."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from reft_runtime.errors import StoreFull, Unavailable
from reft_runtime.interventions.format.file import read, too_large
from reft_runtime.interventions.format.recognise import HEAD_BYTES

SUFFIX = ".part"


class Room:
    """Room on a disk for files that are on their way in; `left` says how many bytes there are."""

    def __init__(self, left: Callable[[], int]) -> None:
        self._left = left
        self._lock = threading.Lock()
        self._taken = 0

    def take(self, size: int) -> None:
        """Take room for so many bytes more; raises `StoreFull` if there is none."""
        with self._lock:
            left = self._left()
            if self._taken + size > left:
                raise StoreFull(
                    f"Files that are being uploaded take {self._taken} bytes of the state folder,"
                    f" and {left} are left for them. Try again later, delete some interventions, or"
                    " start the server with more --state-bytes."
                )
            self._taken += size

    def give_back(self, size: int) -> None:
        """Give back room that was taken."""
        with self._lock:
            self._taken -= size


class Incoming:
    """A temporary file in `folder`, of at most `max_bytes`, which nothing lists.

    All on their way share `room`. It is removed at the end of a `with` block, unless it was moved
    to its place before. It is open only while a part is written: many clients may pause in the
    middle of theirs. All methods but `discard` raise `StoreFull` or `Unavailable` if the disk
    fails.
    """

    def __init__(self, folder: Path, max_bytes: int, room: Room) -> None:
        self.path = folder / f"{secrets.token_hex(8)}{SUFFIX}"
        self.size = 0
        self._max_bytes = max_bytes
        self._room, self._taken = room, 0
        self._start = b""
        self._sha256 = hashlib.sha256()
        with telling():
            self.path.touch(exist_ok=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove the file, unless it was moved to its place; it may be called again."""
        with suppress(OSError):  # the next start removes it
            self.path.unlink(missing_ok=True)
        self._give_back()

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hexadecimal digits."""
        return self._sha256.hexdigest()

    def write(self, part: bytes) -> None:
        """Append a part. Raises `FileTooLarge` as soon as the file is above its limit."""
        self.size += len(part)
        self._start = (self._start + part[:HEAD_BYTES])[:HEAD_BYTES]
        if self.size > self._max_bytes:
            raise too_large(self.size, self._max_bytes, self._start)
        self._room.take(len(part))
        self._taken += len(part)
        self._sha256.update(part)
        rest = memoryview(part)
        with telling(), self._opened() as file:
            while rest:
                rest = rest[file.write(rest) :]

    def read(self) -> bytes:
        """The whole content."""
        with telling():
            return read(self.path, self._max_bytes)

    def move(self, path: Path) -> None:
        """Put the file at `path` in one atomic step, safely on the disk."""
        with telling():
            with self._opened() as file:
                os.fsync(file.fileno())
            self.path.replace(path)
        self._give_back()

    def _give_back(self) -> None:
        self._room.give_back(self._taken)
        self._taken = 0

    def _opened(self) -> FileIO:
        """The file, to append to; one that was deleted is not made again."""
        return open(self.path, "ab", buffering=0, opener=_without_making)


def _without_making(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


@contextmanager
def telling() -> Iterator[None]:
    """Raise what the disk refuses in the block as `StoreFull` or `Unavailable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(
                "The disk of the state folder is full; make room there, or delete interventions."
            ) from error
        raise Unavailable(
            f"The state folder cannot be written: {error.strerror}. What it held serves on."
        ) from error
