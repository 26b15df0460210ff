"""What an evaluation measures, and when an answer is right."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from typing import Literal

from reft_runtime.errors import ConfigError
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Row, Rows

Metric = Literal["accuracy", "exact", "perplexity"]

METRICS: tuple[Metric, ...] = ("accuracy", "exact", "perplexity")


def metric_of(rows: Rows, wanted: Metric | None) -> Metric:
    """The metric for a data set: accuracy where every row has a label, else perplexity."""
    if wanted is not None and wanted not in METRICS:
        raise ConfigError(f"metric: one of {', '.join(METRICS)}, not {wanted!r}.", param="metric")
    unlabelled = [row for row in rows.rows if row.label is None]
    if wanted == "accuracy" and unlabelled:
        raise unlabelled[0].error("there is no field 'label', which accuracy compares with.")
    return wanted or ("perplexity" if unlabelled else "accuracy")


def wanted_text(row: Row, metric: Metric, layout: Layout) -> str:
    """The text that an answer to the row is compared with."""
    label = row.label if metric == "accuracy" else layout.completion(row)
    assert label is not None
    return label.strip()


def answer_texts(row: Row, wanted: str, metric: Metric, layout: Layout) -> list[str]:
    """The right answer as it may be written, which says how long answers have to be.

    Behind something, as answers are: at the beginning of a text some tokenizers add a blank.
    """
    texts = [f" {wanted}", wanted]
    if layout.has_completion(row):
        completion = layout.completion(row)
        begin = len(completion) - len(completion.lstrip())
        if metric == "exact":
            texts = [completion.rstrip()]
        elif completion.startswith(wanted, begin):
            texts = [completion[: begin + len(wanted)]]
    return [text if text[:1].isspace() else f"\n{text}" for text in texts]


def check_label(row: Row, layout: Layout, labels: Collection[str]) -> None:
    """Raise `ConfigError` where the row's own completion would not count as right."""
    if not layout.has_completion(row):
        return
    completion, label = layout.completion(row).strip(), row.label
    if label is None or not completion.startswith(label.strip()):
        return
    if not begins_with(completion, label.strip(), labels):
        raise row.error(
            f"the label {label.strip()!r} is not what the completion {completion[:40]!r} begins"
            " with, but a part of it; write the whole word, or count prefixes with --prefixes."
        )


def is_right(
    answer: str, wanted: str, metric: Metric, labels: Collection[str] | None = None
) -> bool:
    """Whether an answer is right: it begins with the label (accuracy), or is the completion.

    `labels` are all that there are, None where any text that begins with the label's letters is
    right, as `10` for the label `1`.
    """
    if metric != "accuracy":
        return plain(answer) == plain(wanted)
    if labels is None:
        return plain(answer).startswith(plain(wanted))
    return begins_with(answer.strip(), wanted, labels)


def begins_with(answer: str, label: str, labels: Collection[str]) -> bool:
    """Whether the answer begins with the label as a whole word, and with no longer one of them."""
    return _begins(answer, label) and not any(
        len(other) > len(label) and _begins(answer, other) for other in labels
    )


def given_label(answer: str, labels: Collection[str], *, prefixes: bool = False) -> str | None:
    """The label that an answer begins with: the longest, and None where it is none.

    As a whole word or, with `prefixes`, by its letters alone.
    """
    answer = plain(answer)
    found = (
        label
        for label in labels
        if (answer.startswith(plain(label)) if prefixes else _begins(answer, label))
    )
    return max(found, key=len, default=None)


def plain(text: str) -> str:
    """A text without the blanks around it, accents joined to their letters.

    Many tokenizers join them, and so a model never writes the other form.
    """
    return unicodedata.normalize("NFC", text.strip())


def _begins(answer: str, label: str) -> bool:
    answer, label = plain(answer), plain(label)
    return answer.startswith(label) and not _inside_a_word(label[-1:], answer[len(label) :])


def _inside_a_word(last: str, rest: str) -> bool:
    """Whether a word, or a number, goes on behind its character `last`."""
    if not rest or not last.isalnum():
        return False
    if rest[0].isalnum() or rest[0] == "_" or unicodedata.combining(rest[0]):
        return True
    joint = ".,:/" if last.isdecimal() else "'\u2019"
    return rest[0] in joint and rest[1:2].isalnum()
