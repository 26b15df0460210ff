from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions import Positions

spans = st.integers(min_value=0, max_value=12)
lengths = st.integers(min_value=1, max_value=40)


def by_the_rule(n: int, first: int, last: int) -> list[int]:
    """pyreft's rule, read naively: clamp each side to half of the prompt, mark, collect."""
    first, last = min(n // 2, first), min(n // 2, last)
    return [i for i in range(n) if i < first or i >= n - last]


def edited(positions: Positions, n: int, total: int) -> list[int]:
    """All positions read naively: one token after the other, of `total` with n prompt tokens."""
    m = max(n - positions.suffix_offset, 0)
    spans = by_the_rule(m, positions.first, positions.last)
    listed = [i if i >= 0 else m + i for i in positions.listed]
    sliced = [i for start, stop in positions.slices for i in list(range(m))[start:stop]]
    return [
        i
        for i in range(total)
        if positions.everything
        or (i < n and (i in spans or i in listed or i in sliced))
        or (i >= n and i in [j for a, b in positions.decode for j in list(range(n, total))[a:b]])
    ]


def not_empty(positions: dict[str, Any]) -> bool:
    names = ("first", "last", "listed", "slices", "decode", "everything")
    return any(positions[name] for name in names)


def not_always_empty(bounds: tuple[int, int | None]) -> bool:
    """For some length there is something between them."""
    return any(range(n)[slice(*bounds)] for n in range(40))


bounds = st.tuples(st.integers(-15, 15), st.none() | st.integers(-15, 15))
windows = st.tuples(st.integers(0, 15), st.none() | st.integers(0, 15))


fields = st.fixed_dictionaries(
    {
        "first": spans,
        "last": spans,
        "listed": st.lists(st.integers(-15, 15), max_size=6).map(tuple),
        "slices": st.lists(bounds.filter(not_always_empty), max_size=3).map(tuple),
        "decode": st.lists(windows.filter(not_always_empty), max_size=3).map(tuple),
        "everything": st.booleans(),
        "suffix_offset": st.integers(0, 3),
    }
).filter(not_empty)


@given(fields, lengths, st.lists(st.integers(min_value=0, max_value=60)))
def test_every_kind_of_position_in_any_chunks(
    fields: dict[str, Any], n: int, cuts: list[int]
) -> None:
    positions = Positions(**fields)
    found = []
    for start, stop in pairwise(sorted({0, *cuts, 60})):
        found += positions.offsets(n, start, stop)
    assert found == edited(positions, n, 60)
    assert positions.edits_decode == any(i >= n for i in edited(positions, n, 100))
    for at in range(n + 1, 60):
        if at - n not in positions.turns:
            assert (at in found) == (at - 1 in found)


@given(fields)
@example({"slices": ((0, None), (0, None))})
def test_the_text_says_it_all_but_the_offset(fields: dict[str, Any]) -> None:
    positions = Positions(**fields)
    back = Positions.parse(str(positions), positions.suffix_offset)
    assert str(back) == str(positions) or set(positions.listed) == set(back.listed)
    for n in (1, 2, 7, 30):
        assert back.offsets(n, 0, 40) == positions.offsets(n, 0, 40)


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
        ("all", 3, [0, 1, 2]),
        ("[0,3,-1]", 5, [0, 3, 4]),
        ("[0,3,-1]", 3, [0, 2]),
        ("[9,-9]", 3, []),
        ("[4,4,-1]", 5, [4]),
        ("f1+[1]+l1", 4, [0, 1, 3]),
        ("decode", 4, []),
        ("prompt", 3, [0, 1, 2]),
        ("[1:]", 4, [1, 2, 3]),
        ("[:2]", 4, [0, 1]),
        ("[-2:]", 4, [2, 3]),
        ("[-9:]", 2, [0, 1]),
        ("[1:-1]", 4, [1, 2]),
        ("[1:-1]", 2, []),
        ("[:1]+[-1:]", 1, [0]),  # unlike f1+l1
        ("[1:3]+[2:4]+l1", 6, [1, 2, 3, 5]),
    ],
)
def test_clamps(text: str, n: int, expected: list[int]) -> None:
    assert Positions.parse(text).offsets(n, 0, n) == expected


