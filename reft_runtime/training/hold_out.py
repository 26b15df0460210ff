"""Rows that are held out of a training, to choose its checkpoint and to measure it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from reft_runtime.errors import ConfigError
from reft_runtime.training.layout import Layout, prompt_key
from reft_runtime.training.rows import Row, Rows

SHARE = 0.1
"""The share of the rows that is held out where nobody says how many."""

LEAST_ROWS = 100
"""With fewer rows all are trained on, unless told otherwise: a tenth would say too little."""

MOST_ROWS = 500
"""At most this many rows are held out, unless told otherwise: more would only be slower."""


def split(rows: Rows, share: float | None, layout: Layout, seed: int) -> tuple[Rows, Rows | None]:
    """Rows to train on, and those held out, each in the order of the data.

    `share` None holds out a tenth of rows that all have labels, where there are enough of them; 0
    holds out none. Of every label the same share is taken, and at least one row stays to be
    trained on. Rows with the same prompt, but for blanks and capitals, stay together.
    """
    if share is None:
        labelled = all(row.label is not None for row in rows.rows)
        if not labelled or len(rows.rows) < LEAST_ROWS:
            return rows, None
        wanted = min(round(SHARE * len(rows.rows)), MOST_ROWS)
    elif share == 0:
        return rows, None
    else:
        wanted = round(share * len(rows.rows))
    taken: set[int] = set()
    groups = _groups(rows, layout, random.Random(seed))
    for label, quota in _quotas(groups, wanted):
        left = sum(map(len, groups[label])) - 1  # the last row stays
        for group in groups[label]:
            if len(group) <= min(quota, left):
                taken.update(group)
                quota -= len(group)
                left -= len(group)
    if not taken:
        if share is None:
            return rows, None
        raise ConfigError(
            f"hold_out: a share of {share:g} of {len(rows.rows)} rows is none that can be spared;"
            " give a larger one, or 0 to train on all.",
            param="hold_out",
        )
    kept = [row for place, row in enumerate(rows.rows) if place not in taken]
    held = [row for place, row in enumerate(rows.rows) if place in taken]
    return replace(rows, rows=kept), replace(rows, name=f"{rows.name} (held out)", rows=held)


_Groups = Mapping[str | None, list[list[int]]]
"""The places of rows by label, those with one prompt together."""


def _groups(rows: Rows, layout: Layout, order: random.Random) -> _Groups:
    """Groups of rows with one prompt, in random order; prompts with several labels have none."""
    prompts: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows.rows):
        prompts[prompt_key(layout.prompt(row))].append(place)
    found: dict[str | None, list[list[int]]] = defaultdict(list)
    for places in prompts.values():
        labels = {_label(rows.rows[place]) for place in places}
        if len(labels) == 1:
            found[labels.pop()].append(places)
    for groups in found.values():
        order.shuffle(groups)
    return found


def _quotas(groups: _Groups, wanted: int) -> Iterator[tuple[str | None, int]]:
    """How many rows of each label to hold out: shares, rounded so that their sum is `wanted`."""
    counts = Counter({label: sum(map(len, found)) for label, found in groups.items()})
    exact = {label: wanted * count / counts.total() for label, count in counts.items()}
    whole = {label: int(share) for label, share in exact.items()}
    nearest = sorted(exact, key=lambda label: whole[label] - exact[label])
    for label in nearest[: wanted - sum(whole.values())]:
        whole[label] += 1
    yield from whole.items()


def _label(row: Row) -> str | None:
    return None if row.label is None else row.label.strip()
