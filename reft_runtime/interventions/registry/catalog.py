"""Names, and the versions they stand for: the registry's state in memory.

A name stands for the topmost of up to three layers: what was *loaded* at run time from a path, what
was *uploaded*, and what lies in a source *folder*. A name moves to another version in one step,
under a lock that is never held while a file is read; a request that holds a version keeps it.
"""

from __future__ import annotations

import re
import threading
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
    pinned: bool = False

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

    def added(self) -> bool:
        """Whether something was uploaded or loaded under it."""
        return any(layer != "folder" for layer in self.layers)

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

    Interventions take at most `memory_bytes`: tensors that no request uses are evicted. On a device
    that has them as well those in use take at most `device_bytes`.
    """

    def __init__(self, memory_bytes: int, device_bytes: int | None) -> None:
        self._names: dict[str, Name] = {}
        self.added: set[str] = set()
        """The names under which something was uploaded or loaded."""
        self.memory = Residency(memory_bytes, device_bytes)
        self.lock = threading.RLock()
        """Guards names and memory, and what versions say of requests and pins."""

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@<digest prefix>` (8 to 64 hex digits) stands for now.

        By digest, versions in the history of uploads or still held by a request are found too.
        Raises `NotFound` for an unknown name or digest, and for a prefix that two digests share.
        """
        name, at, prefix = ref.partition("@")
        with self.lock:
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

    def read(self, version: Version) -> None:
        """Read the tensors of a version, and count them. Raises what `Version.edits` raises."""
        version.edits()
        self.was_read(version)

    def was_read(self, version: Version) -> None:
        """Count the tensors of a version that were just read, and make it the last used."""
        with self.lock:
            if version.name in self._names and version in self._names[version.name].reachable():
                self.memory.touch(version)
        self.make_room()

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended; does nothing if the name has gone."""
        with self.lock:
            if known := self._names.get(name):
                known.prompt_tokens += prompt_tokens
                known.generation_tokens += generation_tokens

    def meant(self, ref: str, sees: Callable[[str], bool] = everything) -> str:
        """A question to append to the error for an unknown `ref`: which similar name was meant."""
        name = ref.partition("@")[0]
        with self.lock:
            names = [known for known, entry in self._names.items() if entry.layers]
        names = [known for known in names if sees(known)]
        return did_you_mean(name, names) if name not in names else ""

    def names(self) -> list[str]:
        """All names, in no particular order."""
        with self.lock:
            return list(self._names)

    def told(self, names: Iterable[str], tell: Callable[[str, Name], R]) -> list[R]:
        """The results of `tell` for those of the names that stand for something.

        `tell` is called under the lock, which everybody else waits for: give few names.
        """
        with self.lock:
            found = [(name, self._names.get(name)) for name in names]
            return [tell(name, known) for name, known in found if known and known.layers]

    def held_bytes(self) -> int:
        """Memory that interventions take now, in bytes."""
        with self.lock:
            return self.memory.used

    def current(self, name: str) -> Version | None:
        """The version the name stands for; None if it stands for nothing."""
        with self.lock:
            known = self._names.get(name)
            return None if known is None else known.current()

    def layer(self, name: str, origin: Origin) -> Version | None:
        """The version that one layer has under the name; None if it has none."""
        with self.lock:
            known = self._names.get(name)
            return known.layers.get(origin) if known is not None else None

    def history(self, name: str) -> list[Version]:
        """The name's uploaded versions, the current one first."""
        with self.lock:
            known = self._names.get(name)
            return list(known.history) if known is not None else []

    def digests(self, name: str) -> list[str]:
        """The digests of the name's versions that can be addressed, the current one first."""
        with self.lock:
            known = self._names.get(name)
            return list(known.versions()) if known is not None else []

    def uploads(self) -> list[Version]:
        """The uploaded versions of all names."""
        with self.lock:
            return [version for known in self._names.values() for version in known.history]

    def kept_digests(self) -> set[str]:
        """The digests of all versions that requests hold, or that were loaded."""
        with self.lock:
            return {
                version.digest
                for known in self._names.values()
                for version in (*known.held, *known.layers.values())
                if version.origin != "folder"
            }

    def reserve(self, version: Version, leaving: Iterable[Version], share: float) -> None:
        """Raise `StoreFull` unless a version's line of the listing fits into this share of memory.

        If its name is pinned, its tensors have to fit as well. The versions `leaving` make room.
        """
        with self.lock:
            fixed, pinned = self.memory.fixed, self.memory.pinned
            budget = int(share * self.memory.budget)
            size = version.listed_bytes
            if fixed + pinned + size - sum(old.fixed_bytes for old in leaving) > budget:
                raise StoreFull(
                    f"The listing of uploads takes {fixed} bytes of memory, pinned interventions"
                    f" {pinned}, and this one would take {size}; there may be {budget}. Delete some"
                    " of them, or start the server with more --intervention-bytes."
                )
            if self.pinned(version.name):
                self._check_pins(version, share)

    def pinned(self, name: str) -> bool:
        """Whether a name is pinned, also one that stands for nothing now."""
        with self.lock:
            known = self._names.get(name)
            return known is not None and known.pinned

    def pinned_names(self) -> list[str]:
        """The pinned names, also those that stand for nothing now."""
        with self.lock:
            return [name for name, known in self._names.items() if known.pinned]

    def pin(self, name: str, *, pinned: bool) -> None:
        """Say whether the tensors of what a name stands for stay in memory."""
        with self.changed(name) as known:
            known.pinned = pinned
        self.make_room()

    def check_room(self, version: Version, *, pinned: bool, share: float = 1.0) -> None:
        """Raise unless a version's tensors can be read and stay for now, or for good if `pinned`.

        `share` is the part of memory that is for pinned ones. Raises `StoreFull` if other pinned
        names leave no room in it, `Overloaded` if requests leave none. What a pinned name stands
        for until now makes room, once no request uses it.
        """
        with self.lock:
            leaving = None
            if pinned:
                self._check_pins(version, share)
                current = self.current(version.name)
                if current is not None and not (current.users or current.only_copy):
                    leaving = current
            if not self.memory.fits([version], leaving):
                raise Overloaded(
                    "The interventions in use fill the memory set aside for them; try again in a"
                    " moment, or start the server with more --intervention-bytes."
                )

    def _check_pins(self, version: Version, share: float) -> None:
        budget = int(share * self.memory.budget)
        current = self.current(version.name)
        others = self.memory.pinned - (current.memory_bytes if current and current.pinned else 0)
        if self.memory.fixed + others + version.memory_bytes > budget:
            raise StoreFull(
                f"Pinned interventions take {others} bytes of memory, and `{version.name}` would"
                f" take {version.memory_bytes}; there may be {budget}. Unpin some of"
                " them, or start the server with more --intervention-bytes."
            )

    def place(self, version: Version) -> None:
        """Put a version in its layer."""
        with self.changed(version.name) as known:
            known.layers[version.origin] = version
        self.make_room()

    def place_upload(self, history: Sequence[Version]) -> None:
        """Make the first of `history` the current upload, above all other layers of its name."""
        with self.changed(history[0].name) as known:
            known.layers.pop("loaded", None)
            known.layers["uploaded"] = history[0]
            known.history = list(history)
        self.make_room()

    def displace(self, name: str, origin: Origin, version: Version | None = None) -> None:
        """Remove one layer, if it is there; an upload goes with its history.

        With a `version`, the layer is removed only if it holds that version.
        """
        with self.changed(name) as known:
            if version in (None, known.layers.get(origin)):
                known.layers.pop(origin, None)
                if origin == "uploaded":
                    known.history.clear()
        self.make_room()

    def note(self, name: str, problem: str | None) -> None:
        """Set what the listing says is wrong with the name's file in a folder; None clears it.

        While something is, the tensors that were read of the file before are their only copy.
        """
        with self.lock:
            known = self._names.get(name)
            if known is not None:
                known.problem = problem
                if version := known.layers.get("folder"):
                    version.only_copy = problem is not None and version.loaded
                    self.memory.settle(version)

    def make_room(self) -> None:
        """Evict the tensors that were used least recently until the budget holds."""
        evicted = True
        while evicted:
            with self.lock:
                unused = self.memory.unused()
            # This asks the disk, so it is not done under the lock.
            again = {version: version.replaceable() for version in unused}
            evicted = False
            with self.lock:
                for version, replaceable in again.items():
                    if version not in self.memory:  # it has gone meanwhile
                        continue
                    if not replaceable:  # the only copy of its content: others are evicted instead
                        version.only_copy = evicted = True
                        self.memory.settle(version)
                    elif not version.stays and version.evict():
                        self.memory.evicted(version)
                        evicted = True
        with self.lock:
            much = self.memory.freed_much()
        if much:
            return_freed_memory()

    @contextmanager
    def changed(self, name: str) -> Iterator[Name]:
        """Change what a name stands for, under the lock, and account for its versions' memory."""
        with self.lock:
            known = self._names.setdefault(name, Name())
            before = known.reachable()
            try:
                yield known
            finally:
                after = known.reachable()
                current = known.current()
                for version in before | after:
                    version.pinned = known.pinned and version is current
                for version in after - before:
                    self.memory.enter(version)
                for version in before - after:
                    self.memory.leave(version)
                for version in after & before:
                    self.memory.settle(version)
                (self.added.add if known.added() else self.added.discard)(name)
                if not after and not known.pinned:
                    del self._names[name]

    def unknown(self, name: str) -> UnknownName:
        """The error for a name that stands for nothing."""
        return UnknownName(name, self.meant(name))
