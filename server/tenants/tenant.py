"""One tenant: who sent a request, and what it may see and use."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Role = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends requests with one of some keys, and what it may see and use.

    `patterns` are shell patterns of the interventions that it sees; the rest is unknown to it. An
    admin may change what is served. `weight` is its share of a busy engine beside others'. None
    means no limit.
    """

    name: str
    role: Role = "user"
    patterns: tuple[str, ...] = ("*",)
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def sees(self, name: str) -> bool:
        """Whether the tenant may know of the intervention `name`."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


OWNER = Tenant("(owner)", "admin")
"""Who uses a server without keys, or with one key for everything."""

NOBODY = Tenant("(nobody)", patterns=())
"""Who sends a request that showed no key: it sees nothing."""
