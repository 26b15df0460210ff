"""The marks between which a model writes what it thinks before it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
)
"""Marks of Qwen, DeepSeek, SmolLM and most others; of Mistral, Seed-OSS and MiniMax M3."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The two marks of a model; each is one token of its own."""

    begin: str
    end: str
    begin_id: int
    end_id: int

    def after(self, prompt: str) -> Thinking | None:
        """How an answer to a chat begins, whose text ends like `prompt`.

        None if the chat template has ended the thinking already, so that the answer has none.
        """
        written = prompt.rstrip()
        return None if written.endswith(self.end) else Thinking(self, written.endswith(self.begin))


@dataclass(frozen=True, slots=True)
class Thinking:
    """What an answer may begin with: what the model thinks, between its marks.

    `open` says that the prompt has the first mark already: the answer begins behind it.
    """

    marks: Marks
    open: bool


def find_marks(template: str, token_id: Callable[[str], int | None]) -> Marks | None:
    """The marks that a chat template writes, or None.

    `token_id` is the id of a token that was added to the vocabulary for a text.
    """
    for begin, end in _PAIRS:
        first, last = token_id(begin), token_id(end)
        if end in template and first is not None and last is not None:
            return Marks(begin, end, first, last)
    return None
