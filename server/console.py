"""What commands write to a terminal: tables, and text that came from elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDE = 10_000
"""Columns where the output is no terminal: nothing is cut off for a program that reads it."""

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text without control characters, with which a terminal could be told to do something."""
    return text.translate(_CONTROL)


def console() -> Console:
    """Standard output; nothing in a text is taken for markup."""
    return Console(
        width=None if sys.stdout.isatty() else _WIDE, markup=False, highlight=False, emoji=False
    )


def error_console() -> Console:
    """Standard error, likewise."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows below the names of their columns, each with what it does where there is no room.

    That is `fold` (goes on in the next line), `cut` (ends with dots), or `right` (numbers, whole).
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, how in columns.items():
        made.add_column(
            name,
            justify="right" if how == "right" else "left",
            overflow="fold" if how == "fold" else "ellipsis",
            no_wrap=how != "fold",
        )
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def size(count: int) -> str:
    """A number of bytes for people, in decimal units as disks have them."""
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"
