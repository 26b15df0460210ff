"""Counts the memory that interventions take, and chooses whose tensors are evicted."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from reft_runtime.interventions.registry.version import Version

_TRIM_BYTES = 16 << 20
"""Bytes of freed memory that are worth returning to the system."""


class Tally:
    """Bytes by version, in the order in which they were entered, and their sum."""

    def __init__(self) -> None:
        self.total = 0
        self._bytes: OrderedDict[Version, int] = OrderedDict()

    def __contains__(self, version: Version) -> bool:
        return version in self._bytes

    def __iter__(self) -> Iterator[tuple[Version, int]]:
        return iter(self._bytes.items())

    def put(self, version: Version, size: int) -> int:
        """Enter a version's bytes, 0 for none; returns what was entered before."""
        before = self._bytes.get(version, 0)
        if size:
            self._bytes[version] = size
        else:
            self._bytes.pop(version, None)
        self.total += size - before
        return before

    def last(self, version: Version) -> None:
        """Move a version to the end of the order."""
        self._bytes.move_to_end(version)


class Residency:
    """The memory of all versions that can be addressed, against a budget in bytes.

    `fixed` is what uploads and loaded files take whether they are used or not: manifests, and
    tensors that were not made from a file. All other tensors come and go: those used least recently
    are evicted first. The tensors of requests stay, of pinned names, and those whose file is gone.
    On a device, whose tables take `device_bytes`, the tensors of requests have to fit there as
    well. Not safe for threads: the catalog's lock guards it.
    """

    def __init__(self, budget: int, device_bytes: int | None) -> None:
        self.budget = budget
        self._device_bytes = device_bytes
        self._fixed = Tally()
        self._tensors = Tally()  # least recently used first
        self._staying = Tally()
        self._in_use = Tally()
        self._pinned = Tally()
        self._unread = Tally()  # those of `_staying` that are still to be read
        self._freed = 0

    def __contains__(self, version: Version) -> bool:
        """Whether the version's tensors count here, as some that may be evicted one day."""
        return version in self._tensors

    @property
    def fixed(self) -> int:
        """Bytes that are taken by what cannot be evicted, whether it is used or not."""
        return self._fixed.total

    @property
    def used(self) -> int:
        """Bytes that are taken now."""
        return self._fixed.total + self._tensors.total

    @property
    def excess(self) -> int:
        """Bytes beyond the budget that are taken, or will be once what stays is read."""
        return self.used + self._unread.total - self.budget

    @property
    def idle(self) -> bool:
        """Whether no request uses an intervention, so that nobody will make room."""
        return not self._in_use.total

    @property
    def pinned(self) -> int:
        """Bytes of the tensors of pinned names, also while they are still to be read."""
        return self._pinned.total

    def enter(self, version: Version) -> None:
        """Count a version that can be addressed from now on."""
        if version.origin != "folder":
            self._fixed.put(version, version.fixed_bytes)
            self._freed += 2 * version.size_bytes  # the file as bytes, and its stored tensors
        self.touch(version)

    def touch(self, version: Version) -> None:
        """Make a version the most recently used, and count tensors that were just read."""
        if version.loaded and version.reloadable:
            if not self._tensors.put(version, version.tensor_bytes):
                self._freed += 2 * version.size_bytes
            self._tensors.last(version)
        self.settle(version)

    def settle(self, version: Version) -> None:
        """Count a version's tensors anew after it was read, or what makes it stay has changed."""
        size = version.memory_bytes if version.reloadable else 0
        self._staying.put(version, size if version.stays else 0)
        self._in_use.put(version, size if version.users else 0)
        self._pinned.put(version, size if version.pinned else 0)
        self._unread.put(version, size if version.stays and not version.loaded else 0)

    def evicted(self, version: Version) -> None:
        """Subtract the tensors of a version that were evicted."""
        self._freed += self._tensors.put(version, 0)

    def leave(self, version: Version) -> None:
        """Subtract a version that can no longer be addressed."""
        self._freed += self._fixed.put(version, 0)
        self.evicted(version)
        for tally in (self._staying, self._in_use, self._pinned, self._unread):
            tally.put(version, 0)

    def fits(self, versions: Iterable[Version], leaving: Version | None = None) -> bool:
        """Whether a request for these versions fits beside what stays; `leaving` makes room."""
        asked = set(versions)
        staying = self._staying.total
        if leaving is not None and leaving in self._staying and leaving not in asked:
            staying -= leaving.memory_bytes
        fits = self.fixed + staying + _bytes(asked, self._staying) <= self.budget
        if self._device_bytes is None or self.idle:  # on a device one request alone has its way
            return fits
        return fits and self._in_use.total + _bytes(asked, self._in_use) <= self._device_bytes

    def never_fits(self, versions: Iterable[Version]) -> bool:
        """Whether the versions do not fit even if no other request used any."""
        own = _bytes(set(versions), self._pinned)
        return self.fixed + self.pinned + own > self.budget

    def unused(self) -> list[Version]:
        """The least recently used versions whose eviction keeps to the budget."""
        excess = self.excess
        chosen = []
        for version, size in self._tensors:
            if excess <= 0:
                break
            if not version.stays:
                chosen.append(version)
                excess -= size
        return chosen

    def freed_much(self) -> bool:
        """Whether so much was freed that the system should have it back; True resets the count."""
        if self._freed < _TRIM_BYTES:
            return False
        self._freed = 0
        return True


def _bytes(versions: Iterable[Version], counted: Tally) -> int:
    """Bytes of the versions' tensors that are not counted yet."""
    return sum(v.memory_bytes for v in versions if v.reloadable and v not in counted)


def return_freed_memory() -> None:
    """Return freed memory, which glibc's allocator keeps, to the system; elsewhere a no-op."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
