"""What pointers say: which uploaded versions a name has, and whether it is pinned."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Pointers:
    """The pointers of a store, as they are known.

    `histories` are the digests of each name's uploaded versions, the current one first; `pinned`
    are the pinned names, and `damaged` those whose pointer cannot be read.
    """

    def __init__(self) -> None:
        self.histories: dict[str, tuple[str, ...]] = {}
        self.pinned: set[str] = set()
        self.damaged: set[str] = set()
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

    def note_file(self, name: str, data: bytes) -> None:
        """Take in what a pointer's file says; a name without versions and pin is damaged."""
        digests, pinned = _parsed(data)
        self.note(name, digests, pinned=pinned)
        if not digests and not pinned:
            self.damaged.add(name)

    def clear(self) -> None:
        """Forget all names."""
        self.histories.clear()
        self.pinned.clear()
        self.damaged.clear()
        self.named.clear()


def pointer_file(digests: Sequence[str], *, pinned: bool) -> bytes:
    """The content of a pointer's file."""
    return json.dumps({"versions": list(digests), **({"pinned": True} if pinned else {})}).encode()


def _parsed(data: bytes) -> tuple[tuple[str, ...], bool]:
    """The digests that a pointer names, and whether its name is pinned; neither if damaged."""
    try:
        fields = json.loads(data)
        digests, pinned = tuple(fields["versions"]), fields.get("pinned", False) is True
        return (digests, pinned) if all(map(_DIGEST.fullmatch, digests)) else ((), False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (), False
