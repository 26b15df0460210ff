"""The state that servers share: the layout of the state folder at a URL or in a mounted folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from reft_runtime.errors import InvalidFile, StoreFull, Unavailable
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.incoming import Incoming
from reft_runtime.interventions.registry.pointers import Pointers
from reft_runtime.interventions.registry.remote.heads import Head
from reft_runtime.interventions.registry.remote.objects import Objects, RemoteFile
from reft_runtime.interventions.registry.remote.place import FULL, Listed, Place
from reft_runtime.interventions.registry.sources import NAME, File
from reft_runtime.interventions.registry.store import Store

SWEEP_SECONDS = 86400.0
"""A blob that no pointer names is deleted once it is this old; it is looked for as often."""


class RemoteStore:
    """Blobs of at most `max_bytes` that pointers name, and pointers, at a place.

    Several servers may share it. Each change of a name is one object that is written, and is made
    to what the name is at that moment; of two changes at the same moment the later counts, where
    the place has no lock (`Place.changing`). A blob is written before the pointer that names it,
    and deleted once no pointer names it and it was not written for a day. While the place cannot be
    reached, `check` and whatever writes raise `Unavailable`.
    """

    def __init__(self, place: Place, max_bytes: int) -> None:
        self._place = place
        self._objects = Objects(place, "the state at", "held")
        self._max_bytes = max_bytes
        self._local = Store.temporary(max_bytes)  # what is on its way, and what no pointer names
        self._reach = self._objects.reach
        self._swept = 0.0
        self._using = threading.RLock()  # guards what follows
        self.pointers = Pointers()
        self._tokens: dict[str, str] = {}
        self._blobs: dict[str, Listed] = {}
        for head in self._objects.heads.all():  # what an earlier process saw
            path = PurePosixPath(head.listed.key)
            if path.parent.name == "blobs":
                self._blobs[path.stem] = head.listed
            else:
                self._note(path.stem, head)
        self._begin()

    def close(self) -> None:
        """Close what is open on this machine."""
        self._local.close()
        self._objects.close()

    def check(self) -> bool:
        """Whether the place still holds what it held. Raises `Unavailable` if it is away."""
        if self._reach.problem is not None:
            raise self._away(self._reach.problem)
        return True

    def unwritable(self) -> None:
        """Nothing is known: only a write would tell."""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change names in the block, while no other server does if the place has a lock."""
        with ExitStack() as lock:
            try:
                lock.enter_context(self._place.changing())
            except OSError as error:
                self._reach.lost(error)
                raise self._away(str(error.strerror)) from error
            yield

    def changed(self) -> Iterable[str]:
        """The names whose pointers are not as they were looked at last.

        Once a day, if there are none, the blobs are deleted that no pointer has named for as long.
        """
        try:
            listing = self._pointers_there()
        except OSError as error:
            self._reach.lost(error)
            return ()
        self._reach.back()
        with self._using:
            names = [n for n, at in listing.items() if self._tokens.get(n) != at.token]
            names += self._tokens.keys() - listing.keys()
        if not names and time.time() > self._swept + SWEEP_SECONDS:
            self._sweep()
        return names

    def look_again(self, name: str) -> bool:
        """Look at a name's pointer; return whether another server has changed it."""
        key = self._pointer(name)
        before = self._said(name)
        try:
            head = self._found(key)
        except OSError as error:
            self._reach.lost(error)
            raise self._away(str(error.strerror)) from error
        if head is None:
            with self._using:
                self._note(name, None)
                self._objects.heads.drop([key])
            return self._said(name) != before
        with self._using:
            self._note(name, head)
            self._objects.heads.put([head])
        return self._said(name) != before

    def file(self, digest: str) -> File:
        """The file of this digest. Raises `OSError` if it is gone, or cannot be read now."""
        with self._using:
            listed = self._blobs.get(digest)
        if listed is None:
            listed = self._place.look(self._blob(digest))
            with self._using:
                self._blobs[digest] = listed
        return RemoteFile(listed, digest, None, f"{self._place.shown}/blobs/{digest}", self)

    def holds(self, digest: str) -> bool:
        """Whether the file of this digest is kept."""
        with self._using:
            return digest in self._blobs

    def incoming(self, max_bytes: int) -> Incoming:
        """A temporary file on this machine, for a file that is being uploaded."""
        return self._local.incoming(max_bytes)

    def add_blob(self, digest: str, file: Incoming) -> None:
        """Write a file, also one that is there already: that makes it a new one for collectors.

        Raises `StoreFull` if it does not fit, and `Unavailable` if it cannot be written.
        """
        with self._using:
            named = [self._blobs.get(other) for other in self.pointers.named if other != digest]
        kept = sum(listed.size for listed in named if listed is not None)
        if kept + file.size > self._max_bytes:
            raise StoreFull(
                f"Uploaded files take {kept} bytes of the state, and this one {file.size}; there"
                f" may be {self._max_bytes}. Delete some of them, or start the server with more"
                " --state-bytes."
            )
        data = file.read()
        with suppress(OSError):  # it is read from the URL then
            self._objects.cache.add(digest, data)
        self._write(self._blob(digest), data)
        listed = Listed(self._blob(digest), "", file.size, time.time_ns())
        self._objects.heads.put([Head(listed, data[: header_of(data).data_start])])
        with self._using:
            self._blobs[digest] = listed

    def keep_for_now(self, digest: str, file: Incoming) -> File:
        """Keep a file on this machine only, until this process ends or `collect` drops it."""
        return self._local.keep_for_now(digest, file)

    def point(self, name: str, digests: Sequence[str], *, pinned: bool) -> None:
        """Let a name stand for the first of `digests`; the others are its history.

        Raises `Unavailable` if it cannot be written.
        """
        if not digests and not pinned:
            return self.remove(name)
        data = self.pointers.file(name, digests, pinned=pinned)
        self._write(self._pointer(name), data)
        if digests:
            self._write_again_if_swept(digests[0])
        # Without a token, so that the next poll looks at it again, and finds the same.
        head = Head(Listed(self._pointer(name), "", len(data), time.time_ns()), data)
        self._objects.heads.put([head])
        with self._using:
            self._note(name, head)
        return None

    def remove(self, name: str) -> None:
        """Forget a name, also one whose pointer is damaged."""
        try:
            self._place.delete(self._pointer(name))
        except OSError as error:
            self._reach.lost(error)
            raise self._away(str(error.strerror)) from error
        with self._using:
            self._note(name, None)
        self._objects.heads.drop([self._pointer(name)])

    def collect(self, keep: Iterable[str]) -> None:
        """Delete what `keep_for_now` kept and is not in `keep`; blobs are swept by `changed`."""
        self._local.collect(keep)

    # What RemoteFile asks its owner for.

    def head(self, file: RemoteFile) -> bytes:
        """The file's first bytes, which hold its header."""
        return self._objects.head(file.listed)

    def fetch(self, file: RemoteFile) -> Path:
        """The path of the verified file on this machine; a first use reads it over the network."""
        assert file.digest is not None
        cached = self._objects.cached(file, "the state")
        if cached is not None:
            return cached
        path = self._objects.download(file.listed, file.digest)
        if path is None:
            raise InvalidFile("The stored file is not the one that was uploaded.")
        return path

    def read(self, file: RemoteFile, end: int) -> bytes:
        """At most `end` bytes of the file."""
        return self._place.read(file.listed.key, 0, min(end, file.size))

    def intact(self, file: RemoteFile) -> bool:
        """Whether the same data is in the cache, or at the URL as far as is known."""
        named = file.digest in self.pointers.named
        return self.on_disk(file) or (named and self._reach.problem is None)

    def on_disk(self, file: RemoteFile) -> bool:
        """Whether the data is in the cache."""
        return self._objects.on_disk(file)

    def _begin(self) -> None:
        """Read what is there; if it cannot be reached, what an earlier process saw is served."""
        try:
            pointers = self._pointers_there()
            fresh = [at for name, at in pointers.items() if self._tokens.get(name) != at.token]
            for result in self._objects.read_heads(fresh, whole=True):
                if isinstance(result, Head):
                    self._note(PurePosixPath(result.listed.key).stem, result)
                elif not isinstance(result[1], FileNotFoundError):
                    raise result[1]
            for name in self._tokens.keys() - pointers.keys():
                self._note(name, None)
                self._objects.heads.drop([self._pointer(name)])
            if unknown := self.pointers.named.keys() - self._blobs.keys():
                there = self._blobs_there()
                found = {digest: there[digest] for digest in unknown if digest in there}
                list(self._objects.read_heads(found.values()))
                self._blobs.update(found)
        except OSError as error:
            self._reach.lost(error)

    def _sweep(self) -> None:
        if not self.pointers.all_understood:
            return  # such a pointer may name any of them: a person decides
        self._swept = time.time()
        try:
            with self._place.changing():
                self._sweep_files()
        except OSError as error:
            self._reach.lost(error)

    def _sweep_files(self) -> None:
        for digest, listed in self._blobs_there().items():
            if digest in self.pointers.named or not _old(listed):
                continue
            with suppress(FileNotFoundError):  # another server has deleted it
                if _old(self._place.look(listed.key)):  # it may have been written again
                    self._place.delete(listed.key)
                    self._objects.heads.drop([listed.key])
            with self._using:
                self._blobs.pop(digest, None)
        for folder in ("blobs", "pointers"):
            for name, listed in self._listing(folder).items():
                if name.startswith(".") and _old(listed):  # a write that a kill has ended
                    self._place.delete(listed.key)

    def _write_again_if_swept(self, digest: str) -> None:
        """Write a blob again that another server deleted just before a pointer named it."""
        try:
            self._place.look(self._blob(digest))
        except FileNotFoundError:
            listed = self._blobs[digest]
            cached = self._objects.cache.get(digest, listed.size)
            if cached is None:
                raise self._away("a file was deleted at this moment; upload it again") from None
            self._write(self._blob(digest), cached.read_bytes())
        except OSError as error:
            self._reach.lost(error)

    def _write(self, key: str, data: bytes) -> None:
        try:
            self._place.write(key, data)
        except OSError as error:
            if error.errno in FULL:
                raise StoreFull(
                    "The disk of the state is full; make room there, or delete interventions."
                ) from error
            if not isinstance(error, PermissionError):
                self._reach.lost(error)
            raise self._away(str(error.strerror)) from error

    def _pointers_there(self) -> dict[str, Listed]:
        listing = self._listing("pointers")
        names = {PurePosixPath(file): at for file, at in listing.items()}
        return {
            path.stem: at
            for path, at in names.items()
            if path.suffix == ".json" and NAME.fullmatch(path.stem)
        }

    def _blobs_there(self) -> dict[str, Listed]:
        listing = self._listing("blobs")
        return {
            file.removesuffix(SUFFIX): at for file, at in listing.items() if file.endswith(SUFFIX)
        }

    def _found(self, key: str) -> Head | None:
        """A pointer as it is now; None if there is none. Raises `OSError`."""
        try:
            return self._objects.whole(self._place.look(key))
        except FileNotFoundError:
            self._place.check()
            return None

    def _listing(self, folder: str) -> dict[str, Listed]:
        """What is in one of the two folders, which does not exist before something is in it."""
        try:
            return self._place.listing(folder)
        except FileNotFoundError:
            self._place.check()
            return {}

    def _note(self, name: str, head: Head | None) -> None:
        """Take in what a name's pointer says; None if there is none."""
        if head is None:
            self._tokens.pop(name, None)
            self.pointers.note(name, (), pinned=False)
        else:
            self._tokens[name] = head.listed.token
            self.pointers.note_file(name, head.data)

    def _said(self, name: str) -> tuple[object, ...]:
        known = self.pointers
        with self._using:
            return known.histories.get(name, ()), name in known.pinned, name in known.damaged

    def _blob(self, digest: str) -> str:
        return self._place.key(f"blobs/{digest}{SUFFIX}")

    def _pointer(self, name: str) -> str:
        return self._place.key(f"pointers/{name}.json")

    def _away(self, problem: str) -> Unavailable:
        return Unavailable(
            f"The state cannot be used now: {problem}. What it held serves on; try again later."
        )


def _old(listed: Listed) -> bool:
    return listed.modified_ns / 1e9 < time.time() - SWEEP_SECONDS
