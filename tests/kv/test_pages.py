"""Which pages hold what, and that nobody's page is another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.base.attention import LayerShape, Scoring
from reft_runtime.kernels.staging import to_device
from reft_runtime.kv.page_attention import GatheredAttention
from reft_runtime.kv.pages import NOBODYS_PAGE, PageStorage
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence, sequences_of

SHAPES = (
    LayerShape(1, 2, 3),
    LayerShape(2, 2, 2),
    LayerShape(1, 2, 3, source=0),
    LayerShape(1, 3, 2, values_in_keys=True),
)
BLOCKS = 24
ROWS = 6

Columns = tuple[SequenceOf[int], ...]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As in the runner, tensors are made and written in inference mode."""
    with torch.inference_mode():
        yield


def storage(vacant: list[int] | None = None) -> PageStorage:
    return PageStorage(
        SHAPES,
        torch.float32,
        torch.device("cpu"),
        BLOCKS,
        ROWS,
        BLOCKS * BLOCK_TOKENS,
        GatheredAttention(),
        lambda: vacant or (),
    )


def sequence(length: int) -> Sequence:
    return sequences_of(Request("a", (0,) * length, SamplingParams(), 0), 0)


def whole(each: Sequence) -> Chunk:
    return Chunk(each, 0, len(each.tokens))


def write(pages: PageStorage, each: Sequence, value: float) -> None:
    """What a step writes: `value` plus the offset, at every token."""
    (chunk,) = pages.prepare([whole(each)])
    attention = pages.attention([chunk])
    content = value + torch.arange(chunk.length) / 1000
    for layer, shape in enumerate(SHAPES):
        keys, values = (
            content[:, None, None].expand(-1, shape.kv_heads, dim)
            for dim in (shape.key_dim, shape.value_dim)
        )
        attention.attend(layer, keys.repeat(1, 2, 1), keys, values, Scoring())


def content(pages: PageStorage, each: Sequence, length: int) -> torch.Tensor:
    """What the kernels would read of a sequence, through the table on the device."""
    pages._send_changes()
    lane = pages.row(Chunk(each, 0, 1)).lane
    places = pages.tables[lane, : blocks_for(length)]
    read = [
        tensor[places].flatten(0, 1)[:length].amax((1, 2))
        for tensor in (*pages.keys, *pages.values)
    ]
    assert all(torch.equal(read[0], other) for other in read)
    return read[0]


def wanted(value: float, length: int) -> torch.Tensor:
    return value + torch.arange(length) / 1000


def used(pages: PageStorage) -> int:
    pages.check_integrity()
    return BLOCKS - len(pages._free)


def test_sequences_have_pages_of_their_own() -> None:
    pages = storage()
    one, other = sequence(40), sequence(17)
    write(pages, one, 1.0)
    write(pages, other, 2.0)
    assert torch.equal(content(pages, one, 40), wanted(1.0, 40))
    assert torch.equal(content(pages, other, 17), wanted(2.0, 17))
    assert used(pages) == 3 + 2
    pages.release([one])
    assert used(pages) == 2
    pages.release([one, other])
    assert used(pages) == 0
    pages.check_integrity(idle=True)


@pytest.mark.parametrize("length", [32, 37])
def test_a_fork_shares_what_is_whole_and_copies_the_rest(length: int) -> None:
    pages = storage()
    parent, child = sequence(length), sequence(length)
    write(pages, parent, 1.0)
    chunk = whole(parent)
    chunk.forks = [child]
    pages.prepare([chunk])
    pages.fork(parent, child, length)
    assert torch.equal(content(pages, child, length), wanted(1.0, length))
    rest = 1 if length % BLOCK_TOKENS else 0
    assert used(pages) == 2 + 2 * rest
    # What the child writes next is not the parent's.
    child.tokens.append(0)
    pages.prepare([Chunk(child, length, 1)])
    address = pages.row(Chunk(child, length, 1)).addresses[0]
    pages.keys[0].flatten(0, 1)[address] = 9.0
    parent.tokens.append(0)
    pages.prepare([Chunk(parent, length, 1)])
    assert pages.row(Chunk(parent, length, 1)).addresses[0] != address
    assert torch.equal(content(pages, parent, length), wanted(1.0, length))
    pages.release([parent])
    assert torch.equal(content(pages, child, length), wanted(1.0, length))


def test_kept_blocks_are_the_same_pages_and_outlive_their_sequence() -> None:
    pages = storage()
    first, second = sequence(48), sequence(50)
    write(pages, first, 1.0)
    pages.keep([BlockCopy(first, block, place) for block, place in ((0, 4), (1, 2))])
    assert used(pages) == 3
    pages.release([first])
    assert used(pages) == 2
    chunk = Chunk(second, 32, 18, [BlockCopy(second, 0, 4), BlockCopy(second, 1, 2)])
    pages.prepare([chunk])
    assert torch.equal(content(pages, second, 32), wanted(1.0, 32))
    assert used(pages) == 4
    pages.release([second])
    # Another block in the place lets the page of the one before go.
    write(pages, first, 3.0)
    pages.keep([BlockCopy(first, 0, 4)])
    pages.release([first])
    assert used(pages) == 2


def test_reused_blocks_take_the_place_of_pages() -> None:
    pages = storage()
    first, second = sequence(40), sequence(40)
    write(pages, first, 1.0)
    pages.keep([BlockCopy(first, 0, 0), BlockCopy(first, 1, 1)])
    write(pages, second, 2.0)
    assert used(pages) == 6
    pages.prepare([Chunk(second, 32, 8, [BlockCopy(second, 1, 1)])])
    assert used(pages) == 5
    both = torch.cat([wanted(2.0, 40)[:16], wanted(1.0, 40)[16:32], wanted(2.0, 40)[32:]])
    assert torch.equal(content(pages, second, 40), both)


