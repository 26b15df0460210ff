"""Results show themselves in notebooks, and traces are drawn."""

from __future__ import annotations

import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import pyplot

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.outputs import (
    Choice,
    Comparison,
    Comparisons,
    EditSummary,
    EditTrace,
    Generation,
    Trace,
)
from reft_runtime.training import Report, Score
from reft_runtime.training.outcomes import Outcome

TRACE = Trace(
    (
        EditTrace(0, 0, 4, "block_output", 7, 0.25),
        EditTrace(0, 0, 4, "block_output", 2, 0.75),
        EditTrace(0, 1, 9, "mlp_output", 7, 0.5),
        EditTrace(1, 0, 4, "block_output", 7, 1.5),
    ),
    kl=1.25,
    log_ratios=((0.5, -1.0), (2.0,)),
)
NASTY = "<script>alert('a')</script> & more"


class _Cells(HTMLParser):
    """The texts of a table's cells, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def comparison(*names: str) -> Comparison:
    answer = Generation([1, 2], [Choice(0, NASTY, tokens=[3, 4, 5], finish_reason="stop")])
    return Comparison(names, answer, TRACE)


def test_a_trace_is_summed_up_by_edit() -> None:
    assert TRACE.summaries() == [
        EditSummary(0, 4, "block_output", (2, 7), 0.5, 0.75),
        EditSummary(0, 9, "mlp_output", (7,), 0.5, 0.5),
        EditSummary(1, 4, "block_output", (7,), 1.5, 1.5),
    ]
    html = _Cells(TRACE._repr_html_())
    assert html.cells[6:12] == ["0", "4", "block_output", "2", "0.500", "0.750"]
    assert html.cells[-1].endswith("first token 1.250 nats from the base, answer 0.500 a token")


def test_answers_are_escaped() -> None:
    html = Comparisons([comparison(), comparison("a<b", "c=0.5")])._repr_html_()
    assert "script" not in _Cells(html).tags
    assert _Cells(html).cells[5:] == [
        "base",
        NASTY,
        "3",
        "1.250",
        "0.500",
        "a<b + c=0.5",
        NASTY,
        "3",
        "1.250",
        "0.500",
    ]
    assert _Cells(comparison("one")._repr_html_()).cells[5] == "one"


def test_a_report_is_a_table_with_its_details() -> None:
    outcomes = (
        Outcome("row 1", NASTY, "yes", "no", right=False, given="no"),
        Outcome("row 2", "b", "yes", "yes", right=True, given="yes"),
    )
    scores = [Score("base", "d<1>", "accuracy", 0.5, 2, outcomes)]
    report = Report((*scores, Score("mine", "d<1>", "accuracy", 0.5, 2, outcomes)))
    html = _Cells(report._repr_html_())
    assert html.cells[:5] == ["", "d<1> (accuracy, n=2)", "base", "50.0%", "mine"]
    assert html.tags == {"table", "thead", "tbody", "tr", "td", "th", "details", "summary", "pre"}
    assert NASTY in html.cells[-1]
    short = Report((Score("base", "d", "perplexity", 2.5, 2),))
    assert "details" not in _Cells(short._repr_html_()).tags


def test_a_trace_is_drawn() -> None:
    axes = TRACE.plot()
    try:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "7"]
        layers = [label.get_text() for label in axes.get_yticklabels()]
        assert layers == ["4 block_output", "9 mlp_output"]
        [image] = axes.images
        drawn = image.get_array()
        assert drawn is not None
        sizes = np.ma.filled(drawn, -1)
        assert sizes.tolist() == [[0.75, 1.5], [-1, 0.5]]
        given = pyplot.subplots()[1]
        assert TRACE.plot(given) is given
        many = [EditTrace(0, 0, 4, "block_output", place, 0.5) for place in range(1000)]
        wide = Trace(tuple(many), 0.0).plot()
        assert len(wide.get_xticks()) <= 61
        assert wide.get_figure().get_size_inches()[0] <= 16  # type: ignore[union-attr]
    finally:
        pyplot.close("all")


def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="no row was edited"):
        Trace((), 0.0).plot()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install 'reft-server"):
        TRACE.plot()
