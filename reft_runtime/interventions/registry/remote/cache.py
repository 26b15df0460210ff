"""Whole files of URLs, kept on this machine by their digests."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.file import open_verified, write_atomic
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.machine.cache import cache_folder

CACHE_BYTES = 16 << 30
"""Most bytes of files in the cache."""

_ROOM = 0.9
"""Share of the bound that stays taken when room is made."""

_STRAY_SECONDS = 86400.0


class CacheUnusable(OSError):
    """The cache on this machine cannot be written; the URL may well be reached."""


class FileCache:
    """A folder of at most `max_bytes`, from which the files used least recently are removed.

    Several processes may share it: a file is written in one atomic step, and its name says what it
    has to hold. It may be deleted at any time. Methods raise `OSError` if the disk fails.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder or cache_folder() / "files"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._bytes: int | None = None  # counted when the first file is added

    def holds(self, digest: str) -> bool:
        """Whether the file of this digest is kept."""
        return os.path.exists(self._path(digest))

    def get(self, digest: str, size: int) -> Path | None:
        """The path of a file that was verified just now; None if it is not kept, or damaged."""
        path = self._path(digest)
        try:
            file, header = open_verified(path, size)
        except FileNotFoundError:
            return None
        except InvalidFile:
            path.unlink(missing_ok=True)
            return None
        file.close()
        if header.digest != digest:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)  # the file used least recently is the one that is removed first
        return path

    def add(self, digest: str, data: bytes) -> Path:
        """Keep a file that was verified; returns its path. Raises `CacheUnusable`."""
        path = self._path(digest)
        try:
            with self._lock:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._make_room(len(data))
                write_atomic(path, data)
                self._bytes = (self._bytes or 0) + len(data)
        except OSError as error:
            raise CacheUnusable(
                error.errno, f"the cache on this machine cannot be written: {error.strerror}"
            ) from error
        return path

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        """Count the files anew if there may be too many, and remove those used least recently."""
        if self._bytes is not None and self._bytes + size <= self._max_bytes:
            return
        files: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another process removed it
                    status = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        files.append((status.st_mtime, status.st_size, entry.path))
                    elif status.st_mtime < time.time() - _STRAY_SECONDS:
                        os.unlink(entry.path)  # left by a crash in the middle of a write
        self._bytes = sum(size for _, size, _ in files)
        if self._bytes + size <= self._max_bytes:
            return
        for _, taken, path in sorted(files):
            if self._bytes + size <= _ROOM * self._max_bytes:
                return
            with suppress(OSError):
                os.unlink(path)
            self._bytes -= taken
