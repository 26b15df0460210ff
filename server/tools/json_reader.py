"""Reads tool calls that are JSON objects from an answer's text, as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Literal

from reft_runtime.interventions.format.strict_json import load_strict
from server.schemas.tools import NAME
from server.tools.formats import JsonFormat, marks_of
from server.tools.json_end import JsonEnd
from server.tools.reader import MAX_OPENING, Delta, ToolReader

_KEY = re.compile(r'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_NAME = re.compile(NAME)
_ARGUMENTS = ("arguments", "parameters")
"""Keys of the arguments: models confuse those of different formats."""


class JsonReader(ToolReader):
    """Reads calls that are JSON; arguments are passed on as the model wrote them.

    With `exact` they are passed on as they come, and a call that is cut off has a part of them, or
    is left out if it has no name yet. Otherwise they are passed on when the call has ended. Without
    a tag only `names` begin a call.
    """

    _form: JsonFormat

    def __init__(self, form: JsonFormat, names: Collection[str], **options: bool) -> None:
        super().__init__(form, **options)
        self._names = frozenset(names)
        self._opening = form.opening(exact=self._exact)
        self._state: Literal["opening", "value", "after"] = "opening"
        self._value: list[str] = []
        self._end = JsonEnd()
        self._direct = ""
        self._left: tuple[str, ...] = ()
        """Marks that may stand behind the arguments: the ends of the call, and of its tag."""
        self._tagged = False

    def _progress(self) -> object:
        return self._in_text, self._state

    def _begin(self, tag: str) -> None:
        super()._begin(tag)
        self._state, self._tagged = "opening", bool(tag)

    def _behind_tag(self) -> Iterator[Delta]:
        match self._state:
            case "opening":
                yield from self._open()
            case "value":
                yield from self._json()
            case "after":
                self._behind()

    def _unfinished(self) -> str:
        if self._state == "after":
            return ""
        self._cut = self._exact and self._state == "value"
        return "" if self._exact else "".join(self._raw) + self._buffer

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
        self._left = self._marks_behind()

    def _marks_behind(self) -> tuple[str, ...]:
        form = self._form
        if not self._direct:
            return ("}", *form.ends) if self._exact else form.ends
        # Where names may stand without an object, each of them has its own tag.
        return (*marks_of(form.direct[2] if form.direct else ""), *(() if form.lead else form.ends))

    def _behind(self) -> None:
        """Read what stands behind a call: its end, that of its tag, or another call."""
        text = self._buffer.lstrip()
        if not text:
            return
        more = "" if self._direct and self._form.lead else (self._form.more or "").strip()
        found = next((mark for mark in self._left if text.startswith(mark)), None)
        if found is not None:
            self._buffer = text[len(found) :]
            self._left = self._left[self._left.index(found) + 1 :]
            self._in_text = found in self._form.ends and not self._left
        elif more and text.startswith(more):
            self._buffer = text[len(more) :]
            super()._begin(more)
            self._state = "opening"
        elif not any(mark.startswith(text) for mark in (*self._left, more)):
            self._in_text = True

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
