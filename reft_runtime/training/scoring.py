"""What an evaluation measures, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from reft_runtime.errors import ConfigError
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Row, Rows

Metric = Literal["accuracy", "exact", "perplexity"]

METRICS: tuple[Metric, ...] = ("accuracy", "exact", "perplexity")

BASE = "base"
"""What the model without an intervention is called."""


@dataclass(frozen=True, slots=True)
class Score:
    """One intervention on one data set. `right` says it by row; perplexity has no such thing."""

    intervention: str
    data: str
    metric: Metric
    value: float
    rows: int
    right: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All scores, the base's among them."""

    scores: tuple[Score, ...]

    def value(self, intervention: str, data: str) -> float:
        """One figure."""
        [found] = [s for s in self.scores if (s.intervention, s.data) == (intervention, data)]
        return found.value

    def as_json(self) -> list[dict[str, Any]]:
        """Plain values."""
        return [asdict(score) for score in self.scores]

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
        sets = list(dict.fromkeys((s.data, s.metric, s.rows) for s in self.scores))
        names = list(dict.fromkeys(s.intervention for s in self.scores))
        shown = {(s.intervention, s.data): _shown(s) for s in self.scores}
        lines = [["", *(f"{data} ({metric}, n={rows})" for data, metric, rows in sets)]]
        lines += [[name, *(shown[name, data] for data, _, _ in sets)] for name in names]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _shown(score: Score) -> str:
    return f"{score.value:.3f}" if score.metric == "perplexity" else f"{score.value:.1%}"


def metric_of(rows: Rows, wanted: Metric | None) -> Metric:
    """The metric for a data set: accuracy where every row has a label, else perplexity."""
    if wanted is not None and wanted not in METRICS:
        raise ConfigError(f"metric: one of {', '.join(METRICS)}, not {wanted!r}.", param="metric")
    unlabelled = [row for row in rows.rows if row.label is None]
    if wanted == "accuracy" and unlabelled:
        raise unlabelled[0].error("there is no field 'label', which accuracy compares with.")
    return wanted or ("perplexity" if unlabelled else "accuracy")


def wanted_text(row: Row, metric: Metric, layout: Layout) -> str:
    """What an answer is compared with."""
    label = row.label if metric == "accuracy" else layout.completion(row)
    assert label is not None
    return label.strip()


def is_right(answer: str, wanted: str, metric: Metric) -> bool:
    """Accuracy: the answer begins with the label. Exact: it is the completion. Blanks aside."""
    answer = answer.strip()
    return answer.startswith(wanted) if metric == "accuracy" else answer == wanted
