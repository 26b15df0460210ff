"""The state folder: uploads as content-addressed blobs, and pointers with history.

`blobs/<digest>.safetensors` are immutable. `pointers/<name>.json` is all that is kept of a name:
the digests of its uploaded versions, the one that is served first, and whether it is pinned. It is
replaced in one atomic step. The same layout works on an object store. `incoming/` holds files that
are being uploaded, and is empty after a start.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from reft_runtime.errors import ConfigError, StoreFull, Unavailable
from reft_runtime.interventions.format.file import sync_folder, write_atomic
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES, SUFFIX
from reft_runtime.interventions.registry.incoming import Incoming, Room, telling
from reft_runtime.interventions.registry.pointers import Pointers
from reft_runtime.interventions.registry.sources import NAME, Found, look

_TEMPORARY = "reft-uploads-"
_BEGUN_SECONDS = 60.0  # a temporary folder is locked long before, if its server lives

STATE_BYTES = 16 << 30
"""Default bound on the bytes of uploads in the state folder."""

_log = logging.getLogger(__name__)


class Store:
    """Blobs of at most `max_bytes` and pointers under one folder, owned by one process at a time.

    `pointers` are what its pointers say. If the disk fails, methods raise `StoreFull` or
    `Unavailable`.
    """

    def __init__(self, folder: Path, max_bytes: int = STATE_BYTES) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._pointers = folder / "pointers"
        self._incoming = folder / "incoming"
        self._max_bytes = max_bytes
        self._forget: weakref.finalize[..., Store] | None = None
        try:
            self._lock = self._take()
        except BlockingIOError:
            raise ConfigError(
                f"The state folder {folder} is in use by another server; give each its own, or"
                " start all of them with --shared-state."
            ) from None
        except OSError as error:
            raise ConfigError(f"The state folder cannot be written: {error}.") from error
        for stray in [*self._pointers.glob(".*.tmp"), *self._incoming.iterdir()]:
            stray.unlink()  # left by a crash in the middle of a write
        self.pointers = Pointers()
        for path in sorted(self._pointers.glob("*.json")):
            self.pointers.note_file(path.stem, _content(path))
        self._sizes = {blob.stem: blob.stat().st_size for blob in self._blobs.glob(f"*{SUFFIX}")}
        self._kept_bytes = sum(self._sizes.values())
        # One more: what is kept already may be uploaded again.
        self._room = Room(lambda: self._max_bytes - self._kept_bytes + MAX_FILE_BYTES)

    @classmethod
    def temporary(cls, max_bytes: int) -> Store:
        """A store in a temporary folder, which is deleted when the store is closed, or forgotten.

        What servers that were killed have left of theirs is deleted, too. Raises `Unavailable`.
        """
        try:
            for old in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
                _delete_unused(old)
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
            store = cls(folder, max_bytes)
        except (OSError, ConfigError) as error:
            reason = getattr(error.__cause__ or error, "strerror", "another server has it")
            raise Unavailable(
                f"Uploads cannot be kept in the folder of temporary files: {reason}. Start the"
                " server with a --state-dir."
            ) from error
        store._forget = weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
        return store

    def close(self) -> None:
        """Let another process use the folder."""
        if self._forget is not None:
            self._forget()
        os.close(self._lock)

    def check(self) -> bool:
        """Make the folder again if it was deleted; False if what it held is lost.

        Raises `Unavailable` if it cannot be made, or if another server has it by now.
        """
        try:
            own = os.path.samestat(os.stat(self._folder / "lock"), os.fstat(self._lock))
            if own and all(part.is_dir() for part in self._parts):
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
        self.pointers.clear()
        self._sizes.clear()
        self._kept_bytes = 0
        _log.error(
            "The state folder %s was deleted while the server ran. It is there again, and empty:"
            " what was uploaded before serves on from memory, and a restart forgets it.",
            self._folder,
        )
        return False

    def unwritable(self) -> str | None:
        """Why nothing can be written here, though the folder is there; None if it can."""
        if all(os.access(part, os.W_OK) for part in self._parts):
            return None
        return (
            "The state folder cannot be written: it is read-only, as a disk's fault makes it, or"
            " not this user's. What it held serves on."
        )

    def changing(self) -> AbstractContextManager[None]:
        """Change names in the block: nothing has to be locked, as there is no other server."""
        return nullcontext()

    def changed(self) -> tuple[()]:
        """The names that another server has changed: none, as it has no other."""
        return ()

    def look_again(self, name: str) -> bool:
        """Whether another server has changed a name: no, as there is no other."""
        return False

    def file(self, digest: str) -> Found:
        """The file of this digest. Raises `OSError`."""
        return look(self._blob(digest))

    def holds(self, digest: str) -> bool:
        """Whether the file of this digest is kept."""
        return digest in self._sizes

    def incoming(self, max_bytes: int) -> Incoming:
        """A temporary file on the disk of the blobs, for a file that is being uploaded."""
        with telling():
            self._incoming.mkdir(exist_ok=True)
            return Incoming(self._incoming, max_bytes, self._room)

    def add_blob(self, digest: str, file: Incoming) -> None:
        """Keep a file, whose identity is `digest`; one that is kept already stays as it is.

        Raises `StoreFull` if it does not fit, and `Unavailable` if it cannot be written.
        """
        kept = self._kept_bytes - self._sizes.get(digest, 0)
        if kept + file.size > self._max_bytes:
            raise StoreFull(
                f"Uploaded files take {kept} bytes of the state folder, and this one {file.size};"
                f" there may be {self._max_bytes}. Delete some of them, or start the server with"
                " more --state-bytes."
            )
        blob = self._blob(digest)
        with telling():
            if not (self.holds(digest) and _has(blob, file)):
                file.move(blob)
                sync_folder(self._blobs)
        self._sizes[digest] = file.size
        self._kept_bytes = kept + file.size

    def keep_for_now(self, digest: str, file: Incoming) -> Found:
        """Keep a file that no pointer will name until `collect` deletes it; raises as `add_blob`.

        If the process ends before, the next one deletes it.
        """
        self.add_blob(digest, file)
        with telling():
            return self.file(digest)

    def point(self, name: str, digests: Sequence[str], *, pinned: bool) -> None:
        """Let a name stand for the first of `digests`; the others are its history.

        Without digests nothing but whether it is `pinned` is kept of the name.
        """
        if not digests and not pinned:
            self.remove(name)
            return
        with telling():
            write_atomic(self._pointer(name), self.pointers.file(name, digests, pinned=pinned))
        self.pointers.note(name, digests, pinned=pinned)

    def remove(self, name: str) -> None:
        """Forget a name, also one whose pointer is damaged."""
        with telling():
            self._pointer(name).unlink(missing_ok=True)
            sync_folder(self._pointers)
        self.pointers.note(name, (), pinned=False)

    def collect(self, keep: Iterable[str]) -> None:
        """Delete the blobs that no pointer names and that are not in `keep`."""
        if not self.pointers.all_understood:
            return  # such a pointer may name any of them: a person decides
        for digest in self._sizes.keys() - self.pointers.named.keys() - set(keep):
            with suppress(OSError):  # tried again the next time
                self._blob(digest).unlink(missing_ok=True)
                self._kept_bytes -= self._sizes.pop(digest)

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

    @property
    def _parts(self) -> tuple[Path, ...]:
        return self._blobs, self._pointers, self._incoming

    def _make(self) -> None:
        for part in self._parts:
            part.mkdir(parents=True, exist_ok=True)

    def _blob(self, digest: str) -> Path:
        return self._blobs / f"{digest}{SUFFIX}"

    def _pointer(self, name: str) -> Path:
        return self._pointers / f"{name}.json"


def _has(blob: Path, file: Incoming) -> bool:
    """Whether a blob has the content of a file; one that was damaged has not."""
    try:
        with blob.open("rb") as kept:
            return hashlib.file_digest(kept, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return False


def _delete_unused(folder: Path) -> None:
    """Delete a store's temporary folder unless a process has it, or may be about to lock it."""
    with suppress(OSError):
        status = folder.lstat()  # the place is everybody's: it may be another's, or a link
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            return
        if time.time() - status.st_mtime < _BEGUN_SECONDS:
            return
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _content(path: Path) -> bytes:
    """What a pointer's file says; nothing if it cannot be read, or is not named as pointers are."""
    try:
        return path.read_bytes() if NAME.fullmatch(path.stem) else b""
    except OSError:
        return b""
