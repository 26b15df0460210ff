"""Answers as /v1/responses writes them: items of an output, whole or in typed events."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from reft_runtime.outputs import Choice, Trace
from reft_runtime.reasoning import Channels
from server.answers import Writer
from server.choices import ChoiceWriter
from server.errors import ApiError
from server.generation import Run, Step
from server.schemas.answers.responses import ResponseUsage
from server.streaming import named_event
from server.translation import Translation


class _Item(ABC):
    """An item of the output, which grows piece by piece. `index` is its place there."""

    prefix: str
    """The beginning of its id."""

    def __init__(self, run: Run, index: int) -> None:
        self.index = index
        self.id = f"{self.prefix}{run.job.id.partition('_')[2]}_{index}"
        self.pieces: list[str] = []
        self.logprobs: list[Any] = []

    @property
    def place(self) -> dict[str, Any]:
        """How events name the item."""
        return {"item_id": self.id, "output_index": self.index}

    @abstractmethod
    def written(self, status: str) -> dict[str, Any]:
        """Write the item as it is now."""

    @abstractmethod
    def done(self) -> list[tuple[str, dict[str, Any]]]:
        """Types and fields of the events that tell the whole of what came in pieces."""


class _Text(_Item):
    """An item of text, which is its one part."""

    type: str
    kind: str
    """The part's type."""

    fields: ClassVar[dict[str, Any]]
    """What such an item has besides."""

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """Write the part as it is now."""

    def written(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.type,
            "status": status,
            **self.fields,
            "content": [] if status == "in_progress" else [self.part()],
        }

    def done(self) -> list[tuple[str, dict[str, Any]]]:
        part = self.part()
        said: dict[str, Any] = {n: part[n] for n in ("text", "logprobs") if n in part}
        return [
            (f"response.{self.kind}.done", {"content_index": 0, **said}),
            ("response.content_part.done", {"content_index": 0, "part": part}),
        ]


class _Message(_Text):
    prefix = "msg_"
    type = "message"
    kind = "output_text"
    fields: ClassVar[dict[str, Any]] = {"role": "assistant"}

    def part(self) -> dict[str, Any]:
        text = "".join(self.pieces)
        return {"type": self.kind, "text": text, "annotations": [], "logprobs": self.logprobs}


class _Thought(_Text):
    prefix = "rs_"
    type = "reasoning"
    kind = "reasoning_text"
    fields: ClassVar[dict[str, Any]] = {"summary": []}

    def part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": "".join(self.pieces)}


class _Call(_Item):
    prefix = "fc_"

    def __init__(self, run: Run, index: int, call: dict[str, Any]) -> None:
        super().__init__(run, index)
        self._call_id: str = call["id"]
        self._name: str = call["function"]["name"]

    def written(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self.pieces),
        }

    def done(self) -> list[tuple[str, dict[str, Any]]]:
        said = {"name": self._name, "arguments": "".join(self.pieces)}
        return [("response.function_call_arguments.done", said)]


def _answered(run: Run, logprobs: list[Any]) -> list[Any]:
    """Log-probabilities of the tokens behind what the model thinks, and behind a header."""
    if run.job.thinking is None:
        return logprobs
    marks = run.job.thinking.marks
    if isinstance(marks, Channels):
        mark, which = marks.message_id, -1
    elif run.reasoning_tokens:
        mark, which = marks.end_id, 0
    else:
        return logprobs
    text = run.context.engine.tokenizer.token_text(mark)
    behind = [place for place, each in enumerate(logprobs, 1) if each["token"] == text]
    return logprobs[behind[which] :] if behind else logprobs


def _usage(run: Run) -> ResponseUsage:
    usage = run.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": run.reasoning_tokens},
        "total_tokens": usage["total_tokens"],
    }


