from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions import Positions

spans = st.integers(min_value=0, max_value=12)
lengths = st.integers(min_value=1, max_value=40)


def by_the_rule(n: int, first: int, last: int) -> list[int]:
    """pyreft's rule, read naively: clamp each side to half of the prompt, mark, collect."""
    first, last = min(n // 2, first), min(n // 2, last)
    return [i for i in range(n) if i < first or i >= n - last]


@given(n=lengths, first=spans, last=spans)
def test_offsets_follow_the_rule(n: int, first: int, last: int) -> None:
    if first or last:
        assert Positions(first, last).offsets(n, 0, n) == by_the_rule(n, first, last)


@given(n=lengths, first=spans, last=spans, cuts=st.lists(st.integers(min_value=0, max_value=60)))
def test_chunks_edit_what_the_whole_edits(n: int, first: int, last: int, cuts: list[int]) -> None:
    if not (first or last):
        return
    positions = Positions(first, last)
    edges = sorted({0, *cuts, 100})
    edited = []
    for start, stop in pairwise(edges):
        chunk = positions.offsets(n, start, stop)
        assert all(start <= offset < stop for offset in chunk)
        edited += chunk
    assert edited == by_the_rule(n, first, last)


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("l1", 1, []),  # half of one token is none
        ("f1+l1", 1, []),
        ("l1", 2, [1]),
        ("f2", 3, [0]),
        ("f3+l3", 5, [0, 1, 3, 4]),
        ("f3+l3", 6, [0, 1, 2, 3, 4, 5]),
        ("f3+l3", 10, [0, 1, 2, 7, 8, 9]),
        ("f2", 10, [0, 1]),
        ("l3", 10, [7, 8, 9]),
    ],
)
def test_clamps(text: str, n: int, expected: list[int]) -> None:
    assert Positions.parse(text).offsets(n, 0, n) == expected


def test_generated_tokens_are_never_edited() -> None:
    assert Positions.parse("f7+l7").offsets(4, 4, 50) == []


@pytest.mark.parametrize(
    ("text", "normal"),
    [("f3+l3", "f3+l3"), ("l3+f3", "f3+l3"), (" f03 + l1 ", "f3+l1"), ("l12", "l12"), ("f1", "f1")],
)
def test_parse_gives_the_normal_form(text: str, normal: str) -> None:
    positions = Positions.parse(text)
    assert str(positions) == normal
    assert Positions.parse(normal) == positions
    assert hash(Positions.parse(normal)) == hash(positions)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write fN"),
        ("all", "write fN"),
        ("f", "write fN"),
        ("f-1", "write fN"),
        ("f1.5", "write fN"),
        ("f1l1", "write fN"),
        ("f1+", "write fN"),
        ("f1++l1", "write fN"),
        ("F1", "write fN"),
        ("f\u0663", "write fN"),  # an Arabic-Indic digit
        ("f1\n\n+x", "write fN"),
        ("f1234567", "write fN"),
        ("f1+f2", "twice"),
        ("l1+f1+l2", "twice"),
        ("f0", "leave it out"),
        ("f0+l1", "leave it out"),
        ("f65536", "out of range"),
    ],
)
def test_parse_refuses(text: str, hint: str) -> None:
    with pytest.raises(InvalidFile, match=hint):
        Positions.parse(text)
