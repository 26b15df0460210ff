"""Looks a data set through before anything is loaded: every problem at once, with its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from reft_runtime.errors import ConfigError
from reft_runtime.loading.base import read_words
from reft_runtime.text import Tokenizer
from reft_runtime.training.layout import Chat, Layout, choose_template, prompt_key
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.rows import Row, Rows, read_rows
from reft_runtime.training.sources import Data
from reft_runtime.training.wording import counted, listed

SHOWN = 5
"""A problem names this many of its places; the others are counted."""

MOST_LABELS = 20
"""A report names this many labels; the others are counted."""

UNBALANCED = 10
"""A label is rare where the commonest has this many times its rows."""

_AROUND = 8
"""No template writes more special tokens than this around a row."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of fault, with its places. An `error` keeps a training from beginning."""

    error: bool
    message: str
    places: Sequence[str] = ()

    def __str__(self) -> str:
        places = f" ({listed(self.places, SHOWN)})" if self.places else ""
        return f"{'error' if self.error else 'warning'}: {self.message}{places}"


@dataclass(slots=True)
class Check:
    """What a data set holds, and what is wrong with it. `labels` are counts, commonest first."""

    name: str
    rows: int
    labels: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    note: str = ""

    @property
    def errors(self) -> list[Problem]:
        """The problems that a training would stop at."""
        return [problem for problem in self.problems if problem.error]

    def __str__(self) -> str:
        lines = [f"{self.name}: {counted(self.rows, 'row')}"]
        if self.labels:
            counts = [f"{label} {count:,}" for label, count in self.labels.items()]
            lines[0] += f", {counted(len(counts), 'label')}: {listed(counts, MOST_LABELS)}"
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def raise_errors(self) -> None:
        """Raise `ConfigError` with all errors, if there are any."""
        if self.errors:
            listed = "; ".join(str(problem).removeprefix("error: ") for problem in self.errors)
            raise ConfigError(f"{self.name}: {listed}", param="data")


def check(
    data: Data,
    evaluation: Data | None = None,
    *,
    text: str | None = None,
    label: str | None = None,
    template: str | None = None,
    model: str | Path | None = None,
    max_length: int | None = None,
) -> list[Check]:
    """Look through rows to train on and, where there are some, those that judge the training.

    Data, columns and template are as for `train`. The tokenizer of `model`, whose weights are not
    loaded, finds rows that are longer than `max_length`, or than what the model takes. Raises
    `ConfigError` where the rows cannot be read at all.
    """
    rows = read_rows(data, text=text, label=label, lenient=True)
    held_out = None
    if evaluation is not None:
        held_out = read_rows(evaluation, text=text, label=label, lenient=True)
    measure = None
    if model is not None:
        words = read_words(model)
        template = template or choose_template(rows, chats=words.knows_chats)
        measure = measure_of(words, Layout(template, rows.rows[0]), max_length)
    return check_data(rows, held_out, template, measure)


@dataclass(frozen=True, slots=True)
class Measure:
    """A tokenizer and the longest row in tokens that a training takes."""

    formatter: Formatter
    longest: int

    def exceeded(self, row: Row, prompt: str | Chat, completion: str) -> bool:
        """Whether a row is longer. A text has no more tokens than bytes, with a few around them."""
        if isinstance(prompt, str) and prompt.strip():
            size = len(prompt.encode(errors="replace")) + len(completion.encode(errors="replace"))
            if size + _AROUND <= self.longest:
                return False
        return len(self.formatter.example(row).tokens) > self.longest


def measure_of(words: Tokenizer, layout: Layout, max_length: int | None) -> Measure:
    """A measure of rows by the tokenizer of a model; `max_length` None is the model's own."""
    longest = min(max_length or words.max_model_len, words.max_model_len)
    return Measure(Formatter(layout, words, words.eos_ids), longest)


