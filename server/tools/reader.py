"""Reads tool calls from an answer's text, as it comes."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from server.marks import held
from server.schemas.answers.chat import ChatEnd, ChatToolCall
from server.tools.formats import Format

MAX_OPENING = 256
"""Most characters between a tag, or an answer's beginning, and a call; a longer text is none."""

Delta = dict[str, Any]
"""What an answer gained: `{"content": ...}` or `{"tool_calls": [...]}`, as OpenAI streams it."""


class ToolReader(ABC):
    """Turns the text of one choice into content and tool calls.

    Text before and after calls is content, without the blanks beside a call. A call comes as a
    delta with index, id, type, name and empty arguments, and then its arguments. What is not a
    whole call with arguments that are a JSON object stays content.

    `exact` says that a grammar forces every call to have its form. With `alone` an answer has calls
    or text, so that a text may contain tags. With `parallel` false, calls after the first are left
    out. `named` says that the request asks for one function by its name: then the choice ends with
    `stop`, as OpenAI's do.
    """

    def __init__(
        self,
        form: Format,
        *,
        exact: bool = False,
        alone: bool = False,
        parallel: bool = True,
        named: bool = False,
    ) -> None:
        self._form = form
        self._exact = exact
        self._alone = alone
        self._parallel = parallel
        self._named = named
        self._in_text = True
        """Whether what comes next is content, as far as is known."""
        self._buffer = ""
        """Text that may be the beginning of a tag, or what stands behind one or behind a call."""
        self._raw: list[str] = []
        """All text of what may become a call, from its tag on, up to `_buffer`."""
        self._spoken = False
        self._said = False
        """Whether there was content; `_spoken` is true after a call, too."""
        self._space = ""
        self._calls = 0
        self._cut = False

    def push(self, text: str) -> list[Delta]:
        """Take the next text; return what the answer gained, often nothing."""
        self._buffer += text
        return list(_joined(self._read()))

    def finish(self) -> list[Delta]:
        """Return what was held back, at the end of the text."""
        rest = self._buffer if self._in_text else self._unfinished()
        if self._exact and not self._said and self._form.tag.startswith(rest.strip()):
            rest = ""  # a forced call that was cut before its name
        self._raw, self._buffer, self._in_text = [], "", True
        deltas = list(self._say(rest))
        if self._space and not self._calls:
            deltas.append({"content": self._space})
        self._space = ""
        return list(_joined(iter(deltas)))

    def finish_reason(self, reason: ChatEnd | None) -> ChatEnd | None:
        """OpenAI's reason why the choice ended, from the engine's; asked for after `finish`.

        A call that a stop string cut is none that could be made.
        """
        whole = self._calls and not self._cut
        return "tool_calls" if reason == "stop" and whole and not self._named else reason

    @abstractmethod
    def _behind_tag(self) -> Iterator[Delta]:
        """Read the buffer, which is not in a text, as far as it can be understood."""

    @abstractmethod
    def _unfinished(self) -> str:
        """What of the text outside of content is content after all, now that nothing follows."""

    def _tags(self) -> tuple[str, ...]:
        """What begins a call in a text."""
        return (self._form.tag,)

    def _begins_bare(self) -> bool:
        """Whether the buffer begins with a call that has no tag."""
        bare = self._form.bare
        return bool(bare) and not self._spoken and self._buffer.lstrip().startswith(bare)

    def _progress(self) -> object:
        """What changes, beside the buffer's length, with every step that reads something."""
        return self._in_text

    def _read(self) -> Iterator[Delta]:
        """Read the buffer as far as it can be understood."""
        while True:
            before = self._progress(), len(self._buffer)
            yield from self._text() if self._in_text else self._behind_tag()
            if not self._buffer or before == (self._progress(), len(self._buffer)):
                return

    def _text(self) -> Iterator[Delta]:
        tag = self._form.tag
        if self._begins_bare():
            self._begin("")
            return
        begun = self._buffer.lstrip()
        if self._alone and (self._said or not (begun.startswith(tag) or tag.startswith(begun))):
            said, self._buffer = self._buffer, ""
            yield from self._say(said)
            return
        tags = self._tags()
        places = [(at, each) for each in tags if (at := self._buffer.find(each)) >= 0]
        if places:
            at, tag = min(places)
            said, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            yield from self._say(said)
            self._begin(tag)
            return
        known = len(self._buffer) - max(held(self._buffer, each) for each in tags)
        said, self._buffer = self._buffer[:known], self._buffer[known:]
        yield from self._say(said)

    def _begin(self, tag: str) -> None:
        self._in_text, self._raw = False, [tag]

    def _give_back(self) -> Iterator[Delta]:
        """Take what was no call as content; a tag may still be in what was not looked at."""
        self._in_text = True
        said, self._raw = "".join(self._raw), []
        yield from self._say(said)
        if not said:  # no tag began it: it is text from its first character on
            self._spoken = True

    def _call(self, name: str) -> Iterator[Delta]:
        self._calls += 1
        self._space = ""
        self._spoken = True
        if self._calls > 1 and not self._parallel:
            return
        length = self._form.id_length
        call_id = uuid.uuid4().hex[:length] if length else f"call_{uuid.uuid4().hex[:24]}"
        yield _call_delta(
            self._calls - 1,
            {"name": name, "arguments": ""},
            {"id": call_id, "type": "function"},
        )

    def _arguments(self, piece: str) -> Iterator[Delta]:
        if piece and (self._calls == 1 or self._parallel):
            yield _call_delta(self._calls - 1, {"arguments": piece})

    def _say(self, text: str) -> Iterator[Delta]:
        """Pass on content, but for blanks at its end, which a call may follow."""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._spoken = self._said = True
            yield {"content": said}


def whole(reader: ToolReader, text: str) -> tuple[str | None, list[ChatToolCall]]:
    """Content (None if there is none) and calls of a whole answer, by a reader of its own."""
    content: list[str] = []
    calls: list[ChatToolCall] = []
    for delta in reader.push(text) + reader.finish():
        content.append(delta.get("content", ""))
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append(
                    {"id": piece["id"], "type": piece["type"], "function": piece["function"]}
                )
            else:
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    said = "".join(content)
    return (said if said or not calls else None), calls


def _call_delta(index: int, function: dict[str, str], head: dict[str, str] | None = None) -> Delta:
    return {"tool_calls": [{"index": index, **(head or {}), "function": function}]}


def _joined(deltas: Iterator[Delta]) -> Iterator[Delta]:
    """Join pieces of content that follow each other."""
    said = ""
    for delta in deltas:
        if "content" in delta:
            said += delta["content"]
            continue
        if said:
            yield {"content": said}
            said = ""
        yield delta
    if said:
        yield {"content": said}
