"""The replicas of a cluster as one of them sees them: each is asked by a broadcast."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from reft_runtime.errors import ReftError, Unavailable
from server.cluster.slots import Slot, held, slots_of
from server.cluster.sums import metrics_text, missing, stats_sum, usage_sum
from server.context import Context
from server.routes.stats import stats_of
from server.tenants.usage import FILE, Found, Query, Usage

logger = logging.getLogger("reft.server")

CATCH_UP_SECONDS = 10.0
"""Seconds in which a replica takes a change in."""

CHANGE_SECONDS = CATCH_UP_SECONDS + 5.0
"""Seconds in which replicas say whether they have taken a change in."""

FIGURES_SECONDS = 5.0
"""Seconds in which replicas tell their figures: Prometheus waits 10 for those of all."""

SILENT = "a replica that does not answer"
"""What is told in place of the name of a replica that is not known to have taken a change in."""


class Answer(NamedTuple):
    """What one replica answers: its name, its slot, and the value that was asked for."""

    replica: str
    slot: str
    value: Any


class Answers(NamedTuple):
    """What those replicas answer that do, and how many did not in time."""

    given: Sequence[Answer]
    late: int


class Broadcast(Protocol):
    """What asks all replicas that live."""

    async def __call__(self, question: str, *arguments: Any, seconds: float) -> Answers:
        """Ask every replica, for so long; those that die meanwhile are left out."""


class Peers:
    """All replicas, asked by the one that calls these methods (`server.replicas.Replicas`).

    `state` is the state folder on this machine, and `slot` what of it is this replica's.
    """

    def __init__(self, broadcast: Broadcast, state: Path, slot: Slot) -> None:
        self._broadcast = broadcast
        self._state = state
        self._slot = slot

    @property
    def folder(self) -> Path | None:
        """Folder of what this replica alone keeps."""
        return self._slot.folder

    async def catch_up(self, name: str) -> Sequence[str]:
        """Let every replica take in what a name stands for; the names of those that have not."""
        try:
            answers = await self._broadcast("catch_up", name, seconds=CHANGE_SECONDS)
        except Exception as error:  # whatever is wrong with the others: the change is made
            logger.error("%s: who has taken the change in is not known: %r", name, error)
            return [SILENT]
        behind = [answer.replica for answer in answers.given if not answer.value]
        return [*behind, *([SILENT] if answers.late else [])]

    async def metrics(self) -> bytes:
        """The metrics of all replicas, and how many do not answer."""
        answers = await self._ask("metrics")
        by_replica = {one.replica: one.value for one in answers.given}
        return await asyncio.to_thread(metrics_text, by_replica, answers.late)

    async def stats(self) -> Mapping[str, Any]:
        """What all replicas say of themselves."""
        answers = await self._ask("stats")
        total = stats_sum([answer.value for answer in answers.given])
        return total | {"problems": [*total["problems"], *missing(answers.late)]}

    async def usage(self, query: Query) -> Found:
        """What was used at all replicas, those that are gone included."""
        answers = await self._ask("usage", query)
        alive = {answer.slot for answer in answers.given}
        gone = await asyncio.to_thread(self._usage_of_gone, query, alive, answers.late)
        found = usage_sum([*(answer.value for answer in answers.given), *gone], query.most)
        return replace(found, problem=next(iter(missing(answers.late)), None))

    def _usage_of_gone(self, query: Query, alive: set[str], late: int) -> list[Found]:
        """What the replicas counted whose slots nobody holds; `late` ones hold theirs."""
        found = []
        for folder in slots_of(self._state):
            if folder.name in alive or not (folder / FILE).exists():
                continue
            with held(folder) as free:
                if not free and late:
                    continue
                if not free:
                    raise Unavailable(
                        "A replica that is starting or ending holds a part of the usage; ask again"
                        " in some seconds."
                    )
                usage = Usage(folder)
                try:
                    found.append(usage.find(query))
                finally:
                    usage.close()
        return found

    async def _ask(self, question: str, *arguments: Any) -> Answers:
        try:
            answers = await self._broadcast(question, *arguments, seconds=FIGURES_SECONDS)
        except TimeoutError:
            answers = Answers((), 0)
        if not answers.given:
            raise Unavailable("No replica answers; try again later.")
        return answers


class Self:
    """One replica's own answers to what `Peers` asks of all."""

    def __init__(self, context: Context, replica: str, slot: str) -> None:
        self._context = context
        self._replica = replica
        self._slot = slot

    async def answer(self, question: str, *arguments: Any) -> Answer:
        """This replica's answer to a question, the name of one of its methods."""
        asked: dict[str, Callable[..., Awaitable[Any]]] = {
            "catch_up": self._catch_up,
            "metrics": self._metrics,
            "stats": self._stats,
            "usage": self._usage,
        }
        return Answer(self._replica, self._slot, await asked[question](*arguments))

    async def _catch_up(self, name: str) -> bool:
        """Take a change of a name in; whether that was done."""
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._context.change(self._context.whole.registry.catch_up, name)
        except (ReftError, TimeoutError) as error:
            logger.error("%s: the change is not taken in: %s", name, error or "too late")
            return False
        return True

    async def _metrics(self) -> Any:
        registry = self._context.metrics.registry
        return await self._context.administer(lambda: list(registry.collect()))

    async def _stats(self) -> Any:
        return await self._context.administer(stats_of, self._context)

    async def _usage(self, query: Query) -> Any:
        return await self._context.administer(self._context.usage.find, query)
