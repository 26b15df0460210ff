"""Reads tool calls in a syntax of their own from an answer's text, as it comes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from server.marks import held
from server.tools.formats import SyntaxFormat
from server.tools.reader import MAX_OPENING, Delta, ToolReader
from server.tools.syntax import Call, Functions


class SyntaxReader(ToolReader):
    """Reads calls that end with a tag; their arguments, as JSON, come when a call has ended.

    What is no call stays content, and so does one that is cut off within, unless with `exact`,
    where that is left out. `functions` say of which types arguments are.
    """

    _form: SyntaxFormat

    def __init__(self, form: SyntaxFormat, functions: Functions, **options: bool) -> None:
        super().__init__(form, **options)
        self._functions = functions

    def _tags(self) -> tuple[str, ...]:
        head = self._form.head
        return super()._tags() if head is None or self._exact else (self._form.tag, head)

    def _behind_tag(self) -> Iterator[Delta]:
        if self._form.begin is not None:
            yield from self._up_to_the_end(self._form.begin)
            return
        end = self._form.closing
        said, found, behind = self._buffer.partition(end)
        if not found:
            known = len(said) - held(said, end)
            self._buffer = said[known:]
            self._raw.append(said[:known])
            return
        self._buffer = behind
        text, self._raw, self._in_text = "".join([*self._raw, said]), [], True
        before, calls = self._parsed(text)
        if not calls and self._exact:  # the end is a part of a value
            self._in_text, self._raw = False, [text + end]
            return
        yield from self._say(before if calls else text + end)
        yield from self._made(calls)

    def _up_to_the_end(self, begin: re.Pattern[str]) -> Iterator[Delta]:
        """Leave the buffer as it is, if it may begin calls that go on up to the answer's end."""
        if not self._exact and begin.match(self._buffer[:MAX_OPENING]) is None:
            yield from self._give_back()

    def finish(self) -> list[Delta]:
        """Return what was held back; a call of which the end of its tag alone is missing is one."""
        form = self._form
        open_ended = form.begin is not None
        if self._in_text or not (open_ended or (form.syntax.closes and not self._exact)):
            return super().finish()
        ends = form.tokens[-1] if open_ended else form.closing
        rest = self._buffer.rstrip().removesuffix(ends)
        text = "".join([*self._raw, rest[: len(rest) - held(rest, ends)]])
        before, calls = self._parsed(text)
        if not calls:
            return super().finish()
        self._raw, self._buffer, self._in_text = [], "", True
        return [*self._say(before), *self._made(calls), *super().finish()]

    def _parsed(self, text: str) -> tuple[str, list[Call]]:
        """What stands before the calls in a text, and these; none if it has no calls at its end."""
        form, exact = self._form, self._exact
        inner = text.removeprefix(form.tag)
        calls = form.syntax.parsed(inner, self._functions, exact=exact)
        if calls or form.tag not in inner:
            return "", calls
        before, _, inner = text.rpartition(form.tag)  # the first tag may have been one in prose
        return before, form.syntax.parsed(inner, self._functions, exact=exact)

    def _made(self, calls: Iterable[Call]) -> Iterator[Delta]:
        for name, arguments in calls:
            yield from self._call(name)
            yield from self._arguments(arguments)

    def _unfinished(self) -> str:
        self._cut = self._exact
        return "" if self._exact else "".join(self._raw) + self._buffer
