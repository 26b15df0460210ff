"""The sequences that wait for their turn. Knows no tensors."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, KeysView
from collections.abc import Sequence as SequenceOf
from itertools import chain

from reft_runtime.schedule.counters import TokenCounters
from reft_runtime.schedule.sequence import Sequence


def turn(sequence: Sequence) -> tuple[int, int, int]:
    """What sorts the sequences of one tenant: the lowest priority first, then as they came."""
    return sequence.request.priority, sequence.order, sequence.choice


class WaitingQueue:
    """Waiting sequences by tenant.

    The next is of the tenant with the smallest counter, and of several tenants with the same
    counter of the one that waits for the shortest time: it was lifted to the others, and has
    nothing yet. Within a tenant they go in `turn`.
    """

    def __init__(self, counters: TokenCounters) -> None:
        self.counters = counters
        self._queues: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._queues.values())

    @property
    def tenants(self) -> KeysView[str]:
        """The tenants that have something waiting."""
        return self._queues.keys()

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn is next; None if none waits."""
        if not self._queues:
            return None
        return self._queues[min(reversed(self._queues), key=self.counters.served)][0]

    def of(self, tenant: str) -> SequenceOf[Sequence]:
        """What waits of one tenant, the next one first."""
        return self._queues.get(tenant, ())

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence in its turn."""
        request = sequence.request
        self.counters.enter(request.tenant, request.weight, self._queues.keys())
        insort(self._queues.setdefault(request.tenant, []), sequence, key=turn)

    def pop(self, sequence: Sequence) -> None:
        """Remove a sequence that starts."""
        self.discard(sequence)
        self.counters.turn(sequence.request.tenant)

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence; nothing happens if it does not wait."""
        tenant = sequence.request.tenant
        queue = self._queues.get(tenant, [])
        place = bisect_left(queue, turn(sequence), key=turn)
        if place < len(queue) and queue[place] is sequence:
            del queue[place]
            if not queue:
                del self._queues[tenant]
