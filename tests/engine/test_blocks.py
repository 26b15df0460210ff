"""The KV budget, and the keys that say which blocks are equal."""

import dataclasses

import pytest

from reft_runtime.engine.blocks import BLOCK_TOKENS, BlockBudget, block_keys, blocks_for
from reft_runtime.engine.sequence import AppliedIntervention, Request, Sequence, sequences_of
from reft_runtime.interventions import CanonicalEdit, Positions
from reft_runtime.sampling import SamplingParams
from tests.helpers.models import applied, loreft, prompt

LENGTH = 5 * BLOCK_TOKENS + 3


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


def keys(
    *interventions: AppliedIntervention, length: int = LENGTH, salt: bytes = b""
) -> list[bytes]:
    # Prompts of any length begin alike.
    tokens = prompt(1000)[:length]
    request = Request("a", tokens, SamplingParams(), 0, interventions, salt)
    return list(block_keys(request))


def shared(first: list[bytes], second: list[bytes]) -> int:
    """Length of the common beginning; nothing after it may be equal."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    assert not set(first[count:]) & set(second[count:])
    return count


def test_full_blocks_only() -> None:
    assert len(keys()) == len(set(keys())) == 5
    assert len(keys(length=BLOCK_TOKENS - 1)) == 0
    assert len(keys(length=BLOCK_TOKENS)) == 1
    assert len(keys(length=2 * BLOCK_TOKENS)) == 2


def test_equal_prompts_and_equal_beginnings_share() -> None:
    assert keys() == keys()
    assert shared(keys(), keys(length=LENGTH + 40)) == 5


def test_a_token_changes_its_block_and_all_after_it() -> None:
    request = Request("a", prompt(1000)[:LENGTH], SamplingParams(), 0)
    for at in (0, 20, 79):
        tokens = (*request.prompt[:at], 0, *request.prompt[at + 1 :])
        other = dataclasses.replace(request, prompt=tokens)
        assert shared(list(block_keys(request)), list(block_keys(other))) == at // BLOCK_TOKENS


def test_the_id_the_seed_and_the_sampling_do_not_matter() -> None:
    one = Request("a", prompt(40), SamplingParams(), 0)
    other = Request("b", prompt(40), SamplingParams(temperature=0), 9)
    assert list(block_keys(one)) == list(block_keys(other))


@pytest.mark.parametrize(
    ("positions", "count"),
    [("f1", 0), ("f20", 0), ("l1", 5), ("l3", 5), ("l4", 4), ("l20", 3), ("f1+l1", 0)],
)
def test_blocks_before_the_first_edit_are_the_bases(positions: str, count: int) -> None:
    assert shared(keys(), keys(applied(loreft(1, positions)))) == count


def test_the_same_edits_share_all() -> None:
    assert keys(applied(loreft(1, "f3+l20"))) == keys(applied(loreft(1, "f3+l20")))


def test_whose_prompt_is_longer_is_edited_later() -> None:
    edit = applied(loreft(1, "l10"))
    short, long = keys(edit, length=48), keys(edit, length=96)
    assert shared(short, long) == 2
    assert shared(keys(), long) == 5


def test_digest_strength_site_offsets_and_order_matter() -> None:
    a, b = loreft(1, "l20", seed=1), loreft(1, "l20", seed=2)
    base = applied(a)
    edit = a.edit
    moved = CanonicalEdit(2, edit.component, edit.positions, edit.V, edit.b, edit.U)
    other_site = CanonicalEdit(1, "mlp_output", edit.positions, edit.V, edit.b, edit.U)
    other_span = CanonicalEdit(1, edit.component, Positions(last=21), edit.V, edit.b, edit.U)
    variants = [
        keys(base),
        keys(dataclasses.replace(base, digest="other")),
        keys(dataclasses.replace(base, strength=0.5)),
        keys(dataclasses.replace(base, edits=(moved,))),
        keys(dataclasses.replace(base, edits=(other_site,))),
        keys(dataclasses.replace(base, edits=(other_span,))),
        keys(base, base),
        keys(base, applied(b)),
        keys(applied(b), base),
    ]
    for at, one in enumerate(variants):
        for other in variants[:at]:
            assert shared(one, other) == 3


def test_strength_zero_is_the_base() -> None:
    off = applied(loreft(1, "f3"), strength=0)
    assert keys(off) == keys()
    on = applied(loreft(1, "f3"))
    assert keys(off, on) == keys(on)


def test_a_salt_shares_nothing() -> None:
    assert shared(keys(salt=b"a"), keys()) == 0
    assert shared(keys(salt=b"a"), keys(salt=b"b")) == 0
    assert keys(salt=b"a") == keys(salt=b"a")
