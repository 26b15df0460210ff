"""The registry: where interventions come from, and how they change while requests run."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from reft_runtime.cores import releasing_workers
from reft_runtime.errors import ConfigError, InvalidFile, InvalidRequest, NotFound, ReftError
from reft_runtime.interventions.catalog import Catalog, unknown
from reft_runtime.interventions.file import (
    MAX_FILE_BYTES,
    header_of,
    parse,
    read,
    read_header,
    too_large,
)
from reft_runtime.interventions.manifest import BaseShape, Manifest, check_base
from reft_runtime.interventions.sources import NAME, NAME_RULE, Found, list_folder, locate
from reft_runtime.interventions.store import Store
from reft_runtime.interventions.version import Origin, Version

HISTORY = 8
"""How many uploaded versions of a name are kept, the current one included."""

SCAN_SHARE = 0.02
"""Of the time, at most, is spent on looking for changes in the sources."""

_log = logging.getLogger(__name__)


class Registry(Catalog):
    """The interventions of one base model.

    `sources` are folders that are read only; where two hold a file of one name, the first counts.
    Uploads are kept in `state_dir`, which one process owns, or in memory without one. A file that
    cannot be served is passed over, and `problems` says why. `check_site` raises where the loaded
    model has no such place: it gets an edit's layer, component and width. Files made for a base
    whose name matches the shell pattern `allow_base` are taken though its fingerprint differs.
    """

    def __init__(
        self,
        base: BaseShape,
        sources: Sequence[str | Path] = (),
        state_dir: str | Path | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        check_site: Callable[[int, str, int], None] | None = None,
        allow_base: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self._check_site = check_site
        self._allow_base = allow_base
        self._sources = [Path(source) for source in sources]
        self._max_file_bytes = max_file_bytes
        for folder in self._sources:
            if not os.path.isdir(folder):  # pathlib's raises where a name is too long
                raise ConfigError(f"The interventions folder {folder} does not exist.")
        self._changing = threading.Lock()  # one change at a time; taken before _lock, never after
        self._listings: dict[Path, tuple[dict[str, Found], dict[str, str]]] = {}
        self._found: dict[str, Found] = {}
        self._broken: dict[str, str] = {}
        self._scan_problems: dict[str, str] = {}
        self._upload_problems: dict[str, str] = {}
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._store = None if state_dir is None else Store(Path(state_dir))
        if self._store is not None:
            self._restore(self._store)
        self.scan()

    def watch(self, interval: float) -> None:
        """Scan the sources in a thread of its own, until `close`.

        Every `interval` seconds, or less often where scans would take more than `SCAN_SHARE` of
        the time.
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

    def problems(self) -> dict[str, str]:
        """Why files are not served, by path, or by name for uploads."""
        with self._changing:
            return {**self._scan_problems, **self._upload_problems}

    def scan(self) -> None:
        """Take in what is new, changed or gone in the sources; reads only what has changed.

        A file that replaces one in use is verified completely before its name moves to it; until
        a broken one is mended, the version before it goes on being served if it is in memory.
        """
        with self._changing:
            present: dict[str, Found] = {}
            problems: dict[str, str] = {}
            for folder in self._sources:
                try:
                    self._listings[folder] = list_folder(folder)
                except OSError as error:  # serve on with what was there
                    problems[str(folder)] = f"The folder cannot be read: {error.strerror}."
                found, unlisted = self._listings.get(folder, ({}, {}))
                problems.update(unlisted)
                for name, file in found.items():
                    if present.setdefault(name, file) is not file:
                        problems[str(file.path)] = f"Hidden by {present[name].path}."
            broken: dict[str, str] = {}
            for name, file in present.items():
                changed = self._found.get(name) != file
                reason = self._adopt(name, file) if changed else self._broken.get(name)
                if reason is not None:
                    broken[name] = reason
                    problems[str(file.path)] = reason
            for name in self._found.keys() - present.keys():
                self._displace(name, "folder")
            self._found, self._broken, self._scan_problems = present, broken, problems

    def put(self, name: str, data: bytes, sha256: str | None = None) -> tuple[Version, bool]:
        """Upload a file under a name; returns its version, and whether the name is new.

        `sha256`, where given, is what the whole file must hash to. The file is checked completely
        before anything changes: `InvalidRequest` (the name), `FileTooLarge`, `InvalidFile`,
        `WrongBaseModel`. The upload shadows a source's file of the same name.
        """
        _check_name(name)
        if len(data) > self._max_file_bytes:
            raise too_large(len(data), self._max_file_bytes)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
            raise InvalidFile(
                f"The file's SHA-256 is {hashlib.sha256(data).hexdigest()}, not the one that was"
                " sent with it; upload it again."
            )
        version = self._verified(name, data, "uploaded")
        with self._changing:
            created = self._current(name) is None
            history = [old for old in self._history(name) if old.digest != version.digest]
            history = [version, *history[: HISTORY - 1]]
            if self._store is not None:
                self._store.add_blob(version.digest, data)
                self._store.point(name, [kept.digest for kept in history])
            self._place_upload(history)
            self._upload_problems.pop(name, None)
            self._collect()
        _log.info("%s %r", "added" if created else "replaced", version)
        return version, created

    def load(self, name: str, path: str, replace: bool = False) -> Version:
        """Load a file inside the sources under a name, as it is now and until the process ends.

        `path` is absolute, or relative to a source. Raises `InvalidRequest` for a path that leads
        outside, and for a name that is taken unless `replace`; `NotFound` for a missing file; and
        what `put` raises.
        """
        _check_name(name)
        file = locate(path, self._sources)
        try:
            data = read(file, self._max_file_bytes)
        except OSError as error:
            raise NotFound(f"The file cannot be read: {error.strerror}.", param="path") from error
        version = self._verified(name, data, "loaded")
        with self._changing:
            if not replace and self._current(name) is not None:
                raise InvalidRequest(
                    f"The intervention `{name}` is loaded already; ask to replace it, or unload it"
                    " first.",
                    param="name",
                )
            self._place(version)
        _log.info("loaded %r", version)
        return version

    def remove(self, name: str) -> None:
        """Take away what a name stands for; what it shadowed, if anything, shows again.

        An upload is deleted with its history. A source's file stays on disk and comes back when it
        changes, or at the next start. Requests in flight end on what they began with. Raises
        `NotFound`.
        """
        with self._changing:
            version = self._current(name)
            if version is None:
                raise unknown(name)
            if version.origin == "uploaded" and self._store is not None:
                self._store.remove(name)
            self._displace(name, version.origin)
            self._collect()
        _log.info("removed %r", version)

    def _check(self, manifest: Manifest) -> None:
        check_base(manifest, self.base, self._allow_base)
        if self._check_site is not None:
            for index, edit in enumerate(manifest.edits):
                self._check_site(edit.layer, edit.component, manifest.width_of(index))

    @releasing_workers
    def _verified(self, name: str, data: bytes, origin: Origin) -> Version:
        header = header_of(data)
        self._check(header.manifest)
        edits = parse(data).canonical()
        return Version(name, header, origin, lambda: data, edits)

    def _listed(self, name: str, path: Path, origin: Origin) -> Version:
        header = read_header(path, self._max_file_bytes)
        self._check(header.manifest)
        return Version(name, header, origin, partial(read, path, self._max_file_bytes))

    def _adopt(self, name: str, file: Found) -> str | None:
        """Serve a new or changed file of a source; returns the reason why not, if so."""
        before = self._layer(name, "folder")
        try:
            version = self._listed(name, file.path, "folder")
            if before is not None and before.loaded:
                if before.digest == version.digest:
                    return None
                version.edits()
            self._place(version)
        except (ReftError, OSError) as error:
            if before is not None and not before.loaded:
                self._displace(name, "folder")
            reason = error.message if isinstance(error, ReftError) else f"{error.strerror}."
            _log.warning("%s is not served: %s", file.path, reason)
            return reason
        if before is not None:
            _log.info("replaced %r by %r", before, version)
        return None

    def _restore(self, store: Store) -> None:
        """Bring back what was uploaded before the last stop."""
        for name in store.damaged:
            self._upload_problems[name] = "The pointer file is damaged; upload it again."
        for name, digests in store.histories.items():
            history: list[Version] = []
            for digest in digests:
                try:
                    version = self._listed(name, store.blob(digest), "uploaded")
                    if version.digest != digest:
                        raise InvalidFile("The stored file is not the one that was uploaded.")
                except (ReftError, OSError) as error:
                    self._upload_problems.setdefault(name, f"Version {digest[:12]}: {error}")
                    if not history:
                        break
                else:
                    history.append(version)
            if history:
                self._place_upload(history)
        self._collect()

    def _collect(self) -> None:
        if self._store is not None:
            self._store.collect(keep=self._held_digests())

    def _watch(self, interval: float) -> None:
        wait = interval
        while not self._closed.wait(wait):
            began = time.monotonic()
            try:
                self.scan()
            except Exception:  # the watch must outlive whatever one scan meets
                _log.exception("scanning the sources failed")
            # A scan of thousands of files holds up the engine's thread now and then.
            wait = max(interval, (time.monotonic() - began) / SCAN_SHARE)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"The name {name[:80]!r} is not allowed: {NAME_RULE}.", param="name")
