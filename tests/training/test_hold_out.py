"""Which rows are held out of a training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from reft_runtime.training.hold_out import split
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Rows, read_rows


def rows(**labels: int) -> list[dict[str, str]]:
    return [
        {"text": f"{label} number {number}", "label": label}
        for label, count in labels.items()
        for number in range(count)
    ]


def split_of(data: Any, share: float | None = None, seed: int = 0) -> tuple[Rows, Rows | None]:
    found = read_rows(data)
    return split(found, share, Layout(None, found.rows[0]), seed)


def counts(found: Rows) -> Counter[str | None]:
    return Counter(row.label for row in found.rows)


def test_a_tenth_of_every_label() -> None:
    kept, held = split_of(rows(a=160, b=60, c=20))
    assert held is not None
    assert counts(held) == {"a": 16, "b": 6, "c": 2}
    assert counts(kept) == {"a": 144, "b": 54, "c": 18}
    assert held.name == "rows (held out)"
    again = split_of(rows(a=160, b=60, c=20))[1]
    other = split_of(rows(a=160, b=60, c=20), seed=1)[1]
    assert again == held != other


def test_shares_are_rounded_to_the_whole() -> None:
    held = split_of(rows(a=35, b=35, c=35, d=35))[1]
    assert held is not None
    assert len(held.rows) == 14
    assert sorted(counts(held).values()) == [3, 3, 4, 4]


def test_no_more_than_are_useful() -> None:
    held = split_of(rows(a=4000, b=4000))[1]
    assert held is not None
    assert len(held.rows) == 500
    asked = split_of(rows(a=4000, b=4000), 0.2)[1]
    assert asked is not None
    assert len(asked.rows) == 1600


def test_none_where_there_are_few_or_no_labels() -> None:
    assert split_of(rows(a=50, b=49))[1] is None
    plain = [{"prompt": f"p {i}", "completion": "c"} for i in range(200)]
    assert split_of(plain)[1] is None
    assert split_of(rows(a=200), 0.0)[1] is None
    held = split_of(plain, 0.1)[1]
    assert held is not None
    assert len(held.rows) == 20


def test_every_label_keeps_a_row() -> None:
    kept, held = split_of(rows(a=3, b=3, c=1), 0.9)
    assert held is not None
    assert set(counts(kept)) == {"a", "b", "c"}
    with pytest.raises(ConfigError, match=r"hold_out: a share of 0.5 of 2 rows is none"):
        split_of(rows(a=1, b=1), 0.5)


def test_equal_texts_stay_on_one_side() -> None:
    twice = [
        {**row, "text": text}
        for row in rows(a=60, b=60)
        for text in (row["text"], f"  {row['text'].upper()} ")
    ]
    against = [{"text": "either", "label": label} for label in ("a", "b")]
    kept, held = split_of([*twice, *against], 0.3)
    assert held is not None
    sides = [{row.text("prompt").strip().casefold() for row in side.rows} for side in (kept, held)]
    assert not sides[0] & sides[1]
    assert "either" in sides[0]  # a text with two labels says nothing about who is right
    assert len(held.rows) == 72