def test_what_the_cache_gave_up_is_taken_back_when_pages_run_short() -> None:
    vacant: list[int] = []
    pages = storage(vacant)
    first = sequence(20 * BLOCK_TOKENS)
    write(pages, first, 1.0)
    pages.keep([BlockCopy(first, block, block) for block in range(20)])
    pages.release([first])
    assert used(pages) == 20
    vacant += range(5, 20)
    second = sequence(10 * BLOCK_TOKENS)
    write(pages, second, 2.0)
    assert used(pages) == 15
    third = sequence(40)
    pages.prepare([Chunk(third, 32, 8, [BlockCopy(third, i, i) for i in range(2)])])
    assert torch.equal(content(pages, third, 32), wanted(1.0, 32))
    pages.release([third])
    # Not until there is none.
    fourth = sequence((BLOCKS - 15) * BLOCK_TOKENS)
    write(pages, fourth, 4.0)
    vacant[:] = [2, 3]
    fourth.tokens += [0] * BLOCK_TOKENS
    write(pages, fourth, 5.0)
    assert used(pages) == BLOCKS - 1


def test_lanes_are_given_again() -> None:
    pages = storage()
    for round_ in range(3):
        several = [sequence(5 + i) for i in range(ROWS)]
        for number, each in enumerate(several):
            write(pages, each, 10.0 * round_ + number)
        for number, each in enumerate(several):
            kept = content(pages, each, 5 + number)
            assert torch.equal(kept, wanted(10.0 * round_ + number, 5 + number))
        pages.release(several)
    assert bool((pages.tables[pages.spare_lane] == NOBODYS_PAGE).all())


def test_only_changes_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def sending(columns: Columns, device: torch.device) -> tuple[torch.Tensor, ...]:
        sent.append([list(column) for column in columns])
        return to_device(columns, device)

    monkeypatch.setattr("reft_runtime.kv.pages.to_device", sending)
    pages = storage()
    one = sequence(33)
    pages.prepare([Chunk(one, 0, 20)])
    pages.prepare([Chunk(one, 20, 12)])
    pages.prepare([Chunk(one, 32, 1)])
    lane = pages.row(Chunk(one, 0, 1)).lane
    assert sent == [[[lane, lane], [0, 1], [1, 2]], [[lane], [2], [3]]]


def test_pages_are_of_the_given_dtype() -> None:
    pages = PageStorage(
        SHAPES, torch.float16, torch.device("cpu"), 1, 1, BLOCK_TOKENS, GatheredAttention()
    )
    assert {tensor.dtype for tensor in (*pages.keys, *pages.values)} == {torch.float16}


def test_integrity_can_fail() -> None:
    def broken(how: Callable[[PageStorage, Sequence], object], message: str) -> None:
        pages, one = storage(), sequence(20)
        write(pages, one, 1.0)
        pages.check_integrity()
        how(pages, one)
        with pytest.raises(AssertionError, match=message):
            pages.check_integrity(idle=message.endswith("some"))

    broken(lambda pages, one: pages._share(1), "users were miscounted")
    broken(lambda pages, one: pages._free.pop(), "pages lost")
    broken(lambda pages, one: pages._free.append(1), "pages lost")
    broken(lambda pages, one: pages._free_lanes.pop(), "lanes are lost")
    broken(lambda pages, one: pages._free_lanes.append(pages._lanes[one]), "given twice")
    broken(
        lambda pages, one: pages._lanes.update({sequence(1): pages._lanes.pop(one)}), "given twice"
    )
    broken(lambda pages, one: None, "1 sequences still have some")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_history_keeps_the_books(data: st.DataObject) -> None:
    vacant: list[int] = []
    pages = storage(vacant)
    live: dict[Sequence, float] = {}
    kept: dict[int, float] = {}  # by place: what its block was written with
    for number in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["new", "release", "keep", "reuse", "forget"])):
            case "new" if len(live) < ROWS - 1 and used(pages) < BLOCKS - 4:
                each = sequence(data.draw(st.integers(1, 3 * BLOCK_TOKENS)))
                write(pages, each, float(number))
                live[each] = float(number)
            case "release" if live:
                each = data.draw(st.sampled_from(sorted(live, key=live.__getitem__)))
                pages.release([each])
                del live[each]
            case "keep":
                able = [each for each in live if len(each.tokens) >= BLOCK_TOKENS]
                if able:
                    each = data.draw(st.sampled_from(sorted(able, key=live.__getitem__)))
                    place = data.draw(st.integers(0, 3))
                    pages.keep([BlockCopy(each, 0, place)])
                    kept[place] = live[each]
                    if place in vacant:
                        vacant.remove(place)
            case "reuse" if len(live) < ROWS - 1 and used(pages) < BLOCKS - 4:
                places = sorted(set(kept) - set(vacant))
                if places:
                    place = data.draw(st.sampled_from(places))
                    each = sequence(BLOCK_TOKENS + 3)
                    pages.prepare([Chunk(each, BLOCK_TOKENS, 3, [BlockCopy(each, 0, place)])])
                    found = content(pages, each, BLOCK_TOKENS)
                    assert torch.equal(found, wanted(kept[place], BLOCK_TOKENS))
                    pages.release([each])
            case "forget" if set(kept) - set(vacant):
                vacant.append(data.draw(st.sampled_from(sorted(set(kept) - set(vacant)))))
        pages.check_integrity()
        for each, value in live.items():
            found = content(pages, each, len(each.tokens))
            assert torch.equal(found, wanted(value, len(each.tokens)))
    pages.release(live)
    pages.check_integrity(idle=True)