def check_rows(rows: Rows, template: str | None = None, measure: Measure | None = None) -> Check:
    """Look through one data set; long rows are found where there is a `measure`.

    Raises `ConfigError` where the template itself is wrong.
    """
    layout = Layout(template, rows.rows[0])
    check = Check(rows.name, len(rows.rows), note=rows.columns.note)
    wrong, empty, long = list(rows.wrong), [], []
    prompts: dict[str, list[Row]] = {}
    labels: Counter[str] = Counter()
    for row in rows.rows:
        try:
            prompt, completion = layout.prompt(row), layout.completion(row)
            label = row.label if "label" not in row.fields or row.text("label").strip() else ""
            if not completion.strip() or label == "":
                empty.append(row.where)
                continue
            if label is not None and not completion.strip().startswith(label.strip()):
                raise row.error(f"the completion does not begin with the label {label!r}.")
            if measure is not None and measure.exceeded(row, prompt, completion):
                long.append(row.where)
        except ConfigError as error:
            wrong.append(error.message)
            continue
        prompts.setdefault(prompt_key(prompt), []).append(row)
        if label is not None:
            labels[label.strip()] += 1
    check.labels = dict(labels.most_common())
    if wrong:
        found = f"{_rows(len(wrong))} wrong: {' '.join(wrong[:SHOWN])}"
        more = len(wrong) - SHOWN
        check.problems.append(Problem(True, found + (f" And {more} more." if more > 0 else "")))
    if empty:
        check.problems.append(Problem(True, f"{_rows(len(empty))} without an answer", empty))
    if long and measure is not None:
        text = f"{_rows(len(long))} longer than {measure.longest} tokens"
        check.problems.append(Problem(True, f"{text}; shorten, or --truncate", long))
    check.problems += _twice(prompts, layout)
    check.problems += _of_labels(labels, sum(map(len, prompts.values())))
    return check


def check_pair(
    rows: Rows, check: Check, held_out: Rows, held: Check, template: str | None = None
) -> list[Problem]:
    """Problems between rows to train on and rows to judge by: other labels, the same texts."""
    problems = []
    if check.labels and (unknown := sorted(held.labels.keys() - check.labels.keys())):
        text = (
            f"eval: the label {unknown[0]!r} never appears in the training rows, which have"
            f" {listed(sorted(check.labels), MOST_LABELS)}"
        )
        problems.append(Problem(True, text))
    seen = set(_prompts(rows, template).values())
    both = [where for where, prompt in _prompts(held_out, template).items() if prompt in seen]
    if both:
        text = f"eval: {_rows(len(both))} among the training's too; its figures will be too good"
        problems.append(Problem(False, text, both))
    return problems


def check_data(
    rows: Rows, held_out: Rows | None, template: str | None = None, measure: Measure | None = None
) -> list[Check]:
    """Look through the rows of a training and, where there are some, those that judge it."""
    checks = [check_rows(rows, template, measure)]
    if held_out is not None:
        held = check_rows(held_out, template, measure)
        held.problems += check_pair(rows, checks[0], held_out, held, template)
        checks.append(held)
    return checks


def _prompts(rows: Rows, template: str | None) -> dict[str, str]:
    layout, found = Layout(template, rows.rows[0]), {}
    for row in rows.rows:
        try:
            found[row.where] = prompt_key(layout.prompt(row))
        except ConfigError:
            continue  # the check of its own data set says so
    return found


def _twice(prompts: dict[str, list[Row]], layout: Layout) -> Iterable[Problem]:
    """Problems of prompts that several rows have, with one answer or with several labels."""
    same, against = [], []
    for rows in prompts.values():
        answers = {layout.completion(row).strip() for row in rows}
        if len(answers) < len(rows):
            same += [row.where for row in rows[1:]]
        if len(answers) > 1 and rows[0].label is not None:
            against += [row.where for row in rows]
    if against:
        yield Problem(False, f"{_rows(len(against))} with one text but different labels", against)
    if same:
        yield Problem(False, f"{_rows(len(same))} there before, word for word", same)


def _of_labels(labels: Counter[str], rows: int) -> Iterable[Problem]:
    if not labels:
        return
    if unlabelled := rows - labels.total():
        yield Problem(False, f"{_rows(unlabelled)} without a label, so accuracy is not measured")
    if len(labels) == 1:
        yield Problem(False, f"there is one label only, {next(iter(labels))!r}: nothing to tell")
    elif len(labels) * 2 > labels.total() > 20:
        text = f"{len(labels):,} labels for {labels.total():,} rows; is that column a class?"
        yield Problem(False, text)
    most, count = labels.most_common(1)[0]
    rare = [f"{label} {few}" for label, few in labels.items() if few * UNBALANCED <= count]
    if rare:
        yield Problem(False, f"rare beside {most} with {count:,} rows", rare)
    ordered = sorted(labels)
    begun = [
        f"{label!r} begins {longer!r}"
        for label, longer in pairwise(ordered)
        if longer.startswith(label)
    ]
    if begun:
        yield Problem(
            False, "labels that begin another; an answer cut short reads as the other", begun
        )


def _rows(count: int) -> str:
    return f"{counted(count, 'row')} {'is' if count == 1 else 'are'}"
