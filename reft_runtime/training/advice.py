"""What to try next where an intervention answers poorly."""

from __future__ import annotations

import math

from reft_runtime.training.outcomes import LabelFigures, Score
from reft_runtime.training.wording import listed

POOR = 0.8
"""An accuracy below this is worth another training."""

GOOD = 0.9
"""From this accuracy on more rows help little."""

OUTSIDE = 0.1
"""The prompts are suspected where this share of the answers begins with no label."""

FEW_ROWS = 20
"""A training with fewer rows than this for each label had few."""

CONFUSED = 0.2
"""A confusion is told where it takes this share of a label's rows, and `ENOUGH` rows."""

ENOUGH = 3
NAMED = 5


def advise(score: Score, base: Score | None = None) -> list[str]:
    """What to try next, in sentences; none where nothing is wrong with the figures."""
    if score.metric != "accuracy":
        return []
    others = [outcome for outcome in score.outcomes if outcome.given is None]
    mostly_other = 2 * len(others) >= score.rows
    found = []
    if len(others) >= max(OUTSIDE * score.rows, 2):
        found.append(
            f"{len(others):,} of {score.rows:,} answers begin with no label of these rows, such as"
            f" {others[0].answered!r}: the prompts may not be those of the training (without"
            " --template they are written as the file says; `reft inspect` shows how), or it needs"
            " more passes (--epochs)."
        )
    if not mostly_other:
        found += _no_better(score, base)
        found += _never_given(score.labels)
        found += _confused(score)
    few = score.trained_rows is not None and score.trained_rows < FEW_ROWS * len(score.labels)
    if few and score.value < GOOD:
        each = max(1, round((score.trained_rows or 0) / len(score.labels)))
        found.append(
            f"It was trained on {score.trained_rows:,} rows, about {each} a label: more rows"
            " help most."
        )
    if not found and score.value < POOR:
        found.append("More rows help most; then more passes (--epochs) and a higher --rank.")
    return found


def _no_better(score: Score, base: Score | None) -> list[str]:
    if score.majority is None or len(score.labels) < 2 or score.value == 1:
        return []
    name, share = score.majority
    bar, shown = share, f"always answering {name}"
    if base is not None and base.value > bar:
        bar, shown = base.value, "the base model"
    if score.value > bar + math.sqrt(bar * (1 - bar) / score.rows):
        return []
    return [
        f"This is no better than {shown}: check that the labels follow from the texts; then more"
        " rows, more passes (--epochs) or a higher --rank."
    ]


def _never_given(labels: tuple[LabelFigures, ...]) -> list[str]:
    never = [one for one in labels if not one.given and one.rows >= ENOUGH]
    if not never:
        return []
    return [
        f"Never given: {listed([one.label for one in never], NAMED)}. Look whether the training"
        f" rows have enough of {'it' if len(never) == 1 else 'them'}, spelled the same."
    ]


def _confused(score: Score) -> list[str]:
    rows = {figures.label: figures.rows for figures in score.labels}
    for one in score.confusions:
        large = one.count >= max(ENOUGH, CONFUSED * rows[one.wanted])
        if one.given is not None and large:
            return [
                f"{one.wanted} is taken for {one.given} in {one.count:,} of {rows[one.wanted]:,}"
                " rows: read some of them; the two may overlap, or labels may be wrong."
            ]
    return []
