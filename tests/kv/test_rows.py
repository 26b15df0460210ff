"""Where rows lie, what memory they take, and that what they hold survives every move."""

import math
import mmap
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.base.attention import LayerShape
from reft_runtime.kv.rows import MIN_CAPACITY, RowStorage
from reft_runtime.kv.slabs import BlockPool, Layout, rounding_bytes
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of

SHAPES = (LayerShape(1, 2, 3), LayerShape(2, 2, 2))
LONGEST = 5 * MIN_CAPACITY


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As in the runner, tensors are made and written in inference mode."""
    with torch.inference_mode():
        yield


def storage(**options: Any) -> RowStorage:
    return RowStorage(SHAPES, torch.float32, LONGEST, max_blocks=8, **options)


def sequence(length: int = 10) -> Sequence:
    """A sequence that decodes: its prompt is computed, and one token came out of it."""
    made = sequences_of(Request("a", (0,) * length, SamplingParams(), 0), 0)
    made.tokens.append(0)
    made.computed = length
    made.status = Status.RUNNING
    return made


def fill(rows: RowStorage, sequence: Sequence, value: float) -> None:
    """Write what is computed: `value` and the position."""
    row = rows.where(sequence)
    content = value + torch.arange(sequence.computed) / 1000
    for part in range(len(rows._layout.parts)):
        row.part(part)[:, : sequence.computed] = content[:, None]


def holds(rows: RowStorage, sequence: Sequence, value: float, length: int | None = None) -> bool:
    row = rows.where(sequence)
    length = sequence.computed if length is None else length
    content = (value + torch.arange(length) / 1000)[:, None]
    parts = [row.part(part)[:, :length] for part in range(len(rows._layout.parts))]
    return all(torch.equal(part, content.expand_as(part)) for part in parts)


def test_shapes_of_layers_are_their_own() -> None:
    rows, one = storage(), sequence()
    rows.ensure(one, 10)
    row = rows.where(one)
    assert [row.keys(layer).shape for layer in (0, 1)] == [(1, 128, 2), (2, 128, 2)]
    assert [row.values(layer).shape for layer in (0, 1)] == [(1, 128, 3), (2, 128, 2)]


def test_a_row_grows_and_keeps_its_content() -> None:
    rows = storage()
    one, other = sequence(100), sequence(90)
    for each, value in ((one, 1.0), (other, 2.0)):
        rows.ensure(each, 100)
        fill(rows, each, value)
    capacities = []
    for tokens in (128, 129, 256, 257, 513, LONGEST):
        rows.ensure(one, tokens)
        rows.check_integrity()
        capacities.append(rows.where(one).capacity)
        assert holds(rows, one, 1.0)
        assert holds(rows, other, 2.0)
    assert capacities == [128, 256, 256, 512, LONGEST, LONGEST]


def test_a_growth_without_memory_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, one = storage(), sequence(100)
    rows.ensure(one, 100)
    fill(rows, one, 1.0)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("reft_runtime.machine.memory.mmap.mmap", refuse)
        for tokens in (129, LONGEST):
            with pytest.raises(MemoryError):
                rows.ensure(one, tokens)
        with pytest.raises(MemoryError):
            rows.ensure(sequence(), 10)
        with pytest.raises(MemoryError):
            rows.fork(one, sequence(), 10)
    rows.check_integrity()
    assert rows.where(one).capacity == 128
    assert holds(rows, one, 1.0)
    rows.ensure(one, 129)
    assert holds(rows, one, 1.0)


def test_rows_come_and_go() -> None:
    rows = storage()
    a, b, c = (sequence(length) for length in (10, 20, 30))
    for value, each in enumerate((a, b, c)):
        rows.ensure(each, each.computed)
        fill(rows, each, value)
    rows.release([a])
    assert holds(rows, b, 1)
    assert holds(rows, c, 2)
    rows.release([b])
    rows.release([b])
    rows.release([c])
    rows.check_integrity(idle=True)


def test_a_fork_has_its_own_copy() -> None:
    rows = storage()
    parent, child = sequence(20), sequence(20)
    rows.ensure(parent, 20)
    fill(rows, parent, 1)
    rows.fork(parent, child, 20)
    assert holds(rows, child, 1)
    fill(rows, parent, 5)
    assert holds(rows, child, 1)
    rows.release([parent])
    assert holds(rows, child, 1)


@pytest.mark.parametrize("length", [40, LONGEST - 3])
def test_kept_blocks_outlive_their_rows(length: int) -> None:
    rows = storage()
    one, other, unlike = sequence(length), sequence(33), sequence(300)
    rows.ensure(one, length)
    fill(rows, one, 1.0)
    rows.keep([BlockCopy(one, 0, 5), BlockCopy(one, 1, 2)])
    assert holds(rows, one, 1.0), "it goes on"
    fill(rows, one, 3.0)
    rows.release([one])
    rows.ensure(other, 33)
    rows.ensure(unlike, 300)
    fill(rows, unlike, 7.0)
    # Of two rows, and in another order than they were kept.
    rows.reuse([BlockCopy(unlike, 1, 2), BlockCopy(other, 1, 2), BlockCopy(other, 0, 5)])
    assert holds(rows, other, 1.0, 32)
    assert holds(rows, unlike, 7.0, 16)
    theirs, own = rows.where(unlike), rows.where(other)
    assert torch.equal(theirs.keys(1)[:, 16:32], own.keys(1)[:, 16:32])
    assert torch.equal(
        theirs.values(0)[:, 32:300],
        7 + torch.arange(32, 300)[None, :, None].expand(1, -1, 3) / 1000,
    )


def test_of_several_blocks_for_one_slot_the_last_is_kept() -> None:
    rows = storage()
    several = [sequence(16) for _ in range(20)]
    for value, each in enumerate(several):
        rows.ensure(each, 16)
        fill(rows, each, value)
    rows.keep([BlockCopy(each, 0, place) for each in several for place in (0, 1)])
    rows.reuse([BlockCopy(several[0], 0, 0), BlockCopy(several[1], 0, 1)])
    assert holds(rows, several[0], 19)
    assert holds(rows, several[1], 19)


def test_integrity_can_fail() -> None:
    rows, one = storage(), sequence()
    rows.ensure(one, 10)
    with pytest.raises(AssertionError, match="1 sequences still have one"):
        rows.check_integrity(idle=True)
    one.computed = 129
    with pytest.raises(AssertionError, match="129 tokens in 128"):
        rows.check_integrity()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, LONGEST)), max_size=40))
def test_random_moves(moves: list[tuple[int, int]]) -> None:
    """Each move gives a row to a sequence, lets it grow, or (0 tokens more) frees it."""
    rows = storage()
    live: dict[int, Sequence] = {}
    for name, more in moves:
        if name in live and not more:
            rows.release([live.pop(name)])
        elif more:
            each = live.setdefault(name, sequence(0))
            rows.ensure(each, min(LONGEST, each.computed + more))
            each.computed = min(LONGEST, each.computed + more)
            each.tokens = [0] * (each.computed + 1)
            fill(rows, each, name)
        rows.check_integrity()
        assert all(holds(rows, each, name) for name, each in live.items())
    for each in live.values():
        rows.release([each])
    rows.check_integrity(idle=True)


WIDE = (LayerShape(4, 64, 64),) * 8
"""16 KiB a token in float32: of each head 16 tokens are a page."""

TOKEN = 8 * 4 * 128 * 4
BLOCKS = 256


class Resident:
    """Bytes that this process has taken since this was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def tokens(self) -> float:
        """As tokens of `WIDE`."""
        return float(self._process.memory_info().rss - self._before) / TOKEN


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages are not given back")
def test_rows_and_kept_blocks_take_what_the_budget_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed: set[int] = set()

    def take() -> set[int]:
        taken = set(freed)
        freed.clear()
        return taken

    total = 16 * BLOCKS
    rows = RowStorage(WIDE, torch.float32, total, BLOCKS, take)
    slack = 0.05 * total
    resident = Resident()
    # One that has just outgrown half of the longest row: room for twice as much, taken or not.
    one = sequence(total // 2 + 16)
    rows.ensure(one, total // 2)
    one.computed = 0
    rows.ensure(one, total // 2 + 16)
    one.computed = total // 2 + 16
    fill(rows, one, math.nan)
    assert resident.tokens() == pytest.approx(total // 2 + 16, abs=slack)
    # It ends, and all of it is kept: never both the row and its blocks.
    one.status = Status.FINISHED
    seen = []
    real = rows._pool.part

    def watched(*args: int) -> torch.Tensor:
        seen.append(resident.tokens())
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rows._pool, "part", watched)
        rows.keep([BlockCopy(one, block, block) for block in range(total // 32)])
    assert max(seen) < 0.6 * total + slack
    rows.release([one])
    assert resident.tokens() == pytest.approx(total // 2, abs=slack)
    # Kept blocks give way to another.
    freed.update(range(total // 32))
    other = sequence(total)
    other.computed = 0
    rows.prepare([Chunk(other, 0, total)])
    assert resident.tokens() == pytest.approx(0, abs=slack)
    other.computed = total
    fill(rows, other, 1.0)
    assert resident.tokens() == pytest.approx(total, abs=slack)
    rows.release([other])
    assert resident.tokens() == pytest.approx(0, abs=slack)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages are not given back")
def test_a_row_that_grows_does_not_take_twice_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = RowStorage(WIDE, torch.float32, 4096)
    one = sequence(2048)
    resident = Resident()
    rows.ensure(one, 2048)
    fill(rows, one, 1.0)
    seen = []
    old = rows.where(one)
    real = old.part

    def watched(index: int) -> torch.Tensor:
        seen.append(resident.tokens())
        return real(index)

    monkeypatch.setattr(old, "part", watched)
    rows.ensure(one, 2049)
    assert len(seen) == 16
    assert max(seen) < 1.2 * 2048
    row = rows.where(one)
    assert row.capacity == 4096
    content = (1 + torch.arange(2048) / 1000)[:, None]
    assert all(torch.equal(row.part(i)[0, :2048], content.expand(-1, 64)) for i in range(16))


def test_a_blocks_place_is_given_back_after_it_was_reused() -> None:
    """It may give way in the very step that reuses it."""
    freed: set[int] = set()
    rows = storage(freed=lambda: freed)
    one, other = sequence(32), sequence(32)
    rows.ensure(one, 32)
    fill(rows, one, 1.0)
    rows.keep([BlockCopy(one, 0, 3), BlockCopy(one, 1, 4)])
    freed |= {3, 4}
    other.computed = 0
    reused = [BlockCopy(other, 0, 3), BlockCopy(other, 1, 4)]
    rows.prepare([Chunk(other, 32, 1, reused)])
    assert holds(rows, other, 1.0, 32)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages are not given back")
def test_a_place_that_is_given_back_is_that_one_alone() -> None:
    pool = BlockPool(Layout.of(WIDE), 3, torch.float32)
    pool.part(0, 0, 3).fill_(1)
    pool.drop([1])
    assert [float(pool.part(0, place, 1).max()) for place in range(3)] == [1, 0, 1]


def test_layers_whose_keys_and_values_differ_or_are_one_are_told() -> None:
    """Compiled layers would write where they do not lie."""
    kept = Layout.of([*SHAPES, LayerShape(1, 4, 4, values_in_keys=True)])
    assert kept.heads == (None, (2, 2), None)


def test_what_memory_comes_in() -> None:
    assert rounding_bytes(SHAPES, 4096) == (1 + 1 + 2 + 2) * 4096
