"""The registry: where interventions come from, and how they change while requests run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from reft_runtime.caller import everything
from reft_runtime.errors import InvalidRequest, NotFound, Unavailable
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.registry import listing
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.entry import (
    Change,
    Entry,
    Page,
    SourceState,
    Tier,
    VersionEntry,
)
from reft_runtime.interventions.registry.folders import Folders
from reft_runtime.interventions.registry.holding import Holding
from reft_runtime.interventions.registry.incoming import Incoming
from reft_runtime.interventions.registry.paging import DEFAULT_PAGE, Sort
from reft_runtime.interventions.registry.readers import Readers
from reft_runtime.interventions.registry.remote.place import Place
from reft_runtime.interventions.registry.remote.poller import Poller
from reft_runtime.interventions.registry.sources import Folder
from reft_runtime.interventions.registry.state import check_state, open_state
from reft_runtime.interventions.registry.store import STATE_BYTES
from reft_runtime.interventions.registry.turns import Turns
from reft_runtime.interventions.registry.upload_state import UploadState
from reft_runtime.interventions.registry.uploads import HISTORY, Uploads
from reft_runtime.interventions.registry.urls import is_url, local_folder
from reft_runtime.interventions.registry.verifier import Verifier
from reft_runtime.interventions.registry.version import Origin, Version
from reft_runtime.interventions.registry.watcher import Between, Rest, Watcher
from reft_runtime.machine.garbage import without_collections

MEMORY_BYTES = 1 << 30
"""Default bound on the memory of interventions, in bytes."""

MAX_WAITING = 1024
"""Default bound on the requests that wait for memory for their interventions."""


def check_folders(
    sources: Sequence[str | Path], state_dir: str | Path | None, *, shared_state: bool = False
) -> None:
    """Raise `ConfigError` for folders and URLs that a `Registry` would refuse.

    A registry needs the model, which may take minutes to load; they are checked before. URLs are
    not looked at: one that cannot be reached now may be reached later.
    """
    for source in sources:
        Place(str(source)) if is_url(source) else Folder(local_folder(source))
    check_state(state_dir, shared=shared_state)


class Registry:
    """The interventions of one base model.

    `sources` are folders, or URLs that fsspec knows, which are read only; if two hold a file of one
    name, the first counts. Uploads and pins are kept in `state_dir`: a folder that one process
    owns, or with `shared_state` several together, or a URL, which several may share; without one
    they are in a temporary folder until `close`. Files take at most `state_bytes` there, and one
    of them `max_file_bytes`. Interventions take at most `memory_bytes` of memory, and their tensors
    in use at most `device_bytes` of a device that has them as well; `max_waiting` requests may wait
    for room. A file that cannot be served is passed over, and `problems` says why. `check_site`
    gets an edit's layer, component and width, and raises if the loaded model has no such place.
    Files made for a base whose name matches the shell pattern `allow_base` are taken even if its
    fingerprint differs.
    """

    def __init__(
        self,
        base: BaseShape,
        sources: Sequence[str | Path] = (),
        state_dir: str | Path | None = None,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        check_site: Callable[[int, str, int], None] | None = None,
        allow_base: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
        state_bytes: int = STATE_BYTES,
        device_bytes: int | None = None,
        max_waiting: int = MAX_WAITING,
        shared_state: bool = False,
    ) -> None:
        self.base = base
        self._verifier = Verifier(base, check_site, allow_base, max_file_bytes)
        self._watcher: Watcher | None = None
        self._poller: Poller | None = None
        self._catalog = Catalog(memory_bytes, device_bytes)
        self._turns = Turns(self._catalog, max_waiting)
        self._folders = Folders(self._catalog, sources, self._verifier)
        self._readers = Readers(self._catalog, self._folders, self._turns)
        store = None
        if state_dir is not None:
            store = open_state(state_dir, state_bytes, shared=shared_state)
        self.shares_state = state_dir is not None and (shared_state or is_url(state_dir))
        """Whether other servers may have the same state."""
        self._state = UploadState(self._catalog, self._verifier, store, state_bytes)
        self._uploads = Uploads(self._catalog, self._folders, self._verifier, self._state)
        with without_collections():
            self._state.restore()
            self.scan()

    def watch(self, interval: float) -> None:
        """Scan the sources, and look after the state, in threads of their own until `close`.

        Each URL is polled in a thread, so that one that does not answer holds up nothing. The scan
        runs every `interval` seconds, or less often where it takes long (`Watcher`).
        """
        if self._watcher is not None:
            raise RuntimeError("the registry is watching already")
        self._watcher = Watcher(self._look, interval)
        self._folders.keep_polling()
        if self.shares_state:
            self._poller = Poller(self._state.follow, "state")

    def stop(self) -> None:
        """Let nobody wait for tensors; names can be changed until `close`. Safe to call twice."""
        self._turns.close()
        self._readers.close()

    def close(self) -> None:
        """Stop watching, let nobody wait, and let another process have the state folder."""
        if self._watcher is not None:
            self._watcher.close()
        if self._poller is not None:
            self._poller.close()
        self.stop()
        self._folders.close()
        self._state.close()

    def scan(
        self,
        rest: Callable[[float], bool] = lambda worked: False,
        between: Callable[[float], object] = lambda looked: None,
    ) -> None:
        """Take in what is new, changed or gone in the sources, and what other servers did.

        Reads only what has changed. What is at URLs is looked at over the network, first.
        A file that replaces one in use is verified completely before its name moves to it. Until a
        broken file is mended, the version before it goes on being served if it is in memory. `rest`
        is called after each file that was read, with the seconds that it took, and ends the scan by
        returning True. `between` is called after some hundred files that were looked at, with the
        seconds that they took.
        """
        self._folders.poll()
        self._state.follow()
        self._scan(rest, between)

    def catch_up(self, name: str) -> None:
        """Take in what a name stands for in the state now, whichever server changed it.

        Files of sources are not looked at. Blocks, over the network too. Raises `Unavailable` if
        the state cannot be reached, if what it says cannot be served here, or if no other server
        can have this state.
        """
        if not self.shares_state:
            raise Unavailable(
                "This server's state is its own: no other server sees what is uploaded here."
            )
        self._state.catch_up(name)

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@<digest prefix>` (8 to 64 hex digits) stands for now.

        A name is looked up at this moment in the sources that are folders; those at URLs are as the
        last poll found them. By digest, versions in the history of
        uploads or still held by a request are found too. Raises `NotFound` for an unknown name or
        digest and for a prefix that two digests share, and `Unavailable` if the name's file is
        broken.
        """
        return self._folders.resolve(ref)

    def acquire(self, refs: Sequence[str | Version]) -> Holding:
        """Begin to hold the versions that one request's `refs` stand for, all together.

        It returns at once; `Holding.ready` says when their tensors are in memory. Until then it
        waits for its turn, if the tensors in use leave no room, and for those that have to be read.
        A version that was resolved before is taken as it is; a name whose file is replaced at this
        moment stands for the new one. No request is counted. Raises what `resolve` raises,
        `Overloaded` if too many wait, `InvalidRequest` if the tensors of `refs` alone are more than
        there may be, or if another registry made one of them, and `Unavailable` if pinned names
        leave them no room.
        """
        for ref in refs:
            if isinstance(ref, Version) and not self._verifier.made(ref):
                raise InvalidRequest(
                    f"The version {ref.name}@{ref.digest[:12]} was resolved by another registry,"
                    " whose model may be another one; resolve it by this engine's own.",
                    param="interventions",
                )
        return self._readers.acquire(refs)

    def hold(self, version: Version) -> None:
        """Begin a request on a version, and count it; blocks until its tensors are in memory.

        That is at once for a version that is held already. Until the matching `release` the version
        works and stays addressable by its digest, whatever happens to its name or its file. Raises
        what `acquire` and `Version.edits` raise; then nothing is held.
        """
        if not self._turns.hold(version):
            holding = self.acquire([version])
            try:
                holding.ready.result()
                self._turns.hold(version)
            finally:
                holding.release()

    def release(self, version: Version) -> None:
        """Let go of a version that is held."""
        self._turns.release(version)

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended; does nothing if the name has gone."""
        self._catalog.count(name, prompt_tokens, generation_tokens)

    def meant(self, ref: str, sees: Callable[[str], bool] = everything) -> str:
        """A question to append to the error for an unknown `ref`: which similar name was meant.

        Only names for which `sees` is true are told.
        """
        return self._catalog.meant(ref, sees)

    def entry(self, name: str) -> Entry:
        """One name's line of the listing; raises `NotFound`."""
        return listing.entry(self._catalog, name)

    def entries(self) -> list[Entry]:
        """The listing, sorted by name."""
        return list(chain.from_iterable(self.pages()))

    def pages(self, sees: Callable[[str], bool] = everything) -> Iterator[list[Entry]]:
        """Yield the listing in parts that are short work, so that nobody waits for the lock.

        Only names for which `sees` is true are listed.
        """
        return listing.pages(self._catalog, sees)

    def page(
        self,
        q: str = "",
        sort: Sort = "name",
        after: str | None = None,
        limit: int = DEFAULT_PAGE,
        sees: Callable[[str], bool] = everything,
    ) -> Page:
        """The first `limit` entries in an order, or those behind where another page ended.

        `q` is looked for in names and descriptions, ignoring case; `after` is the `next` of the
        page before. Only names for which `sees` is true are listed and counted. It pauses now and
        then, so it must not run on an event loop. Raises `InvalidRequest`.
        """
        return listing.page(self._catalog, q, sort, after, limit, sees)

    def versions_of(self, name: str) -> list[VersionEntry]:
        """All versions of a name that can be addressed, the current one first.

        Uploads come in the order in which they were served last. Raises `NotFound`.
        """
        return listing.versions_of(self._catalog, name)

    def tiers(self) -> dict[Tier, int]:
        """How many names' current versions have their tensors on disk, and how many in memory."""
        return listing.tiers(self._catalog)

    def held_bytes(self) -> int:
        """Memory that interventions take now, in bytes."""
        return self._catalog.held_bytes()

    def sources(self) -> list[SourceState]:
        """The configured sources, in their order, and what is wrong with them."""
        return [
            SourceState(number, source.kind, source.label, source.problem)
            for number, source in enumerate(self._folders.sources, 1)
        ]

    def state_problem(self) -> str | None:
        """Why nothing can be kept in the state now; None if it can."""
        return self._state.problem

    def unserved(self) -> dict[str, str]:
        """Why files are not served, by path, or by name for uploads."""
        return {**self._folders.problems(), **self._state.problems()}

    def problems(self) -> dict[str, str]:
        """What `unserved` says, and by name what is wrong with interventions that are listed."""
        problems = self.unserved()
        for entry in self.entries():
            if entry.problem is not None and not self._folders.broken(entry.name):
                problems[entry.name] = entry.problem
        return problems

    def incoming(self) -> Incoming:
        """A temporary file for an upload, to be written and given to `put`; close it by `with`.

        Raises `Unavailable` or `StoreFull` if there is no place for one.
        """
        return self._uploads.incoming()

    def put(
        self,
        name: str,
        data: bytes | Incoming,
        sha256: str | None = None,
        expected: Collection[str] | None = None,
        *,
        share: float = 1.0,
    ) -> Change:
        """Upload a file under a name; returns what that changed.

        `data` is the whole file, or where it was written. `sha256`, if given, is what it must hash
        to. The file is checked completely before anything changes. Raises `InvalidRequest` (the
        name), `FileTooLarge`, `InvalidFile`, `WrongBaseModel`, `StoreFull`, `Unavailable` if the
        disk fails, and `Changed` if the name stands for none of the digests `expected` (`*` is any
        digest, an empty collection means no version). The upload shadows a source's file of the
        same name; a pinned name stays pinned. `share` is the part of the memory that the listing of
        uploads and pinned tensors may take together.
        """
        return self._uploads.put(name, data, sha256, expected, share)

    def load(self, name: str, path: str, *, replace: bool = False) -> Change:
        """Load a file inside the sources under a name, as it is now and until the process ends.

        Returns what that changed. `path` is absolute, or the whole URL of a file, or relative
        to a source. Raises `InvalidRequest` for a path that leads outside, and for a name that is
        taken unless `replace`; `NotFound` for a missing file; and what `put` raises.
        """
        return self._uploads.load(name, path, replace=replace)

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """The version that `ref` stands for now, and its verified file; the caller closes the file.

        Raises what `resolve` and `Version.open` raise; `NotFound` names the versions that there
        are.
        """
        version = self._named(ref)
        try:
            return version, version.open()
        except Unavailable:
            newer = self._named(ref)
            if newer is version:
                raise
            return newer, newer.open()  # it was replaced in between

    def _named(self, ref: str) -> Version:
        name, _, prefix = ref.partition("@")
        try:
            return self.resolve(ref)
        except NotFound:
            if (known := self._catalog.digests(name)) and prefix:
                raise NotFound(
                    f"There is no version {prefix} of `{name}`; there are"
                    f" {', '.join(digest[:12] for digest in known[:HISTORY])}.",
                    param="name",
                ) from None
            raise self._catalog.unknown(name) from None

    def remove(
        self, name: str, expected: Collection[str] | None = None, *, uploads_only: bool = False
    ) -> Change:
        """Remove what a name stands for; what it shadowed, if anything, shows again.

        An upload is deleted with its history, also one that could not be restored. A source's file
        stays on disk and comes back when it changes, or at the next start. Requests in flight end
        on the versions they began with. With `uploads_only` nothing is removed that only this
        process would know of. Returns what that changed. Raises `NotFound`, `Changed` as `put`
        does, and `InvalidRequest` for what is no upload but has to be.
        """
        return self._uploads.remove(name, expected, uploads_only=uploads_only)

    def rollback(
        self,
        name: str,
        digest: str | None = None,
        expected: Collection[str] | None = None,
        *,
        share: float = 1.0,
    ) -> Change:
        """Serve a kept uploaded version again, in one step; returns what that changed.

        `digest` may be a prefix of 8 digits or more; without one it is the version that was served
        before the current one, so that a second call undoes the first. Nothing falls out of the
        history by it. `share` is that of `put`. Raises `InvalidRequest` if the name stands for
        something that was not uploaded, `NotFound` if there is no such version, `Changed` as `put`
        does, and what reading the version raises; then nothing has changed.
        """
        return self._uploads.rollback(name, digest, expected, share)

    def pin(self, name: str, *, share: float = 1.0) -> Change:
        """Read the tensors of what a name stands for, and keep them in memory.

        Returns what that changed. The pin is the name's: it moves to what the name stands for
        later, and outlives a restart with a state folder. It ends with `unpin`, and when an upload
        of the name is removed. `share` is that of `put`. Raises `NotFound`, `StoreFull` if pinned
        tensors would fill the memory, `Overloaded` if it is full of tensors in use now, and what
        `Version.edits` raises; then nothing has changed.
        """
        return self._uploads.pin(name, share)

    def unpin(self, name: str) -> Change:
        """Let the tensors of a pinned name be evicted again; returns what that changed.

        A name that is not pinned stays as it is. Raises `NotFound`.
        """
        return self._uploads.unpin(name)

    def warm(self, name: str) -> Entry:
        """Read the tensors of what a name stands for, as a first use would; returns its entry.

        Raises `NotFound`, `Overloaded` if tensors in use fill the memory, and what `Version.edits`
        raises.
        """
        return self._uploads.warm(name)

    def waiting(self) -> int:
        """How many requests wait for memory for their interventions."""
        return self._turns.waiting()

    def verified(self, name: str, data: bytes, origin: Origin = "loaded") -> Version:
        """A version made of a whole file, which no name stands for and a `Use` may hold.

        `name` is what the version is called. Raises `InvalidFile` and `WrongBaseModel`.
        """
        return self._verifier.verified(name, data, origin)

    def _scan(self, rest: Rest, between: Between) -> None:
        self._folders.scan(rest, between)
        self._uploads.read_pinned()

    def _look(self, rest: Rest, between: Between) -> None:
        self._scan(rest, between)
        self._state.tend()
