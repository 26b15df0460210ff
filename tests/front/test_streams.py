"""How events of steps reach the streams of an event loop."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import uvloop

from reft_runtime.engine.events import Event, TokenMade
from reft_runtime.front import streams
from reft_runtime.front.assembly import Assembler
from reft_runtime.front.streams import EventLoopSink, Stream
from reft_runtime.outputs import ChoiceDelta, TokenLogprob
from reft_runtime.text import Tokenizer
from tests.helpers.models import request
from tests.helpers.tokenizer import tiny_tokenizer

A, B, C = (ord(letter) for letter in "abc")


def opened(sink: EventLoopSink, name: str, n: int = 1) -> Stream:
    """A stream of a request of n choices, which ends when its sink does not know it any more."""
    tokenizer = Tokenizer(tiny_tokenizer(), 64)
    assembler = Assembler(request(name, (1, 2), n=n), tokenizer, lambda choice: None)

    def end() -> None:
        del sink.streams[name]

    stream = Stream(assembler, [], end, lambda: None, lambda: True)
    sink.streams[name] = stream
    return stream


def made(name: str, *tokens: int, ends: bool = False) -> list[Event]:
    """One step: a token for each choice."""
    return [
        TokenMade(name, choice, token, TokenLogprob(token, -1.0, ()), "length" if ends else None)
        for choice, token in enumerate(tokens)
    ]


async def test_steps_that_come_together_are_one_delta_for_each_choice() -> None:
    sink = EventLoopSink(asyncio.get_running_loop())
    stream, other = opened(sink, "x", n=2), opened(sink, "y")
    sink(made("x", A, B) + made("y", C))
    sink(made("x", B, C))
    sink(made("x", C, A, ends=True) + made("y", A, ends=True))
    first, second = await anext(stream)
    assert (first.index, first.tokens, first.finish_reason) == (0, (A, B, C), "length")
    assert [logprob.token for logprob in first.logprobs] == [A, B, C]
    assert (second.index, second.tokens, second.finish_reason) == (1, (B, C, A), "length")
    assert second.text == first.text[1:] + first.text[0]
    assert [delta.tokens async for deltas in other for delta in deltas] == [(C, A)]
    assert [deltas async for deltas in stream] == []


async def test_a_loop_rests_after_a_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REST", 1e9)
    monkeypatch.setattr(streams, "LONGEST_REST", 0.5)
    sink = EventLoopSink(asyncio.get_running_loop())
    stream = opened(sink, "x")
    sink(made("x", A))
    assert [delta.tokens for delta in await anext(stream)] == [(A,)]
    sink(made("x", B))
    for _ in range(5):
        await asyncio.sleep(0)
    sink(made("x", C))
    began = asyncio.get_running_loop().time()
    assert [delta.tokens for delta in await anext(stream)] == [(B, C)]
    assert asyncio.get_running_loop().time() - began > 0.1


async def test_a_delivery_ends_although_more_steps_come() -> None:
    sink = EventLoopSink(asyncio.get_running_loop())
    stream = opened(sink, "x")
    feed, fed, heard = stream.feed, 0, list[int]()

    def slowly(event: Event) -> None:
        nonlocal fed
        fed += 1
        time.sleep(0.001)
        if fed < 200:
            sink(made("x", A))  # as the engine's thread does meanwhile
        feed(event)

    stream.feed = slowly  # type: ignore[method-assign]
    stream.listener = lambda: heard.append(fed)
    sink(made("x", A))
    while fed < 200:
        await asyncio.sleep(0.001)
    assert heard[0] < 50


def test_a_short_rest_does_not_keep_the_loop_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's loop rounds its timers to milliseconds."""
    monkeypatch.setattr(streams, "REST", 1e9)
    monkeypatch.setattr(streams, "LONGEST_REST", 0.0014)
    calls = 0
    deliver = EventLoopSink._deliver

    def counted(sink: EventLoopSink) -> None:
        nonlocal calls
        calls += 1
        deliver(sink)

    monkeypatch.setattr(EventLoopSink, "_deliver", counted)

    async def main() -> None:
        sink = EventLoopSink(asyncio.get_running_loop())
        stream = opened(sink, "x")
        for _ in range(20):
            sink(made("x", A))
            await anext(stream)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert calls <= 2 * 20


async def test_a_delta_is_not_of_any_size() -> None:
    sink = EventLoopSink(asyncio.get_running_loop())
    stream = opened(sink, "x", n=2)
    for step in range(70):
        sink(made("x", A, B, ends=step == 69))
    found: dict[int, list[int]] = {}
    async for deltas in stream:
        for delta in deltas:
            found.setdefault(delta.index, []).append(len(delta.tokens))
    assert [sum(lengths) for lengths in found.values()] == [70, 70]
    assert max(length for lengths in found.values() for length in lengths) == streams.JOINED


async def test_no_event_is_lost_or_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST_REST", 0.001)
    sink = EventLoopSink(asyncio.get_running_loop())
    stream = opened(sink, "x")
    tokens = [A + step % 26 for step in range(5000)]

    def steps() -> None:
        for step, token in enumerate(tokens, start=1):
            sink(made("x", token, ends=step == len(tokens)))

    thread = threading.Thread(target=steps)
    thread.start()
    found = [token async for deltas in stream for delta in deltas for token in delta.tokens]
    thread.join()
    assert found == tokens


async def test_a_listener_hears_of_a_step_once_and_of_an_abort() -> None:
    sink = EventLoopSink(asyncio.get_running_loop())
    stream = opened(sink, "x", n=2)
    heard: list[list[ChoiceDelta] | None] = []
    stream.listener = lambda: heard.append(stream.gained())
    sink(made("x", A, B))
    await asyncio.sleep(0.01)
    assert [[delta.index for delta in deltas or ()] for deltas in heard] == [[0, 1]]
    stream.abort()
    assert heard[1:] == [None]


def test_a_loop_that_is_closed_is_told_of_every_time() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    sink = EventLoopSink(loop)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            sink([])
