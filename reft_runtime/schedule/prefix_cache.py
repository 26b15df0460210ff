"""Which blocks of keys and values are kept for reuse, and in which place. Knows no tensors.

Kept blocks are evicted, the least recently used first, whenever a sequence needs the room. Where
the tensors lie is the storage's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from reft_runtime.schedule.block_keys import BlockKeys
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.sequence import Sequence
from reft_runtime.stats import PrefixCacheStats


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Block number `block` of a sequence, and the `place` that it is copied from or to."""

    sequence: Sequence
    block: int
    place: int


@dataclass(frozen=True, slots=True)
class StateCopy:
    """The recurrent state of a sequence as it is now, and the `place` that it is copied to."""

    sequence: Sequence
    place: int


class PrefixCache:
    """The places of kept blocks, by key.

    Places are numbers from 0 on, never more than the most blocks that were kept at once. A block
    counts as "base" (the base model's) if no edit stands before its end, else as "own".
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, tuple[int, str]] = OrderedDict()
        self._free: list[int] = []
        self._freed: set[int] = set()
        self._blocks: dict[str, int] = {"base": 0, "own": 0}
        self._queries: dict[str, int] = {"base": 0, "own": 0}
        self._hits: dict[str, int] = {"base": 0, "own": 0}
        self._evictions = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: SequenceOf[bytes]) -> list[int]:
        """Places of the leading `keys` that are kept; this counts as a use of them."""
        found: list[int] = []
        for key in keys:
            if key not in self._kept:
                break
            found.append(self._kept[key][0])
        self._touch(keys[: len(found)])
        return found

    def add(self, keys: SequenceOf[bytes], base: int, limit: int) -> list[tuple[int, int]]:
        """Keep blocks of a sequence, from its beginning on; at most `limit` may be kept in all.

        The first `base` of them are the base model's. Returns index and place of those that were
        not kept yet, whose content the caller must copy. The least recently used blocks are
        evicted; if there is still too little room, the last of `keys` are left out.
        """
        keys = keys[:limit]
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        self._touch(keys)
        self.shrink(limit - len(missing))
        placed = []
        for index in missing:
            place = self._free.pop() if self._free else len(self._kept)
            self._freed.discard(place)
            kind = "base" if index < base else "own"
            self._kept[keys[index]] = place, kind
            self._blocks[kind] += 1
            placed.append((index, place))
        self._touch(keys)
        return placed

    def shrink(self, limit: int) -> None:
        """Evict the least recently used blocks until at most `limit` are kept."""
        while len(self._kept) > limit:
            _, (place, kind) = self._kept.popitem(last=False)
            self._free.append(place)
            self._freed.add(place)
            self._blocks[kind] -= 1
            self._evictions += 1

    def vacant(self) -> tuple[int, ...]:
        """Places that hold no kept block."""
        return tuple(self._free)

    def take_freed(self) -> set[int]:
        """Places that came free since the last call, and are still free."""
        freed, self._freed = self._freed, set()
        return freed

    def count_query(self, keys: BlockKeys, tokens: int) -> None:
        """Note that the first `tokens` tokens of a sequence with these keys were looked for."""
        base = min(tokens, keys.base * BLOCK_TOKENS)
        self._queries["base"] += base
        self._queries["own"] += tokens - base

    def count_hit(self, keys: BlockKeys, start: int, stop: int) -> None:
        """Note that the tokens [start, stop) were found."""
        base = max(0, min(stop, keys.base * BLOCK_TOKENS) - start)
        self._hits["base"] += base
        self._hits["own"] += stop - start - base

    def stats(self) -> PrefixCacheStats:
        """Return a snapshot of the counters."""
        return PrefixCacheStats(
            queries=dict(self._queries),
            hits=dict(self._hits),
            blocks=dict(self._blocks),
            evictions=self._evictions,
        )

    def check_integrity(self, limit: int) -> None:
        """Raise AssertionError unless every place is kept or free, and at most `limit` are kept."""
        places = sorted([*self._free, *(place for place, _ in self._kept.values())])
        if places != list(range(len(places))) or sum(self._blocks.values()) != len(self._kept):
            raise AssertionError("prefix cache: places are lost or given twice")
        if len(self._kept) > limit:
            raise AssertionError(f"prefix cache: {len(self._kept)} blocks kept, {limit} may be")

    def _touch(self, keys: SequenceOf[bytes]) -> None:
        # The first block ends up as the most recently used: without it no later one can be found.
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
