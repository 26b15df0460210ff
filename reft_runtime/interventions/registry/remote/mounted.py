"""A folder that several servers have mounted, such as NFS or a volume, as a place like a URL."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.file import write_atomic
from reft_runtime.interventions.registry.remote.place import CALL_SECONDS, Away, Place

_RETRY_SECONDS = 0.005


class MountedFolder(Place):
    """The state in `folder`, which is made if need be. Raises `ConfigError` if it cannot be used.

    While it is open, its file `lock` is locked by all servers that share it together, so that a
    server that would own the folder alone is refused. `changing` locks the file `changing`, by one
    server at a time. The file system must have POSIX locks and an atomic rename, as NFS does. While
    the folder is not the one that was opened, because it was unmounted or deleted, nothing is found
    or changed there: methods raise `OSError`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        super().__init__(self._folder.as_uri())
        try:
            for part in ("blobs", "pointers"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock", fcntl.LOCK_SH)
        except BlockingIOError:
            raise ConfigError(
                f"The state folder {folder} is in use by a server that does not share it; start all"
                " of its servers with --shared-state."
            ) from None
        except OSError as error:
            raise ConfigError(f"The state folder {folder} cannot be shared: {error}.") from error

    def check(self) -> None:
        """Raise `OSError` if the folder is not the one that was opened."""
        self._call(self._check)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change pointers and delete blobs in the block, while no other server does.

        Raises `OSError` if others do for too long, or the folder cannot be reached.
        """
        self.check()
        lock = self._taken()
        try:
            yield
        finally:
            os.close(lock)

    def close(self) -> None:
        """Let a server have the folder that does not share it."""
        os.close(self._lock)

    def _open(self, url: str) -> tuple[Any, str]:
        return _Files(self), str(self._folder)

    def _check(self) -> None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._folder / "lock"), os.fstat(self._lock)):
                return
        raise Away(errno.EIO, "the folder was unmounted or deleted")

    def _taken(self) -> int:
        """The open file `changing`, locked."""
        until = time.monotonic() + CALL_SECONDS
        while True:
            try:
                return _locked(self._folder / "changing", fcntl.LOCK_EX)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"other servers have been changing it for {CALL_SECONDS:g} s",
                    ) from None
                time.sleep(_RETRY_SECONDS)
            except OSError as error:
                raise OSError(error.errno, f"it cannot be locked ({error.strerror})") from None


class _Files:
    """The methods of fsspec's file systems that a `Place` calls; each write is one atomic step."""

    async_impl = False

    def __init__(self, place: MountedFolder) -> None:
        self._place = place

    def invalidate_cache(self) -> None:
        """Do nothing: what NFS keeps of a folder it asks for again when the folder is opened."""

    def ls(self, path: str, *, detail: bool) -> list[dict[str, Any]]:
        """The files of a folder; one that is renamed at this moment may be left out."""
        self._place._check()
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    found.append(_info(entry.path, entry.stat(follow_symlinks=False)))
                except OSError as error:  # a temporary file that has got its name
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        raise
        return found

    def info(self, path: str) -> dict[str, Any]:
        """What a file is."""
        self._place._check()
        # A client of NFS may remember for a minute that a file is there, is not, or is another,
        # unless it opens the folder.
        os.close(os.open(os.path.dirname(path), os.O_RDONLY))
        return _info(path, os.stat(path, follow_symlinks=False))

    def cat_file(self, path: str, start: int, end: int, **_: object) -> bytes:
        """The bytes of a file from `start` to before `end`, or to its end."""
        try:
            return _read(path, start, end)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return _read(path, start, end)  # what has taken its place on the server of NFS

    def pipe_file(self, path: str, data: bytes) -> None:
        """Write a whole file."""
        write_atomic(Path(path), data)

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        os.unlink(path)


def _read(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _info(path: str, status: os.stat_result) -> dict[str, Any]:
    regular = stat.S_ISREG(status.st_mode)
    return {
        "name": path,
        "type": "file" if regular else "other",
        "size": status.st_size,
        "mtime": status.st_mtime,
        "etag": f"{status.st_mtime_ns} {status.st_ino}",
    }


def _locked(path: Path, how: int) -> int:
    """An open file with a lock on it. Raises `BlockingIOError` if another process has one."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file
