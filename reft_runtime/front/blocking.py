"""Runs lists of requests to their end from an ordinary thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue

from reft_runtime.engine.events import Event
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.errors import Draining, EngineDead, Overloaded, RequestFailed
from reft_runtime.front.admission import Admission
from reft_runtime.front.assembly import Assembler
from reft_runtime.front.prepared import Prepared
from reft_runtime.outputs import Choice, Classification, Generation
from reft_runtime.progress import bar
from reft_runtime.schedule.request import Request
from reft_runtime.text import Tokenizer
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


class BlockingCalls:
    """Answers lists of requests for callers who block; at most `at_once` of a list run at a time.

    A list may be longer than the queue, and apply more than fits into memory together.
    """

    def __init__(
        self, admission: Admission, tokenizer: Tokenizer, loop: EngineLoop, at_once: int
    ) -> None:
        self._admission = admission
        self._tokenizer = tokenizer
        self._loop = loop
        self._at_once = at_once

    def answered(self, todo: Sequence[Todo], *, progress: bool = False) -> list[Call]:
        """Run requests to their end, all at once or as many as memory takes of what they apply.

        If one fails, its error is raised and the others are aborted. Raises what admission raises,
        before anything is computed unless memory takes them in parts only, and `EngineDead` if the
        engine stops.
        """
        done: list[Call] = []
        while len(done) < len(todo):
            with ExitStack() as held:
                calls = self._prepared(todo, len(done), held)
                self._run(calls, progress=progress)
            done += calls
        return done

    def _prepared(self, todo: Sequence[Todo], begin: int, held: ExitStack) -> list[Call]:
        """Prepare the requests from `begin` on that memory has room for, until `held` is closed."""
        calls: list[Call] = []
        for one in todo[begin:]:
            holding = self._admission.acquire(one.uses)
            held.callback(holding.release)
            if calls and not holding.granted:  # it would wait for those before it
                for later in todo[len(calls) :] if begin == 0 else ():
                    self._admission.acquire(later.uses).release()  # is it there?
                break
            [prepared] = one.prepare(holding=holding)
            held.callback(prepared.release)
            assembler = Assembler.of(prepared, self._tokenizer, self._loop.abort)
            calls.append(Call(assembler, prepared.labels))
        return calls

    def _run(self, calls: Sequence[Call], *, progress: bool) -> None:
        waiting = deque(calls)
        live: dict[str, Call] = {}
        inbox: SimpleQueue[list[Event]] = SimpleQueue()
        shown = bar(total=len(waiting), desc="Answers", disable=not progress, unit="prompt")
        try:
            while waiting or live:
                while waiting and len(live) < self._at_once:
                    try:
                        self._loop.submit(waiting[0].request, inbox.put)
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
                        shown.update()
        except RequestFailed as error:
            if self._loop.alive:
                raise
            raise EngineDead(error.message) from error
        finally:
            shown.close()
            for request_id in live:
                self._loop.abort(request_id)
