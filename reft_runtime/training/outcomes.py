"""What an evaluation found: every row's outcome, and the figures that follow from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reft_runtime.training.scoring import Metric

MOST_CONFUSIONS = 5

OTHER = "other"
"""Reports call an answer that begins with no label this."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one row wanted and got.

    `text` is what was asked, `answered` the answer, each cut to a short line; so is `wanted` where
    it is a whole completion. `given` is the label that the answer begins with, None where it is
    none. `runs_on` says of a right answer that it did not end where it should have.
    """

    where: str
    text: str
    wanted: str
    answered: str
    right: bool
    given: str | None = None
    runs_on: bool = False


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """How well one label is found. `precision` is None where it was never given.

    `recall` is the share of its `rows` that were answered so, `precision` the share of the answers
    `given` so that were right.
    """

    label: str
    precision: float | None
    recall: float
    rows: int
    given: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often one label was wanted and another given; `example` is the first such answer.

    `given` None stands for answers that begin with no label.
    """

    wanted: str
    given: str | None
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Score:
    """One intervention on one data set.

    `intervention` is its name, with its strength where that is not 1 (`pirate=0.5`). Perplexity
    has no `outcomes`. `trained_rows` is how many rows the file was trained on, where it says so.
    """

    intervention: str
    data: str
    metric: Metric
    value: float
    rows: int
    outcomes: tuple[Outcome, ...] = ()
    trained_rows: int | None = None

    @property
    def shown(self) -> str:
        """The value for people: a share in per cent, a perplexity as a number."""
        return f"{self.value:.3f}" if self.metric == "perplexity" else f"{self.value:.1%}"

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each row was answered right."""
        return tuple(outcome.right for outcome in self.outcomes)

    @property
    def wrong(self) -> tuple[Outcome, ...]:
        """The rows that were answered wrong."""
        return tuple(outcome for outcome in self.outcomes if not outcome.right)

    @property
    def runs_on(self) -> int:
        """How many right answers did not end where they should have."""
        return sum(outcome.runs_on for outcome in self.outcomes)

    @property
    def majority(self) -> tuple[str, float] | None:
        """The commonest label and its share of the rows, which always answering it would reach."""
        if self.metric != "accuracy":
            return None
        [(label, count)] = Counter(o.wanted for o in self.outcomes).most_common(1)
        return label, count / self.rows

    @property
    def labels(self) -> tuple[LabelFigures, ...]:
        """Every label's figures, the worst first; none where the metric is not accuracy."""
        if self.metric != "accuracy":
            return ()
        wanted = Counter(outcome.wanted for outcome in self.outcomes)
        given = Counter(outcome.given for outcome in self.outcomes)
        right = Counter(outcome.wanted for outcome in self.outcomes if outcome.right)
        figures = [
            LabelFigures(
                label,
                right[label] / given[label] if given[label] else None,
                right[label] / rows,
                rows,
                given[label],
            )
            for label, rows in wanted.items()
        ]
        return tuple(sorted(figures, key=lambda f: (f.recall, f.precision or 0.0, f.label)))

    @property
    def confusions(self) -> tuple[Confusion, ...]:
        """The commonest confusions, at most five, the commonest first."""
        if self.metric != "accuracy":
            return ()
        counts = Counter((outcome.wanted, outcome.given) for outcome in self.wrong)
        examples = {(o.wanted, o.given): o.answered for o in reversed(self.wrong)}
        return tuple(
            Confusion(*pair, count, examples[pair])
            for pair, count in counts.most_common(MOST_CONFUSIONS)
        )
