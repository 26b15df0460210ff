"""How much memory interventions take, and whose tensors give way when it is too much."""

from __future__ import annotations

import ctypes
from collections import OrderedDict

from reft_runtime.interventions.registry.version import Version

_TRIM_BYTES = 32 << 20
"""Freed memory that is worth returning."""


class Residency:
    """The books of all versions that can be addressed, against a budget in bytes.

    `fixed` is what uploads and loaded files take whether they are used or not: manifests, and the
    tensors that have no file to be read from again. The tensors of all others come and go: those
    used least recently give way first, and those of requests under way stay. Not safe for threads:
    the catalog's lock guards it.
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
        """A version can be addressed from now on."""
        if version.origin != "folder":
            self._fixed[version] = version.fixed_bytes
            self.fixed += version.fixed_bytes
            self._freed += 2 * version.size_bytes  # the file as bytes, and its stored tensors
        self.touch(version)

    def touch(self, version: Version) -> None:
        """A version is used, or its tensors have just been read."""
        if version in self._tensors:
            self._tensors.move_to_end(version)
        elif version.loaded and version.reloadable:
            self._tensors[version] = version.tensor_bytes
            self._tensor_bytes += version.tensor_bytes
            self._freed += 2 * version.size_bytes

    def evicted(self, version: Version) -> None:
        """The tensors of a version are gone."""
        size = self._tensors.pop(version, 0)
        self._tensor_bytes -= size
        self._freed += size

    def leave(self, version: Version) -> None:
        """A version can be addressed no longer."""
        fixed = self._fixed.pop(version, 0)
        self.fixed -= fixed
        self._freed += fixed
        self.evicted(version)

    def idle(self) -> list[Version]:
        """As many versions that no request uses as must give way to keep to the budget."""
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
        """Whether so much was freed since the last time that the system should have it back."""
        if self._freed < _TRIM_BYTES:
            return False
        self._freed = 0
        return True


def return_freed_memory() -> None:
    """Hand what was freed back to the system, which glibc's allocator keeps; elsewhere a no-op."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
