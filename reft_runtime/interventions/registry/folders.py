"""Follows intervention files in folders: at the start, by scanning, and when asked for one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reft_runtime.errors import (
    ConfigError,
    InvalidFile,
    NotFound,
    ReftError,
    Unavailable,
    WrongBaseModel,
)
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.sources import NAME, Found, find, list_folder, look
from reft_runtime.interventions.registry.version import Version

WORK_SHARE = 0.25
"""At most this share of time is spent on reading what has changed."""

_log = logging.getLogger(__name__)


def check_sources(folders: Sequence[Path]) -> None:
    """Raise `ConfigError` if one of the folders does not exist."""
    for folder in folders:
        if not os.path.isdir(folder):  # pathlib's raises if a name is too long
            raise ConfigError(
                f"The interventions folder {folder} does not exist; make it, or name another."
            )


class Folders:
    """The layer of a catalog that follows folders; the first with a file of a name counts.

    A name that is asked for is looked up on disk at once, so nobody waits for the next scan. A file
    that cannot be served is passed over, and `problems` says why. `listed` makes a version of a
    file from its header, and raises `ReftError` or `OSError` if the file is not usable. `reserved`
    is the base model's name, which no file can have.
    """

    def __init__(
        self,
        catalog: Catalog,
        sources: Sequence[str | Path],
        reserved: str,
        listed: Callable[[str, Found], Version],
    ) -> None:
        self.sources = [Path(source) for source in sources]
        check_sources(self.sources)
        self._catalog = catalog
        self._reserved = reserved
        self._listed = listed
        self._scanning = threading.Lock()  # guards what follows; held for one file at a time
        self._listings: dict[Path, tuple[dict[str, Found], dict[str, str]]] = {}
        self._found: dict[str, Found] = {}
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
                self._found.pop(version.name, None)

    def problems(self) -> dict[str, str]:
        """Why files are not served, by path."""
        with self._scanning:
            broken = {
                str(self._found[name].path): error.message
                for name, error in self._broken.items()
                if name in self._found
            }
        return {**self._unlisted, **broken}

    def broken(self, name: str) -> bool:
        """Whether there is a file of the name that cannot be served."""
        return name in self._broken

    def scan(self, rest: Callable[[float], bool], between: Callable[[float], object]) -> None:
        """Take in what is new, changed or gone in the folders; see `Registry.scan`."""
        present: dict[str, Found] = {}
        problems: dict[str, str] = {}
        for folder in self.sources:
            try:
                self._listings[folder] = list_folder(folder, between)
            except OSError as error:  # what was there is served on
                problems[str(folder)] = f"The folder cannot be read: {error.strerror}."
            found, unlisted = self._listings.get(folder, ({}, {}))
            problems.update(unlisted)
            for name, file in found.items():
                if present.setdefault(name, file) is not file:
                    problems[str(file.path)] = f"Hidden by {present[name].path}."
        if hidden := present.pop(self._reserved, None):
            problems[str(hidden.path)] = (
                f"`{self._reserved}` is the base model's own id, which requests would get; give the"
                " file another name."
            )
        for path, why in problems.items():
            if self._unlisted.get(path) != why:
                _log.warning("%s is not served: %s", path, why)
        self._unlisted = problems
        with self._scanning:
            known = dict(self._found)
        for name in [*present, *(known.keys() - present.keys())]:
            if known.get(name) != present.get(name):
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
                if file == self._found.get(name):
                    return
                if file is None:
                    del self._found[name]
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
        known = self._found.get(name)
        for folder in self.sources:
            try:
                now = look(folder / f"{name}{SUFFIX}", follow=True)
            except OSError:
                continue
            return known is not None and now._replace(path=known.path) == known
        return known is None

    def _look(self, name: str) -> Found | None:
        for folder in self.sources:
            if (file := find(name, folder)) is not None:
                return file
        return None

    def _adopt(self, name: str, file: Found) -> None:
        """Serve a new or changed file of a source, or keep the reason why it is not served."""
        before = self._catalog.layer(name, "folder")
        in_memory = before is not None and before.loaded
        try:
            version = self._listed(name, file)
            if in_memory and before is not None and before.digest == version.digest:
                before.moved(file)
                version = before
            elif in_memory:
                version.edits()
            self._catalog.place(version)
        except (ReftError, OSError) as error:
            problem = (
                error
                if isinstance(error, ReftError)
                else InvalidFile(f"Cannot be read: {error.strerror}.")
            )
            self._broken[name] = problem
            if in_memory:
                self._catalog.note(name, f"Its new file is not served: {problem.message}")
            else:
                self._catalog.displace(name, "folder")
            _log.warning("%s is not served: %s", file.path, problem.message)
            return
        self._broken.pop(name, None)
        self._catalog.note(name, None)
        if before is None and (above := self._catalog.current(name)) not in (None, version):
            _log.warning("%s: %s is hidden by what was %s", name, file.path, above.origin)
        if before not in (None, version):
            _log.info("replaced %r by %r", before, version)
