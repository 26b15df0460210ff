"""When a request is over: its versions are let go, and its id is free; whoever ended it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.caller import Caller
from reft_runtime.errors import EngineDead, InvalidRequest, OutOfMemory, Overloaded
from reft_runtime.front.streams import Stream
from reft_runtime.schedule.plan import Chunk
from tests.front.test_engine import GREEDY, opened
from tests.helpers.models import prompt, tiny
from tests.helpers.tokenizer import tiny_tokenizer

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with opened(max_running=4) as engine:
        yield engine


def in_flight(engine: Engine) -> int:
    """How many requests hold the version of `several`."""
    return engine.registry.entry("several").in_flight


def wait_for_none(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while in_flight(engine):
        assert time.monotonic() < deadline, "the version is held for ever"
        time.sleep(0.01)


async def test_an_id_belongs_to_one_request_at_a_time(engine: Engine) -> None:
    first = await engine.open(prompt(9), LONG, (Use("several"),), request_id="mine")
    with pytest.raises(InvalidRequest, match=r"request_id: .*'mine' is under way") as refused:
        await engine.open(prompt(12), GREEDY, (Use("several"),), request_id="mine")
    assert refused.value.param == "request_id"
    assert in_flight(engine) == 1
    count = 0
    async for deltas in first:
        count += sum(len(delta.tokens) for delta in deltas)
    assert count == 200
    again = await engine.open(prompt(12), GREEDY, request_id="mine")
    async for _ in again:
        pass
    assert engine.alive
    engine.check_integrity()


async def test_an_id_that_comes_back_gets_its_own_answer(engine: Engine) -> None:
    """While events of the request before it are on their way to the event loop."""
    [whole] = engine.generate([prompt(12)], GREEDY, progress=False)

    def started(tokens: tuple[int, ...], sampling: SamplingParams) -> Stream:
        [prepared] = engine.admission.prepare([tokens], sampling, request_id="mine")
        return engine.start(prepared)

    async def answer(stream: Stream) -> list[int]:
        async with asyncio.timeout(60):
            return [token async for step in stream for delta in step for token in delta.tokens]

    left = started(prompt(9), LONG)
    while engine.stats().steps < 5:
        time.sleep(0.001)
    left.abort()
    ended = started(prompt(12), GREEDY)
    await engine.drained()
    assert await answer(ended) == whole.tokens
    ended = started(prompt(12), GREEDY)
    engine._loop.wait_empty()  # this event loop does not know yet
    again = started(prompt(12), GREEDY)
    assert await answer(again) == whole.tokens
    assert await answer(ended) == whole.tokens
    assert not engine._sinks


async def test_a_trace_that_fails_leaves_the_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the answer is read; who asks for the trace is told."""
    core = engine._loop._core
    run = core.runner.run

    def short(chunks: Sequence[Chunk]) -> Any:
        if any(not chunk.sequence.request.interventions for chunk in chunks):
            raise MemoryError
        return run(chunks)

    monkeypatch.setattr(core.runner, "run", short)
    stream = await engine.open(prompt(9), GREEDY, (Use("several"),), trace=True)
    other = await engine.open(prompt(12), LONG, (Use("loreft"),))
    engine._loop.wait_empty()  # all events wait for this event loop
    for one, tokens in ((stream, 10), (other, 200)):
        assert sum([len(delta.tokens) async for step in one for delta in step]) == tokens
    with pytest.raises(OutOfMemory):
        await stream.trace()
    assert in_flight(engine) == 0


def test_generate_says_that_the_engine_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer(), max_running=2) as engine:

        def broken(_: Any) -> Any:
            raise ValueError("broken")

        monkeypatch.setattr(engine._loop._core.runner, "run", broken)
        with pytest.raises(EngineDead):
            engine.generate([prompt(9)], GREEDY, progress=False)


def test_a_start_that_fails_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("broken")

    before = set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr("reft_runtime.front.engine.EngineLoop", broken)
        with pytest.raises(ValueError, match="broken"):
            Engine(tiny("llama"), tokenizer=tiny_tokenizer(), state_dir=tmp_path)
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
    Engine(tiny("llama"), tokenizer=tiny_tokenizer(), state_dir=tmp_path).close()


@pytest.mark.parametrize("trace", [False, True])
def test_an_event_loop_that_ends_lets_go(engine: Engine, *, trace: bool) -> None:
    async def leave() -> None:
        await engine.open(prompt(9), LONG, (Use("several"),), trace=trace)

    asyncio.run(leave())
    wait_for_none(engine)
    [answer] = engine.generate([prompt(9)], GREEDY, intervention="several")
    assert len(answer.tokens) == 10
    engine.check_integrity()

    async def later() -> None:
        stream = await engine.open(prompt(9), GREEDY)
        assert list(engine._sinks) == [asyncio.get_running_loop()]
        stream.abort()

    asyncio.run(later())


async def test_a_trace_is_of_its_requests_salt_and_ends_in_a_full_queue() -> None:
    with opened(max_running=1, max_queued=1) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        uses = (Use("several"),)
        stream = await engine.open(prompt(48), sampling, uses, caller=Caller(salt=b"a"), trace=True)
        waiting = None
        while waiting is None:  # the queue's one place is free once the first has started
            try:
                waiting = await engine.open(prompt(12), sampling)
            except Overloaded:
                await asyncio.sleep(0.001)
        async for _ in stream:
            pass
        assert len((await stream.trace()).log_ratios[0]) == 4
        async for _ in waiting:
            pass
        other = await engine.open(prompt(48), sampling)
        async for _ in other:
            pass
        assert other.cached_tokens == 0
        own = await engine.open(prompt(48), sampling, caller=Caller(salt=b"a"))
        async for _ in own:
            pass
        assert own.cached_tokens == 32


def test_an_event_loop_that_ends_while_a_request_is_prepared_holds_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    prepare = engine.admission.prepare

    def slowly(*asked: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return prepare(*asked, **options)

    monkeypatch.setattr(engine.admission, "prepare", slowly)

    async def leave() -> None:
        opening = asyncio.ensure_future(engine.open(prompt(9), LONG, [Use("several")]))
        await asyncio.to_thread(begun.wait, 60)
        assert not opening.done()
        threading.Timer(0.2, go_on.set).start()  # when the loop has cancelled its tasks

    asyncio.run(leave())
    wait_for_none(engine)
    engine.check_integrity()
