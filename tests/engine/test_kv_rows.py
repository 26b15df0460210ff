"""Where rows lie, and that what they hold survives every move."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.engine.attention import LayerShape
from reft_runtime.engine.kv_rows import MIN_CAPACITY, MIN_ROWS, RowStorage
from reft_runtime.engine.prefix_cache import BlockCopy
from reft_runtime.engine.sequence import Request, Sequence, sequences_of
from reft_runtime.sampling import SamplingParams

SHAPES = (LayerShape(1, 2, 3), LayerShape(2, 2, 2))
LONGEST = 5 * MIN_CAPACITY


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As in the runner, tensors are made and written in inference mode."""
    with torch.inference_mode():
        yield


def storage() -> RowStorage:
    return RowStorage(SHAPES, torch.float32, LONGEST, max_blocks=8)


def sequence(length: int = 10) -> Sequence:
    """A sequence that decodes: its prompt is computed, and one token came out of it."""
    made = sequences_of(Request("a", (0,) * length, SamplingParams(), 0), 0)
    made.tokens.append(0)
    made.computed = length
    return made


def fill(rows: RowStorage, sequence: Sequence, value: float) -> None:
    """Write what is computed: `value` and the position."""
    slab, slot = rows.where(sequence)
    content = value + torch.arange(sequence.computed) / 1000
    for tensor in (*slab.keys, *slab.values):
        tensor[slot, :, : sequence.computed] = content[:, None]


def holds(rows: RowStorage, sequence: Sequence, value: float, length: int | None = None) -> bool:
    slab, slot = rows.where(sequence)
    length = sequence.computed if length is None else length
    content = (value + torch.arange(length) / 1000)[:, None]
    return all(
        torch.equal(tensor[slot, :, :length], content.expand_as(tensor[slot, :, :length]))
        for tensor in (*slab.keys, *slab.values)
    )


def test_shapes_of_layers_are_their_own() -> None:
    rows, one = storage(), sequence()
    rows.ensure(one, 10)
    slab, slot = rows.where(one)
    assert slot == 0
    assert [t.shape for t in slab.keys] == [(MIN_ROWS, 1, 128, 2), (MIN_ROWS, 2, 128, 2)]
    assert [t.shape for t in slab.values] == [(MIN_ROWS, 1, 128, 3), (MIN_ROWS, 2, 128, 2)]


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
        capacities.append(rows.where(one)[0].capacity)
        assert holds(rows, one, 1.0)
        assert holds(rows, other, 2.0)
    assert capacities == [128, 256, 256, 512, LONGEST, LONGEST]
    assert rows.where(other)[1] == 0, "the place that came free is filled"


def test_a_slab_grows_and_keeps_its_rows() -> None:
    rows = storage()
    all_of_them = [sequence() for _ in range(3 * MIN_ROWS)]
    for value, each in enumerate(all_of_them):
        rows.ensure(each, 10)
        fill(rows, each, value)
    assert [rows.where(each)[1] for each in all_of_them] == list(range(3 * MIN_ROWS))
    assert all(holds(rows, each, value) for value, each in enumerate(all_of_them))


def test_the_last_row_moves_into_a_freed_place() -> None:
    rows = storage()
    a, b, c = (sequence(length) for length in (10, 20, 30))
    for value, each in enumerate((a, b, c)):
        rows.ensure(each, each.computed)
        fill(rows, each, value)
    rows.release([a])
    assert [rows.where(each)[1] for each in (c, b)] == [0, 1]
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
    fill(rows, one, 3.0)
    rows.release([one])
    rows.ensure(other, 33)
    rows.ensure(unlike, 300)
    fill(rows, unlike, 7.0)
    # Of two rows, in slabs of their own, and in another order than they were kept.
    rows.reuse([BlockCopy(unlike, 1, 2), BlockCopy(other, 1, 2), BlockCopy(other, 0, 5)])
    assert holds(rows, other, 1.0, 32)
    assert holds(rows, unlike, 7.0, 16)
    slab, slot = rows.where(unlike)
    home, place = rows.where(other)
    assert torch.equal(slab.keys[1][slot, :, 16:32], home.keys[1][place, :, 16:32])
    assert torch.equal(
        slab.values[0][slot, :, 32:300],
        7 + torch.arange(32, 300)[None, :, None].expand(1, -1, 3) / 1000,
    )


def test_of_several_blocks_for_one_slot_the_last_is_kept() -> None:
    rows = storage()
    several = [sequence(16) for _ in range(20)]
    for value, each in enumerate(several):
        rows.ensure(each, 16)
        fill(rows, each, value)
    rows.keep([BlockCopy(each, 0, slot) for each in several for slot in (0, 1)])
    rows.reuse([BlockCopy(several[0], 0, 0), BlockCopy(several[1], 0, 1)])
    assert holds(rows, several[0], 19)
    assert holds(rows, several[1], 19)


def test_memory_of_a_length_that_nobody_has_goes() -> None:
    rows = storage()
    short, long = sequence(), sequence()
    rows.ensure(short, 10)
    rows.release([short])
    rows.ensure(long, 200)
    assert list(rows._slabs) == [256]


def finite_everywhere(rows: RowStorage) -> bool:
    slabs = rows._slabs.values()
    tensors = [tensor for slab in slabs for tensor in (*slab.keys, *slab.values)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("how", ["released", "grown", "moved"])
def test_what_is_not_known_to_be_finite_leaves_nothing(how: str) -> None:
    rows = storage()
    first, suspect, last = sequence(), sequence(), sequence()
    suspect.tokens.pop()  # no token came out of it
    for each in (first, suspect, *([last] if how != "moved" else [])):
        rows.ensure(each, 10)
    fill(rows, first, 1)
    fill(rows, suspect, float("nan"))
    if how == "grown":
        rows.ensure(suspect, 200)
    elif how == "moved":
        rows.release([first])
        assert rows.where(suspect)[1] == 0
    rows.release([suspect])
    assert finite_everywhere(rows)


def test_integrity_can_fail() -> None:
    rows, one = storage(), sequence()
    rows.ensure(one, 10)
    with pytest.raises(AssertionError, match="1 in slabs"):
        rows.check_integrity(idle=True)
    rows.where(one)[0].rows[0] = sequence()
    with pytest.raises(AssertionError, match="not where it was placed"):
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