def test_generated_tokens_are_never_edited() -> None:
    assert Positions.parse("f7+l7").offsets(4, 4, 50) == []


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("f3+l3", "f3+l3"),
        ("l3+f3", "f3+l3"),
        (" f03 + l1 ", "f3+l1"),
        ("l12", "l12"),
        ("f1", "f1"),
        ("all", "all"),
        ("decode+all", "all"),
        ("all+l1", "all"),
        ("[:]", "prompt"),
        ("prompt+[:]", "prompt"),
        ("decode+prompt", "prompt+decode"),
        (" [ 1 : ]+[0:3]", "[:3]+[1:]"),
        ("[1:]+[1:-1]", "[1:-1]+[1:]"),
        ("decode[:]+[:3]", "[:3]+decode"),
        ("decode[ 5: ]+decode[0:3]+l1", "l1+decode[:3]+decode[5:]"),
        ("decode+[ -1, 2,0 ,2]+l2+f1", "f1+l2+[0,2,-1]+decode"),
    ],
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
        ("ALL", "write fN"),
        ("all+all", "write fN"),
        ("decode+decode", "write fN"),
        ("[]", "write fN"),
        ("[0,]", "write fN"),
        ("[1 2]", "write fN"),
        ("[1.0]", "write fN"),
        ("[0]+[1]", "write fN"),
        ("[70000]", "out of range"),
        ("[70000:]", "out of range"),
        ("[1:70000]", "out of range"),
        ("[::2]", "write fN"),
        ("[1:a]", "write fN"),
        ("prompt+prompt", "write fN"),
        ("[3:3]", "always empty"),
        ("[-1:-2]", "always empty"),
        ("[-3:0]", "always empty"),
        ("+".join(f"[{i}:]" for i in range(9)), "at most 8"),
        ("+".join(f"[{i}:]+decode[{i}:]" for i in range(5)), "at most 8"),
        ("decode[3]", "write fN"),
        ("decode[::2]", "write fN"),
        ("decode [:3]", "write fN"),
        ("l1+decode[-3:]", r"`decode\[-3:\]` counts from the end of an answer"),
        ("decode[:-1]", r"`decode\[:-1\]` counts from the end of an answer"),
        ("decode[4:4]", r"`decode\[4:4\]` is always empty"),
        ("decode[:0]", "always empty"),
        ("decode[:70000]", "out of range"),
        (str([*range(4097)]), "at most 4096"),
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


@pytest.mark.parametrize(
    ("text", "n", "suffix_offset", "expected"),
    [
        ("l1", 5, 1, [3]),
        ("f3+l3", 7, 1, [0, 1, 2, 3, 4, 5]),
        ("f3+l3", 6, 1, [0, 1, 3, 4]),
        ("[-1,5]", 6, 1, [4, 5]),
        ("l1", 2, 1, []),
        ("f1+l1+[-1]", 1, 3, []),
        ("prompt", 6, 1, [0, 1, 2, 3, 4]),
        ("[-2:]", 6, 1, [3, 4]),
    ],
)
def test_suffix_offset(text: str, n: int, suffix_offset: int, expected: list[int]) -> None:
    assert Positions.parse(text, suffix_offset).offsets(n, 0, n) == expected


@pytest.mark.parametrize("suffix_offset", [-1, 65_536])
def test_suffix_offset_out_of_range(suffix_offset: int) -> None:
    with pytest.raises(InvalidFile, match="suffix_offset"):
        Positions.parse("l1", suffix_offset)


def test_generated_tokens_by_name() -> None:
    assert Positions.parse("all").offsets(3, 2, 6) == [2, 3, 4, 5]
    assert Positions.parse("l1+decode").offsets(4, 0, 7) == [3, 4, 5, 6]
    assert not Positions.parse("f1+[0]").edits_decode
    assert Positions.parse("all").edits_decode
    assert Positions.parse("decode+f1").edits_decode
    assert Positions.parse("[1:]+decode").offsets(3, 0, 5) == [1, 2, 3, 4]
    assert Positions.parse("prompt").offsets(3, 0, 5) == [0, 1, 2]
    assert not Positions.parse("prompt").edits_decode
    assert Positions.parse("decode[1:3]").offsets(4, 0, 9) == [5, 6]
    assert Positions.parse("decode[1:3]", suffix_offset=1).offsets(4, 0, 9) == [5, 6]
    assert Positions.parse("decode[1:]+decode[:2]").offsets(4, 5, 8) == [5, 6, 7]
    assert Positions.parse("decode[2:]").edits_decode


def test_what_is_not_given_is_not_edited() -> None:
    assert Positions(first=1) == Positions.parse("f1")
    assert Positions(last=1) == Positions.parse("l1")
