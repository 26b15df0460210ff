"""Several tenants in one engine: turns, shares, and the same answers as alone."""

from __future__ import annotations

import asyncio

import pytest

from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.caller import Caller
from reft_runtime.errors import Overloaded
from reft_runtime.schedule.pacing import StepPacer, StepTimes
from tests.front.test_engine import GREEDY, expected, opened
from tests.helpers.models import prompt

A, B = Caller("a"), Caller("b")


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be taken for as long as their tokens are many, so that sequences have to rest."""
    times = StepTimes((1, 64), (1.0, 64.0), 1.0)
    monkeypatch.setattr(StepPacer, "times", lambda pacer: times)


async def tokens_of(engine: Engine, length: int, caller: Caller, ended: list[str]) -> list[int]:
    stream = await engine.open(prompt(length), GREEDY, (Use("loreft"),), caller=caller)
    tokens = [token async for deltas in stream for delta in deltas for token in delta.tokens]
    ended.append(caller.tenant)
    return tokens


async def test_answers_beside_another_tenant_are_the_same(long_steps: None) -> None:
    wanted = {length: expected("loreft", prompt(length)) for length in range(5, 21)}
    with opened(max_running=4) as engine:
        ended: list[str] = []
        lengths = [5 + i % 16 for i in range(48)]
        flood = [asyncio.create_task(tokens_of(engine, one, A, ended)) for one in lengths]
        while not engine.stats().generation_tokens:
            await asyncio.sleep(0.001)
        i = 0
        while i < 3 or not engine.stats().preemptions:  # some find a place that is free just then
            assert ended.count("a") < len(flood)
            assert await tokens_of(engine, 9 + i % 3, B, ended) == wanted[9 + i % 3]
            i += 1
        assert await asyncio.gather(*flood) == [wanted[one] for one in lengths]
        assert ended[-1] == "a"


async def test_a_full_queue_has_room_for_another_tenant() -> None:
    with opened(max_running=1, max_queued=2) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        streams = [await engine.open(prompt(9), sampling, caller=A)]
        while engine.stats().waiting:
            await asyncio.sleep(0.001)
        streams += [await engine.open(prompt(9), sampling, caller=A) for _ in range(2)]
        with pytest.raises(Overloaded):
            await engine.open(prompt(9), sampling, caller=A)
        streams.append(await engine.open(prompt(9), sampling, caller=B))
        for stream in streams:
            stream.abort()
        while engine.stats().running:
            await asyncio.sleep(0.001)


async def test_what_waits_is_counted_by_tenant() -> None:
    with opened(max_running=1) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        first = await engine.open(prompt(9), sampling, caller=A)
        while engine.stats().waiting:
            await asyncio.sleep(0.001)
        second = await engine.open(prompt(9), sampling, caller=A)
        assert engine.stats().waiting_by_tenant == {"a": 1}
        assert engine.stats().waiting == 1
        first.abort()
        second.abort()
        while engine.stats().running:
            await asyncio.sleep(0.001)
