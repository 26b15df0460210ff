"""What commands write to a terminal: tables, and text that came from elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reft_runtime.display.text import printable

_WIDE = 10_000
"""The width where the output is no terminal: nothing is cut off for a program that reads it."""


def console(*, err: bool = False) -> Console:
    """A console on standard output, or on standard error; nothing in a text is taken for markup."""
    wide = None if (sys.stderr if err else sys.stdout).isatty() else _WIDE
    return Console(stderr=err, width=wide, markup=False, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """Write plain values to standard output as one line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def error_console() -> Console:
    """A console on standard error; nothing in a text is taken for markup."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def warn_behind(name: str, answer: Mapping[str, Any]) -> None:
    """Say on standard error which replicas have not taken a change of a name in, if any."""
    if behind := answer.get("replicas_behind"):
        typer.echo(
            f"reft: {name}: not yet on {printable(', '.join(behind))}; until they reach the state"
            " again they serve what was there before.",
            err=True,
        )


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> Table:
    """A table: rows below the names of their columns, each with how it is laid out.

    `whole` and `right` (for numbers) keep their width as long as the terminal has it; of the
    others, `cut` ends with dots where there is no room, and `fold` goes on in the next line.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, how in columns.items():
        made.add_column(
            name,
            justify="right" if how == "right" else "left",
            overflow="ellipsis" if how in ("whole", "right") else "fold",
            no_wrap=how in ("whole", "right"),
        )
    for row in rows:
        made.add_row(
            *(
                Text(printable(cell), no_wrap=True, overflow="ellipsis")
                if how == "cut"
                else printable(cell)
                for cell, how in zip(row, columns.values(), strict=True)
            )
        )
    return made


def size(count: int) -> str:
    """A number of bytes for people, in decimal units as disks have them."""
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"
