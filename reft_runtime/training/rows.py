"""Rows of a task's data: JSON lines, read with the number of the line that a mistake is on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands (`train.jsonl, line 3`), and its fields."""

    where: str
    fields: Mapping[str, Any]

    def error(self, message: str) -> ConfigError:
        """An error that names the row."""
        return ConfigError(f"{self.where}: {message}", param="data")

    def text(self, name: str) -> str:
        """A field that must be there and be text."""
        if name not in self.fields:
            raise self.error(f"there is no field {name!r}; it has {_listed(self.fields)}.")
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, not {type(value).__name__}.")
        return value

    @property
    def label(self) -> str | None:
        """The answer's class, where rows have one; every answer would begin with an empty one."""
        if "label" not in self.fields:
            return None
        label = self.text("label")
        if not label.strip():
            raise self.error("label is empty; write what the answer begins with, or leave it out.")
        return label


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set: its name, its rows, at least one, and the SHA-256 of its file."""

    name: str
    rows: Sequence[Row]
    sha256: str

    @property
    def labels(self) -> set[str]:
        """All labels, without the blanks around them."""
        return {row.label.strip() for row in self.rows if row.label is not None}


def read_rows(source: str | Path | Sequence[Mapping[str, Any]]) -> Rows:
    """Read a JSON-lines file, or take rows from memory; a `ConfigError` names the line."""
    if not isinstance(source, str | Path):
        data = "\n".join(json.dumps(dict(fields), sort_keys=True) for fields in source).encode()
        rows = [Row(f"row {number}", fields) for number, fields in enumerate(source, 1)]
        return _checked("rows", rows, data)
    path = Path(source)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", param="data") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}).", param="data") from None
    rows = []
    # Not splitlines: strings in JSON may hold U+2028 and other things that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        where = f"{path.name}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}.", param="data") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: must be a JSON object.", param="data")
        rows.append(Row(where, fields))
    return _checked(path.stem if path.stem not in _SPLITS else path.parent.name, rows, data)


_SPLITS = ("train", "dev", "test", "validation")
"""File names that say nothing about the task: the folder's name does."""


def _checked(name: str, rows: list[Row], data: bytes) -> Rows:
    if not rows:
        raise ConfigError(f"{name}: there are no rows.", param="data")
    return Rows(name, rows, hashlib.sha256(data).hexdigest())


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "none"
