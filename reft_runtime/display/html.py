"""Tables in HTML, as notebooks show them: every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_LEFT = "text-align: left; vertical-align: top; white-space: pre-wrap"
_RIGHT = "text-align: right; vertical-align: top"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int]) -> str:
    """An HTML table; `texts` are the indices of columns with text, the others hold numbers."""
    styles = [_LEFT if place in texts else _RIGHT for place in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        made = (
            f'<{tag} style="{style}">{escape(cell)}</{tag}>'
            for style, cell in zip(styles, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"
