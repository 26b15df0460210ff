"""Names, and the versions they stand for: the registry's state in memory.

A name stands for the topmost of up to three layers: what was *loaded* at run time from a path, what
was *uploaded*, and what lies in a source *folder*. A name moves to another version in one step,
under a lock that is never held while a file is read; who holds a version keeps it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from reft_runtime.errors import NotFound
from reft_runtime.interventions.manifest import Manifest
from reft_runtime.interventions.version import Origin, Version

_LAYERS: tuple[Origin, ...] = ("loaded", "uploaded", "folder")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the listing.

    `versions` are the digests that can be addressed, the current one first. `in_flight`,
    `requests` and `last_used` (Unix time) count all versions of the name. `tier` says where the
    current version's tensors are: still on `disk`, or in `host` memory.
    """

    name: str
    digest: str
    versions: tuple[str, ...]
    origin: Origin
    tier: Literal["disk", "host"]
    in_flight: int
    requests: int
    last_used: float | None
    size_bytes: int
    manifest: Manifest


@dataclass(slots=True)
class _Name:
    layers: dict[Origin, Version] = field(default_factory=dict)
    history: list[Version] = field(default_factory=list)
    """Uploaded versions, the current one first."""
    held: set[Version] = field(default_factory=set)
    requests: int = 0
    last_used: float | None = None

    def shown(self) -> list[Version]:
        """The layers, topmost first."""
        return [self.layers[layer] for layer in _LAYERS if layer in self.layers]

    def versions(self) -> dict[str, Version]:
        """All that can be addressed, by digest, the current one first."""
        held = sorted(self.held, key=lambda version: version.digest)
        found: dict[str, Version] = {}
        for version in (*self.shown(), *self.history, *held):
            found.setdefault(version.digest, version)
        return found


class Catalog:
    """Names and versions in memory; every method may be called from any thread."""

    def __init__(self) -> None:
        self._names: dict[str, _Name] = {}
        self._lock = threading.Lock()  # guards _names and every version's in_flight

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@<digest prefix>` (8 to 64 hex digits) stands for now.

        By digest, versions in the history of uploads or still held by a request are found too.
        Raises `NotFound` for an unknown name or digest, and for a prefix of two digests.
        """
        name, at, prefix = ref.partition("@")
        with self._lock:
            known = self._names.get(name)
            if known is not None and not at:
                shown = known.shown()
                if shown:
                    return shown[0]
            elif known is not None and _PREFIX.fullmatch(prefix):
                versions = known.versions()
                matches = [digest for digest in versions if digest.startswith(prefix)]
                if len(matches) == 1:
                    return versions[matches[0]]
        raise NotFound(f"The model `{ref}` does not exist.", param="model")

    def hold(self, version: Version) -> None:
        """Begin a request on a version, its tensors loaded on return (a first use reads the file).

        Until the matching `release` the version works and stays addressable by its digest,
        whatever happens to its name or its file. Raises as `Version.edits`, then holding nothing.
        """
        with self._lock:
            known = self._names.setdefault(version.name, _Name())
            known.held.add(version)
            version.in_flight += 1
            known.requests += 1
            known.last_used = time.time()
        try:
            version.edits()
        except BaseException:
            self.release(version)
            raise

    def release(self, version: Version) -> None:
        """End one request that held a version."""
        with self._lock:
            if version.in_flight < 1:
                raise RuntimeError(f"{version!r} is released more often than held")
            version.in_flight -= 1
            if version.in_flight == 0:
                self._names[version.name].held.discard(version)
                self._prune(version.name)

    def entries(self) -> list[Entry]:
        """The listing, sorted by name."""
        with self._lock:
            return [
                _entry(name, known) for name, known in sorted(self._names.items()) if known.layers
            ]

    def entry(self, name: str) -> Entry:
        """One name's line of the listing; raises `NotFound`."""
        with self._lock:
            known = self._names.get(name)
            if known is None or not known.layers:
                raise unknown(name)
            return _entry(name, known)

    def _current(self, name: str) -> Version | None:
        with self._lock:
            known = self._names.get(name)
            return known.shown()[0] if known is not None and known.layers else None

    def _layer(self, name: str, origin: Origin) -> Version | None:
        with self._lock:
            known = self._names.get(name)
            return known.layers.get(origin) if known is not None else None

    def _history(self, name: str) -> list[Version]:
        with self._lock:
            known = self._names.get(name)
            return list(known.history) if known is not None else []

    def _place(self, version: Version) -> None:
        """Put a version in its layer."""
        with self._lock:
            self._names.setdefault(version.name, _Name()).layers[version.origin] = version

    def _place_upload(self, history: Sequence[Version]) -> None:
        """Put the first of `history` on top, as the newest word on its name."""
        with self._lock:
            known = self._names.setdefault(history[0].name, _Name())
            known.layers.pop("loaded", None)
            known.layers["uploaded"] = history[0]
            known.history = list(history)

    def _displace(self, name: str, origin: Origin) -> None:
        """Take one layer away, if it is there; an upload goes with its history."""
        with self._lock:
            if name in self._names:
                self._names[name].layers.pop(origin, None)
                if origin == "uploaded":
                    self._names[name].history.clear()
                self._prune(name)

    def _held_digests(self) -> set[str]:
        with self._lock:
            return {version.digest for known in self._names.values() for version in known.held}

    def _prune(self, name: str) -> None:
        known = self._names[name]
        if not (known.layers or known.history or known.held):
            del self._names[name]


def unknown(name: str) -> NotFound:
    """The error for a name that stands for nothing."""
    return NotFound(f"The intervention `{name}` does not exist.", param="name")


def _entry(name: str, known: _Name) -> Entry:
    current = known.shown()[0]
    return Entry(
        name=name,
        digest=current.digest,
        versions=tuple(known.versions()),
        origin=current.origin,
        tier="host" if current.loaded else "disk",
        in_flight=sum(version.in_flight for version in known.held),
        requests=known.requests,
        last_used=known.last_used,
        size_bytes=current.size_bytes,
        manifest=current.manifest,
    )
