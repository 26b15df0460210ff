"""What pointers say: which uploaded versions a name has, and whether it is pinned."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{64}")

_MOST_BLANKS = 64
"""Fewer than a digest has characters, so that a version more is a larger file."""


class Pointers:
    """The pointers of a store, as they are known.

    `histories` are the digests of each name's uploaded versions, the current one first; `pinned`
    are the pinned names, and `damaged` those whose pointer cannot be read. `other` are fields that
    only a later version of this server knows: they stay as they are, and so do all blobs meanwhile.
    """

    def __init__(self) -> None:
        self.histories: dict[str, tuple[str, ...]] = {}
        self.pinned: set[str] = set()
        self.damaged: set[str] = set()
        self.other: dict[str, dict[str, Any]] = {}
        self._blanks = 0
        self.named: Counter[str] = Counter()
        """How often each digest stands in the histories."""

    def note(self, name: str, digests: Sequence[str], *, pinned: bool) -> None:
        """Take in that a name has these versions."""
        self.named.update(digests)
        for digest in self.histories.pop(name, ()):
            self.named[digest] -= 1
            if not self.named[digest]:
                del self.named[digest]
        if digests:
            self.histories[name] = tuple(digests)
        self.pinned.discard(name)
        if pinned:
            self.pinned.add(name)
        self.damaged.discard(name)
        if not digests and not pinned:
            self.other.pop(name, None)

    def note_file(self, name: str, data: bytes) -> None:
        """Take in what a pointer's file says; a name without versions and pin is damaged."""
        digests, pinned, other = _parsed(data)
        self.note(name, digests, pinned=pinned)
        self.other.pop(name, None)
        if not digests and not pinned:
            self.damaged.add(name)
        elif other:
            self.other[name] = other

    def clear(self) -> None:
        """Forget all names."""
        self.histories.clear()
        self.pinned.clear()
        self.damaged.clear()
        self.named.clear()
        self.other.clear()

    def file(self, name: str, digests: Sequence[str], *, pinned: bool) -> bytes:
        """The content of the pointer's file by which a name has these versions.

        Its size is another than the last one's: where a file system's times are whole seconds, and
        the same inode is taken again, nothing else tells other servers that it was replaced.
        """
        self._blanks = (self._blanks + 1) % _MOST_BLANKS
        fields = {"versions": list(digests), **({"pinned": True} if pinned else {})}
        return json.dumps(self.other.get(name, {}) | fields).encode() + b" " * self._blanks

    @property
    def all_understood(self) -> bool:
        """Whether nothing but `named` is named: a blob may be deleted then."""
        return not self.damaged and not self.other


def _parsed(data: bytes) -> tuple[tuple[str, ...], bool, dict[str, Any]]:
    """The digests that a pointer names, whether its name is pinned, and what else it has.

    Nothing of that if it is damaged.
    """
    try:
        fields = json.loads(data)
        digests, pinned = tuple(fields.pop("versions")), fields.pop("pinned", False) is True
        sound = all(map(_DIGEST.fullmatch, digests))
        return (digests, pinned, fields) if sound else ((), False, {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (), False, {}
