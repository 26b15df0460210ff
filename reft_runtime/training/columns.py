"""Which columns of a table are the text that a model is given, and the answer that it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_runtime.errors import ConfigError

TEXT_NAMES = (
    "text", "sentence", "input", "question", "message", "ticket", "review", "utterance", "query",
    "instruction", "content", "comment", "tweet", "document", "body", "description", "title",
)  # fmt: skip
"""Usual names of the column of texts; where rows have several, the first of these counts."""

LABEL_NAMES = (
    "label", "labels", "label_text", "category", "class", "target", "intent", "topic", "sentiment",
    "tag",
)  # fmt: skip
"""Usual names of a column of classes."""

ANSWER_NAMES = ("output", "answer", "response", "reply")
"""Usual names of a column of whole answers, which are no classes."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where `prompt`, `completion` and `label` come from, each None where rows have their own.

    `note` says which columns were taken because of their names, or is empty.
    """

    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    note: str = ""

    def fields(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row's fields, with those that come from its columns; numbers become text.

        A label of its own that is null is none, as in rows that have some in other rows alone.
        """
        if self.label is None and "label" in row and _is_missing(row["label"]):
            row = {name: value for name, value in row.items() if name != "label"}
        found = {
            name: _as_text(row[column])
            for name in ("prompt", "completion", "label")
            if (column := getattr(self, name)) in row
        }
        if self.label is not None:
            found |= {
                name: value.strip()
                for name in ("completion", "label")
                if isinstance(value := found.get(name), str)
            }
        return {**row, **found} if found else row


OWN_FIELDS = Columns()
"""Those of rows that have all fields themselves."""


def choose_columns(first: Mapping[str, Any], text: str | None, label: str | None) -> Columns:
    """The columns of rows that are like the `first`: those named, else those with usual names.

    What is not found stays open; a layout that needs it says what is missing. Raises
    `ConfigError` where a named column is not there.
    """
    for option, column in (("text", text), ("label", label)):
        if column is not None and column not in first:
            raise ConfigError(
                f"{option}: there is no column {column!r}; there are {', '.join(first) or 'none'}.",
                param=option,
            )
    if text is not None and text == label:
        raise ConfigError(
            f"label: {label!r} is the column of the texts, too; name another.", param="label"
        )
    guessed = []
    answer: str | None = None
    if "messages" not in first:
        rest = [name for name in first if name not in (text, label)]
        if text is None and "prompt" not in first and (text := _usual(rest, TEXT_NAMES)):
            guessed.append(f"text from the column {text!r}")
        if label is None and "completion" not in first:
            rest = [name for name in rest if name not in (text, "prompt")]
            label = _usual(rest, LABEL_NAMES)
            answer = None if label else _usual(rest, ANSWER_NAMES)
            if found := label or answer:
                guessed.append(f"{'label' if label else 'answer'} from the column {found!r}")
    note = f"{' and '.join(guessed)}, by the name; --text and --label name others"
    return Columns(
        text,
        None if "completion" in first else label or answer,
        label,
        note if guessed else "",
    )


def _usual(columns: Sequence[str], names: Sequence[str]) -> str | None:
    written = {column.strip().lower(): column for column in reversed(columns)}
    return next((written[name] for name in names if name in written), None)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_text(value: object) -> Any:
    """A cell as text. What is neither text nor a number stays, and is refused where it is used."""
    if _is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas makes whole numbers floats where one is missing
    return str(value) if isinstance(value, int | float) else value
