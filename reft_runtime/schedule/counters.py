"""What each tenant was served, in virtual tokens: whose turn is next. Knows no tensors.

These are the virtual token counters of "Fairness in Serving Large Language Models" (Sheng et al.,
2024, arXiv:2401.00588): the tenant that was served least is next, and one that had nothing waiting
is lifted to those that have, because time in which it asked for nothing is no credit.
"""

from __future__ import annotations

from collections.abc import Collection

PROMPT_COST = 1.0
"""Virtual tokens of one token that is computed as part of a prompt."""

DECODE_COST = 2.0
"""Virtual tokens of one token that is computed while decoding. In a full batch it takes 1.3 (a
large model on a device) to 3 (a small one on a CPU) times as long as a prompt token; the paper's
choice lies between."""


class TokenCounters:
    """A counter for each tenant: the virtual tokens that it was served, over its weight.

    Counters are only compared with each other. A tenant's weight is that of its last request.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last = ""

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """The tenant's weight."""
        return self._weights[tenant]

    def enter(self, tenant: str, weight: float, waiting: Collection[str]) -> None:
        """Note that the tenant asks for something; `waiting` are the tenants that wait already.

        If it is not among them it is lifted to the least of them, or to the tenant whose turn was
        last if nobody waits.
        """
        self._weights[tenant] = weight
        if tenant in waiting:
            return
        least = min(map(self.served, waiting), default=self.served(self._last))
        self._served[tenant] = max(self.served(tenant), least)

    def turn(self, tenant: str) -> None:
        """Note that it was the tenant's turn."""
        self._last = tenant

    def charge(self, tenant: str, cost: float) -> None:
        """Add virtual tokens to the tenant's counter, by its weight."""
        self._served[tenant] += cost / self._weights[tenant]

    def clear(self) -> None:
        """Forget all tenants; nothing may wait or run."""
        self._served.clear()
        self._weights.clear()
