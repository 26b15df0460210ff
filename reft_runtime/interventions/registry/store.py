"""The state folder: uploads as content-addressed blobs, and pointers with history.

`blobs/<digest>.safetensors` are immutable. `pointers/<name>.json` names the digests of an
intervention's versions, the one that is served first, and is replaced in one atomic step. The same
layout works on an object store.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_runtime.errors import ConfigError, StoreFull, Unavailable
from reft_runtime.interventions.format.file import sync_folder, write_atomic
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.sources import NAME

_DIGEST = re.compile(r"[0-9a-f]{64}")

STATE_BYTES = 16 << 30
"""Default bound on the bytes of uploads in the state folder."""

_log = logging.getLogger(__name__)


class Store:
    """Blobs of at most `max_bytes` and pointers under one folder, owned by one process at a time.

    `histories` are the digests of each name's versions, the current one first; `damaged` are the
    names whose pointer cannot be read. If the disk fails, methods raise `StoreFull` or
    `Unavailable`.
    """

    def __init__(self, folder: Path, max_bytes: int = STATE_BYTES) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._pointers = folder / "pointers"
        self._max_bytes = max_bytes
        try:
            self._lock = self._take()
        except BlockingIOError:
            raise ConfigError(
                f"The state folder {folder} is in use by another server; give each its own."
            ) from None
        except OSError as error:
            raise ConfigError(f"The state folder cannot be written: {error}.") from error
        for stray in [*self._blobs.glob(".*.tmp"), *self._pointers.glob(".*.tmp")]:
            stray.unlink()  # left by a crash in the middle of a write
        self.histories: dict[str, tuple[str, ...]] = {}
        self.damaged: set[str] = set()
        for path in sorted(self._pointers.glob("*.json")):
            digests = _read_pointer(path) if NAME.fullmatch(path.stem) else ()
            if digests:
                self.histories[path.stem] = digests
            else:
                self.damaged.add(path.stem)
        self._named = Counter(digest for history in self.histories.values() for digest in history)
        self._sizes = {blob.stem: blob.stat().st_size for blob in self._blobs.glob(f"*{SUFFIX}")}

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def check(self) -> bool:
        """Make the folder again if it was deleted; False if what it held is lost.

        Raises `Unavailable` if it cannot be made, or if another server has it by now.
        """
        try:
            own = os.path.samestat(os.stat(self._folder / "lock"), os.fstat(self._lock))
            if own and self._blobs.is_dir() and self._pointers.is_dir():
                return True
        except OSError:
            own = False
        try:
            if own:
                self._make()
            else:
                lock = self._take()
                os.close(self._lock)
                self._lock = lock
        except BlockingIOError:
            raise Unavailable(
                "The state folder was deleted while the server ran, and another server has it now."
                " What was uploaded here serves on until this server stops; restart it with a state"
                " folder of its own."
            ) from None
        except OSError as error:
            raise Unavailable(
                f"The state folder was deleted, and cannot be made again: {error.strerror}."
            ) from error
        self.histories.clear()
        self.damaged.clear()
        self._named.clear()
        self._sizes.clear()
        _log.error(
            "The state folder %s was deleted while the server ran. It is there again, and empty:"
            " what was uploaded before serves on from memory, and a restart forgets it.",
            self._folder,
        )
        return False

    def blob(self, digest: str) -> Path:
        """The path at which the file of this digest is kept."""
        return self._blobs / f"{digest}{SUFFIX}"

    def holds(self, digest: str) -> bool:
        """Whether the file of this digest is kept."""
        return digest in self._sizes

    def add_blob(self, digest: str, data: bytes) -> None:
        """Keep a file, whose identity is `digest`.

        Raises `StoreFull` if it does not fit, and `Unavailable` if it cannot be written.
        """
        kept = sum(self._sizes.values()) - self._sizes.get(digest, 0)
        if kept + len(data) > self._max_bytes:
            raise StoreFull(
                f"Uploaded files take {kept} bytes of the state folder, and this one {len(data)};"
                f" there may be {self._max_bytes}. Delete some of them, or start the server with"
                " more --state-bytes."
            )
        with _told():
            write_atomic(self.blob(digest), data)
        self._sizes[digest] = len(data)

    def point(self, name: str, digests: Sequence[str]) -> None:
        """Let a name stand for the first of `digests`; the others are its history."""
        with _told():
            write_atomic(self._pointer(name), json.dumps({"versions": list(digests)}).encode())
        self._rename(name, tuple(digests))

    def remove(self, name: str) -> None:
        """Forget a name, also one whose pointer is damaged."""
        with _told():
            self._pointer(name).unlink(missing_ok=True)
            sync_folder(self._pointers)
        self._rename(name, ())

    def collect(self, keep: Iterable[str]) -> None:
        """Delete the blobs that no pointer names and that are not in `keep`."""
        if self.damaged:
            return  # a damaged pointer may name any of them: a person decides
        for digest in self._sizes.keys() - self._named.keys() - set(keep):
            with suppress(OSError):  # tried again the next time
                self.blob(digest).unlink(missing_ok=True)
                del self._sizes[digest]

    def _take(self) -> int:
        """Make the folder and lock it. Raises `BlockingIOError` if another server has it."""
        self._make()
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _make(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._pointers.mkdir(exist_ok=True)

    def _rename(self, name: str, digests: tuple[str, ...]) -> None:
        self._named.update(digests)
        for digest in self.histories.pop(name, ()):
            self._named[digest] -= 1
            if not self._named[digest]:
                del self._named[digest]
        if digests:
            self.histories[name] = digests
        self.damaged.discard(name)

    def _pointer(self, name: str) -> Path:
        return self._pointers / f"{name}.json"


@contextmanager
def _told() -> Iterator[None]:
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


def _read_pointer(path: Path) -> tuple[str, ...]:
    try:
        digests = json.loads(path.read_bytes())["versions"]
        return tuple(digests) if all(_DIGEST.fullmatch(digest) for digest in digests) else ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
