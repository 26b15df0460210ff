"""The KV budget."""

import pytest

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.prefix_cache import PrefixCache
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence, sequences_of


def sequence() -> Sequence:
    return sequences_of(Request("a", (1,), SamplingParams(), 0), 0)


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)]
)
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


def test_the_budget_counts_what_each_holds() -> None:
    budget = BlockBudget(4 * BLOCK_TOKENS + 15)
    a, b = sequence(), sequence()
    assert (budget.total, budget.free) == (4, 4)
    assert budget.reserve(a, 17)
    assert budget.reserve(a, 20), "the same two blocks"
    assert budget.reserve(a, 1), "never fewer"
    assert budget.used == 2
    assert not budget.reserve(b, 33), "all or nothing"
    assert budget.used == 2
    assert budget.reserve(b, 32)
    assert budget.free == 0
    assert not budget.reserve(a, 33)
    budget.release(a)
    budget.release(a)
    assert budget.free == 2
    budget.release(b)
    assert budget.used == 0
    budget.check_integrity()


def test_the_budgets_integrity_can_fail() -> None:
    budget = BlockBudget(100)
    budget.reserve(sequence(), 10)
    budget._used += 1
    with pytest.raises(AssertionError, match="KV budget"):
        budget.check_integrity()


def test_what_is_cached_gives_way() -> None:
    cache = PrefixCache()
    budget = BlockBudget(4 * BLOCK_TOKENS, cache)
    cache.add([b"a", b"b", b"c", b"d"], 4, budget.free)
    a = sequence()
    assert budget.reserve(a, 17)
    assert len(cache) == budget.free == 2
    assert budget.reserve(a, 64)
    assert len(cache) == 0
    budget.release(a)
    budget.check_integrity()


def test_integrity_sees_a_cache_that_is_too_large() -> None:
    cache = PrefixCache()
    budget = BlockBudget(4 * BLOCK_TOKENS, cache)
    cache.add([b"a", b"b", b"c", b"d", b"e"], 5, 5)
    with pytest.raises(AssertionError, match="5 blocks kept, 4 may be"):
        budget.check_integrity()
