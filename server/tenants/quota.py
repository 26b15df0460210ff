"""Quotas of tenants: requests and tokens a minute, and requests at the same time.

Minutes are those of the clock (UTC). Tokens that an answer makes beyond its tenant's limit are put
into the minutes that follow, so that they delay the next requests for as long as they would have
taken at the limit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from server.errors import ApiError

if TYPE_CHECKING:
    from limits.aio.storage import Storage
    from redis.asyncio import BlockingConnectionPool

    from server.tenants.tenant import Tenant

logger = logging.getLogger("reft.server")

MINUTE = 60
"""Seconds of a minute, for which a limit holds."""

MOST_MINUTES = 60
"""Tokens over the limit are put into at most so many minutes; what is left then is forgiven."""

SETTLE_SECONDS = 1.0
"""Tokens that answers make are counted at least so often."""

ASK_SECONDS = 0.5
"""A shared counter that takes longer to answer counts as away."""

AWAY_SECONDS = 5.0
"""A shared counter that was away is asked again after this time."""

CONNECTIONS = 16
"""Most connections to a shared counter."""

RETRY_SECONDS = 1
"""When a tenant with too many requests at the same time may try again: nobody knows, soon."""

Reason = Literal["requests", "tokens", "concurrent", "too_large"]
"""Which quota refuses a request; `too_large` is a prompt that no minute has room for."""

Charge = tuple[str, int]
"""A minute's key and what was counted under it."""


class Refused(ApiError):
    """A request that a quota refuses."""

    def __init__(
        self, reason: Reason, message: str, wait: int, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(
            429,
            message,
            code="rate_limit_exceeded",
            kind="tokens" if reason == "tokens" else "requests",
            headers={"retry-after": str(wait), **(headers or {})},
        )
        self.reason: Reason = reason


class TooLarge(ApiError):
    """A prompt with more tokens than its tenant may use in a minute: it can never pass."""

    reason: Reason = "too_large"

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            400,
            f"The prompt has {prompt_tokens} tokens, and this key may use {limit} a minute, so it"
            " can never be answered. Shorten it, send fewer prompts at once, or ask for a higher"
            " tokens_per_minute.",
            code="rate_limit_exceeded",
        )


@dataclass(slots=True)
class Admitted:
    """A request that its tenant's quotas let pass.

    `headers` are those of its answer. `charges` say where its prompt was counted.
    """

    tenant: Tenant
    headers: dict[str, str] = field(default_factory=dict)
    charges: list[Charge] = field(default_factory=list)


@dataclass(slots=True)
class _Due:
    """What a tenant's requests have used, or give back, and what is not counted yet."""

    limit: int
    tokens: int = 0
    refunds: list[Charge] = field(default_factory=list)


