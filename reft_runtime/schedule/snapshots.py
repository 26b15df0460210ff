"""Which recurrent states are kept for reuse, and in which place. Knows no tensors.

A model with recurrent layers has a state of fixed size for each sequence, beside its keys and
values. A *snapshot* is a copy of it at a block boundary: a prompt with the same beginning goes on
from there, if the blocks before it are kept, too. Where the states lie is the storage's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.sequence import Sequence
from reft_runtime.stats import SnapshotStats


class Snapshots:
    """The places of snapshots, by the key of the last block before their boundary.

    `places` is their number: places are 0 to `places - 1`. If all are taken, the least recently
    used snapshot is evicted. A snapshot behind edits is *pending* until a token has come out of its
    sequence: before, nobody knows that it is finite. Nobody finds a pending one, and it is not
    evicted.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._pending: dict[Sequence, dict[bytes, int]] = {}
        self._free = list(reversed(range(places)))
        self._hits = 0
        self._evictions = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: SequenceOf[bytes]) -> tuple[int, int] | None:
        """The last of `keys` that has a snapshot: how many keys lead to it, and its place.

        This counts as a use of the snapshot.
        """
        for count in range(len(keys), 0, -1):
            if (place := self._kept.get(keys[count - 1])) is not None:
                self._kept.move_to_end(keys[count - 1])
                return count, place
        return None

    def is_worth(self, sequence: Sequence, boundary: int, apart: int) -> bool:
        """Whether no snapshot lies within the last `apart` tokens before a boundary, or on it.

        The sequence's own pending ones count, and so does its beginning.
        """
        keys = sequence.block_keys(boundary)
        own = self.pending(sequence)
        near = keys[max(0, boundary - apart) // BLOCK_TOKENS :]
        return boundary >= apart and not any(key in self._kept or key in own for key in near)

    def take(self, sequence: Sequence, *, finite: bool) -> int | None:
        """A place for the state of a sequence, which stands on a boundary without a snapshot.

        Unless it is known to be `finite` it is pending. The caller must copy the state. None if
        every place is pending.
        """
        if not self._free and self._kept:
            self._free.append(self._kept.popitem(last=False)[1])
            self._evictions += 1
        if not self._free:
            return None
        place = self._free.pop()
        key = sequence.block_keys(sequence.computed)[-1]
        kept = self._kept if finite else self._pending.setdefault(sequence, {})
        kept[key] = place
        return place

    def pending(self, sequence: Sequence) -> Collection[bytes]:
        """The keys of a sequence's pending snapshots."""
        return self._pending.get(sequence, ())

    def publish(self, sequence: Sequence) -> None:
        """Let a sequence's pending snapshots be found: a token has come out of it."""
        for key, place in self._pending.pop(sequence, {}).items():
            if key in self._kept:  # another's, that had its token first
                self._free.append(place)
            else:
                self._kept[key] = place

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence's pending snapshots; nothing happens if it has none."""
        self._free += self._pending.pop(sequence, {}).values()

    def clear(self) -> None:
        """Forget all snapshots."""
        self._evictions += len(self._kept)
        self._kept.clear()
        self._pending.clear()
        self._free = list(reversed(range(self.places)))

    def count_hit(self) -> None:
        """Note that a sequence went on from a snapshot."""
        self._hits += 1

    def stats(self) -> SnapshotStats:
        """Return a snapshot of the counters."""
        return SnapshotStats(
            kept=len(self._kept), places=self.places, hits=self._hits, evictions=self._evictions
        )

    def check_integrity(self, live: Collection[Sequence]) -> None:
        """Raise AssertionError unless each place is taken or free, and only `live` have pending."""
        pending = [place for places in self._pending.values() for place in places.values()]
        places = sorted([*self._free, *self._kept.values(), *pending])
        if places != list(range(self.places)):
            raise AssertionError("snapshots: places are lost or given twice")
        if not self._pending.keys() <= set(live):
            raise AssertionError("snapshots: pending ones of a sequence that does not run")