class ResponseWriter(Writer):
    """Writes what `chat`, the writer of the chat that stands for the request, makes as items.

    Text is a message; what was thought, and every tool call, is an item of its own.
    """

    prefix = "resp_"

    def __init__(self, asked: Translation, chat: ChoiceWriter) -> None:
        self._asked = asked
        self._chat = chat
        self._run: Run | None = None
        self._items: list[_Item] = []
        self._logprobs: list[Any] = []
        self._finish_reason = ""
        self._events = 0

    @property
    def heavy(self) -> bool:
        """Whether log-probabilities, which are many numbers, are asked for."""
        return self._chat.heavy

    def is_large_step(self, run: Run, step: Step, *, fresh: bool) -> bool:
        """Whether it is, or may end a message with many log-probabilities as a call begins."""
        ends = self.heavy and bool(self._asked.chat.tools)
        return ends or super().is_large_step(run, step, fresh=False)

    def body(self, run: Run, choices: list[Choice], traces: list[Trace]) -> dict[str, Any]:
        """Write the answer to the request's only choice."""
        written = self._chat.choice(run, choices[0])
        message = written["message"]
        calls = message.get("tool_calls") or []
        thought = message.get("reasoning_content")
        if thought:
            self._add(_Thought(run, len(self._items))).pieces.append(thought)
        if message["content"] or not (calls or thought):
            text = self._add(_Message(run, len(self._items)))
            text.pieces.append(message["content"] or "")
            text.logprobs += _answered(run, (written["logprobs"] or {}).get("content") or [])
        for call in calls:
            item = self._add(_Call(run, len(self._items), call))
            item.pieces.append(call["function"]["arguments"])
        self._finish_reason = written["finish_reason"]
        return self._ended(run, traces)

    def events(self, run: Run, step: Step) -> bytes:
        """Write the events of one step, before the first ones those that open the stream."""
        events = []
        if self._run is None:
            self._run = run
            begun = self._response(run, "in_progress")
            events.append(self._event("response.created", response=begun))
            events.append(self._event("response.in_progress", response=begun))
        for index, delta in step:
            for chunk in self._chat.chunks(run, index, delta):
                events += self._chunk(run, chunk)
        return b"".join(events)

    def end(self, run: Run, traces: list[Trace]) -> bytes:
        """Write the end of the last item and the whole answer."""
        events = []
        if not self._items or (self._logprobs and isinstance(self._items[-1], _Message)):
            events += self._text(run, "")
        events += self._close()
        response = self._ended(run, traces)
        events.append(self._event(f"response.{response['status']}", response=response))
        return b"".join(events)

    def broken(self, problem: ApiError) -> bytes:
        """Write the failure twice: as the answer's end, and as the error that clients raise."""
        error = problem.body()["error"]
        failed = b""
        if self._run is not None:
            response = self._response(self._run, "failed")
            # What there is of the output is in the events before.
            response["error"] = {"code": "server_error", "message": problem.message}
            failed = self._event("response.failed", response=response)
        said = {name: error[name] for name in ("code", "message", "param")}
        return failed + self._event("error", **said, error=error)

    def _chunk(self, run: Run, chunk: Mapping[str, Any]) -> list[bytes]:
        """Events of one chunk of the chat's."""
        delta = chunk["delta"]
        self._logprobs += (chunk["logprobs"] or {}).get("content") or []
        events = []
        if delta.get("reasoning_content"):
            events += self._thought(run, delta["reasoning_content"])
        if delta.get("content"):
            events += self._text(run, delta["content"])
        for call in delta.get("tool_calls") or []:
            events += self._call(run, call)
        self._finish_reason = chunk["finish_reason"] or self._finish_reason
        return events

    def _thought(self, run: Run, text: str) -> list[bytes]:
        """Events of more of what is thought; there is no place for its log-probabilities."""
        events = []
        if not self._items or not isinstance(self._items[-1], _Thought):
            events += self._close()
            events += self._open(_Thought(run, len(self._items)))
        item = self._items[-1]
        item.pieces.append(text)
        said = {"content_index": 0, "delta": text}
        events.append(self._event("response.reasoning_text.delta", **item.place, **said))
        return events

    def _text(self, run: Run, text: str) -> list[bytes]:
        """Events of new text; log-probabilities of tokens without text go with the next."""
        events = []
        if not self._items or not isinstance(self._items[-1], _Message):
            if not self._items or isinstance(self._items[-1], _Thought):
                self._logprobs = _answered(run, self._logprobs)
            events += self._close()
            events += self._open(_Message(run, len(self._items)))
        item = self._items[-1]
        item.pieces.append(text)
        item.logprobs += self._logprobs
        if text or self._logprobs:
            said = {"content_index": 0, "delta": text, "logprobs": self._logprobs}
            events.append(self._event("response.output_text.delta", **item.place, **said))
        self._logprobs = []
        return events

    def _call(self, run: Run, call: dict[str, Any]) -> list[bytes]:
        """Events of a new call, or of more of the arguments of the last one."""
        events = []
        if call.get("id"):
            events += self._close()
            item = self._add(_Call(run, len(self._items), call))
            events.append(self._item_event("added", item, "in_progress"))
        self._logprobs = []  # of the call's tokens, for which there is no place
        if arguments := call["function"].get("arguments"):
            item = self._items[-1]
            item.pieces.append(arguments)
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **item.place, delta=arguments))
        return events

    def _close(self) -> list[bytes]:
        """Events that end the last item, if there is one."""
        if not self._items:
            return []
        item = self._items[-1]
        events = [self._event(kind, **item.place, **said) for kind, said in item.done()]
        events.append(self._item_event("done", item, self._status(item)))
        return events

    def _open(self, item: _Text) -> list[bytes]:
        """Events that begin an item of text."""
        self._add(item)
        part = {"content_index": 0, "part": item.part()}
        return [
            self._item_event("added", item, "in_progress"),
            self._event("response.content_part.added", **item.place, **part),
        ]

    def _add(self, item: _Item) -> _Item:
        self._items.append(item)
        return item

    def _status(self, item: _Item) -> str:
        cut = self._finish_reason == "length" and item is self._items[-1]
        return "incomplete" if cut else "completed"

    def _ended(self, run: Run, traces: list[Trace]) -> dict[str, Any]:
        cut = self._finish_reason == "length"
        response = self._response(run, "incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["output"] = [item.written(self._status(item)) for item in self._items]
        response["usage"] = _usage(run)
        return response | {"trace": traces} if traces else response

    def _response(self, run: Run, status: str) -> dict[str, Any]:
        return {
            "id": run.job.id,
            "object": "response",
            "created_at": run.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": run.job.label,
            "output": [],
            "usage": None,
            **self._asked.said,
        }

    def _item_event(self, what: str, item: _Item, status: str) -> bytes:
        said = {"output_index": item.index, "item": item.written(status)}
        return self._event(f"response.output_item.{what}", **said)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        return named_event(kind, {"type": kind, "sequence_number": number, **fields})
