"""What was submitted and has not started: how much of it there may be, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass

from reft_runtime.errors import Overloaded
from reft_runtime.schedule.request import Request


@dataclass(slots=True)
class _Part:
    """One tenant's part of the queue."""

    weight: float
    requests: int = 0
    tokens: int = 0


class QueuedRequests:
    """The requests that wait, with a limit on their number and on their prompt tokens.

    A full queue refuses a tenant only what exceeds its share of the queue too, by the weights of
    the tenants with something in it. So nobody keeps others out by filling it. What waits may
    exceed the limits therefore, but no tenant's own part does. Not thread safe.
    """

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self._requests: dict[str, Request] = {}
        self._parts: dict[str, _Part] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def by_tenant(self) -> dict[str, int]:
        """Number of requests of each tenant that has any."""
        return {tenant: part.requests for tenant, part in self._parts.items()}

    def add(self, request: Request) -> None:
        """Note a request; raises `Overloaded` if the queue is full for its tenant.

        A tenant that has nothing in the queue is not refused.
        """
        tokens = len(request.prompt)
        part = self._parts.get(request.tenant)
        if part is None:
            part = _Part(request.weight)
        else:
            share = part.weight / sum(other.weight for other in self._parts.values())
            if len(self) >= self._most and part.requests >= share * self._most:
                raise Overloaded(f"The queue is full ({part.requests} requests wait).")
            full = self._tokens + tokens > self._most_tokens
            if full and part.tokens + tokens > share * self._most_tokens:
                raise Overloaded(f"The queue is full ({part.tokens} prompt tokens wait).")
        self._parts[request.tenant] = part
        self._requests[request.id] = request
        part.weight = request.weight
        part.requests += 1
        part.tokens += tokens
        self._tokens += tokens

    def discard(self, request_id: str) -> None:
        """Forget a request that has started or is over; one that is not known is ignored."""
        if (request := self._requests.pop(request_id, None)) is None:
            return
        part = self._parts[request.tenant]
        part.requests -= 1
        part.tokens -= len(request.prompt)
        self._tokens -= len(request.prompt)
        if not part.requests:
            del self._parts[request.tenant]
