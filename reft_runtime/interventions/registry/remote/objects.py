"""Intervention files at a URL: their headers, and their data by way of the cache."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.file import too_large
from reft_runtime.interventions.format.header import Header, header_length, parse_header
from reft_runtime.interventions.format.identity import LENGTH_BYTES, is_whole
from reft_runtime.interventions.format.recognise import HEAD_BYTES
from reft_runtime.interventions.registry.remote.cache import FileCache
from reft_runtime.interventions.registry.remote.heads import Head, Heads
from reft_runtime.interventions.registry.remote.place import Listed, Place
from reft_runtime.interventions.registry.remote.reach import Reach
from reft_runtime.machine.cache import cache_folder

AT_ONCE = 16
"""Headers that are read at the same time."""

FIRST_BYTES = 16 << 10
"""Bytes that are asked for first; a longer header is read in two parts."""

BATCH = 256
"""Headers after which what was read is kept."""


class Owner(Protocol):
    """What knows how a file's data is had."""

    def head(self, file: RemoteFile) -> bytes:
        """The file's first bytes, which hold its header. Raises `OSError`."""

    def fetch(self, file: RemoteFile) -> Path:
        """The path of the verified file on this machine. Raises `OSError` and `InvalidFile`."""

    def read(self, file: RemoteFile, end: int) -> bytes:
        """At most `end` bytes of the file as it is now. Raises `OSError`."""

    def intact(self, file: RemoteFile) -> bool:
        """Whether the same data could be had again."""

    def on_disk(self, file: RemoteFile) -> bool:
        """Whether the data is on this machine."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL as it was listed; equal values mean that it was not replaced since."""

    listed: Listed
    digest: str | None
    """The digest that its header gives; None if that is no intervention file's."""
    problem: str | None
    """Why its data cannot be served, if that is known."""
    where: str
    owner: Owner = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.listed.size

    @property
    def modified_ns(self) -> int:
        """When it was written, in nanoseconds of Unix time."""
        return self.listed.modified_ns

    def header(self, max_bytes: int) -> Header:
        """The file's header. Raises `InvalidFile`, `FileTooLarge` and `OSError`."""
        start = self.owner.head(self)
        if self.size > max_bytes:
            raise too_large(self.size, max_bytes, start[:HEAD_BYTES])
        if self.problem is not None:
            raise InvalidFile(self.problem)
        return parse_header(start, self.size)

    def fetch(self) -> Path:
        """The path of the verified file on this machine. Raises `OSError` and `InvalidFile`."""
        return self.owner.fetch(self)

    def read(self, max_bytes: int) -> bytes:
        """The whole file as it is now, not verified. Raises `OSError` and `FileTooLarge`."""
        data = self.owner.read(self, max_bytes + 1)
        if len(data) > max_bytes:
            raise too_large(max(self.size, len(data)), max_bytes, data[:HEAD_BYTES])
        return data

    def intact(self) -> bool:
        """Whether the same data could be had again."""
        return self.owner.intact(self)

    def on_disk(self) -> bool:
        """Whether the data is on this machine."""
        return self.owner.on_disk(self)


class Objects:
    """The objects of one place, with what is kept of them on this machine.

    `what` and `kept` are the words of the log for the place and for what it has.
    """

    def __init__(self, place: Place, what: str, kept: str) -> None:
        self.place = place
        self.reach = Reach(f"{what} {place.shown}", kept, place)
        self.cache = FileCache()
        self.heads = Heads(cache_folder() / "listings" / f"{place.id}.sqlite")

    def read_heads(
        self, objects: Iterable[Listed], *, whole: bool = False
    ) -> Iterator[Head | tuple[Listed, OSError]]:
        """Read headers, or small objects as a `whole`, many at once, and keep them.

        Where that fails, its object is yielded with the error.
        """
        read = self._whole if whole else self._head
        rest = iter(objects)
        with ThreadPoolExecutor(AT_ONCE, "reft-heads") as threads:
            while batch := list(islice(rest, BATCH)):
                results = list(threads.map(read, batch))
                self.heads.put(result for result in results if isinstance(result, Head))
                yield from results

    def head(self, listed: Listed) -> bytes:
        """An object's first bytes; over the network only if they are not kept. Raises `OSError`."""
        kept = self.heads.get(listed.key)
        if kept is not None:
            return kept
        (result,) = self.read_heads([listed])
        if not isinstance(result, Head):
            raise result[1]
        return result.data

    def on_disk(self, file: RemoteFile) -> bool:
        """Whether a file's data is in the cache."""
        return file.digest is not None and self.cache.holds(file.digest)

    def cached(self, file: RemoteFile, place: str) -> Path | None:
        """The path of a file in the cache; None if it has to be read over the network.

        Raises `OSError`, which names the `place`, if that could not be reached the last time:
        nobody waits for what has just failed.
        """
        assert file.digest is not None
        path = self.cache.get(file.digest, file.size)
        if path is None and self.reach.problem is not None:
            raise OSError(errno.EIO, f"{place} is away: {self.reach.problem}")
        return path

    def download(self, listed: Listed, digest: str) -> Path | None:
        """Read a whole object into the cache; None if it is not the file of that digest.

        Raises `OSError`, which is a `CacheUnusable` if the cache cannot be written.
        """
        data = self.place.read(listed.key, 0, listed.size + 1)
        return self.cache.add(digest, data) if is_whole(data, digest) else None

    def close(self) -> None:
        """Close what is open on this machine."""
        self.heads.close()
        self.place.close()

    def whole(self, listed: Listed) -> Head:
        """A small object with all of its bytes, also if it has grown since. Raises `OSError`."""
        return Head(listed, self.place.read(listed.key, 0, FIRST_BYTES) if listed.size else b"")

    def _whole(self, listed: Listed) -> Head | tuple[Listed, OSError]:
        try:
            return self.whole(listed)
        except OSError as error:
            return listed, error

    def _head(self, listed: Listed) -> Head | tuple[Listed, OSError]:
        if listed.size == 0:
            return Head(listed, b"")
        try:
            start = self.place.read(listed.key, 0, min(FIRST_BYTES, listed.size))
            try:
                end = LENGTH_BYTES + header_length(start)
            except InvalidFile:  # said when the header is parsed
                return Head(listed, start[:HEAD_BYTES])
            if end > len(start):
                start += self.place.read(listed.key, len(start), min(end, listed.size))
            return Head(listed, start[:end])
        except OSError as error:
            return listed, error


def digest_of(head: bytes) -> str | None:
    """The digest of a file that begins with these bytes; None if they are no whole header."""
    try:
        end = LENGTH_BYTES + header_length(head)
    except InvalidFile:
        return None
    return hashlib.sha256(head).hexdigest() if len(head) == end else None
