"""Streams are followed on the event loop: a step is taken when it is told, or after what waits."""

from __future__ import annotations

import asyncio

import pytest

from reft_runtime.errors import RequestFailed
from reft_runtime.outputs import ChoiceDelta, TokenLogprob, Trace
from server.following import Follower, Rest

Taken = list[tuple[int, str]]


class Told:
    """A stream that gains what the test says; None ends it, an error fails it."""

    queue_seconds = None
    cached_tokens = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    label_logprobs = ()

    def __init__(self) -> None:
        self.listener = self._nobody
        self._deltas: list[ChoiceDelta] = []
        self._end: Exception | None = None
        self._ended = False

    def _nobody(self) -> None:
        raise AssertionError("nobody listens")

    def tell(self, *texts: str, end: bool = False, error: Exception | None = None) -> None:
        self._deltas += [ChoiceDelta(0, text) for text in texts]
        self._ended, self._end = end or error is not None, error
        self.listener()

    def gained(self) -> list[ChoiceDelta] | None:
        deltas, self._deltas = self._deltas, []
        if not deltas and self._end is not None:
            raise self._end
        return deltas or (None if self._ended else [])

    async def trace(self) -> Trace:
        raise NotImplementedError

    def abort(self) -> None:
        raise NotImplementedError


class Taker:
    """Takes steps at once, or, while `busy`, lets them wait for `free`."""

    def __init__(self) -> None:
        self.taken: Taken = []
        self.busy = False
        self.free = asyncio.Event()
        self.cancelled = False

    def __call__(self, position: int, deltas: list[ChoiceDelta]) -> Rest:
        self.taken += [(position, delta.text) for delta in deltas]
        if deltas[0].text == "bad":
            raise ValueError("cannot be written")
        return self._rest() if self.busy else None

    async def _rest(self) -> None:
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.fixture
def streams() -> list[Told]:
    return [Told(), Told()]


async def following(streams: list[Told], take: Taker) -> asyncio.Task[None]:
    task = asyncio.ensure_future(Follower(streams, take).run())
    await asyncio.sleep(0)  # it has looked at all streams, and sleeps
    return task


async def test_a_step_is_taken_before_the_task_wakes(streams: list[Told]) -> None:
    take = Taker()
    task = await following(streams, take)
    streams[1].tell("a")
    streams[0].tell("b", "c")
    assert take.taken == [(1, "a"), (0, "b"), (0, "c")]  # nothing was awaited
    streams[0].tell("d", end=True)
    streams[1].tell(end=True)
    await task
    assert take.taken[3:] == [(0, "d")]
    for stream in streams:
        with pytest.raises(AssertionError, match="nobody listens"):
            stream.tell("too late")  # listeners are as they were before


async def test_what_streams_have_already_is_taken(streams: list[Told]) -> None:
    for stream in streams:
        stream.listener = lambda: None
    streams[1].tell("early", end=True)
    streams[0].tell("whole", end=True)
    take = Taker()
    await Follower(streams, take).run()
    assert sorted(take.taken) == [(0, "whole"), (1, "early")]


async def test_nothing_is_taken_while_a_step_waits(streams: list[Told]) -> None:
    take = Taker()
    task = await following(streams, take)
    take.busy = True
    streams[0].tell("waits")
    streams[0].tell("x")
    streams[1].tell("y")
    await asyncio.sleep(0)
    streams[1].tell("z")
    assert take.taken == [(0, "waits")]
    take.busy = False
    take.free.set()
    while len(take.taken) < 4:
        await asyncio.sleep(0)
    assert sorted(take.taken[1:]) == [(0, "x"), (1, "y"), (1, "z")]
    streams[0].tell(end=True)
    streams[1].tell("last", end=True)
    await task
    assert take.taken[-1] == (1, "last")


@pytest.mark.parametrize("busy", [False, True])
async def test_an_error_of_a_stream_ends_it(streams: list[Told], busy: bool) -> None:
    take = Taker()
    take.busy = busy
    task = await following(streams, take)
    streams[1].tell("shown", error=RequestFailed("broken"))
    take.free.set()
    with pytest.raises(RequestFailed, match="broken"):
        await task
    assert take.taken == [(1, "shown")]


async def test_an_error_of_the_taker_reaches_the_task_alone(streams: list[Told]) -> None:
    task = await following(streams, Taker())
    streams[0].tell("bad")  # raises nothing here, where other requests are told of theirs
    streams[1].tell("good")
    with pytest.raises(ValueError, match="cannot be written"):
        await task


@pytest.mark.parametrize("began", [False, True])
async def test_a_step_that_waits_is_dropped_with_the_task(streams: list[Told], began: bool) -> None:
    take = Taker()
    task = await following(streams, take)
    take.busy = True
    streams[0].tell("waits")
    if began:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert take.cancelled == began  # a rest that never began is closed, and warns of nothing


async def test_a_cancelled_task_takes_no_more(streams: list[Told]) -> None:
    take = Taker()
    task = await following(streams, take)
    task.cancel()
    streams[0].tell("late")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not take.taken
