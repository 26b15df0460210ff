"""The keys that say which blocks of keys and values are equal."""

import dataclasses

import pytest

from reft_runtime.interventions import CanonicalEdit, Positions
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.block_keys import BlockKeys
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.request import AppliedIntervention, Request
from tests.helpers.models import applied, loreft, prompt

LENGTH = 5 * BLOCK_TOKENS + 3


def keys_of(request: Request, generated: tuple[int, ...] = ()) -> list[bytes]:
    tokens = (*request.prompt, *generated)
    return BlockKeys(request).upto(len(tokens) // BLOCK_TOKENS, tokens)


def keys(
    *interventions: AppliedIntervention, length: int = LENGTH, salt: bytes = b""
) -> list[bytes]:
    # Prompts of any length begin alike.
    tokens = prompt(1000)[:length]
    request = Request("a", tokens, SamplingParams(), 0, interventions, salt)
    return keys_of(request)


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
        assert shared(keys_of(request), keys_of(other)) == at // BLOCK_TOKENS


def test_the_id_the_seed_and_the_sampling_do_not_matter() -> None:
    one = Request("a", prompt(40), SamplingParams(), 0)
    other = Request("b", prompt(40), SamplingParams(temperature=0), 9)
    assert keys_of(one) == keys_of(other)


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


def base_blocks(*interventions: AppliedIntervention, length: int = LENGTH) -> int:
    request = Request("a", prompt(1000)[:length], SamplingParams(), 0, interventions)
    keys = BlockKeys(request)
    keys.upto(length // BLOCK_TOKENS, request.prompt)
    return keys.base


@pytest.mark.parametrize(
    ("positions", "count"),
    [("f1", 0), ("l3", 5), ("l4", 4), ("l20", 3), ("f1+l1", 0), ("[33]", 2), ("decode", 5)],
)
def test_base_counts_the_blocks_before_the_first_edit(positions: str, count: int) -> None:
    assert base_blocks(applied(loreft(1, positions))) == count
    assert base_blocks(applied(loreft(1, positions), strength=0)) == 5


def test_generated_tokens_are_keyed_as_a_longer_prompt_is() -> None:
    tokens = prompt(1000)
    for length in (5, 16, 40):
        short = Request("a", tokens[:length], SamplingParams(), 0)
        long = Request("a", tokens[:100], SamplingParams(), 0)
        assert keys_of(short, tokens[length:100]) == keys_of(long)


@pytest.mark.parametrize(("positions", "count"), [("l1", 1), ("decode", 2), ("all", 0), ("f1", 6)])
def test_edits_of_generated_tokens_are_in_the_keys(positions: str, count: int) -> None:
    tokens = prompt(1000)[:100]
    edit = applied(loreft(1, positions))
    short = Request("a", tokens[:32], SamplingParams(), 0, (edit,))
    base = Request("a", tokens, SamplingParams(), 0)
    long = Request("a", tokens, SamplingParams(), 0, (edit,))
    if positions == "f1":
        assert shared(keys_of(short, tokens[32:]), keys_of(long)) == count
    else:
        assert shared(keys_of(short, tokens[32:]), keys_of(base)) == count


def test_keys_are_made_once_and_in_pieces_as_at_once() -> None:
    request = Request("a", prompt(100), SamplingParams(), 0, (applied(loreft(1, "f3+l20")),))
    keys = BlockKeys(request)
    pieces = [keys.upto(blocks, request.prompt) for blocks in (1, 4, 2, 6)]
    assert [len(piece) for piece in pieces] == [1, 4, 2, 6]
    assert pieces[-1] == keys_of(request)
    copy = keys.copy(100)
    more = (*request.prompt, *prompt(60, seed=1))
    assert copy.upto(10, more) == keys_of(request, more[100:])
    assert len(keys.upto(6, request.prompt)) == 6
    assert keys.upto(6, request.prompt) == keys_of(request)
    other = (*request.prompt[:40], *more[100:])
    assert keys.copy(40).upto(5, other) == BlockKeys(request).upto(5, other)
