"""Data sets as an evaluation asks them: what is measured, and how rows are asked and judged."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reft_runtime.client import Answer
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.interventions.format.template import (
    CHAT,
    TEMPLATE_FIELD,
    around,
    is_text,
    laid_out,
)
from reft_runtime.training.layout import Chat, Layout
from reft_runtime.training.outcomes import Outcome
from reft_runtime.training.rows import Row, Rows, read_rows
from reft_runtime.training.scoring import (
    Metric,
    check_label,
    given_label,
    is_right,
    metric_of,
    plain,
)
from reft_runtime.training.sources import Data, written

TEXT = 100
"""An outcome keeps this many characters of a prompt."""

ANSWER = 80
"""An outcome keeps this many characters of an answer."""


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, what is measured on it, and how its rows are read.

    `template` is what the user gave. `labels` are those that answers begin with as whole words,
    None where prefixes count.
    """

    rows: Rows
    metric: Metric
    template: str | None
    layout: Layout
    labels: set[str] | None

    def asked_of(self, manifest: Manifest | None) -> Layout:
        """How the rows are asked of an intervention: as its training asked its own.

        Where neither the user nor the rows say it, prompts become what a user says in a chat, which
        the file's template writes. Prompts that all end as this template ends them stay.
        """
        first = self.rows.rows[0]
        template = None if manifest is None else manifest.template
        told = self.template is not None or "messages" in first.fields
        if told or template in (None, TEMPLATE_FIELD):
            return self.layout
        if is_text(template) and _all_laid_out(self.rows, template):
            return self.layout
        return Layout(CHAT, first)

    def outcome(self, row: Row, layout: Layout, wanted: str, answer: Answer) -> Outcome:
        """The outcome of a row that was asked by `layout`."""
        text, labelled = answer.text.strip(), self.metric == "accuracy"
        right = is_right(text, wanted, self.metric, self.labels)
        given = None
        if labelled:
            prefixes = self.labels is None
            given = wanted if right else given_label(text, self.rows.labels, prefixes=prefixes)
        ends = not layout.has_completion(row) or layout.completion(row).strip() == wanted
        return Outcome(
            row.where,
            _one_line(_last_turn(layout.prompt(row)), TEXT),
            wanted if labelled else _one_line(wanted, ANSWER),
            _one_line(text, ANSWER),
            right,
            given,
            right and ends and not (answer.ended and plain(text) == plain(wanted)),
        )


def read_tasks(
    data: Sequence[Data],
    metric: Metric | None,
    *,
    template: str | None,
    prefixes: bool,
    text: str | None,
    label: str | None,
) -> list[Task]:
    """Read and check data sets; raises `ConfigError` for wrong rows and for two of one name.

    Files that have one name, such as `dev.csv` and `test.csv` of a folder, go by their paths.
    """
    tasks = []
    read = [read_rows(source, text=text, label=label) for source in data]
    named = Counter(rows.name for rows in read)
    for source, rows in zip(data, read, strict=True):
        if named[rows.name] > 1 and isinstance(source, str | os.PathLike):
            rows = replace(rows, name=written(source))
        layout = Layout(template, rows.rows[0])
        labels = None if prefixes else rows.labels
        task = Task(rows, metric_of(rows, metric), template, layout, labels)
        if task.metric == "accuracy" and labels is not None:
            for row in rows.rows:
                check_label(row, layout, labels)
        tasks.append(task)
    names = Counter(task.rows.name for task in tasks)
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise ConfigError(
            f"data: two data sets are called {twice}; ask one at a time.", param="data"
        )
    return tasks


def _all_laid_out(rows: Rows, template: str) -> bool:
    """Whether a server would take every prompt as one that the template has written already."""
    behind = around(template)[1]
    return all(laid_out(row.text("prompt"), behind) is not None for row in rows.rows)


def _last_turn(asked: str | Chat) -> str:
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _one_line(text: str, longest: int) -> str:
    line = " ".join(text[: 2 * longest].split())
    return line if len(line) <= longest else f"{line[: longest - 1]}\u2026"
