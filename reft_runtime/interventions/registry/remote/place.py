"""A folder at a URL: every call has a time limit, and fails with an `OSError` that can be shown."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.registry.urls import secrets_of, shown

T = TypeVar("T")

CALL_SECONDS = 30.0
"""Longest that one call may take."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of errors of a disk, or of what one may use of it, that is full."""

_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "created")
_TAGS = ("ETag", "etag", "md5Hash", "generation", "blob_id")
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}


class Listed(NamedTuple):
    """What a listing says about one object; an object with another `token` was replaced."""

    key: str
    token: str
    size: int
    modified_ns: int


class Away(OSError):
    """A place is not what it was; `strerror` may be shown."""


class Place:
    """The folder at a URL. Raises `ConfigError` if such URLs cannot be read or listed.

    `id` tells it from other places on this machine, and may be shown.

    Methods raise `FileNotFoundError`, `PermissionError`, and `OSError` for whatever else goes
    wrong. Their `strerror` may be shown to clients: it holds neither the URL nor a library's text.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown(url)
        self.id = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.kind = url.partition("://")[0]
        self.detail = ""
        """What the last error of a library said, for the log."""
        self._secrets = secrets_of(url)
        self._fs, path = self._open(url)
        self.path = path.rstrip("/")
        # Buffers would fetch megabytes for a header; async file systems read ranges as they are.
        self._unbuffered = {} if self._fs.async_impl else {"cache_type": "none"}

    def key(self, name: str) -> str:
        """The key of an object whose path below the folder is `name`."""
        return f"{self.path}/{name}"

    def below(self, url: str) -> str | None:
        """The path below the folder that a whole URL stands for; None if it is not below."""
        if "://" not in url or url.partition("://")[0] != self.kind:
            return None
        path = str(self._fs._strip_protocol(url))
        return path[len(self.path) + 1 :] if path.startswith(f"{self.path}/") else None

    def listing(self, folder: str = "") -> dict[str, Listed]:
        """The objects directly in the folder, or in one below it, by their names there."""

        def work() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self.key(folder).rstrip("/"), detail=True))

        infos = self._call(work)
        files = [_listed(info) for info in infos if info.get("type") == "file"]
        return {PurePosixPath(file.key).name: file for file in files}

    def look(self, key: str) -> Listed:
        """One object as it is now."""

        def work() -> Mapping[str, Any]:
            self._fs.invalidate_cache()
            info: Mapping[str, Any] = self._fs.info(key)
            return info

        info = self._call(work)
        if info.get("type") != "file":
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        return _listed(info)

    def read(self, key: str, start: int, end: int) -> bytes:
        """The bytes of an object from `start` to before `end`, or to its end."""
        return self._call(
            lambda: bytes(self._fs.cat_file(key, start=start, end=end, **self._unbuffered))
        )

    def write(self, key: str, data: bytes) -> None:
        """Write an object in one step; file systems that are no object stores may take several."""
        self._call(lambda: self._fs.pipe_file(key, data))

    def delete(self, key: str) -> None:
        """Delete an object; one that is gone already is no error."""
        try:
            self._call(lambda: self._fs.rm_file(key))
        except FileNotFoundError:
            return

    def check(self) -> None:
        """Raise `FileNotFoundError` if there is no such bucket."""
        bucket = self.path.partition("/")[0] or "/"
        self._call(lambda: self._fs.info(bucket))

    def changing(self) -> AbstractContextManager[None]:
        """Change objects in the block; other servers may at the same moment, and the later counts.

        Raises `OSError`.
        """
        return nullcontext()

    def close(self) -> None:
        """Let others use the place in ways that were refused until now; here there are none."""

    def _open(self, url: str) -> tuple[Any, str]:
        """The file system that reads a URL, and the folder's path in it."""
        from fsspec.core import url_to_fs  # not where only folders are used

        if self.kind in ("http", "https"):  # fsspec lists the links of a page, without sizes
            raise ConfigError(
                f"{self.shown}: a web server does not list its files with their sizes. Give the URL"
                " of an object store or a repository (s3://, hf://), or a folder with a copy."
            )
        try:
            files, path = url_to_fs(url, use_listings_cache=False)
        except ImportError:
            package = _EXTRAS.get(self.kind)
            how = f": pip install {package}" if package else ""
            raise ConfigError(
                f"{self.shown}: what reads {self.kind}:// URLs is not installed{how}."
            ) from None
        except Exception as error:
            raise ConfigError(f"{self.shown} cannot be used: {self._told(error)}.") from None
        return files, str(path)

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return _within(CALL_SECONDS, work)
        except FileNotFoundError as error:
            self.detail = self._told(error)
            raise FileNotFoundError(errno.ENOENT, "there is no such file or folder") from None
        except PermissionError as error:
            self.detail = self._told(error)
            raise PermissionError(errno.EACCES, "access is denied") from None
        except TimeoutError as error:
            self.detail = self._told(error)
            raise TimeoutError(
                errno.ETIMEDOUT, f"there is no answer within {CALL_SECONDS:g} s"
            ) from None
        except Away as error:
            self.detail = self._told(error)
            raise
        except Exception as error:  # every backend has exceptions of its own
            self.detail = self._told(error)
            if isinstance(error, OSError) and error.errno in FULL:
                raise OSError(error.errno, "the disk is full") from None
            raise OSError(errno.EIO, f"it cannot be reached ({type(error).__name__})") from None

    def _told(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:300].rstrip(".")


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`; raises `TimeoutError` if it takes longer, and leaves it to itself."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="reft-remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _listed(info: Mapping[str, Any]) -> Listed:
    size = int(info.get("size") or 0)
    modified = next(
        (t for field in _MODIFIED if (t := _seconds(info.get(field))) is not None), None
    )
    # A listing and a look at one object differ in fields, and in how exact their times are.
    tag = next((info[field] for field in _TAGS if info.get(field)), modified)
    token = hashlib.sha256(repr((str(tag), size)).encode()).hexdigest()[:32]
    if modified is None:
        modified = time.time()
    return Listed(str(info["name"]), token, size, int(modified * 1e9))


def _seconds(value: object) -> float | None:
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else None
