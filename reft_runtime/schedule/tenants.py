"""The tenants that a scheduler serves now: what each holds, and what it may. Knows no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

from reft_runtime.schedule.blocks import blocks_for
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.counters import TokenCounters
from reft_runtime.schedule.sequence import Sequence
from reft_runtime.schedule.shares import Share
from reft_runtime.schedule.waiting import WaitingQueue, turn

RECENT_STEPS = 32
"""Steps for which a tenant is still reckoned with after its last one: it may come back at once, and
then it waits for the end of the step that is under way."""


class Tenants:
    """Who runs or waits, or did lately; a tenant's share is by the weights of those present.

    `running` is the scheduler's list of running sequences, at most `max_running`.
    """

    def __init__(
        self, running: list[Sequence], waiting: WaitingQueue, budget: BlockBudget, max_running: int
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._counters: TokenCounters = waiting.counters
        self._budget = budget
        self._max_running = max_running
        self._steps = 0
        self._seen: dict[str, int] = {}

    @property
    def several(self) -> bool:
        """Whether more than one tenant is present, or was lately."""
        return len(self._seen.keys() | self._waiting.tenants) > 1

    def begin_step(self) -> None:
        """Note who is present at the beginning of a step."""
        self._steps += 1
        self._seen |= dict.fromkeys(self._present(), self._steps)
        if self.several:
            since = self._steps - RECENT_STEPS
            self._seen = {tenant: step for tenant, step in self._seen.items() if step > since}

    def clear(self) -> None:
        """Forget all tenants; nothing may wait or run."""
        self._seen.clear()

    def below_share(self, head: Sequence) -> bool:
        """Whether a waiting sequence's tenant has a right to the place and the blocks for it."""
        tenant = head.request.tenant
        share = self._share(tenant)
        places = self._held(_one)[tenant] + 1
        blocks = self._held(self._budget.held)[tenant] + blocks_for(len(head.tokens) + 1)
        return places <= share * self._max_running and blocks <= share * self._budget.total

    def displaced_by(self, head: Sequence) -> Sequence | None:
        """The running sequence that makes room for a waiting one of a tenant below its share.

        It is the last in turn of the tenants beyond their share, and of these only of tenants that
        were served as much, or more.
        """
        if not self.below_share(head):
            return None
        if len(self._running) >= self._max_running:
            held, room = self._held(_one), self._max_running
        else:
            held, room = self._held(self._budget.held), self._budget.total
        served = self._counters.served
        least = served(head.request.tenant)
        beyond = {
            tenant
            for tenant, number in held.items()
            if number > room * self._share(tenant) and served(tenant) >= least
        }
        return max(
            (sequence for sequence in self._running if sequence.request.tenant in beyond),
            key=lambda sequence: (served(sequence.request.tenant), turn(sequence)),
            default=None,
        )

    def wanted(self, places: int, most_tokens: int) -> dict[str, Share]:
        """What each tenant could take of the next step, if it were alone.

        `places` are free for waiting sequences. A tenant computes at most `most_tokens` of prompts.
        One that was present lately counts as if a sequence of it decoded.
        """
        weight = self._counters.weight
        lately = self._seen.keys() - self._present()
        wanted = {tenant: Share(weight(tenant), decodes=1) for tenant in lately}
        starting = (
            sequence
            for tenant in self._waiting.tenants
            for sequence in islice(self._waiting.of(tenant), places)
        )
        for sequence in (*self._running, *starting):
            tenant = sequence.request.tenant
            share = wanted.setdefault(tenant, Share(weight(tenant)))
            if sequence.decoding:
                share.decodes += 1
            else:
                tokens = share.prompt_tokens + sequence.remaining
                share.prompt_tokens = min(most_tokens, tokens)
        return wanted

    def _present(self) -> set[str]:
        """The tenants of which something runs or waits."""
        return {s.request.tenant for s in self._running}.union(self._waiting.tenants)

    def _share(self, tenant: str) -> float:
        """The tenant's share of places and blocks, 0 to 1."""
        weight = self._counters.weight
        return weight(tenant) / sum(map(weight, self._present()))

    def _held(self, of: Callable[[Sequence], int]) -> Counter[str]:
        held: Counter[str] = Counter()
        for sequence in self._running:
            held[sequence.request.tenant] += of(sequence)
        return held


def _one(sequence: Sequence) -> int:
    return 1
