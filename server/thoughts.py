"""Tells what a model thinks from what it answers, in an answer's text, as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from reft_runtime.reasoning import Channels
from server.channels import ChannelReader
from server.marks import held

if TYPE_CHECKING:
    from reft_runtime.reasoning import Marks, Thinking


def reader_of(thinking: Thinking) -> Reader:
    """A reader of the text of one choice."""
    if isinstance(thinking.marks, Channels):
        return ChannelReader(thinking.marks, open=thinking.open)
    return ThoughtReader(thinking.marks, open=thinking.open)


class ThoughtReader:
    """Parts the text of one choice at the model's marks.

    Blanks beside the marks belong to neither part. A text that does not begin with the first mark,
    where the prompt has not begun the thinking, is an answer as it is.
    """

    def __init__(self, marks: Marks, *, open: bool) -> None:
        self._marks = marks
        self._label = self._marks.label
        self._state: Literal["begin", "thought", "between", "answer"] = "begin"
        self._said = False
        self._buffer = ""
        """Text that may be, or stand beside, a mark."""
        self._counts = False
        """Whether the next tokens are of what is thought, as far as is known."""
        self._uncounted: list[int] = []
        if open:
            self._begin()

    def read(self, text: str, *, ended: bool) -> tuple[str, str]:
        """Take the next text; return what more was thought, and answered. Either may be empty.

        What may yet turn out to be a mark is held back until the text has ended.
        """
        thought, said = self._push(text)
        if ended:
            more, rest = self._finish()
            return thought + more, said + rest
        return thought, said

    def _push(self, text: str) -> tuple[str, str]:
        self._buffer += text
        thought = ""
        if self._state == "begin":
            begun, mark = self._buffer.lstrip(), self._marks.begin
            if begun.startswith(mark):
                self._buffer = begun[len(mark) :]
                self._begin()
            elif not mark.startswith(begun):
                self._state = "answer"
        if self._state == "thought":
            thought = self._think()
        if self._state == "between":
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._state = "answer"
        said = ""
        if self._state == "answer":
            said, self._buffer = self._buffer, ""
        return thought, said

    def _finish(self) -> tuple[str, str]:
        rest, self._buffer = self._buffer, ""
        if self._state == "thought":
            return rest.removeprefix(self._label).strip() if not self._said else rest.rstrip(), ""
        return "", rest if self._state == "begin" else ""

    def count(self, tokens: Iterable[int]) -> int:
        """Take the ids of the text that `read` had; return how many more were thought with.

        The marks are among them.
        """
        self._uncounted += tokens
        if self._state == "begin":
            return 0
        made, self._uncounted = self._uncounted, []
        if not self._counts:
            return 0
        end = self._marks.end_id
        if end in made:
            made = made[: made.index(end) + 1]
        self._counts = self._state == "thought"
        return len(made)

    def _begin(self) -> None:
        self._state, self._counts = "thought", True

    def _think(self) -> str:
        """Read the buffer as far as it is known to be thought."""
        if not self._said:
            self._buffer = self._buffer.lstrip()
        if self._label:
            if len(self._buffer) < len(self._label) and self._label.startswith(self._buffer):
                return ""
            self._buffer = self._buffer.removeprefix(self._label).lstrip()
            self._label = ""
        mark = self._marks.end
        thought, found, behind = self._buffer.partition(mark)
        if found:
            self._state, self._buffer, thought = "between", behind, thought.rstrip()
        else:
            thought = thought[: len(thought) - held(thought, mark)].rstrip()
            self._buffer = self._buffer[len(thought) :]
        self._said |= bool(thought)
        return thought


Reader = ThoughtReader | ChannelReader
