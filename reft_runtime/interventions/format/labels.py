"""The labels among which a classifier chooses: what is allowed, in files and in requests."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_LABELS = 2
MOST_LABELS = 1000
MAX_LABEL_CHARS = 256


def problem_of(labels: Sequence[str]) -> str | None:
    """What is wrong with a list of labels, as the rest of a sentence; None if nothing is.

    Blanks around a label do not count.
    """
    if not LEAST_LABELS <= len(labels) <= MOST_LABELS:
        return f"give {LEAST_LABELS} to {MOST_LABELS} labels, not {len(labels)}"
    seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        text = label.strip()
        if not text:
            return f"number {index} is empty; write what the answer is, or leave it out"
        if len(text) > MAX_LABEL_CHARS:
            return f"number {index} has {len(text)} characters; {MAX_LABEL_CHARS} are allowed"
        if text in seen:
            return f"{text[:40]!r} stands there twice, as numbers {seen[text]} and {index}"
        seen[text] = index
    return None
