"""All scores of an evaluation, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from reft_runtime.display.html import table
from reft_runtime.display.text import aligned
from reft_runtime.errors import ConfigError
from reft_runtime.outputs import BASE_LABEL
from reft_runtime.training.advice import advise
from reft_runtime.training.outcomes import OTHER, Confusion, LabelFigures, Outcome, Score

MOST_LABELS = 20
MOST_WRONG = 3


@dataclass(frozen=True, slots=True)
class Report:
    """All scores, the base's among them."""

    scores: tuple[Score, ...]

    def value(self, intervention: str, data: str) -> float:
        """The value of one intervention on one data set."""
        [found] = [s for s in self.scores if (s.intervention, s.data) == (intervention, data)]
        return found.value

    @property
    def interventions(self) -> list[str]:
        """The interventions that were judged, without the base."""
        names = dict.fromkeys(score.intervention for score in self.scores)
        return [name for name in names if name != BASE_LABEL]

    def as_json(self) -> list[dict[str, Any]]:
        """Plain values: each score with its rows' outcomes, labels and confusions."""
        return [
            {
                **asdict(score),
                "right": list(score.right),
                "labels": [asdict(figures) for figures in score.labels],
                "confusions": [asdict(confusion) for confusion in score.confusions],
            }
            for score in self.scores
        ]

    def frame(self) -> Any:
        """A pandas DataFrame, one line a score; `pip install pandas` provides it."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("frame: needs pandas; run `pip install pandas`.") from None
        fields = ("intervention", "data", "metric", "value", "rows")
        return pandas.DataFrame(
            [[getattr(score, field) for field in fields] for score in self.scores],
            columns=list(fields),
        )

    def table(self) -> str:
        """Interventions by data sets, for a terminal: accuracies in per cent."""
        return "\n".join(aligned(self.cells(), numbers=True))

    def cells(self) -> list[list[str]]:
        """The cells of the table, line by line, the head first."""
        sets = list(dict.fromkeys((s.data, s.metric, s.rows) for s in self.scores))
        names = list(dict.fromkeys(s.intervention for s in self.scores))
        shown = {(s.intervention, s.data): s.shown for s in self.scores}
        lines = [["", *(f"{data} ({metric}, n={rows})" for data, metric, rows in sets)]]
        lines += [[name, *(shown[name, data] for data, _, _ in sets)] for name in names]
        return lines

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        shown, details = table(head, rows, texts=(0,)), self.details()
        if not details:
            return shown
        return f"{shown}<details><summary>details</summary><pre>{escape(details)}</pre></details>"

    def details(self) -> str:
        """Each intervention on each data set that it answered, for a terminal.

        By label, the commonest confusions, some wrong rows, and what to try next; the base model
        stands beside it.
        """
        bases = {s.data: s for s in self.scores if s.intervention == BASE_LABEL}
        return "\n\n".join(
            "\n".join(_details(score, bases.get(score.data)))
            for score in self.scores
            if score.intervention != BASE_LABEL and score.outcomes
        )


def _details(score: Score, base: Score | None) -> list[str]:
    head = [f"{score.intervention} on {score.data}: {score.shown} of {score.rows:,} rows right"]
    if base is not None:
        head.append(f"base {base.shown}")
    if score.majority is not None:
        label, share = score.majority
        head.append(f"always {label} {share:.1%}")
    lines = [", ".join(head)]
    if score.runs_on:
        right = sum(score.right)
        lines += [f"  {score.runs_on:,} of {right:,} right answers went on after what was wanted"]
    lines += _section("labels, the worst first", _label_lines(score.labels))
    lines += _section("commonest confusions, wanted -> given", _confusion_lines(score.confusions))
    shown = score.wrong[:MOST_WRONG]
    wrong = [line for outcome in shown for line in _wrong_lines(outcome)]
    lines += _section(f"wrong rows, {len(shown)} of {len(score.wrong):,}", wrong)
    return lines + _section("to try next", advise(score, base))


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"  {title}", *(f"    {line}" for line in lines)] if lines else []


def _label_lines(labels: Sequence[LabelFigures]) -> list[str]:
    if not labels:
        return []
    rows = [["", "precision", "recall", "rows"]]
    rows += [
        [
            one.label,
            "-" if one.precision is None else f"{one.precision:.1%}",
            f"{one.recall:.1%}",
            f"{one.rows:,}",
        ]
        for one in labels[:MOST_LABELS]
    ]
    more = len(labels) - MOST_LABELS
    lines = aligned(rows, numbers=True)
    return [*lines, f"and {more:,} more, which are better"] if more > 0 else lines


def _confusion_lines(confusions: Sequence[Confusion]) -> list[str]:
    return [
        f"{one.count:>4,}  {one.wanted} -> "
        + (one.given if one.given is not None else f"{OTHER}, such as {one.example!r}")
        for one in confusions
    ]


def _wrong_lines(outcome: Outcome) -> Iterable[str]:
    yield f"{outcome.where}: {outcome.text}"
    yield f"  wanted {outcome.wanted!r}, answered {outcome.answered!r}"
