"""A source at a URL: followed by polling, its headers and the files in use kept on this machine."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.file import DAMAGED
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES, SUFFIX
from reft_runtime.interventions.registry.remote.cache import CacheUnusable
from reft_runtime.interventions.registry.remote.heads import Head
from reft_runtime.interventions.registry.remote.objects import Objects, RemoteFile, digest_of
from reft_runtime.interventions.registry.remote.place import Listed, Place
from reft_runtime.interventions.registry.sources import NAME, NO_NAME, Listing

_log = logging.getLogger(__name__)


class RemoteSource:
    """The intervention files directly in the folder at a URL.

    What it lists is what the last `poll` found, at first what an earlier process found. While the
    URL cannot be reached that stays, and `problem` says why. A file's data is read when it is first
    used; the new data of a file whose old data is in the cache is read before it is listed.
    """

    def __init__(self, url: str) -> None:
        self._objects = Objects(Place(url), "the source", "served")
        self._place = self._objects.place
        self.kind, self.label = self._place.kind, self._place.shown
        self._reach = self._objects.reach
        self._polling = threading.Lock()
        self._files: dict[str, RemoteFile] = {}  # replaced whole, or one entry at a time
        self._unlisted: dict[str, str] = {}
        for head in self._objects.heads.all():
            name = _name_of(head.listed)
            self._files[name] = self._file(head)

    @property
    def problem(self) -> str | None:
        """Why it cannot be reached; None if it could be the last time."""
        away = self._reach.problem
        return None if away is None else f"The source is away: {away}."

    def poll(self) -> bool:
        """Look at the URL, over the network; return whether it could be reached."""
        with self._polling:
            try:
                listing = self._place.listing()
                self._take(listing)
            except OSError as error:
                self._reach.lost(error)
                return False
        self._reach.back()
        return True

    def close(self) -> None:
        """Close what is open on this machine."""
        self._objects.close()

    # What sources.Source asks for; nothing here waits for the network but the last two.

    def listing(self, between: Callable[[float], object]) -> Listing:
        """What the last poll found; raises `OSError` if there was none, and no earlier process."""
        if self._reach.problem is not None and not self._files:
            raise OSError(errno.EIO, self._reach.problem)
        return dict(self._files), dict(self._unlisted)

    def find(self, name: str) -> RemoteFile | None:
        """The file of a name, as the last poll found it."""
        return self._files.get(name)

    def glance(self, name: str, known: object) -> bool | None:
        """Whether the file of a name is the known one; None if there is none."""
        file = self._files.get(name)
        return None if file is None else file == known

    def inside(self, path: str) -> str | None:
        """The path below the URL that a client's `path` stands for; None if it leads elsewhere."""
        below = self._place.below(path) if "://" in path else path
        if below is None or any(part in ("", ".", "..") for part in below.split("/")):
            return None
        return None if "\\" in below or not below.isprintable() else below

    def at(self, inside: str) -> RemoteFile | None:
        """The file at a path below the URL as it is now; None if there is none."""
        try:
            listed = self._place.look(self._place.key(inside))
        except FileNotFoundError:
            return None
        return RemoteFile(listed, None, None, self._shown(listed), self)

    def is_folder(self, inside: str) -> bool:
        """Whether there is a folder at a path below the URL."""
        try:
            return bool(self._place.listing(inside))
        except OSError:
            return False

    # What RemoteFile asks its owner for.

    def head(self, file: RemoteFile) -> bytes:
        """The file's first bytes, as they were read when it was listed."""
        return self._objects.head(file.listed)

    def fetch(self, file: RemoteFile) -> Path:
        """The path of the verified file on this machine; a first use reads it over the network."""
        assert file.digest is not None
        cached = self._objects.cached(file, "its source")
        if cached is not None:
            return cached
        try:
            path = self._objects.download(file.listed, file.digest)
        except FileNotFoundError:
            self._forget(file)
            raise
        except (PermissionError, CacheUnusable):
            raise
        except OSError as error:
            if isinstance(error, TimeoutError) or not self._is_there():
                self._reach.lost(error)
            raise
        if path is None:
            self._look_anew(file)
            raise OSError(errno.EIO, "it has changed since it was listed")
        return path

    def read(self, file: RemoteFile, end: int) -> bytes:
        """At most `end` bytes of the file as it is now."""
        return self._place.read(file.listed.key, 0, min(end, file.size)) if file.size else b""

    def intact(self, file: RemoteFile) -> bool:
        """Whether the same data is in the cache, or at the URL as far as is known."""
        return self.on_disk(file) or (
            self.problem is None and self._files.get(_name_of(file.listed)) == file
        )

    def on_disk(self, file: RemoteFile) -> bool:
        """Whether the data is in the cache."""
        return self._objects.on_disk(file)

    def _take(self, listing: dict[str, Listed]) -> None:
        """Read the headers of what is new or changed, and list what there is."""
        found: dict[str, Listed] = {}
        unlisted: dict[str, str] = {}
        for key, listed in listing.items():
            name = key.removesuffix(SUFFIX)
            if name == key:
                continue
            if NAME.fullmatch(name):
                found[name] = listed
            else:
                unlisted[self._shown(listed)] = NO_NAME
        files = {name: self._files[name] for name in found.keys() & self._files.keys()}
        fresh = [
            listed
            for name, listed in found.items()
            if name not in files or files[name].listed.token != listed.token
        ]
        failed: OSError | None = None
        for result in self._objects.read_heads(fresh):
            try:
                if not isinstance(result, Head):
                    raise result[1]
                name = _name_of(result.listed)
                files[name] = self._replaced(files.get(name), self._file(result))
            except FileNotFoundError:
                continue
            except OSError as error:
                listed = result.listed if isinstance(result, Head) else result[0]
                unlisted[self._shown(listed)] = f"Cannot be read: {error.strerror}."
                if not isinstance(error, PermissionError):
                    failed = error
        gone = [file.listed.key for name, file in self._files.items() if name not in found]
        self._files, self._unlisted = dict(sorted(files.items())), unlisted
        self._objects.heads.drop(gone)
        if failed is not None and not self._is_there():
            raise failed

    def _is_there(self) -> bool:
        """Whether the folder can be listed, so that what failed is one file's own fault."""
        try:
            self._place.listing()
        except OSError:
            return False
        return True

    def _replaced(self, old: RemoteFile | None, new: RemoteFile) -> RemoteFile:
        """The new file, its data read already where the old one's was in use. Raises `OSError`."""
        if old is None or new.digest in (None, old.digest) or not self.on_disk(old):
            return new
        if new.size > MAX_FILE_BYTES:  # said when the header is read
            return new
        assert new.digest is not None
        try:
            if self.on_disk(new) or self._objects.download(new.listed, new.digest) is not None:
                return new
        except FileNotFoundError:
            return new
        except CacheUnusable as error:  # the next poll tries it again
            _log.warning("%s stays as it was: %s", new.where, error.strerror)
            return old
        return replace(new, problem=DAMAGED)

    def _look_anew(self, file: RemoteFile) -> None:
        """List a file as it is now whose data was not what its header said."""
        with self._polling:
            name = _name_of(file.listed)
            if self._files.get(name) != file:
                return  # somebody else has looked
            (result,) = self._objects.read_heads([self._place.look(file.listed.key)])
            if not isinstance(result, Head):
                raise result[1]
            now = self._file(result)
            if now.digest == file.digest:
                self._files[name] = replace(now, problem=DAMAGED)
                raise InvalidFile(DAMAGED)
            self._files[name] = now

    def _forget(self, file: RemoteFile) -> None:
        """List a file no longer that is gone."""
        with self._polling:
            name = _name_of(file.listed)
            if self._files.get(name) == file:
                del self._files[name]

    def _file(self, head: Head) -> RemoteFile:
        return RemoteFile(head.listed, digest_of(head.data), None, self._shown(head.listed), self)

    def _shown(self, listed: Listed) -> str:
        return f"{self.label}/{PurePosixPath(listed.key).name}"


def _name_of(listed: Listed) -> str:
    return PurePosixPath(listed.key).name.removesuffix(SUFFIX)
