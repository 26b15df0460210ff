"""The registry: where interventions come from, and how they change while requests run."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from reft_runtime.errors import InvalidFile, InvalidRequest, NotFound, Unavailable
from reft_runtime.interventions.format.file import edits_of, read, read_header, too_large
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from reft_runtime.interventions.format.manifest import BaseShape, Manifest, check_base
from reft_runtime.interventions.format.recognise import HEAD_BYTES
from reft_runtime.interventions.registry.entry import Entry
from reft_runtime.interventions.registry.folders import WORK_SHARE, check_sources
from reft_runtime.interventions.registry.sources import NAME, NAME_RULE, Found, locate
from reft_runtime.interventions.registry.store import STATE_BYTES, Store
from reft_runtime.interventions.registry.uploads import HISTORY, Uploads
from reft_runtime.interventions.registry.version import Origin, Version
from reft_runtime.machine.cores import releasing_workers

MEMORY_BYTES = 1 << 30
"""Memory that interventions take, unless told otherwise."""

LOOK_SHARE = 0.05
"""Of the time, at most, is spent on looking for changes in the sources."""

_log = logging.getLogger(__name__)


def check_folders(sources: Sequence[str | Path], state_dir: str | Path | None) -> None:
    """Raise `ConfigError` for folders that a `Registry` would refuse.

    It needs the model, which may take minutes to load; these are looked at before.
    """
    check_sources([Path(source) for source in sources])
    if state_dir is not None:
        Store(Path(state_dir)).close()


class Registry(Uploads):
    """The interventions of one base model.

    `sources` are folders that are read only; where two hold a file of one name, the first counts.
    Uploads are kept in `state_dir`, which one process owns, in at most `state_bytes`, or in memory
    without one. Interventions take at most `memory_bytes`, all files and tensors of uploads without
    a state folder included. A file that cannot be served is passed over, and `problems` says why.
    `check_site` raises where the loaded model has no such place: it gets an edit's layer, component
    and width. Files made for a base whose name matches the shell pattern `allow_base` are taken
    though its fingerprint differs.
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
        super().__init__(memory_bytes, sources, base.model, state_dir, state_bytes)
        self.scan()

    def watch(self, interval: float) -> None:
        """Scan the sources, and look after the state folder, in a thread of its own until `close`.

        Every `interval` seconds, or less often where looking would take more than `LOOK_SHARE` of
        the time; reading what has changed takes at most `WORK_SHARE`.
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
        with self._changing:
            if self._store is not None:
                self._store.close()
                self._store = None

    def unserved(self) -> dict[str, str]:
        """Why files are not served, by path, or by name for uploads."""
        with self._scanning:
            broken = {
                str(self._found[name].path): error.message
                for name, error in self._broken.items()
                if name in self._found
            }
        state = {} if self._state_problem is None else {"(state folder)": self._state_problem}
        return {**self._unlisted, **broken, **state, **self._upload_problems}

    def problems(self) -> dict[str, str]:
        """As `unserved`, and what is wrong with those that are listed, by name."""
        problems = self.unserved()
        for entry in self.entries():
            if entry.problem is not None and entry.name not in self._broken:
                problems[entry.name] = entry.problem
        return problems

    def put(
        self,
        name: str,
        data: bytes,
        sha256: str | None = None,
        expected: Collection[str] | None = None,
    ) -> tuple[Entry, bool]:
        """Upload a file under a name; returns the entry that it made, and whether the name is new.

        `sha256`, where given, is what the whole file must hash to. The file is checked completely
        before anything changes: `InvalidRequest` (the name), `FileTooLarge`, `InvalidFile`,
        `WrongBaseModel`, `Changed` (it stands for none of the digests `expected`; `*` is any, ()
        nothing). The upload shadows a source's file of the same name.
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
        with self._changing:
            self._tend()
            shown = self._expect(name, expected)
            before = self._history(name)
            kept = [old for old in before if old.digest != version.digest][: HISTORY - 1]
            self._admit(version, kept=self._store is not None, leaving=set(before) - set(kept))
            if self._store is not None:
                self._write(self._store, version, data, kept)
            self._place_upload([version, *kept])
            self._upload_problems.pop(name, None)
            self._collect()
            entry = self.entry(name)
        _log.info("%s %r", "replaced" if shown else "added", version)
        self._tell_hidden(shown, version)
        return entry, shown is None

    def load(self, name: str, path: str, replace: bool = False) -> Entry:
        """Load a file inside the sources under a name, as it is now and until the process ends.

        Returns the entry that it made.
        `path` is absolute, or relative to a source. Raises `InvalidRequest` for a path that leads
        outside, and for a name that is taken unless `replace`; `NotFound` for a missing file; and
        what `put` raises.
        """
        self._check_name(name)
        file = locate(path, self._sources)
        try:
            data = read(file, self._max_file_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"The file cannot be read: {error.strerror}.", param="path") from error
        except OSError as error:
            raise Unavailable(
                f"The file cannot be read: {error.strerror}.", param="path"
            ) from error
        version = self.verified(name, data, "loaded")
        with self._changing:
            shown = self._current(name)
            if not replace and shown is not None:
                raise InvalidRequest(
                    f"The intervention `{name}` is loaded already; ask to replace it, or unload it"
                    " first.",
                    param="name",
                )
            before = self._layer(name, "loaded")
            self._admit(version, kept=False, leaving=set() if before is None else {before})
            self._place(version)
            entry = self.entry(name)
        _log.info("loaded %r", version)
        self._tell_hidden(shown, version)
        return entry

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """The version that `ref` stands for now, as `resolve` says, and its file as `Version.open`.

        Raises what they raise; `NotFound` names the versions that there are.
        """
        name, _, prefix = ref.partition("@")
        try:
            version = self.resolve(ref)
        except NotFound:
            if (known := self._digests(name)) and prefix:
                raise NotFound(
                    f"There is no version {prefix} of `{name}`; there are"
                    f" {', '.join(digest[:12] for digest in known[:HISTORY])}.",
                    param="name",
                ) from None
            raise self._unknown(name) from None
        return version, version.open()

    def remove(self, name: str, expected: Collection[str] | None = None) -> None:
        """Take away what a name stands for; what it shadowed, if anything, shows again.

        An upload is deleted with its history, also one that could not be restored. A source's file
        stays on disk and comes back when it changes, or at the next start. Requests in flight end
        on what they began with. Raises `NotFound`, and `Changed` as `put`.
        """
        with self._changing:
            self._tend()
            version = self._expect(name, expected)
            origin = None if version is None else version.origin
            if origin in (None, "folder") and name in self._upload_problems:
                origin = "uploaded"
            if origin is None:
                raise self._unknown(name)
            if origin == "uploaded":
                if self._store is not None:
                    self._store.remove(name)
                self._upload_problems.pop(name, None)
            self._displace(name, origin)
            if self._layer(name, "loaded") is None and self._layer(name, "uploaded") is None:
                self._added.discard(name)
            self._collect()
        _log.info("removed %s (%s)", name, origin)

    @releasing_workers
    def verified(self, name: str, data: bytes, origin: Origin = "loaded") -> Version:
        """A whole file as a version that no name stands for, which a `Use` may hold.

        `name` is how it is called. Raises `InvalidFile` and `WrongBaseModel`.
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
                # Whoever computes in Python holds up the engine's thread.
                nonlocal away
                away += worked / WORK_SHARE
                return self._closed.wait(worked / WORK_SHARE - worked)

            try:
                self.scan(rest)
                self._watch_state()
            except Exception:  # the watch must outlive whatever one scan meets
                _log.exception("scanning the sources failed")
            wait = max(interval, (time.monotonic() - began - away) / LOOK_SHARE)

    def _watch_state(self) -> None:
        known = self._state_problem
        if self._changing.acquire(blocking=False):  # whoever changes something looks as well
            try:
                self._tend()
            except Unavailable as error:
                if error.message != known:
                    _log.error("%s", error.message)
            finally:
                self._changing.release()
