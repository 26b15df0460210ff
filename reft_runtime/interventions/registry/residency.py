"""Counts the memory that interventions take, and chooses whose tensors are evicted."""

from __future__ import annotations

import ctypes
from collections import OrderedDict

from reft_runtime.interventions.registry.version import Version

_TRIM_BYTES = 32 << 20
"""Bytes of freed memory that are worth returning to the system."""


class Residency:
    """The memory of all versions that can be addressed, against a budget in bytes.

    `fixed` is what uploads and loaded files take whether they are used or not: manifests, and the
    tensors that have no file to be read from again. The tensors of all others come and go: those
    used least recently are evicted first, and those of requests under way stay. Not safe for
    threads: the catalog's lock guards it.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.fixed = 0
        self._fixed: dict[Version, int] = {}
        self._tensors: OrderedDict[Version, int] = OrderedDict()  # least recently used first
        self._tensor_bytes = 0
        self._freed = 0

    @property
    def used(self) -> int:
        """Bytes that are taken now."""
        return self.fixed + self._tensor_bytes

    def enter(self, version: Version) -> None:
        """Count a version that can be addressed from now on."""
        if version.origin != "folder":
            self._fixed[version] = version.fixed_bytes
            self.fixed += version.fixed_bytes
            self._freed += 2 * version.size_bytes  # the file as bytes, and its stored tensors
        self.touch(version)

    def touch(self, version: Version) -> None:
        """Make a version the most recently used, and count tensors that were just read."""
        if version in self._tensors:
            self._tensors.move_to_end(version)
        elif version.loaded and version.reloadable:
            self._tensors[version] = version.tensor_bytes
            self._tensor_bytes += version.tensor_bytes
            self._freed += 2 * version.size_bytes

    def evicted(self, version: Version) -> None:
        """Subtract the tensors of a version that were evicted."""
        size = self._tensors.pop(version, 0)
        self._tensor_bytes -= size
        self._freed += size

    def leave(self, version: Version) -> None:
        """Subtract a version that can no longer be addressed."""
        fixed = self._fixed.pop(version, 0)
        self.fixed -= fixed
        self._freed += fixed
        self.evicted(version)

    def idle(self) -> list[Version]:
        """The least recently used versions without requests whose eviction keeps to the budget."""
        excess = self.used - self.budget
        chosen = []
        for version, size in self._tensors.items():
            if excess <= 0:
                break
            if version.in_flight == 0:
                chosen.append(version)
                excess -= size
        return chosen

    def freed_much(self) -> bool:
        """Whether so much was freed that the system should have it back; True resets the count."""
        if self._freed < _TRIM_BYTES:
            return False
        self._freed = 0
        return True


def return_freed_memory() -> None:
    """Return freed memory, which glibc's allocator keeps, to the system; elsewhere a no-op."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
