"""Which replica a name belongs to: consistent hashing as Ray Serve does it, and rendezvous hashing.

Both send a name always to the same replica, and move few names when a replica joins or leaves.
`Ring` has the hash function, its seed, the number of virtual nodes and the order of fall-backs of
`ray.serve.experimental.consistent_hash_router.ConsistentHashRouter` (Ray 2.60), so it chooses the
very replicas that Ray would choose for replicas with these ids.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import mmh3
import numpy as np
from numpy.typing import NDArray

SEED = 0xF9B4CA77
VIRTUAL_NODES = 100
FALLBACKS = 2

BLOCK = 1 << 20
"""Scores that rendezvous hashing computes at once."""

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


def hash64(key: str) -> int:
    """The lower 64 bits of MurmurHash3 of a text, as Ray takes them."""
    return mmh3.hash64(key.encode(), seed=SEED, signed=False)[0]


def hashes(keys: Sequence[str]) -> Hashes:
    """The hashes of several texts."""
    return np.fromiter((hash64(key) for key in keys), np.uint64, len(keys))


class Placement(Protocol):
    """A way to choose replicas, which are meant by their index."""

    def ranked(self, name: str, count: int) -> list[int]:
        """The first `count` different replicas for a name: its own, and those that step in."""

    def owners(self, names: Hashes, count: int) -> Indices:
        """The same for many names at once, by their hashes; shape [names, count]."""


class Ring:
    """Consistent hashing: every replica has `virtual_nodes` places on a ring of 64-bit numbers.

    A name belongs to the first place behind its own hash; the next different replicas along the
    ring step in. Lists of Python's numbers, as Ray keeps them.
    """

    def __init__(self, replicas: Sequence[str], virtual_nodes: int = VIRTUAL_NODES) -> None:
        places = sorted(
            (hash64(f"{replica}:{node}"), index)
            for index, replica in enumerate(replicas)
            for node in range(virtual_nodes)
        )
        self._hashes = [place for place, _ in places]
        self._replicas = [index for _, index in places]
        self._count = len(replicas)

    def ranked(self, name: str, count: int) -> list[int]:
        """The first `count` different replicas for a name, in the order in which Ray tries them."""
        return self._from(bisect_right(self._hashes, hash64(name)), count)

    def owners(self, names: Hashes, count: int) -> Indices:
        """The same for many names at once, by their hashes; shape [names, count]."""
        first = np.searchsorted(np.array(self._hashes, np.uint64), names, side="right")
        found = np.array([self._from(place, count) for place in range(len(self._hashes))])
        return found[first % len(found)]

    def _from(self, place: int, count: int) -> list[int]:
        """The first different replicas at a place of the ring and behind it."""
        found: dict[int, None] = {}
        for step in range(len(self._replicas)):
            found[self._replicas[(place + step) % len(self._replicas)]] = None
            if len(found) == min(count, self._count):
                break
        return list(found)


class Rendezvous:
    """Rendezvous hashing: every replica has a score for a name, and the highest scores count."""

    def __init__(self, replicas: Sequence[str]) -> None:
        self._replicas = hashes(replicas)

    def ranked(self, name: str, count: int) -> list[int]:
        """The first `count` different replicas for a name."""
        found: list[int] = self.owners(hashes([name]), count)[0].tolist()
        return found

    def owners(self, names: Hashes, count: int) -> Indices:
        """The same for many names at once, by their hashes; shape [names, count]."""
        rows = max(1, BLOCK // len(self._replicas))
        blocks = []
        for start in range(0, len(names), rows):
            scores = mixed(names[start : start + rows, None] ^ self._replicas[None, :])
            if count == 1:
                blocks.append(scores.argmax(axis=1)[:, None])
            else:
                blocks.append(np.argsort(~scores, axis=1, kind="stable")[:, :count])
        return np.concatenate(blocks)


def mixed(values: Hashes) -> Hashes:
    """Scramble 64-bit numbers, one to one, by MurmurHash3's last step."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
