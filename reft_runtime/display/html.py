"""How results show themselves in a notebook: small tables in HTML, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_runtime.outputs import Comparison, Trace
    from reft_runtime.training.report import Report

_LEFT = "text-align: left; vertical-align: top; white-space: pre-wrap"
_RIGHT = "text-align: right; vertical-align: top"


def trace_html(trace: Trace) -> str:
    """What every edit did, one line each, and how far the answer is from the base."""
    rows = [
        (
            str(one.intervention),
            str(one.layer),
            one.component,
            str(len(one.positions)),
            f"{one.mean:.3f}",
            f"{one.largest:.3f}",
        )
        for one in trace.summaries()
    ]
    head = ("intervention", "layer", "component", "rows", "mean change", "largest change")
    far = (
        f"first token {trace.kl:.3f} nats from the base, answer {trace.mean_log_ratio:.3f} a token"
    )
    return _table(head, rows, texts=(2,)) + f"<p>{far}</p>"


def comparisons_html(comparisons: Iterable[Comparison]) -> str:
    """Answers below each other, each with its length and its distance from the base."""
    rows = [
        (
            " + ".join(one.interventions) or "base",
            one.answer.text.strip(),
            str(len(one.answer.tokens)),
            f"{one.trace.kl:.3f}",
            f"{one.trace.mean_log_ratio:.3f}",
        )
        for one in comparisons
    ]
    head = ("interventions", "answer", "tokens", "first token, nats", "mean a token, nats")
    return _table(head, rows, texts=(0, 1))


def report_html(report: Report) -> str:
    """Interventions by data sets, as `Report.table` has them; behind it the details, folded."""
    head, *rows = report.cells()
    table = _table(head, rows, texts=(0,))
    details = report.details()
    if not details:
        return table
    return f"{table}<details><summary>details</summary><pre>{escape(details)}</pre></details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int]) -> str:
    """A table whose columns `texts` are texts; the others are numbers."""
    styles = [_LEFT if place in texts else _RIGHT for place in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        made = (
            f'<{tag} style="{style}">{escape(cell)}</{tag}>'
            for style, cell in zip(styles, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"
