"""How the fields of a row become a prompt and the completion it should get, as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.manifest import Texts
from reft_runtime.interventions.format.template import CHAT, TEMPLATE_FIELD, is_text
from reft_runtime.training.rows import Row, Rows

RECURRENCE = 8
"""Completions are taken for classes where each occurs this often on average."""

Chat = list[dict[str, str]]
"""Messages, each with role and content."""

_FIELD = re.compile(r"\{(\w+)\}")


class Layout:
    """One way to read all rows of a data set; the `first` row shows which fields they have.

    With `template` None rows have `messages` (a chat that ends with the assistant's turn, written
    by the model's chat template), or `prompt` and `completion`, taken as they are. `chat` makes
    `prompt` one user's message. Any other template is a text with fields of the rows in braces,
    `Review: {text}`, and rows have a `completion`. `served_template` is what the manifest needs so
    that a chat with the served intervention gives the same prompts: a template of one field takes
    that field's text as the message, one of several fields takes the whole prompt. `texts` says,
    likewise, whether a text that is given as a prompt is such a message.
    """

    def __init__(self, template: str | None, first: Row) -> None:
        self._template = template
        self._chats = template is None and "messages" in first.fields
        self.served_template = CHAT if self._chats or template == CHAT else TEMPLATE_FIELD
        self.texts: Texts | None = "message" if template == CHAT else None
        if is_text(template):
            names = _FIELD.findall(template)
            if not names:
                raise ConfigError(
                    "template: there is no field in it; write `chat`, or a text such as"
                    f" 'Review: {{text}}', not {template!r}.",
                    param="template",
                )
            if len(names) == 1:
                self.served_template = _FIELD.sub(lambda _: TEMPLATE_FIELD, template)
                self.texts = "message" if self.served_template != TEMPLATE_FIELD else None

    def prompt(self, row: Row) -> str | Chat:
        """What a client sends: text, or the messages of a chat."""
        if self._chats:
            return _turns(row)[:-1]
        if self._template == CHAT:
            return [{"role": "user", "content": row.text("prompt")}]
        if self._template is not None:
            return _FIELD.sub(lambda field: row.text(field[1]), self._template)
        if "prompt" not in row.fields and "messages" in row.fields:
            raise row.error("has messages, but the first row has a prompt; rows must be alike.")
        return row.text("prompt")

    def completion(self, row: Row) -> str:
        """The answer that the row wants."""
        return _turns(row)[-1]["content"] if self._chats else row.text("completion")

    def has_completion(self, row: Row) -> bool:
        """Whether the row says what the whole answer is; for a label alone it need not."""
        return self._chats or "completion" in row.fields


def prompt_key(prompt: str | Chat) -> str:
    """A key of a prompt; prompts that differ in blanks and capitals alone have the same."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return " ".join(text.split()).casefold()


def choose_template(rows: Rows, *, chats: bool) -> str | None:
    """The template of rows that nobody gave one for; `chats` is whether the model knows chats.

    What a table has as texts, and prompts of rows with a class, are what a user says in a chat: a
    model that was tuned to chats reads them better so. A class is a label, or a completion that
    recurs. Prompts that all end in the same words, such as `Sentiment:`, lead to the answer
    already, and stay as they are.
    """
    first = rows.rows[0]
    asked = rows.columns.prompt is not None or first.label is not None or _recur(rows)
    if not chats or not asked or "messages" in first.fields:
        return None
    prompts = [str(row.fields.get("prompt", "")).rstrip() for row in rows.rows]
    return None if len(prompts) > 1 and re.search(r"\s\w", _common_ending(prompts)) else CHAT


def _recur(rows: Rows) -> bool:
    """Whether all completions are a few that recur."""
    answers = [str(row.fields.get("completion", "")).strip() for row in rows.rows]
    return len(set(answers)) * RECURRENCE <= len(answers)


def _common_ending(texts: Sequence[str]) -> str:
    backwards = [text[::-1] for text in texts]
    pairs = zip(min(backwards), max(backwards), strict=False)  # all others lie between the two
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]


def _turns(row: Row) -> Chat:
    turns: Any = row.fields.get("messages")
    if turns is None:
        raise row.error("there is no field 'messages', which the first row has.")
    listed = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if listed and (row.fields.get("tools") or any(turn.get("tool_calls") for turn in turns)):
        # A server tells the model of tools, and writes their calls, otherwise than a row has them.
        raise row.error("chats with tools cannot be trained on or evaluated; leave the row out.")
    fine = listed and all(
        isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    )
    if not fine or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise row.error(
            "messages must be a list of turns, each with role and content, that ends with the"
            " assistant's."
        )
    return turns  # type: ignore[no-any-return]
