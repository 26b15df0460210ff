"""The marks between which a model writes what it thinks before it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_KNOWN = (
    ("<think>", "", "</think>"),
    ("<|channel>", "thought", "<channel|>"),
    ("[THINK]", "", "[/THINK]"),
    ("<|START_THINKING|>", "", "<|END_THINKING|>"),
    ("<seed:think>", "", "</seed:think>"),
    ("<mm:think>", "", "</mm:think>"),
)
"""The two marks, and between them the label that stands behind the first.

Those of Qwen, DeepSeek, SmolLM and most others; of Gemma 4, Mistral, Cohere, Seed-OSS and MiniMax.
"""


@dataclass(frozen=True, slots=True)
class Marks:
    """The two marks of a model, each of which is a token; `label` may stand behind the first."""

    begin: str
    end: str
    begin_id: int
    end_id: int
    label: str = ""

    def within(self, said: str) -> Thinking | None:
        """How the answer begins that goes on with a turn, of which `said` is there already."""
        thinks = said.rfind(self.begin) > said.rfind(self.end)
        return Thinking(self, open=True) if thinks else None

    def after(self, prompt: str) -> Thinking | None:
        """How an answer to a chat begins, whose text ends like `prompt`.

        None if the chat template has ended the thinking already, so that the answer has none.
        """
        written = prompt.rstrip()
        if written.endswith(self.end):
            return None
        return Thinking(self, written.endswith((self.begin, self.begin + self.label)))


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
    for begin, label, end in _KNOWN:
        first, last = token_id(begin), token_id(end)
        if end in template and first is not None and last is not None:
            return Marks(begin, end, first, last, label)
    return None
