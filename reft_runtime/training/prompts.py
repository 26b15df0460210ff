"""From rows to token ids: prompts as they will be served, and the completions to learn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.interventions.manifest import TEMPLATE_FIELD
from reft_runtime.text import Tokenizer
from reft_runtime.training.rows import Row, Rows

CHAT = "chat"

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row in tokens: the prompt, then the completion with its end-of-sequence token.

    `label_length` is how many tokens of the completion spell the row's label, None where it has no
    label: then all of them count for accuracy.
    """

    where: str
    tokens: tuple[int, ...]
    prompt_length: int
    label_length: int | None = None

    @property
    def completion(self) -> tuple[int, ...]:
        """The tokens to be predicted."""
        return self.tokens[self.prompt_length :]


class Formatter:
    """Turns rows into prompts and examples, all in the same way.

    With `template` None rows have `messages` (a chat that ends with the assistant's turn, written
    by the model's chat template), or `prompt` and `completion`, taken as they are. `chat` writes
    `prompt` as one user's message. Any other template is a text with fields of the rows in braces,
    `Review: {text}`, and rows have a `completion`. `served_template` is what the manifest
    needs so that a chat with the served intervention gives the same prompts: a template of
    one field takes that field's text as the message, one of several the whole prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, first: Row, eos_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids | tokenizer.eos_ids
        self._eos = min(tokenizer.eos_ids or eos_ids, default=None)
        self._template = template
        self._chats = template is None and "messages" in first.fields
        self.served_template = CHAT if self._chats or template == CHAT else TEMPLATE_FIELD
        if template not in (None, CHAT):
            names = _FIELD.findall(template or "")
            if not names:
                raise ConfigError(
                    "template: there is no field in it; write `chat`, or a text such as"
                    f" 'Review: {{text}}', not {template!r}.",
                    param="template",
                )
            if len(names) == 1:
                self.served_template = _FIELD.sub(lambda _: TEMPLATE_FIELD, template or "")

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's prompt, as a server makes them."""
        try:
            messages = self._messages(row)
            if messages is not None:
                return self._tokenizer.encode_chat(messages)
            return self._tokenizer.encode(self._text(row))
        except InvalidRequest as error:
            raise row.error(error.message) from None

    def example(self, row: Row) -> Example:
        """A row in tokens; what is missing or wrong in it raises `ConfigError`."""
        prompt = self.prompt(row)
        completion = self._completion(row, prompt)
        label = row.label
        length = None
        if label is not None:
            length = self._label_length(row, label.strip(), completion)
        return Example(row.where, (*prompt, *completion), len(prompt), length)

    def completion_text(self, row: Row) -> str:
        """The text that a row wants to be answered."""
        text = row.fields["messages"][-1]["content"] if self._chats else row.text("completion")
        assert isinstance(text, str)
        return text

    def _text(self, row: Row) -> str:
        if self._template is None:
            if "prompt" not in row.fields and "messages" in row.fields:
                raise row.error("has messages, but the rows before it have a prompt.")
            return row.text("prompt")
        return _FIELD.sub(lambda field: row.text(field[1]), self._template)

    def _messages(self, row: Row) -> list[dict[str, str]] | None:
        """The turns before the answer, where a chat template writes the prompt."""
        if self._chats:
            return _turns(row)[:-1]
        if self._template == CHAT:
            return [{"role": "user", "content": row.text("prompt")}]
        return None

    def _completion(self, row: Row, prompt: Sequence[int]) -> list[int]:
        messages = self._messages(row)
        if messages is None:
            before, answer = self._text(row), row.text("completion")
            ids = self._continued(prompt, before, answer, special=True)
        else:
            turn = {"role": "assistant", "content": self.completion_text(row)}
            before = self._tokenizer.render(messages)
            whole = self._tokenizer.render([*messages, turn], answered=True)
            if not whole.startswith(before):
                raise row.error("the model's chat template writes an answered chat otherwise.")
            ids = self._continued(prompt, before, whole[len(before) :], special=False)
        for place, token in enumerate(ids):
            if token in self._eos_ids:  # chat templates may write something after it
                return ids[: place + 1]
        return ids if self._eos is None else [*ids, self._eos]

    def _continued(
        self, prompt: Sequence[int], before: str, answer: str, *, special: bool
    ) -> list[int]:
        """Tokens of an answer. The prompt's stay as they are: when serving, they come first."""
        whole = self._tokenizer.encode(before + answer, add_special_tokens=special)
        if whole[: len(prompt)] == list(prompt):
            return whole[len(prompt) :]
        return self._tokenizer.encode(answer, add_special_tokens=False)

    def _label_length(self, row: Row, label: str, completion: Sequence[int]) -> int:
        for length in range(1, len(completion) + 1):
            if self._tokenizer.decode(completion[:length]).strip().startswith(label):
                return length
        raise row.error(f"the completion does not begin with the label {label!r}.")


def make_examples(
    rows: Rows, formatter: Formatter, max_length: int, *, truncate: bool
) -> list[Example]:
    """All rows in tokens, none longer than `max_length`.

    Longer ones raise `ConfigError` with their number, or, with `truncate`, lose the end of their
    completion and, where the prompt alone is too long, the prompt's beginning.
    """
    examples = [formatter.example(row) for row in rows.rows]
    long = [example for example in examples if len(example.tokens) > max_length]
    if long and not truncate:
        raise ConfigError(
            f"{rows.name}: {len(long)} of {len(examples)} rows are longer than {max_length} tokens"
            f" (the first, {long[0].where}, has {len(long[0].tokens)}). Shorten them, raise"
            " --max-length, or cut them with --truncate.",
            param="max_length",
        )
    return [_cut(example, max_length) for example in examples]


def _cut(example: Example, max_length: int) -> Example:
    excess = len(example.tokens) - max_length
    if excess <= 0:
        return example
    wanted = example.label_length or 1
    kept = max(max_length - example.prompt_length, min(wanted, max_length - 1))
    prompt = example.tokens[: example.prompt_length][-(max_length - kept) :]
    return Example(
        example.where, (*prompt, *example.completion[:kept]), len(prompt), example.label_length
    )


def _turns(row: Row) -> list[dict[str, str]]:
    turns: Any = row.fields.get("messages")
    if turns is None:
        raise row.error("there is no field 'messages', which the first row has.")
    fine = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not fine or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise row.error(
            "messages must be a list of turns, each with role and content, that ends with the"
            " assistant's."
        )
    return turns  # type: ignore[no-any-return]
