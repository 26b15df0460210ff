"""Reads tool calls in a syntax of their own from an answer's text, as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from server.marks import held
from server.tools.formats import SyntaxFormat
from server.tools.reader import Delta, ToolReader
from server.tools.syntax import Functions


class SyntaxReader(ToolReader):
    """Reads calls that end with a tag; their arguments, as JSON, come when a call has ended.

    What is no call stays content, and so does one that is cut off, unless with `exact`, where that
    is left out. `functions` say of which types arguments are.
    """

    _form: SyntaxFormat

    def __init__(self, form: SyntaxFormat, functions: Functions, **options: bool) -> None:
        super().__init__(form, **options)
        self._functions = functions

    def _tags(self) -> tuple[str, ...]:
        head = self._form.head
        return super()._tags() if head is None or self._exact else (self._form.tag, head)

    def _behind_tag(self) -> Iterator[Delta]:
        end = self._form.end
        said, found, behind = self._buffer.partition(end)
        if not found:
            known = len(said) - held(said, end)
            self._buffer = said[known:]
            self._raw.append(said[:known])
            return
        self._buffer = behind
        self._raw.append(said)
        text, self._raw, self._in_text = "".join(self._raw), [], True
        tag, parsed = self._form.tag, self._form.syntax.parsed
        before, inner = "", text.removeprefix(tag)
        call = parsed(inner, self._functions)
        if call is None and tag in inner:  # the first tag may have been one in prose
            before, _, inner = text.rpartition(tag)
            call = parsed(inner, self._functions)
        if call is None and self._exact:  # the end is a part of a value
            self._in_text, self._raw = False, [text + end]
            return
        yield from self._say(text + end if call is None else before)
        if call is None:
            return
        yield from self._call(call[0])
        yield from self._arguments(call[1])

    def _unfinished(self) -> str:
        self._cut = self._exact
        return "" if self._exact else "".join(self._raw) + self._buffer
