"""Answers as completions and chats write them: a list of choices, whole or in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from reft_runtime.outputs import Choice, ChoiceDelta, Trace
from server.answers import Writer
from server.errors import ApiError
from server.generation import Run, Step
from server.schemas.common import SamplingBody
from server.streaming import DONE, event


class ChoiceWriter(Writer):
    """What the writers of completions and chats have in common."""

    object: str
    chunk_object: str

    def __init__(self, body: SamplingBody) -> None:
        self._options = body.stream_options
        self._started = False
        self._fields: dict[str, Any] = {}

    def whole(self, run: Run) -> dict[str, Any]:
        """Fields beside the choices, in a whole answer and in a stream's first event."""
        return {}

    @abstractmethod
    def choice(self, run: Run, choice: Choice) -> Mapping[str, Any]:
        """Write a finished choice for a whole answer."""

    @abstractmethod
    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> Sequence[Mapping[str, Any]]:
        """Write the chunks, none to two, that one delta adds to a stream."""

    def body(self, run: Run, choices: list[Choice], traces: list[Trace]) -> dict[str, Any]:
        """Write all choices."""
        written = [self.choice(run, choice) for choice in choices]
        body = _envelope(run, self.object, written) | {"usage": run.usage()} | self.whole(run)
        return body | {"trace": traces} if traces else body

    def events(self, run: Run, step: Step) -> bytes:
        """Write an event for each chunk."""
        chunks = [chunk for index, delta in step for chunk in self.chunks(run, index, delta)]
        common = self._common(run)
        if self._options.continuous_usage_stats:
            common = common | {"usage": run.usage()}
        events = [common | {"choices": [chunk]} for chunk in chunks]
        if events and not self._started:
            events[0] |= self.whole(run)
            self._started = True
        return b"".join(map(event, events))

    def end(self, run: Run, traces: list[Trace]) -> bytes:
        """Write the last event, with the usage and the traces that were asked for, and `DONE`."""
        last: dict[str, Any] = {}
        if self._options.include_usage:
            last["usage"] = run.usage()
        if run.job.trace:
            last["trace"] = traces
        return (event(self._common(run) | last) if last else b"") + DONE

    def broken(self, problem: ApiError) -> bytes:
        """Write the error object, and `DONE`."""
        return event(problem.body()) + DONE

    def _common(self, run: Run) -> dict[str, Any]:
        """Fields of every event of a run; they are made once."""
        if not self._fields:
            self._fields = _envelope(run, self.chunk_object, [])
            if self._options.include_usage:
                self._fields["usage"] = None
        return self._fields


def _envelope(run: Run, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "id": run.job.id,
        "object": kind,
        "created": run.created,
        "model": run.job.label,
        "choices": choices,
    }
