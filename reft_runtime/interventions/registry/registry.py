"""The registry: where interventions come from, and how they change while requests run."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from reft_runtime.caller import everything
from reft_runtime.errors import InvalidFile, InvalidRequest, NotFound, Unavailable
from reft_runtime.interventions.format.file import edits_of, read, read_header, too_large
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from reft_runtime.interventions.format.manifest import BaseShape, Manifest, check_base
from reft_runtime.interventions.format.recognise import HEAD_BYTES
from reft_runtime.interventions.registry import listing
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.entry import Change, Entry, Page, Tier, VersionEntry
from reft_runtime.interventions.registry.folders import WORK_SHARE, Folders, check_sources
from reft_runtime.interventions.registry.paging import DEFAULT_PAGE, Sort
from reft_runtime.interventions.registry.sources import NAME, NAME_RULE, Found, locate
from reft_runtime.interventions.registry.store import STATE_BYTES, Store
from reft_runtime.interventions.registry.uploads import HISTORY, Uploads
from reft_runtime.interventions.registry.version import Origin, Version
from reft_runtime.machine.cores import releasing_workers

MEMORY_BYTES = 1 << 30
"""Default bound on the memory of interventions, in bytes."""

LOOK_SHARE = 0.05
"""At most this share of time is spent on looking for changes in the sources."""

BREATH = 4
"""After files are looked at, a scan pauses this many times as long as that took."""

_log = logging.getLogger(__name__)


def check_folders(sources: Sequence[str | Path], state_dir: str | Path | None) -> None:
    """Raise `ConfigError` for folders that a `Registry` would refuse.

    A registry needs the model, which may take minutes to load; the folders are checked before.
    """
    check_sources([Path(source) for source in sources])
    if state_dir is not None:
        Store(Path(state_dir)).close()


class Registry:
    """The interventions of one base model.

    `sources` are folders that are read only; if two hold a file of one name, the first counts.
    Uploads are kept in `state_dir`, which one process owns, in at most `state_bytes`, or in memory
    without one. Interventions take at most `memory_bytes`; without a state folder this includes all
    files and tensors of uploads. A file that cannot be served is passed over, and `problems` says
    why. `check_site` gets an edit's layer, component and width, and raises if the loaded model has
    no such place. Files made for a base whose name matches the shell pattern `allow_base` are taken
    even if its fingerprint differs.
    """

    def __init__(
        self,
        base: BaseShape,
        sources: Sequence[str | Path] = (),
        state_dir: str | Path | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        check_site: Callable[[int, str, int], None] | None = None,
        allow_base: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
        state_bytes: int = STATE_BYTES,
    ) -> None:
        self.base = base
        self._check_site = check_site
        self._allow_base = allow_base
        self._max_file_bytes = max_file_bytes
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._catalog = Catalog(memory_bytes)
        self._folders = Folders(self._catalog, sources, base.model, self._listed)
        store = None if state_dir is None else Store(Path(state_dir), state_bytes)
        self._uploads = Uploads(self._catalog, self._folders, store)
        self._uploads.restore(base.model, self._listed)
        self.scan()

    def watch(self, interval: float) -> None:
        """Scan the sources, and look after the state folder, in a thread of its own until `close`.

        It runs every `interval` seconds, or less often if looking would take more than `LOOK_SHARE`
        of the time. Reading what has changed takes at most `WORK_SHARE` of it.
        """
        if self._watcher is not None:
            raise RuntimeError("the registry is watching already")
        self._watcher = threading.Thread(
            target=self._watch, args=(interval,), name="reft-registry", daemon=True
        )
        self._watcher.start()

    def close(self) -> None:
        """Stop watching, and let another process have the state folder."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        self._uploads.close()

    def scan(
        self,
        rest: Callable[[float], bool] = lambda worked: False,
        between: Callable[[float], object] = lambda looked: None,
    ) -> None:
        """Take in what is new, changed or gone in the sources; reads only what has changed.

        A file that replaces one in use is verified completely before its name moves to it. Until a
        broken file is mended, the version before it goes on being served if it is in memory. `rest`
        is called after each file that was read, with the seconds that it took, and ends the scan by
        returning True. `between` is called after some hundred files that were looked at, with the
        seconds that they took.
        """
        self._folders.scan(rest, between)

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@<digest prefix>` (8 to 64 hex digits) stands for now.

        A name is looked up in the sources at this moment. By digest, versions in the history of
        uploads or still held by a request are found too. Raises `NotFound` for an unknown name or
        digest and for a prefix that two digests share, and `Unavailable` if the name's file is
        broken.
        """
        return self._folders.resolve(ref)

    def hold(self, version: Version) -> None:
        """Begin a request on a version, with its tensors loaded (a first use reads the file).

        Until the matching `release` the version works and stays addressable by its digest, whatever
        happens to its name or its file. Raises what `Version.edits` raises, and `Overloaded` if the
        interventions of other requests fill the memory; then nothing is held.
        """
        self._folders.hold(version)

    def acquire(self, ref: str | Version) -> Version:
        """Return the version that `ref` stands for, held and with its tensors read.

        It is held until the matching `release`, and no request is counted. A version that was
        resolved before is taken as it is. Raises what `resolve` and `hold` raise.
        """
        return self._folders.acquire(ref)

    def release(self, version: Version) -> None:
        """Let go of a version that is held."""
        self._catalog.release(version)

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

    def unserved(self) -> dict[str, str]:
        """Why files are not served, by path, or by name for uploads."""
        return {**self._folders.problems(), **self._uploads.problems()}

    def problems(self) -> dict[str, str]:
        """What `unserved` says, and by name what is wrong with interventions that are listed."""
        problems = self.unserved()
        for entry in self.entries():
            if entry.problem is not None and not self._folders.broken(entry.name):
                problems[entry.name] = entry.problem
        return problems

    def put(
        self,
        name: str,
        data: bytes,
        sha256: str | None = None,
        expected: Collection[str] | None = None,
    ) -> Change:
        """Upload a file under a name; returns what that changed.

        `sha256`, if given, is what the whole file must hash to. The file is checked completely
        before anything changes. Raises `InvalidRequest` (the name), `FileTooLarge`, `InvalidFile`,
        `WrongBaseModel`, and `Changed` if the name stands for none of the digests `expected` (`*`
        is any digest, an empty collection means no version). The upload shadows a source's file of
        the same name.
        """
        self._check_name(name)
        if len(data) > self._max_file_bytes:
            raise too_large(len(data), self._max_file_bytes, data[:HEAD_BYTES])
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
            raise InvalidFile(
                f"The file's SHA-256 is {hashlib.sha256(data).hexdigest()}, not the one that was"
                " sent with it; upload it again."
            )
        version = self.verified(name, data, "uploaded")
        return self._uploads.put(version, data, expected)

    def load(self, name: str, path: str, replace: bool = False) -> Change:
        """Load a file inside the sources under a name, as it is now and until the process ends.

        Returns what that changed. `path` is absolute, or relative to a source. Raises
        `InvalidRequest` for a path that leads outside, and for a name that is taken unless
        `replace`; `NotFound` for a missing file; and what `put` raises.
        """
        self._check_name(name)
        file = locate(path, self._folders.sources)
        try:
            data = read(file, self._max_file_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"The file cannot be read: {error.strerror}.", param="path") from error
        except OSError as error:
            raise Unavailable(
                f"The file cannot be read: {error.strerror}.", param="path"
            ) from error
        return self._uploads.load(self.verified(name, data, "loaded"), replace=replace)

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """The version that `ref` stands for now, and its verified file; the caller closes the file.

        Raises what `resolve` and `Version.open` raise; `NotFound` names the versions that there
        are.
        """
        name, _, prefix = ref.partition("@")
        try:
            version = self.resolve(ref)
        except NotFound:
            if (known := self._catalog.digests(name)) and prefix:
                raise NotFound(
                    f"There is no version {prefix} of `{name}`; there are"
                    f" {', '.join(digest[:12] for digest in known[:HISTORY])}.",
                    param="name",
                ) from None
            raise self._catalog.unknown(name) from None
        return version, version.open()

    def remove(self, name: str, expected: Collection[str] | None = None) -> Change:
        """Remove what a name stands for; what it shadowed, if anything, shows again.

        An upload is deleted with its history, also one that could not be restored. A source's file
        stays on disk and comes back when it changes, or at the next start. Requests in flight end
        on the versions they began with. Returns what that changed. Raises `NotFound`, and `Changed`
        as `put` does.
        """
        return self._uploads.remove(name, expected)

    def rollback(
        self, name: str, digest: str | None = None, expected: Collection[str] | None = None
    ) -> Change:
        """Serve a kept uploaded version again, in one step; returns what that changed.

        `digest` may be a prefix of 8 digits or more; without one it is the version that was served
        before the current one, so that a second call undoes the first. Nothing falls out of the
        history by it. Raises `InvalidRequest` if the name stands for something that was not
        uploaded, `NotFound` if there is no such version, `Changed` as `put` does, and what reading
        the version raises; then nothing has changed.
        """
        return self._uploads.rollback(name, digest, expected)

    @releasing_workers
    def verified(self, name: str, data: bytes, origin: Origin = "loaded") -> Version:
        """A version made of a whole file, which no name stands for and a `Use` may hold.

        `name` is what the version is called. Raises `InvalidFile` and `WrongBaseModel`.
        """
        header = header_of(data)
        self._check(header.manifest)
        return Version(name, header, origin, None, edits_of(header, data), data)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"The name {name[:80]!r} is not allowed: {NAME_RULE}.", param="name"
            )
        if name == self.base.model:
            raise InvalidRequest(
                f"The name `{name}` is the base model's own id; choose another.", param="name"
            )

    def _check(self, manifest: Manifest) -> None:
        check_base(manifest, self.base, self._allow_base)
        if self._check_site is not None:
            for index, edit in enumerate(manifest.edits):
                self._check_site(edit.layer, edit.component, manifest.width_of(index))

    def _listed(self, name: str, file: Found, origin: Origin = "folder") -> Version:
        header = read_header(file.path, self._max_file_bytes)
        self._check(header.manifest)
        return Version(name, header, origin, file)

    def _watch(self, interval: float) -> None:
        wait = interval
        while not self._closed.wait(wait):
            began, away = time.monotonic(), 0.0

            def rest(worked: float) -> bool:
                # A scan that computes in Python holds up the engine's thread, so it pauses.
                nonlocal away
                away += worked / WORK_SHARE
                return self._closed.wait(worked / WORK_SHARE - worked)

            def between(looked: float) -> None:
                nonlocal away
                away += BREATH * looked
                self._closed.wait(BREATH * looked)

            try:
                self.scan(rest, between)
                self._uploads.tend()
            except Exception:  # the watch must outlive whatever one scan meets
                _log.exception("scanning the sources failed")
            wait = max(interval, (time.monotonic() - began - away) / LOOK_SHARE)
