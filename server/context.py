"""What every route needs: the engine, the settings, the metrics, the health, and who asks."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from fastapi import Depends, Request
from starlette.types import Scope

from server.health import Health
from server.metrics import Metrics
from server.recent import Rates
from server.replicas import Replicas
from server.settings import Settings
from server.tenants.keys import Keys
from server.tenants.quota import Quotas
from server.tenants.tenant import NOBODY, Tenant
from server.tenants.usage import Usage
from server.tenants.view import View
from server.threads import THREADS, TenantThreads, started_pool
from server.tools import Tools

if TYPE_CHECKING:
    from reft_runtime.interventions.registry.entry import Change
    from server.engine import Engine, WholeEngine


P = ParamSpec("P")
R = TypeVar("R")

ADMIN_THREADS = 4
"""Threads for listings and metrics; requests use asyncio's own threads."""

CHANGE_THREADS = 4
"""Threads for changes and for files that are read, which wait for the network if it is slow."""

TENANT_THREADS = max(2, THREADS // 2)
"""Most threads in which one tenant's requests are read and prepared at once, if there are keys."""

MAX_DOWNLOADS = 16
"""Most files sent at the same time; each is open until its client has received it."""

BODIES_BYTES = 256 * 2**20
"""Most bytes of bodies of all requests under way; twice the largest body if that is more."""


class BodyBudget:
    """Bytes held for the bodies of the requests under way, which share one bound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, scope: Scope, size: int) -> bool:
        """Hold `size` more bytes for a request; False if there is no room."""
        if self.held + size > self.limit:
            return False
        self.held += size
        scope["state"]["body_bytes"] = scope["state"].get("body_bytes", 0) + size
        return True

    def give_back(self, scope: Scope) -> None:
        """Release the bytes held for a request that has ended."""
        self.held -= scope["state"].pop("body_bytes", 0)


class Made(NamedTuple):
    """A change that was made, and the names of the replicas that have not taken it in."""

    change: Change
    behind: Sequence[str]


class Tracing(Protocol):
    """What makes spans of requests, where a collector wants them: `server.tracing`."""

    @property
    def problem(self) -> str | None:
        """Why spans are lost; None while the collector takes them."""

    def ended(self, scope: Scope, status: int | None, seconds: float) -> str | None:
        """Make the span of a request that has just ended; returns the id of its trace, if any."""

    def close(self) -> None:
        """Send what is left."""


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts, and the tenant that uses them for one request.

    Handlers reach the registry by `registry`, which keeps to what the tenant sees; `whole`, the
    engine with all of it, is for the server itself. `replicas` are the servers of its cluster, None
    if it is by itself. `started` is Unix time in seconds, `up_since` the same on a clock that does
    not jump. Raises `ConfigError` for a keys file that is not usable.
    """

    whole: WholeEngine
    settings: Settings
    metrics: Metrics
    health: Health
    replicas: Replicas | None = None
    tracing: Tracing | None = None
    tenant: Tenant = NOBODY
    request_id: str = ""
    started: int = field(default_factory=lambda: int(time.time()))
    up_since: float = field(default_factory=time.monotonic)
    bodies: BodyBudget = field(init=False)
    tools: Tools = field(init=False)
    keys: Keys = field(init=False)
    quotas: Quotas = field(init=False)
    usage: Usage = field(init=False)
    rates: Rates = field(default_factory=Rates)
    downloads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_DOWNLOADS))
    threads: TenantThreads = field(default_factory=lambda: TenantThreads(TENANT_THREADS))
    _admin: ThreadPoolExecutor = field(
        default_factory=lambda: started_pool(ADMIN_THREADS, "reft-admin")
    )
    _changes: ThreadPoolExecutor = field(
        default_factory=lambda: started_pool(CHANGE_THREADS, "reft-change")
    )

    def __post_init__(self) -> None:
        limit = max(BODIES_BYTES, 2 * self.settings.max_body_bytes)
        object.__setattr__(self, "bodies", BodyBudget(limit))
        object.__setattr__(self, "tools", Tools(self.engine.tokenizer, self.settings))
        object.__setattr__(self, "keys", Keys.of(self.settings))
        url = self.settings.quota_url
        quotas = Quotas(None if url is None else url.get_secret_value())
        object.__setattr__(self, "quotas", quotas)
        folder = self.settings.state_folder if self.replicas is None else self.replicas.folder
        object.__setattr__(self, "usage", Usage(folder))

    @property
    def engine(self) -> Engine:
        """The engine, without its registry."""
        return self.whole

    @property
    def registry(self) -> View:
        """The registry as the tenant sees it."""
        in_cluster = self.replicas is not None
        return View(self.whole.registry, self.tenant, self.request_id, in_cluster=in_cluster)

    def of(self, tenant: Tenant, request_id: str) -> Context:
        """The same parts, as `tenant` uses them for the request of this id."""
        own = copy.copy(self)
        object.__setattr__(own, "tenant", tenant)
        object.__setattr__(own, "request_id", request_id)
        return own

    def problems(self) -> list[str]:
        """What is wrong with what the server keeps or asks, in words that anybody may read."""
        parts = (self.keys, self.usage, self.quotas, self.tracing)
        found = [None if part is None else part.problem for part in parts]
        return [problem for problem in found if problem is not None]

    async def work(self, call: Callable[[], R]) -> R:
        """Run a part of a request that may take long in a thread.

        A tenant's requests have a part of the threads; without keys all are everybody's.
        """
        if not self.keys.configured:
            return await asyncio.to_thread(call)
        return await self.threads.run(self.tenant.name, call)

    async def administer(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function`, which may take long, in a thread that no completion waits for."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._admin, work)

    async def change(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function`, which may wait for a URL, in a thread that no listing waits for."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._changes, work)

    async def make(
        self,
        change: Callable[Concatenate[str, P], Change],
        name: str,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Made:
        """Change what a name stands for, here and then on every replica of the cluster."""
        made = await self.change(change, name, *args, **kwargs)
        behind = () if self.replicas is None else await self.replicas.catch_up(name)
        return Made(made, behind)

    def close(self) -> None:
        """Cancel administrative work that has not begun, and take no more."""
        for threads in (self._admin, self._changes):
            threads.shutdown(wait=False, cancel_futures=True)


async def _context(request: Request) -> Context:  # async: FastAPI runs other functions in a thread
    context: Context = request.app.state.context
    return context.of(getattr(request.state, "tenant", NOBODY), request.state.request_id)


Current = Annotated[Context, Depends(_context)]
"""A route's parameter of this type gets the app's context, with the tenant whose key was shown."""
