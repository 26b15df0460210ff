"""The meter of one request: what it uses, counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.tenants.usage import BASE, Counts, add

if TYPE_CHECKING:
    from server.tenants.quota import Admitted, Quotas
    from server.tenants.usage import Usage


class Meter:
    """Counts what one request uses, to its tenant's quotas and usage.

    A prompt counts from its first step on: one that never had a token costs none, and one whose
    answer is cut off later costs what was made until then. A request counts once, when the first
    of its prompts does. `prompts` are the numbers of tokens of its prompts.
    """

    def __init__(
        self,
        quotas: Quotas,
        usage: Usage,
        admitted: Admitted,
        names: Sequence[str],
        prompts: Sequence[int],
    ) -> None:
        self._used = [0] * len(Counts._fields)
        self._quotas, self._usage, self._admitted = quotas, usage, admitted
        self._intervention = "+".join(names) or BASE
        self._prompts = prompts
        self._cached: dict[int, int] = {}

    @property
    def counts(self) -> Counts:
        """What was used so far."""
        return Counts(*self._used)

    def step(self, prompt: int, cached_tokens: int, made: int) -> None:
        """Count a step that made tokens for a prompt, which had so many from the cache so far."""
        before = self._cached.get(prompt)
        more = (
            0 if self._cached else 1,
            self._prompts[prompt] if before is None else 0,
            cached_tokens - (before or 0),
            made,
        )
        self._cached[prompt] = cached_tokens
        add(self._used, more)
        tenant = self._admitted.tenant
        self._usage.add(tenant.name, self._intervention, more)
        self._quotas.spend(tenant, made)

    def end(self) -> None:
        """The request has ended; gives back what was counted of prompts that had no step."""
        self._quotas.leave(self._admitted, sum(self._prompts) - self.counts.prompt_tokens)