class Quotas:
    """Counts what tenants use, in this process or, with a URL, for several servers together.

    Requests at the same time are counted by each server. A shared counter that is away lets every
    request pass until it is back. All methods belong to one event loop.
    """

    def __init__(self, url: str | None = None) -> None:
        self._pool: BlockingConnectionPool | None = None
        self._where = "" if url is None else _shown(url)
        self._storage = _in_memory() if url is None else self._shared(url)
        self._running: Counter[str] = Counter()
        self._due: dict[str, _Due] = {}
        self._asks_again = 0.0
        self._away = False

    @property
    def problem(self) -> str | None:
        """What is wrong, in words that may be shown to anybody; None if all is well."""
        return "the shared counter of quotas is away: no quota holds" if self._away else None

    async def admit(self, tenant: Tenant, prompt_tokens: int) -> Admitted:
        """Let a request pass and count it, with the tokens of all its prompts.

        Whoever is admitted calls `leave` at the end. Raises `Refused` or `TooLarge`; then nothing
        of the request is counted.
        """
        limit = tenant.tokens_per_minute
        if limit is not None and prompt_tokens > limit:
            raise TooLarge(prompt_tokens, limit)
        most = tenant.concurrent_requests
        if most is not None and self._running[tenant.name] >= most:
            raise Refused(
                "concurrent",
                f"This key may have {most} requests under way at the same time. Send this one"
                " again when another has ended.",
                RETRY_SECONDS,
            )
        admitted = Admitted(tenant)
        self._running[tenant.name] += 1

        async def count() -> None:
            await self._settle(tenant.name)
            await self._count(admitted, prompt_tokens)

        try:
            await self._ask(count)
        except BaseException:
            self.leave(admitted, prompt_tokens)
            raise
        return admitted

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Note tokens that an answer has made; they are counted within `SETTLE_SECONDS`.

        What is made while a shared counter is away is never counted, as its requests are not.
        """
        if tenant.tokens_per_minute is not None and not self._away:
            self._due_of(tenant).tokens += tokens

    def leave(self, admitted: Admitted, unused: int) -> None:
        """A request has ended; `unused` of its prompts' tokens are given back."""
        tenant = admitted.tenant
        self._running[tenant.name] -= 1
        if not self._running[tenant.name]:
            del self._running[tenant.name]
        for key, tokens in admitted.charges:
            back = min(unused, tokens)
            if back:
                self._due_of(tenant).refunds.append((key, -back))

    async def watch(self) -> None:
        """Count what answers make, until cancelled."""
        while True:
            await asyncio.sleep(SETTLE_SECONDS)
            await self.settle()

    async def settle(self) -> None:
        """Count what answers have made until now."""
        for name in list(self._due):
            await self._ask(partial(self._settle, name))

    async def close(self) -> None:
        """Count what is left, and close the connections."""
        await self.settle()
        if self._pool is not None:
            await self._pool.disconnect()

    async def _count(self, admitted: Admitted, prompt_tokens: int) -> None:
        """Count a request in this minute; raises `Refused` where there is no room for it."""
        tenant, headers = admitted.tenant, admitted.headers
        minute, second = divmod(time.time(), MINUTE)
        rest = math.ceil(MINUTE - second)
        requests = _key(tenant.name, "requests", int(minute))
        limit, most = tenant.tokens_per_minute, tenant.requests_per_minute
        if limit is not None:
            used = await self._storage.get(_key(tenant.name, "tokens", int(minute)))
            headers |= _headers("tokens", limit, limit - used, rest)
            if used + prompt_tokens > limit:
                if most is not None:
                    left = most - await self._storage.get(requests)
                    headers |= _headers("requests", most, left, rest)
                wait = rest + MINUTE * await self._full_minutes(tenant, int(minute), prompt_tokens)
                raise Refused(
                    "tokens",
                    f"This key may use {limit} tokens a minute, and {used} are used; the prompt has"
                    f" {prompt_tokens}. Send it again in {wait} s.",
                    wait,
                    headers | _headers("tokens", limit, limit - used, wait),
                )
        if most is not None:
            sent = await self._storage.incr(requests, MINUTE, 1)
            headers |= _headers("requests", most, most - sent, rest)
            if sent > most:
                await self._storage.incr(requests, MINUTE, -1)  # the limit may be raised
                raise Refused(
                    "requests",
                    f"This key may send {most} requests a minute. Send this one again in {rest} s.",
                    rest,
                    headers,
                )
        if limit is not None:
            admitted.charges = await self._charge(tenant.name, limit, prompt_tokens)
            left = limit - used - prompt_tokens
            headers |= _headers("tokens", limit, left, rest)

    async def _full_minutes(self, tenant: Tenant, minute: int, tokens: int) -> int:
        """Number of minutes after `minute` that have no room for so many tokens."""
        assert tenant.tokens_per_minute is not None
        for ahead in range(1, MOST_MINUTES):
            used = await self._storage.get(_key(tenant.name, "tokens", minute + ahead))
            if used + tokens <= tenant.tokens_per_minute:
                return ahead - 1
        return MOST_MINUTES - 1

    async def _settle(self, name: str) -> None:
        due = self._due.pop(name, None)
        if due is None:
            return
        if due.tokens:
            await self._charge(name, due.limit, due.tokens)
        for key, tokens in due.refunds:
            await self._storage.incr(key, MINUTE, tokens)

    async def _charge(self, name: str, limit: int, tokens: int) -> list[Charge]:
        """Count tokens in this minute, and what is over the limit in the minutes that follow."""
        charges: list[Charge] = []
        minute = int(time.time() // MINUTE)
        for ahead in range(MOST_MINUTES):
            if tokens <= 0:
                break
            key = _key(name, "tokens", minute + ahead)
            used = await self._storage.incr(key, (ahead + 1) * MINUTE, tokens)
            charges.append((key, tokens))
            tokens = min(tokens, used - limit)
        return charges

    def _due_of(self, tenant: Tenant) -> _Due:
        due = self._due.setdefault(tenant.name, _Due(0))
        due.limit = tenant.tokens_per_minute or due.limit  # it may have changed meanwhile
        return due

    async def _ask(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which asks the counter; while that is away, do nothing."""
        from limits.errors import StorageError

        if self._away:
            if time.monotonic() < self._asks_again:
                return
            # One request finds out whether it is back; the others need not wait for that.
            self._asks_again = time.monotonic() + AWAY_SECONDS
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await work()
        except Refused:
            self._answers()
            raise
        except (StorageError, OSError) as error:
            if not self._away:
                logger.error(
                    "The counter of quotas at %s does not answer (%s): no quota holds until it"
                    " does",
                    self._where,
                    str(error) or "too late",
                )
            self._away, self._asks_again = True, time.monotonic() + AWAY_SECONDS
        else:
            self._answers()

    def _answers(self) -> None:
        if self._away:
            self._away = False
            logger.warning("The counter of quotas at %s answers again", self._where)

    def _shared(self, url: str) -> Storage:
        from limits.aio.storage import RedisStorage
        from redis.asyncio import BlockingConnectionPool

        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=ASK_SECONDS,
            socket_timeout=ASK_SECONDS,
            socket_connect_timeout=ASK_SECONDS,
        )
        return RedisStorage(
            url,
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="reft",
            connection_pool=self._pool,  # type: ignore[arg-type]  # taken, but not in its types
        )


def _in_memory() -> Storage:
    from limits.aio.storage import MemoryStorage

    return MemoryStorage(wrap_exceptions=True)


def _key(name: str, what: Literal["requests", "tokens"], minute: int) -> str:
    return f"{what}/{name}/{minute}"


def _headers(
    what: Literal["requests", "tokens"], limit: int, left: int, wait: int
) -> dict[str, str]:
    """OpenAI's headers for one limit, which is whole again in `wait` seconds."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, left)),
        f"x-ratelimit-reset-{what}": _duration(wait),
    }


def _duration(seconds: int) -> str:
    """A time as OpenAI writes it: 1s, 6m0s."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _shown(url: str) -> str:
    """The address in a URL, without what may be secret."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"
