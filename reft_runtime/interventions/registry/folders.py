"""Interventions that lie in folders: found at the start, by looking again, and when asked for."""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from reft_runtime.errors import (
    Changed,
    ConfigError,
    InvalidFile,
    NotFound,
    ReftError,
    Unavailable,
    WrongBaseModel,
)
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.listing import Listing
from reft_runtime.interventions.registry.sources import NAME, Found, find, list_folder, look
from reft_runtime.interventions.registry.version import Version

CHANGES = 3
"""How often a file may be replaced while it is being read."""

WORK_SHARE = 0.25
"""Of the time, at most, the watch spends on reading what has changed."""

_log = logging.getLogger(__name__)


def check_sources(folders: Sequence[Path]) -> None:
    """Raise `ConfigError` where one of the folders is not there."""
    for folder in folders:
        if not os.path.isdir(folder):  # pathlib's raises where a name is too long
            raise ConfigError(
                f"The interventions folder {folder} does not exist; make it, or name another."
            )


class Folders(Listing):
    """The layer of the catalog that follows folders; where two have a file of one name, the first
    counts.

    A name that is asked for is looked up on disk at once, so nobody waits for the watch to come
    round. A file that cannot be served is passed over, and `_broken` says why.
    """

    def __init__(self, memory_bytes: int, sources: Sequence[str | Path], reserved: str) -> None:
        super().__init__(memory_bytes)
        self._sources = [Path(source) for source in sources]
        check_sources(self._sources)
        self._reserved = reserved
        self._scanning = threading.Lock()  # guards what follows; held for one file's sake at a time
        self._listings: dict[Path, tuple[dict[str, Found], dict[str, str]]] = {}
        self._found: dict[str, Found] = {}
        self._broken: dict[str, ReftError] = {}
        self._unlisted: dict[str, str] = {}

    @abstractmethod
    def _listed(self, name: str, file: Found) -> Version:
        """A version by its file's header; raises `ReftError` or `OSError` if it is not usable."""

    def resolve(self, ref: str) -> Version:
        """As `Catalog.resolve`, by what lies in the folders at this moment.

        Raises `Unavailable` where there is a file of the name, and it is broken.
        """
        name = ref.partition("@")[0]
        if NAME.fullmatch(name) and name != self._reserved:
            self._refresh(name)
        try:
            return super().resolve(ref)
        except NotFound:
            broken = self._broken.get(name)
            if broken is None or isinstance(broken, WrongBaseModel) or self._current(name):
                raise
            raise Unavailable(
                f"The file of the intervention `{name}` cannot be served: {broken.message}"
            ) from None

    def acquire(self, ref: str | Version) -> Version:
        """As `Catalog.acquire`; a file that is replaced just now is used in its new version."""
        for _ in range(CHANGES):
            with suppress(NotFound, Unavailable):
                return super().acquire(ref)
        return super().acquire(ref)

    def _pin(self, version: Version) -> None:
        try:
            super()._pin(version)
        except (NotFound, Unavailable):
            if version.origin == "folder" and version.problem is None:
                with self._scanning:  # look at it anew, though by the disk's clock it is the same
                    self._found.pop(version.name, None)
            raise

    def scan(self, rest: Callable[[float], bool] = lambda worked: False) -> None:
        """Take in what is new, changed or gone in the sources; reads only what has changed.

        A file that replaces one in use is verified completely before its name moves to it; until
        a broken one is mended, the version before it goes on being served if it is in memory.
        `rest` is called after each file that was read, with the seconds that it took, and ends the
        scan by answering True.
        """
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
                self._refresh(name)
                if rest(time.monotonic() - began):
                    return

    def _refresh(self, name: str) -> None:
        """Follow the file of one name, if it is new, changed or gone."""
        if self._unchanged(name):
            return
        try:
            with self._scanning:
                file = self._look(name)
                if file == self._found.get(name):
                    return
                if file is None:
                    del self._found[name]
                    self._broken.pop(name, None)
                    self._displace(name, "folder")
                    self._note(name, None)
                else:
                    self._adopt(name, file)
                    self._found[name] = file
        except OSError:  # the folder cannot be read: serve on with what was there
            return

    def _unchanged(self, name: str) -> bool:
        """Whether one look says so: every request asks, and most files are as they were."""
        known = self._found.get(name)
        for folder in self._sources:
            try:
                now = look(folder / f"{name}{SUFFIX}", follow=True)
            except OSError:
                continue
            return known is not None and now._replace(path=known.path) == known
        return known is None

    def _expect(self, name: str, expected: Collection[str] | None) -> Version | None:
        """What the name stands for at this moment, which is one of the digests `expected`.

        `*` is any, () nothing, None whatever there is. Raises `Changed`.
        """
        if expected is None:
            return self._current(name)
        if name != self._reserved:
            self._refresh(name)
        current = self._current(name)
        if current is None and expected:
            raise Changed(
                f"There is no intervention `{name}`, which was to be there.", param="name"
            )
        if current is not None and not {current.digest, "*"} & set(expected):
            wanted = "another one was expected" if expected else "none was to be there"
            raise Changed(f"`{name}` is served as {current.digest}, and {wanted}.", param="name")
        return current

    def _tell_hidden(self, before: Version | None, now: Version) -> None:
        """Say that what a client put under a name hides the file that was served under it."""
        if before is not None and before.origin == "folder":
            _log.warning("%s: the folder's file is hidden by what was %s", now.name, now.origin)

    def _look(self, name: str) -> Found | None:
        for folder in self._sources:
            if (file := find(name, folder)) is not None:
                return file
        return None

    def _adopt(self, name: str, file: Found) -> None:
        """Serve a new or changed file of a source, or keep the reason why not."""
        before = self._layer(name, "folder")
        in_memory = before is not None and before.loaded
        try:
            version = self._listed(name, file)
            if in_memory and before is not None and before.digest == version.digest:
                before.moved(file)
                version = before
            elif in_memory:
                version.edits()
            self._place(version)
        except (ReftError, OSError) as error:
            problem = (
                error
                if isinstance(error, ReftError)
                else InvalidFile(f"Cannot be read: {error.strerror}.")
            )
            self._broken[name] = problem
            if in_memory:
                self._note(name, f"Its new file is not served: {problem.message}")
            else:
                self._displace(name, "folder")
            _log.warning("%s is not served: %s", file.path, problem.message)
            return
        self._broken.pop(name, None)
        self._note(name, None)
        if before is None and (above := self._current(name)) not in (None, version):
            _log.warning("%s: %s is hidden by what was %s", name, file.path, above.origin)
        if before not in (None, version):
            _log.info("replaced %r by %r", before, version)
