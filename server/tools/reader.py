"""Reads tool calls from an answer's text, as it comes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from typing import Any, Literal

from reft_runtime.interventions.format.strict_json import load_strict
from server.marks import held
from server.schemas.tools import NAME
from server.tools.formats import Format
from server.tools.json_end import JsonEnd

Delta = dict[str, Any]
"""What an answer gained: `{"content": ...}` or `{"tool_calls": [...]}`, as OpenAI streams it."""

MAX_OPENING = 256
"""Most characters between a tag and the JSON behind it; a longer text is no call."""

_KEY = re.compile(r'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_NAME = re.compile(NAME)
_ARGUMENTS = ("arguments", "parameters")
"""Keys of the arguments: models confuse those of different formats."""


class ToolReader:
    """Turns the text of one choice into content and tool calls.

    Text before and after calls is content, without the blanks beside a call. A call comes as a
    delta with index, id, type, name and empty arguments, and then its arguments, as the model wrote
    them. What is not a whole call with arguments that are a JSON object stays content.

    `exact` says that a grammar forces every call to have its form: then arguments are passed on as
    they come, and a call that is cut off has a part of them, or is left out if it has no name yet.
    Otherwise they are passed on when the call has ended. With `alone` an answer has calls or text,
    so that a text may contain tags. With `parallel` false, calls after the first are left out.
    Without a tag only `names` begin a call. `named` says that the request asks for one function by
    its name: then the choice ends with `stop`, as OpenAI's do.
    """

    def __init__(
        self,
        form: Format,
        names: Collection[str],
        *,
        exact: bool = False,
        alone: bool = False,
        parallel: bool = True,
        named: bool = False,
    ) -> None:
        self._form = form
        self._names = frozenset(names)
        self._exact = exact
        self._alone = alone
        self._parallel = parallel
        self._named = named
        self._opening = form.opening(exact=exact)
        self._state: Literal["text", "opening", "value", "after"] = "text"
        self._buffer = ""
        """Text that may be the beginning of a tag, or what stands behind one or behind a call."""
        self._raw: list[str] = []
        """All text of what may become a call, from its tag on, up to `_buffer`."""
        self._value: list[str] = []
        self._end = JsonEnd()
        self._direct = ""
        self._open_brace = False
        """Whether the end of a call's object, behind its arguments, has not come yet."""
        self._tagged = False
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
        rest = self._buffer if self._state == "text" else ""
        if self._exact and not self._said and self._form.tag.startswith(rest.strip()):
            rest = ""  # a forced call that was cut before its name
        self._cut = self._exact and self._state == "value"
        if self._state in ("opening", "value") and not self._exact:
            rest = "".join(self._raw) + self._buffer
        self._raw, self._buffer, self._state = [], "", "text"
        deltas = list(self._say(rest))
        if self._space and not self._calls:
            deltas.append({"content": self._space})
        self._space = ""
        return list(_joined(iter(deltas)))

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason why the choice ended, from the engine's; asked for after `finish`.

        A call that a stop string cut is none that could be made.
        """
        whole = self._calls and not self._cut
        return "tool_calls" if reason == "stop" and whole and not self._named else reason

    def _read(self) -> Iterator[Delta]:
        """Read the buffer as far as it can be understood."""
        while True:
            before = self._state, len(self._buffer)
            match self._state:
                case "text":
                    yield from self._text()
                case "opening":
                    yield from self._open()
                case "value":
                    yield from self._json()
                case "after":
                    self._behind()
            if not self._buffer or before == (self._state, len(self._buffer)):
                return

    def _text(self) -> Iterator[Delta]:
        tag = self._form.tag
        if self._form.bare and not self._spoken and self._buffer.lstrip().startswith("{"):
            self._begin("", tagged=False)
            return
        begun = self._buffer.lstrip()
        if self._alone and (self._said or not (begun.startswith(tag) or tag.startswith(begun))):
            said, self._buffer = self._buffer, ""
            yield from self._say(said)
            return
        said, found, behind = self._buffer.partition(tag)
        if found:
            self._buffer = behind
            yield from self._say(said)
            self._begin(tag, tagged=True)
            return
        known = len(said) - held(said, tag)
        self._buffer = said[known:]
        yield from self._say(said[:known])

    def _begin(self, tag: str, *, tagged: bool) -> None:
        self._state, self._tagged, self._raw = "opening", tagged, [tag]

    def _open(self) -> Iterator[Delta]:
        found = self._opening.match(self._buffer[:MAX_OPENING])
        if found is None:
            if len(self._buffer) >= MAX_OPENING:
                yield from self._give_back()
            return
        self._raw.append(found[0])
        self._buffer = self._buffer[found.end() :]
        groups = found.groupdict()
        self._direct = groups.get("direct") or ""
        self._state, self._value, self._end = "value", [], JsonEnd()
        if self._exact:
            yield from self._call(self._direct or groups["name"])

    def _json(self) -> Iterator[Delta]:
        end = self._end.find(self._buffer)
        piece = self._buffer if end is None else self._buffer[:end]
        self._buffer = "" if end is None else self._buffer[end:]
        if self._exact:
            yield from self._arguments(piece)
        else:
            self._raw.append(piece)
            self._value.append(piece)
        if end is None:
            return
        if not self._exact:
            call = self._parsed("".join(self._value))
            if call is None:
                yield from self._give_back()
                return
            yield from self._call(call[0])
            yield from self._arguments(call[1])
        self._state, self._raw = "after", []
        self._open_brace = self._exact and not self._direct

    def _behind(self) -> None:
        """Read what stands behind a call: the end of its object, of its tag, or another object."""
        text = self._buffer.lstrip()
        if not text:
            return
        if self._open_brace and text.startswith("}"):
            self._open_brace, self._buffer = False, text[1:]
            return
        more, end = (None, None) if self._direct else (self._form.more, self._form.end)
        if more and text.startswith(more):
            self._buffer = text[len(more) :]
            self._begin(more, tagged=self._tagged)
        elif end and text.startswith(end):
            self._buffer, self._state = text[len(end) :], "text"
        elif not (end and end.startswith(text)):
            self._state = "text"

    def _give_back(self) -> Iterator[Delta]:
        """Take what was no call as content; a tag may still be in what was not looked at."""
        self._state = "text"
        said, self._raw = "".join(self._raw), []
        yield from self._say(said)
        if not said:  # no tag began it: it is text from its first character on
            self._spoken = True

    def _parsed(self, value: str) -> tuple[str, str] | None:
        """Name and arguments of a call; None if the text is not one."""
        if self._direct:
            return (self._direct, value) if _is_object(value) else None
        if not _is_object(value):
            return None
        fields = _fields(value)
        name = fields.get("name", "")
        name = json.loads(name) if name.startswith('"') else ""
        if not _NAME.fullmatch(name) or not (self._tagged or name in self._names):
            return None
        # A function without parameters is often called without arguments.
        arguments = next((fields[key] for key in _ARGUMENTS if key in fields), "{}")
        if arguments.startswith("{"):
            return name, arguments
        said = json.loads(arguments)
        return (name, said) if isinstance(said, str) and _is_object(said) else None

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


def whole(reader: ToolReader, text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Content (None if there is none) and calls of a whole answer, by a reader of its own."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in reader.push(text) + reader.finish():
        content.append(delta.get("content", ""))
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append({key: piece[key] for key in ("id", "type", "function")})
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


def _fields(value: str) -> dict[str, str]:
    """The values of an object, each as its JSON is written."""
    decoder = json.JSONDecoder()
    fields: dict[str, str] = {}
    at = 1
    while found := _KEY.match(value, at):
        _, at = decoder.raw_decode(value, found.end())
        fields[json.loads(found[1])] = value[found.end() : at]
    return fields


def _is_object(text: str) -> bool:
    try:
        return isinstance(load_strict(text), dict)
    except ValueError:
        return False
