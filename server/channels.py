"""Reads messages on channels, as gpt-oss writes them, from an answer's text as it comes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from reft_runtime.reasoning import CHANNEL, END, MESSAGE, START, THOUGHTS, Channels
from server.marks import held
from server.schemas.tools import NAME

Kind = Literal["thought", "said"]

CALL = f"{CHANNEL}commentary to=functions."
"""How a call begins in what `ChannelReader` reads as said; behind it stand its name and message."""

_ENDS = (END, START, CHANNEL)
"""Marks that end a message; the last two begin another one, too."""

_MARK = re.compile("|".join(map(re.escape, _ENDS)))
_CALLED = re.compile(r"\bto=functions\.([^\s<]+)")
_CALLED_SHORT = re.compile(rf"\bto=({NAME})(?=[\s<]|$)")
"""The same with less, as the model writes it at times where it does not think."""

_ON = re.compile(rf"{re.escape(CHANNEL)}\s*(\w+)")
_BEGINS = (START, CHANNEL, "to=functions.")
"""What an answer with a header begins with; the last one behind the prompt's own beginning."""


class ChannelReader:
    """Parts the text of one choice at the headers of its messages.

    What stands on the channel of thoughts is thought, and all else is answered. Between two
    messages of a kind stands an empty line. A call is answered with its header, which is always
    written as `CALL`. A text without a header is an answer as it is.
    """

    def __init__(self, channels: Channels, *, open: bool) -> None:
        self._ids = channels
        self._state: Literal["begin", "header", "body", "between"] = "begin"
        self._buffer = ""
        """Text that may be, or be the beginning of, a mark or a header."""
        self._kind: Kind = "said"
        self._kinds: list[Kind] = []
        """The kinds of the messages whose headers have been read."""
        self._spoken: set[Kind] = set()
        self._parted = False
        """Whether an empty line has to come before the next text of the message."""
        self._in_header = True
        self._message = 0
        self._uncounted = Counter[int]()
        """How many tokens of each message are not counted yet."""
        if open:
            self._begin("thought")
            self._in_header = False

    def read(self, text: str, *, ended: bool) -> tuple[str, str]:
        """Take the next text; return what more was thought, and answered. Either may be empty.

        What may yet turn out to be a mark is held back until the text has ended. A header that was
        cut off is left out.
        """
        self._buffer += text
        gained: dict[Kind, str] = {"thought": "", "said": ""}
        for kind, piece in self._pieces():
            gained[kind] += piece
        if ended:
            rest, self._buffer = self._buffer, ""
            if self._state == "body":
                gained[self._kind] += self._said(rest)
            elif self._state == "begin" and not _is_header(rest):
                gained["said"] += rest
        return gained["thought"], gained["said"]

    def count(self, tokens: Iterable[int]) -> int:
        """Take the ids of the text that `read` had; return how many more were thought with.

        The marks and the header of what is thought are among them.
        """
        ids = self._ids
        for token in tokens:
            if not self._in_header and token in (ids.start_id, ids.channel_id):
                self._in_header = True
                self._message += 1
            elif token == ids.message_id:
                self._in_header = False
            self._uncounted[self._message] += 1
        known = [message for message in self._uncounted if message < len(self._kinds)]
        counts = [(self._kinds[message], self._uncounted.pop(message)) for message in known]
        return sum(count for kind, count in counts if kind == "thought")

    def _pieces(self) -> Iterator[tuple[Kind, str]]:
        """Read the buffer as far as it can be understood."""
        while True:
            before = self._state, len(self._buffer)
            match self._state:
                case "begin":
                    self._first()
                case "header":
                    yield from self._header()
                case "body":
                    yield from self._body()
                case "between":
                    self._next()
            if not self._buffer or before == (self._state, len(self._buffer)):
                return

    def _first(self) -> None:
        begun = self._buffer.lstrip()
        if begun.startswith(_BEGINS):
            self._state = "header"
        elif not any(mark.startswith(begun) for mark in _BEGINS):
            self._begin("said")

    def _header(self) -> Iterator[tuple[Kind, str]]:
        header, found, behind = self._buffer.partition(MESSAGE)
        if not found:
            return
        self._buffer = behind
        called, on = _CALLED.search(header), _ON.search(header)
        thought = called is None and on is not None and on[1] == THOUGHTS
        if not thought:
            called = called or _CALLED_SHORT.search(header)
        self._begin("thought" if thought else "said")
        if called is not None:
            yield "said", self._said(f"{CALL}{called[1]}{MESSAGE}")

    def _body(self) -> Iterator[tuple[Kind, str]]:
        found = _MARK.search(self._buffer)
        if found is None:
            known = len(self._buffer) - max(held(self._buffer, mark) for mark in _ENDS)
            piece, self._buffer = self._buffer[:known], self._buffer[known:]
        else:
            piece = self._buffer[: found.start()]
            ended = found[0] == END
            self._buffer = self._buffer[found.end() if ended else found.start() :]
            self._state = "between" if ended else "header"
        yield self._kind, self._said(piece)

    def _next(self) -> None:
        """Look for the next header; a text without one goes on with the answer."""
        begun = self._buffer.lstrip()
        if begun.startswith(_ENDS):
            self._state = "header"
        elif begun and not any(mark.startswith(begun) for mark in _ENDS):
            self._enter("said")

    def _begin(self, kind: Kind) -> None:
        self._kinds.append(kind)
        self._enter(kind)

    def _enter(self, kind: Kind) -> None:
        self._state, self._kind, self._parted = "body", kind, kind in self._spoken

    def _said(self, piece: str) -> str:
        """A piece of the message's text, behind an empty line where one is due."""
        if not piece:
            return ""
        parted, self._parted = self._parted, False
        self._spoken.add(self._kind)
        return "\n\n" + piece if parted else piece


def _is_header(text: str) -> bool:
    """Whether a text is the beginning of a header."""
    begun = text.strip()
    return bool(begun) and any(mark.startswith(begun) for mark in _BEGINS)
