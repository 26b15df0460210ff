"""Names, and the versions they stand for: the registry's state in memory.

A name stands for the topmost of up to three layers: what was *loaded* at run time from a path, what
was *uploaded*, and what lies in a source *folder*. A name moves to another version in one step,
under a lock that is never held while a file is read; a request that holds a version keeps it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from reft_runtime.caller import everything
from reft_runtime.errors import NotFound, Overloaded, StoreFull, UnknownName, did_you_mean
from reft_runtime.interventions.registry.residency import Residency, return_freed_memory
from reft_runtime.interventions.registry.version import Origin, Version

R = TypeVar("R")

_LAYERS: tuple[Origin, ...] = ("loaded", "uploaded", "folder")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(slots=True)
class Name:
    """One name: its layers, its history, and what requests have used of it."""

    layers: dict[Origin, Version] = field(default_factory=dict)
    history: list[Version] = field(default_factory=list)
    """Uploaded versions, the current one first."""
    held: set[Version] = field(default_factory=set)
    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_used: float | None = None
    problem: str | None = None

    def reachable(self) -> set[Version]:
        """All versions that can be addressed or are held."""
        return {*self.layers.values(), *self.history, *self.held}

    def shown(self) -> list[Version]:
        """The layers, topmost first."""
        return [self.layers[layer] for layer in _LAYERS if layer in self.layers]

    def current(self) -> Version | None:
        """The version the name stands for; None if only requests still hold versions of it."""
        for layer in _LAYERS:
            if layer in self.layers:
                return self.layers[layer]
        return None

    def in_flight(self) -> int:
        """Number of requests that hold one of its versions."""
        return sum(version.in_flight for version in self.held)

    def versions(self) -> dict[str, Version]:
        """All versions that can be addressed, by digest, the current one first."""
        held = sorted(self.held, key=lambda version: version.digest)
        found: dict[str, Version] = {}
        for version in (*self.shown(), *self.history, *held):
            found.setdefault(version.digest, version)
        return found


class Catalog:
    """Names and versions in memory; every method may be called from any thread.

    Interventions take at most `memory_bytes`: tensors that can be read again are evicted, and
    `hold` and `reserve` refuse what would not fit beside what must stay.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._names: dict[str, Name] = {}
        self._memory = Residency(memory_bytes)
        self._lock = threading.Lock()  # guards _names, _memory and every version's in_flight

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@<digest prefix>` (8 to 64 hex digits) stands for now.

        By digest, versions in the history of uploads or still held by a request are found too.
        Raises `NotFound` for an unknown name or digest, and for a prefix that two digests share.
        """
        name, at, prefix = ref.partition("@")
        with self._lock:
            known = self._names.get(name)
            if known is not None and not at:
                current = known.current()
                if current is not None:
                    return current
            elif known is not None and _PREFIX.fullmatch(prefix):
                versions = known.versions()
                matches = [digest for digest in versions if digest.startswith(prefix)]
                if len(matches) == 1:
                    return versions[matches[0]]
        raise NotFound(f"The model `{ref}` does not exist.", param="model")

    def hold(self, version: Version) -> None:
        """Begin a request on a version, with its tensors loaded (a first use reads the file).

        Until the matching `release` the version works and stays addressable by its digest, whatever
        happens to its name or its file. Raises what `Version.edits` raises, and `Overloaded` if the
        interventions of other requests fill the memory; then nothing is held.
        """
        self.pin(version)
        with self._lock:
            known = self._names[version.name]
            known.requests += 1
            known.last_used = time.time()

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended; does nothing if the name has gone."""
        with self._lock:
            if known := self._names.get(name):
                known.prompt_tokens += prompt_tokens
                known.generation_tokens += generation_tokens

    def release(self, version: Version) -> None:
        """End one request that held a version."""
        with self._changed(version.name) as known:
            if version.in_flight < 1:
                raise RuntimeError(f"{version!r} is released more often than held")
            version.in_flight -= 1
            if version.in_flight == 0:
                known.held.discard(version)

    def meant(self, ref: str, sees: Callable[[str], bool] = everything) -> str:
        """A question to append to the error for an unknown `ref`: which similar name was meant."""
        name = ref.partition("@")[0]
        with self._lock:
            names = [known for known, entry in self._names.items() if entry.layers]
        names = [known for known in names if sees(known)]
        return did_you_mean(name, names) if name not in names else ""

    def pin(self, version: Version) -> None:
        """Hold a version and load its tensors as `hold` does, without counting a request."""
        with self._changed(version.name) as known:
            known.held.add(version)
            version.in_flight += 1
        try:
            version.edits()
            with self._lock:
                self._memory.touch(version)
            self._shrink(version)
        except BaseException:
            self.release(version)
            self._shrink()
            raise

    def names(self) -> list[str]:
        """All names, in no particular order."""
        with self._lock:
            return list(self._names)

    def told(self, names: Iterable[str], tell: Callable[[str, Name], R]) -> list[R]:
        """The results of `tell` for those of the names that stand for something.

        `tell` is called under the lock, which everybody else waits for: give few names.
        """
        with self._lock:
            found = [(name, self._names.get(name)) for name in names]
            return [tell(name, known) for name, known in found if known and known.layers]

    def held_bytes(self) -> int:
        """Memory that interventions take now, in bytes."""
        with self._lock:
            return self._memory.used

    def current(self, name: str) -> Version | None:
        """The version the name stands for; None if it stands for nothing."""
        with self._lock:
            known = self._names.get(name)
            return None if known is None else known.current()

    def layer(self, name: str, origin: Origin) -> Version | None:
        """The version that one layer has under the name; None if it has none."""
        with self._lock:
            known = self._names.get(name)
            return known.layers.get(origin) if known is not None else None

    def history(self, name: str) -> list[Version]:
        """The name's uploaded versions, the current one first."""
        with self._lock:
            known = self._names.get(name)
            return list(known.history) if known is not None else []

    def digests(self, name: str) -> list[str]:
        """The digests of the name's versions that can be addressed, the current one first."""
        with self._lock:
            known = self._names.get(name)
            return list(known.versions()) if known is not None else []

    def uploads(self) -> list[Version]:
        """The uploaded versions of all names."""
        with self._lock:
            return [version for known in self._names.values() for version in known.history]

    def held_digests(self) -> set[str]:
        """The digests of all versions that requests hold."""
        with self._lock:
            return {version.digest for known in self._names.values() for version in known.held}

    def reserve(self, size: int, leaving: Iterable[Version]) -> None:
        """Raise `StoreFull` unless `size` more bytes fit once the versions `leaving` are gone.

        The bytes are those that stay in memory and cannot be evicted.
        """
        with self._lock:
            fixed, budget = self._memory.fixed, self._memory.budget
            if fixed + size - sum(old.fixed_bytes for old in leaving) > budget:
                raise StoreFull(
                    f"Uploaded interventions take {fixed} bytes of memory, and this one would take"
                    f" {size}; there may be {budget}. Delete some of them, or start the server with"
                    " more --intervention-bytes or with a --state-dir."
                )

    def place(self, version: Version) -> None:
        """Put a version in its layer."""
        with self._changed(version.name) as known:
            known.layers[version.origin] = version
        self._shrink()

    def place_upload(self, history: Sequence[Version]) -> None:
        """Make the first of `history` the current upload, above all other layers of its name."""
        with self._changed(history[0].name) as known:
            known.layers.pop("loaded", None)
            known.layers["uploaded"] = history[0]
            known.history = list(history)
        self._shrink()

    def displace(self, name: str, origin: Origin, version: Version | None = None) -> None:
        """Remove one layer, if it is there; an upload goes with its history.

        With a `version`, the layer is removed only if it holds that version.
        """
        with self._changed(name) as known:
            if version in (None, known.layers.get(origin)):
                known.layers.pop(origin, None)
                if origin == "uploaded":
                    known.history.clear()
        self._shrink()

    def note(self, name: str, problem: str | None) -> None:
        """Set what the listing says is wrong with the name's file in a folder; None clears it."""
        with self._lock:
            if name in self._names:
                self._names[name].problem = problem

    def _shrink(self, newest: Version | None = None) -> None:
        """Evict the tensors that were used least recently until the budget holds.

        If tensors in use keep the budget from holding, and `newest` is held by one request alone,
        `Overloaded` is raised.
        """
        evicted = True
        while evicted:
            with self._lock:
                idle = self._memory.idle()
            # This asks the disk, so it is not done under the lock.
            again = {version: version.replaceable() for version in idle}
            evicted = False
            with self._lock:
                for version, replaceable in again.items():
                    if not replaceable:  # the only copy of its content: others are evicted instead
                        self._memory.touch(version)
                    elif version.in_flight == 0 and version.evict():
                        self._memory.evicted(version)
                        evicted = True
        with self._lock:
            much = self._memory.freed_much()
            full = self._memory.used > self._memory.budget
            full = full and newest is not None and newest.reloadable and newest.in_flight == 1
        if much:
            return_freed_memory()
        if full:
            raise Overloaded(
                "The interventions in use fill the memory set aside for them; try again in a"
                " moment, or start the server with more --intervention-bytes."
            )

    @contextmanager
    def _changed(self, name: str) -> Iterator[Name]:
        """Change what a name stands for, under the lock, and account for its versions' memory."""
        with self._lock:
            known = self._names.setdefault(name, Name())
            before = known.reachable()
            try:
                yield known
            finally:
                after = known.reachable()
                for version in after - before:
                    self._memory.enter(version)
                for version in before - after:
                    self._memory.leave(version)
                if not after:
                    del self._names[name]

    def unknown(self, name: str) -> UnknownName:
        """The error for a name that stands for nothing."""
        return UnknownName(name, self.meant(name))
