"""The meter of one request: what it uses, counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.tenants.usage import BASE, Counts, add

if TYPE_CHECKING:
    from server.tenants.quota import Admitted, Quotas
    from server.tenants.usage import Usage

TELL_SECONDS = 0.1
"""How long tokens are gathered before they are passed on: that takes longer than to count one."""


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
        self._used, self._new = ([0] * len(Counts._fields) for _ in range(2))
        self._tells_at = 0.0
        self._quotas, self._usage, self._admitted = quotas, usage, admitted
        self._intervention = "+".join(names) or BASE
        self._prompts = prompts
        self._cached: dict[int, int] = {}

    @property
    def counts(self) -> Counts:
        """What was used until `TELL_SECONDS` ago, or until the end."""
        return Counts(*self._used)

    def step(self, prompt: int, cached_tokens: int, made: int, now: float) -> None:
        """Count a step that made tokens for a prompt, which had so many from the cache so far.

        `now` is in seconds, on any clock that only goes forward.
        """
        new = self._new
        before = self._cached.get(prompt)
        if before is None:
            new[0] += 0 if self._cached else 1
            new[1] += self._prompts[prompt]
        new[2] += cached_tokens - (before or 0)
        new[3] += made
        self._cached[prompt] = cached_tokens
        if before is None or now >= self._tells_at:
            self._tells_at = now + TELL_SECONDS
            self._tell()

    def _tell(self) -> None:
        """Pass on what was counted since the last time."""
        new, self._new = self._new, [0] * len(Counts._fields)
        add(self._used, new)
        tenant = self._admitted.tenant
        self._usage.add(tenant.name, self._intervention, new)
        self._quotas.spend(tenant, new[-1])

    def end(self) -> None:
        """The request has ended; gives back what was counted of prompts that had no step."""
        if any(self._new):
            self._tell()
        self._quotas.leave(self._admitted, sum(self._prompts) - self.counts.prompt_tokens)
