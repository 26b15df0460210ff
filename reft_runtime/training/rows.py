"""Rows of a task's data, each with the place that a mistake in it is at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_runtime.errors import ConfigError
from reft_runtime.training.columns import OWN_FIELDS, Columns, choose_columns
from reft_runtime.training.sources import Data, read_records


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands (`train.jsonl, line 3`), and its fields."""

    where: str
    fields: Mapping[str, Any]

    def error(self, message: str) -> ConfigError:
        """A `ConfigError` that names the row."""
        return ConfigError(f"{self.where}: {message}", param="data")

    def text(self, name: str) -> str:
        """A field of the row; raises `ConfigError` where it is not there or is no text."""
        if name not in self.fields:
            raise self.error(
                f"there is no field {name!r}; it has {_listed(self.fields)}.{_HINTS.get(name, '')}"
            )
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, not {type(value).__name__}.")
        return value

    @property
    def label(self) -> str | None:
        """The class of the answer, None where the row has none; raises for an empty one."""
        if "label" not in self.fields:
            return None
        label = self.text("label")
        if not label.strip():
            raise self.error("label is empty; write what the answer begins with, or leave it out.")
        return label


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set: its name, its rows, at least one, and the SHA-256 of its file.

    `wrong` are the lines of the file that hold no row, as messages; `columns` are those that were
    taken for text and label, and say which because of their names.
    """

    name: str
    rows: Sequence[Row]
    sha256: str
    wrong: Sequence[str] = ()
    columns: Columns = OWN_FIELDS

    @property
    def labels(self) -> set[str]:
        """All labels, without the blanks around them."""
        return {row.label.strip() for row in self.rows if row.label is not None}


def read_rows(
    source: Data, *, text: str | None = None, label: str | None = None, lenient: bool = False
) -> Rows:
    """Read rows, as `sources.read_records` does; a `ConfigError` names the line.

    `text` and `label` are the columns that become `prompt`, and `label` and `completion`; without
    them, those of usual names do where rows have no such fields. With `lenient`, lines that hold
    no row are left to `Rows.wrong`. Rows that were read before stay as they are.
    """
    if isinstance(source, Rows):
        return source
    found = read_records(source)
    if found.wrong and not lenient:
        more = len(found.wrong) - 1
        others = f" {more} more lines are wrong; `reft check` lists them." if more else ""
        raise ConfigError(found.wrong[0] + others, param="data")
    if not found.records:
        first = f": {found.wrong[0]}" if found.wrong else "."
        raise ConfigError(f"{found.name}: there are no rows{first}", param="data")
    columns = choose_columns(found.records[0][1], text, label)
    rows = [Row(where, columns.fields(fields)) for where, fields in found.records]
    return Rows(found.name, rows, found.sha256, found.wrong, columns)


_HINTS = {
    "prompt": " Name its column: --text COLUMN (text= in Python), or give a template.",
    "completion": " Name the answers' column: --label COLUMN (label= in Python).",
}


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "none"
