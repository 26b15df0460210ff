"""A cluster in one event loop: its own fronts and replicas, with a test in Ray Serve's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any

import httpx

from server.cluster.calls import Call, Full, Head, NoReplica, ReplicaDied
from server.cluster.front import Front
from server.cluster.peers import Answers
from server.cluster.replica import Replica
from server.connections import Limits
from server.settings import Settings
from tests.helpers.published import check_published
from tests.http.fake_engine import FakeEngine


class Cluster:
    """Replicas by their names; `asked` is which of them had each call, with its key."""

    def __init__(self, settings: Settings, *names: str) -> None:
        self.engines = {name: FakeEngine() for name in names}
        self.replicas = {
            name: Replica(settings, name, self.broadcast, partial(self._engine, name))
            for name in names
        }
        self.asked: list[tuple[str, str]] = []
        self.calls: list[Call] = []
        self.kept: list[int] = []
        self.dies: list[int] = []
        """For each call to come: after how many pieces its replica dies, be they all."""
        self.pieces = 0
        """Pieces of the last call's answer."""
        self.full = self.empty = self.starts = self.hangs = False

    def _engine(self, name: str, settings: Settings) -> FakeEngine:
        return self.engines[name]

    async def broadcast(self, question: str, *arguments: Any, seconds: float) -> Answers:
        asked = list(self.replicas.values())[: 1 if self.hangs else None]
        answers = [await replica.ask(question, *arguments) for replica in asked]
        return Answers(answers, len(self.replicas) - len(asked))

    async def base(self) -> str:
        if self.empty:
            raise NoReplica
        return next(iter(self.replicas.values())).base

    async def keep(self, data: bytes) -> Any:
        self.kept.append(len(data))

        async def given() -> bytes:
            return data

        return given()

    async def ask(self, call: Call, key: str) -> AsyncIterator[Head | bytes]:
        if self.full:
            raise Full
        if self.empty:
            raise NoReplica
        if self.starts:
            await asyncio.Event().wait()
        names = list(self.replicas)
        # The test's own way to find a replica by a key; without one each has its turn.
        at = int(key, 16) if key else len(self.asked)
        name = names[at % len(names)]
        self.asked.append((name, key))
        self.calls.append(call)
        left = self.dies.pop(0) if self.dies else None
        self.pieces = 0
        async with aclosing(self.replicas[name].answer(call)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if left == 0:
                    raise ReplicaDied
                left = None if left is None else left - 1
                self.pieces += 1
                yield piece
            if left == 0:
                raise ReplicaDied


@asynccontextmanager
async def cluster_of(settings: Settings, *names: str) -> AsyncIterator[Cluster]:
    """A cluster whose replicas run as long as the block lasts."""
    cluster = Cluster(settings, *names)
    async with AsyncExitStack() as stack:
        for replica in cluster.replicas.values():
            await replica.open()
            stack.push_async_callback(replica.close)
        yield cluster


def client_of(
    cluster: Cluster, settings: Settings, limits: Limits | None = None
) -> httpx.AsyncClient:
    """A client of a front of the cluster; its answers are as published."""
    hooks: dict[str, list[Callable[..., Any]]] = {"response": [check_published]}
    transport = httpx.ASGITransport(Front(cluster, settings, limits), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://front", event_hooks=hooks)


def counted(text: str, name: str) -> Mapping[str, float]:
    """The samples of a metric in Prometheus' text, by the label `replica`, added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(f"{name}{{"):
            labels, _, value = line.partition("} ")
            replica = labels.partition('replica="')[2].partition('"')[0]
            found[replica] = found.get(replica, 0) + float(value)
    return found
