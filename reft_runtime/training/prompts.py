"""From rows to token ids: prompts as they will be served, and the completions to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.interventions.format.manifest import CompletionPrefix, SystemTurn
from reft_runtime.interventions.format.template import is_text
from reft_runtime.text import Tokenizer
from reft_runtime.text.join import join
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Row, Rows


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row in tokens: the prompt, then the completion with its end-of-sequence token.

    `label_length` is how many tokens of the completion tell the row's label, None where it has no
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
    """Turns rows of one layout into examples, with the model's tokenizer.

    `eos_ids` are what ends the model's answers, where they are served too. `chat_template`, where
    given, is an intervention's own: chats are then written by it, and a `system` turn in them, as
    the server does. `completion_prefix` is what stands between a prompt and its completion, as in
    `join`; None takes both as they are.
    """

    def __init__(
        self,
        layout: Layout,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        chat_template: str | None = None,
        system: SystemTurn = "prepend",
        completion_prefix: CompletionPrefix | None = None,
    ) -> None:
        self._layout = layout
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._eos = min(tokenizer.eos_ids & eos_ids or eos_ids, default=None)
        self._system = system
        self._prefix = completion_prefix
        self._chat_template = chat_template if is_text(chat_template) else None

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's prompt, at least one, as a server makes them."""
        asked = self._layout.prompt(row)
        try:
            if isinstance(asked, str):
                ids = self._tokenizer.encode(asked, completion_prefix=self._prefix or "")
            else:
                ids = self._tokenizer.encode_chat(
                    asked,
                    self._chat_template,
                    system=self._system,
                    completion_prefix=self._prefix or "",
                )
        except InvalidRequest as error:
            raise row.error(error.message) from None
        if not ids:
            raise row.error("the prompt is empty; write what is asked, or leave the row out.")
        return ids

    def example(self, row: Row) -> Example:
        """A row in tokens; what is missing or wrong in it raises `ConfigError`."""
        prompt = self.prompt(row)
        completion = self._completion(row, prompt)
        label = row.label
        length = None
        if label is not None:
            length = self._label_length(row, label.strip(), completion)
        return Example(row.where, (*prompt, *completion), len(prompt), length)

    def _completion(self, row: Row, prompt: Sequence[int]) -> list[int]:
        asked, answer = self._layout.prompt(row), join(self._layout.completion(row), self._prefix)
        if isinstance(asked, str):
            asked = asked.rstrip(self._prefix) if self._prefix else asked
            ids = self._continued(prompt, asked, answer, special=True)
        elif self._chat_template is not None:
            ids = self._tokenizer.encode(answer, add_special_tokens=False)
        else:
            turn = {"role": "assistant", "content": answer}
            before = self._tokenizer.render(asked)
            whole = self._tokenizer.render([*asked, turn], answered=True)
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
        # Some tokenizers rewrite what they are given, such as letters and their accents.
        ids = self._tokenizer.encode(label, add_special_tokens=False)
        spelled = self._tokenizer.decode(ids).strip() or label
        for length in range(1, len(completion) + 1):
            if self._tokenizer.decode(completion[:length]).strip().startswith((label, spelled)):
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
    examples = _told_apart(examples, rows)
    long = [example for example in examples if len(example.tokens) > max_length]
    if long and not truncate:
        raise ConfigError(
            f"{rows.name}: {len(long)} of {len(examples)} rows are longer than {max_length} tokens"
            f" (the first, {long[0].where}, has {len(long[0].tokens)}). Shorten them, raise"
            " --max-length, or cut them with --truncate.",
            param="max_length",
        )
    return [_cut(example, max_length) for example in examples]


def _told_apart(examples: Sequence[Example], rows: Rows) -> list[Example]:
    """The examples, with one more token that has to be right where a label begins another."""
    labels = rows.labels
    begun = {one for one in labels for other in labels if other != one and other.startswith(one)}
    return [
        replace(example, label_length=min(example.label_length + 1, len(example.completion)))
        if example.label_length is not None and row.label and row.label.strip() in begun
        else example
        for example, row in zip(examples, rows.rows, strict=True)
    ]


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
