"""Runs a list of requests to their end from an ordinary thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from tqdm.auto import tqdm

from reft_runtime.engine.events import Event
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.errors import Draining, EngineDead, Overloaded, RequestFailed
from reft_runtime.front.assembly import Assembler
from reft_runtime.front.prepared import Prepared
from reft_runtime.outputs import Choice, Classification, Generation
from reft_runtime.schedule.request import Request
from reft_runtime.use import Use


@dataclass(frozen=True, slots=True)
class Todo:
    """One request that is still to be made: what it applies, and what makes it of a `holding`."""

    uses: Sequence[Use]
    prepare: Callable[..., list[Prepared]]


class Call:
    """One prepared request, and the answer that grows for it."""

    def __init__(self, assembler: Assembler, labels: tuple[str, ...] = ()) -> None:
        self.assembler = assembler
        self.labels = labels
        self.choices = [Choice(index) for index in range(assembler.request.sampling.n)]

    @property
    def request(self) -> Request:
        """The request as the engine gets it."""
        return self.assembler.request

    def answer(self) -> Generation:
        """The whole answer, once it has ended."""
        return Generation(
            list(self.request.prompt),
            self.choices,
            self.assembler.prompt_logprobs,
            self.assembler.cached_tokens,
        )

    def classification(self) -> Classification:
        """Which label it is, once the request has ended."""
        return Classification(
            self.labels,
            self.assembler.label_logprobs,
            list(self.request.prompt),
            self.assembler.cached_tokens,
        )


def run_calls(loop: EngineLoop, calls: Iterable[Call], at_once: int, *, progress: bool) -> None:
    """Run calls to their end, at most `at_once` at a time.

    If a call fails, its error is raised and the other calls are aborted. Raises `EngineDead` if the
    engine stops.
    """
    waiting = deque(calls)
    live: dict[str, Call] = {}
    inbox: SimpleQueue[list[Event]] = SimpleQueue()
    bar = tqdm(total=len(waiting), desc="Answers", disable=not progress, unit="prompt")
    try:
        while waiting or live:
            while waiting and len(live) < at_once:
                try:
                    loop.submit(waiting[0].request, inbox.put)
                except Draining:
                    raise
                except Overloaded:
                    if not live:
                        raise
                    break  # the queue is full for now; calls of this list that end make room
                call = waiting.popleft()
                live[call.request.id] = call
            for event in inbox.get():
                if event.request_id not in live:
                    continue
                call = live[event.request_id]
                if (delta := call.assembler.feed(event)) is not None:
                    call.choices[delta.index].add(delta)
                if call.assembler.over:
                    del live[event.request_id]
                    bar.update()
    except RequestFailed as error:
        if loop.alive:
            raise
        raise EngineDead(error.message) from error
    finally:
        bar.close()
        for request_id in live:
            loop.abort(request_id)
