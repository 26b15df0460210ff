"""Follows intervention files in sources: at the start, by scanning, and when asked for one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from reft_runtime.errors import (
    InvalidFile,
    NotFound,
    ReftError,
    Unavailable,
    WrongBaseModel,
)
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.remote.poller import Poller
from reft_runtime.interventions.registry.remote.source import RemoteSource
from reft_runtime.interventions.registry.sources import NAME, File, Folder, Listing, Source
from reft_runtime.interventions.registry.urls import is_url, local_folder
from reft_runtime.interventions.registry.verifier import Verifier
from reft_runtime.interventions.registry.version import Version

_log = logging.getLogger(__name__)


def source_at(place: str | Path) -> Source:
    """The source at a folder or URL. Raises `ConfigError` if it cannot be one."""
    return RemoteSource(str(place)) if is_url(place) else Folder(local_folder(place))


class Folders:
    """The layer of a catalog that follows sources; the first with a file of a name counts.

    A name that is asked for is looked up on disk at once, so nobody waits for the next scan; at
    URLs it is what the last poll found. A file that cannot be served is passed over, and `problems`
    says why.
    """

    def __init__(self, catalog: Catalog, sources: Sequence[str | Path], verifier: Verifier) -> None:
        self.sources = [source_at(place) for place in sources]
        self._remote = [source for source in self.sources if isinstance(source, RemoteSource)]
        self._pollers: list[Poller] = []
        self._catalog = catalog
        self._verifier = verifier
        self._reserved = verifier.base.model  # no file can have the base model's own name
        self._scanning = threading.Lock()  # guards what follows; held for one file at a time
        self._listings: dict[Source, Listing] = {}
        self._found: dict[str, File] = {}
        self._doubted: set[str] = set()  # names whose file could not be read when it was used
        self._broken: dict[str, ReftError] = {}
        self._unlisted: dict[str, str] = {}

    def resolve(self, ref: str) -> Version:
        """The version that `ref` stands for by what lies in the folders at this moment.

        Raises what `Catalog.resolve` raises, and `Unavailable` if the name's file is broken.
        """
        name = ref.partition("@")[0]
        self.refresh(name)
        try:
            return self._catalog.resolve(ref)
        except NotFound:
            broken = self._broken.get(name)
            if broken is None or isinstance(broken, WrongBaseModel) or self._catalog.current(name):
                raise
            raise Unavailable(
                f"The file of the intervention `{name}` cannot be served: {broken.message}"
            ) from None

    def forget(self, version: Version) -> None:
        """Take the file of a version that cannot be read as changed, when it is looked at next."""
        if version.origin == "folder" and version.problem is None:
            with self._scanning:
                self._doubted.add(version.name)

    def problems(self) -> dict[str, str]:
        """Why files are not served, by path."""
        with self._scanning:
            broken = {
                self._found[name].where: error.message
                for name, error in self._broken.items()
                if name in self._found
            }
        return {**self._unlisted, **broken}

    def broken(self, name: str) -> bool:
        """Whether there is a file of the name that cannot be served."""
        return name in self._broken

    def poll(self) -> None:
        """Look at the sources that are at URLs, over the network, all at the same time."""
        if self._remote:
            with ThreadPoolExecutor(len(self._remote), "reft-poll") as threads:
                list(threads.map(RemoteSource.poll, self._remote))

    def keep_polling(self) -> None:
        """Look at the sources that are at URLs in threads of their own until `close`."""
        self._pollers = [Poller(source.poll, source.kind) for source in self._remote]

    def close(self) -> None:
        """Stop polling."""
        for poller in self._pollers:
            poller.close()
        for source in self._remote:
            source.close()

    def scan(self, rest: Callable[[float], bool], between: Callable[[float], object]) -> None:
        """Take in what is new, changed or gone in the folders; see `Registry.scan`."""
        present: dict[str, File] = {}
        problems: dict[str, str] = {}
        for source in self.sources:
            with suppress(OSError):  # what was there is served on
                self._listings[source] = source.listing(between)
            if source.problem is not None:
                problems[source.label] = source.problem
            found, unlisted = self._listings.get(source, ({}, {}))
            problems.update(unlisted)
            for name, file in found.items():
                if present.setdefault(name, file) is not file:
                    problems[file.where] = f"Hidden by {present[name].where}."
        if hidden := present.pop(self._reserved, None):
            problems[hidden.where] = (
                f"`{self._reserved}` is the base model's own id, which requests would get; give the"
                " file another name."
            )
        told = {source.label for source in self._remote}  # by the sources, with more detail
        for path, why in problems.items():
            if self._unlisted.get(path) != why and path not in told:
                _log.warning("%s is not served: %s", path, why)
        self._unlisted = problems
        with self._scanning:
            known, doubted = dict(self._found), set(self._doubted)
        for name in [*present, *((known.keys() | doubted) - present.keys())]:
            if name in doubted or known.get(name) != present.get(name):
                began = time.monotonic()
                self.refresh(name)
                if rest(time.monotonic() - began):
                    return

    def refresh(self, name: str) -> None:
        """Follow the file of one name, if it is new, changed or gone."""
        if not NAME.fullmatch(name) or name == self._reserved or self._unchanged(name):
            return
        try:
            with self._scanning:
                file = self._look(name)
                if file == self._found.get(name) and name not in self._doubted:
                    return
                self._doubted.discard(name)
                if file is None:
                    self._found.pop(name, None)
                    self._broken.pop(name, None)
                    self._catalog.displace(name, "folder")
                    self._catalog.note(name, None)
                else:
                    self._adopt(name, file)
                    self._found[name] = file
        except OSError:  # the folder cannot be read: what was there is served on
            return

    def _unchanged(self, name: str) -> bool:
        """Whether one look at the disk finds the name's file unchanged.

        Every request asks this, and most files are as they were.
        """
        if name in self._doubted:
            return False
        known = self._found.get(name)
        for source in self.sources:
            same = source.glance(name, known)
            if same is not None:
                return same
        return known is None

    def _look(self, name: str) -> File | None:
        for source in self.sources:
            if (file := source.find(name)) is not None:
                return file
        return None

    def _adopt(self, name: str, file: File) -> None:
        """Serve a new or changed file of a source, or keep the reason why it is not served."""
        before = self._catalog.layer(name, "folder")
        served = before is not None and (before.loaded or before.replaceable())
        try:
            version = self._verifier.listed(name, file, "folder")
            if served and before is not None and before.digest == version.digest:
                before.moved(file)
                version = before
            elif served:
                version.edits()
            self._catalog.place(version)
        except (ReftError, OSError) as error:
            problem = (
                error
                if isinstance(error, ReftError)
                else InvalidFile(f"Cannot be read: {error.strerror}.")
            )
            self._broken[name] = problem
            if served:
                self._catalog.note(name, f"Its new file is not served: {problem.message}")
            else:
                self._catalog.displace(name, "folder")
            _log.warning("%s is not served: %s", file.where, problem.message)
            return
        self._broken.pop(name, None)
        self._catalog.note(name, None)
        if before is None and (above := self._catalog.current(name)) not in (None, version):
            _log.warning("%s: %s is hidden by what was %s", name, file.where, above.origin)
        if before is not None and before.digest != version.digest:
            _log.info("replaced %r by %r", before, version)
