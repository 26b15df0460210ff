"""Grammars that wait to be compiled: of several tenants each has its turn."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

from reft_runtime.errors import Overloaded
from reft_runtime.sampling import Grammar

Waiting = tuple[Grammar, Future[Any]]
"""A grammar, and what is told once it is compiled."""


class TenantQueues:
    """A queue of each tenant, of which one grammar after the other is taken in turn.

    At most `most` wait. Of a tenant that has some waiting more are refused where all places are
    taken, and its part of them is, too; so nobody keeps others out by filling them. Not thread
    safe.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queues: OrderedDict[str, dict[Grammar, Future[Any]]] = OrderedDict()

    def add(self, tenant: str, grammar: Grammar, future: Future[Any]) -> bool:
        """Let a grammar wait; False if it does already. Raises `Overloaded` if there is no room."""
        queue = self._queues.get(tenant, {})
        if grammar in queue:
            return False
        waiting = sum(map(len, self._queues.values()))
        if queue and waiting >= self._most and len(queue) * len(self._queues) >= self._most:
            raise Overloaded(f"{len(queue)} grammars wait to be compiled.")
        queue[grammar] = future
        self._queues[tenant] = queue
        return True

    def take(self) -> Waiting:
        """Take the first one of the tenant whose turn it is; one must be waiting."""
        tenant, queue = next(iter(self._queues.items()))
        grammar = next(iter(queue))
        future = queue.pop(grammar)
        if queue:
            self._queues.move_to_end(tenant)
        else:
            del self._queues[tenant]
        return grammar, future
