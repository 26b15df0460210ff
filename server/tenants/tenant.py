"""One tenant: who sent a request, and what it may see, use and change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Literal

Role = Literal["user", "admin"]

EVERYTHING = "*"
"""The pattern that every name matches."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request of a tenant may ask for; None means no limit.

    `max_tokens` is also the length of an answer for which the request gives none.
    """

    max_tokens: int | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends requests with one of some keys, and what it may see, use and change.

    `patterns` are shell patterns of the interventions that it sees; the rest is unknown to it. A
    user with `upload` may change, and sees, the names under its own `prefix`. An admin may change
    whatever it sees. `weight` is its share of a busy engine beside others'. None means no limit.
    """

    name: str
    role: Role = "user"
    patterns: tuple[str, ...] = (EVERYTHING,)
    upload: bool = False
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    limits: Limits = Limits()
    _seen: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        either = "|".join(translate(pattern) for pattern in self.patterns)
        object.__setattr__(self, "_seen", re.compile(either or "(?!)"))

    @property
    def prefix(self) -> str:
        """What the names of its own interventions begin with, such as `team-a.`."""
        return f"{self.name}."

    @property
    def sees_all(self) -> bool:
        """Whether every intervention may be known to it."""
        return EVERYTHING in self.patterns

    @property
    def sees_server(self) -> bool:
        """Whether it may be told of all interventions and tenants together."""
        return self.role == "admin" and self.sees_all

    def sees(self, name: str) -> bool:
        """Whether the tenant may know of the intervention `name`."""
        own = self.upload and name.startswith(self.prefix)
        return own or self._seen.match(name) is not None

    def may_change(self, name: str) -> bool:
        """Whether the tenant may upload, replace and remove the intervention `name`."""
        if self.role == "admin":
            return self.sees(name)
        return self.upload and name.startswith(self.prefix)


OWNER = Tenant("(owner)", "admin")
"""Who uses a server without keys, or with the key of `--api-key`."""

NOBODY = Tenant("(nobody)", patterns=())
"""Who sends a request that showed no key: it sees nothing."""
