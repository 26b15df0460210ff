"""Text as terminals and logs show it: tables as lines, and what came from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text without control characters, with which a terminal could be told to do something."""
    return text.translate(_CONTROL)


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Rows as lines of text, with columns aligned and two spaces apart.

    With `numbers`, all columns but the first are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
