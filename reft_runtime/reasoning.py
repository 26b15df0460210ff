"""How a model writes what it thinks before it answers: between two marks, or on a channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

TokenId = Callable[[str], int | None]
"""Id of the token that a tokenizer adds for a text; None if it adds none."""

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

    @property
    def kept(self) -> tuple[str, ...]:
        """The texts by which thoughts are told from answers."""
        return self.begin, self.end

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


START = "<|start|>"
CHANNEL = "<|channel|>"
MESSAGE = "<|message|>"
CONSTRAIN = "<|constrain|>"
END = "<|end|>"
THOUGHTS = "analysis"
"""The channel of what is thought."""


@dataclass(frozen=True, slots=True)
class Channels:
    """The ids of the tokens around a model's messages, each of which is on a channel.

    So writes gpt-oss, in OpenAI's format Harmony. An answer is one or more messages, each of a
    header and a body, `<|channel|>analysis<|message|>...<|end|>`, and between two of them stands
    `<|start|>assistant`. The tokens that end an answer are none of these.
    """

    start_id: int
    channel_id: int
    message_id: int
    constrain_id: int
    end_id: int

    @classmethod
    def of(cls, token_id: TokenId) -> Self | None:
        """The ids, if there is a token for each; `token_id` is the id of the token of a text."""
        ids = [token_id(text) for text in (START, CHANNEL, MESSAGE, CONSTRAIN, END)]
        known = [one for one in ids if one is not None]
        return cls(*known) if len(known) == len(ids) else None

    @property
    def kept(self) -> tuple[str, ...]:
        """The texts by which thoughts are told from answers."""
        return START, CHANNEL, MESSAGE, CONSTRAIN, END

    def within(self, said: str) -> Thinking | None:
        """None: an answer that goes on with a turn is in that turn's last message."""
        return None

    def after(self, prompt: str) -> Thinking | None:
        """How an answer to a chat begins, whose text ends like `prompt`.

        None if that begins a message already, which is not on the channel of thoughts.
        """
        written = prompt.rstrip()
        if not written.endswith(MESSAGE):
            return Thinking(self, open=False)
        thinks = written.endswith(f"{CHANNEL}{THOUGHTS}{MESSAGE}")
        return Thinking(self, open=True) if thinks else None

    @property
    def thought(self) -> str:
        """A message of what is thought, and what stands behind it, in Lark's notation."""
        return self._before(THOUGHTS)

    @property
    def preamble(self) -> str:
        """The same of a message to the user that stands before calls."""
        return self._before("commentary")

    @property
    def final(self) -> str:
        """The header of an answer's last message, in Lark's notation."""
        return self._header("final")

    def called(self, name: str) -> str:
        """The header of a call of a function, in Lark's notation."""
        return self._header(f"commentary to=functions.{name}")

    def _header(self, channel: str) -> str:
        form = f'(" "? <[{self.constrain_id}]> "json")?'
        return f'<[{self.channel_id}]> "{channel}" {form} <[{self.message_id}]>'

    def _before(self, channel: str) -> str:
        header = f'<[{self.channel_id}]> "{channel}" <[{self.message_id}]>'
        return f'{header} /(?s:.+)/? <[{self.end_id}]> <[{self.start_id}]> "assistant"'

    @property
    def frame(self) -> str:
        """A grammar in Lark's notation of answers of a form, which is its rule `@answer`.

        An answer without a header is allowed, too: so may answer files that were trained on texts.
        """
        return f"start: ((thought)* {self.final})? @answer\nthought: {self.thought}\n"


@dataclass(frozen=True, slots=True)
class Thinking:
    """What an answer may begin with: what the model thinks, between its marks or on its channel.

    `open` says that the prompt has begun it already.
    """

    marks: Marks | Channels
    open: bool


def find_marks(template: str, token_id: TokenId) -> Marks | Channels | None:
    """The marks that a chat template writes, or the tokens around its channels, or None.

    `token_id` is the id of a token that was added to the vocabulary for a text.
    """
    channels = Channels.of(token_id)
    if f"{CHANNEL}{THOUGHTS}{MESSAGE}" in template and channels is not None:
        return channels
    for begin, label, end in _KNOWN:
        first, last = token_id(begin), token_id(end)
        if end in template and first is not None and last is not None:
            return Marks(begin, end, first, last, label)
    return None
