"""Where prompts go on from kept recurrent states, and where these are taken; no tensors."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.reuse import LEAST_GAIN, SPARSE
from reft_runtime.schedule.sequence import Sequence, sequences_of
from reft_runtime.schedule.snapshots import Snapshots
from tests.helpers.models import applied, loreft, prompt
from tests.schedule.recurrent import POISON, RecurrentSimulation

SYSTEM = prompt(100)
"""A beginning of six whole blocks and four tokens."""
EDIT = applied(loreft(1, "f1"))
BAD = AppliedIntervention(POISON, EDIT.edits)


def standing(tokens: tuple[int, ...], at: int) -> Sequence:
    """A sequence of which so many tokens are computed."""
    sequence = sequences_of(Request("", tokens, SamplingParams(), 0), 0)
    sequence.computed = at
    return sequence


def test_the_least_recently_used_snapshot_goes() -> None:
    snapshots = Snapshots(2)
    one, two, three = (standing(prompt(80, seed), 64) for seed in range(3))
    keys = {sequence: sequence.block_keys(80) for sequence in (one, two, three)}
    assert [snapshots.take(s, finite=True) for s in (one, two)] == [0, 1]
    assert snapshots.find(keys[one]) == (4, 0)
    assert snapshots.find(keys[one][:3]) is None
    assert snapshots.take(three, finite=True) == 1
    assert snapshots.find(keys[two]) is None
    assert snapshots.find(keys[one]) == (4, 0)
    assert snapshots.find(keys[three]) == (4, 1)
    stats = snapshots.stats()
    assert (stats.kept, stats.places, stats.evictions) == (2, 2, 1)
    snapshots.clear()
    assert snapshots.find(keys[one]) is None
    snapshots.check_integrity([])


def test_the_last_snapshot_before_the_end_is_found() -> None:
    snapshots = Snapshots(3)
    sequence = standing(prompt(200), 64)
    for boundary in (64, 128, 192):
        sequence.computed = boundary
        snapshots.take(sequence, finite=True)
    keys = sequence.block_keys(200)
    assert snapshots.find(keys) == (12, 2)
    assert snapshots.find(keys[:11]) == (8, 1)
    assert snapshots.find(keys[8:11]) is None
    assert not snapshots.is_worth(sequence, 176, 64)
    assert snapshots.is_worth(sequence, 176, 48)


def test_a_pending_snapshot_is_neither_found_nor_evicted() -> None:
    snapshots = Snapshots(1)
    one, two = standing(prompt(80), 64), standing(prompt(80), 64)
    keys = one.block_keys(80)
    assert snapshots.take(one, finite=False) == 0
    assert snapshots.find(keys) is None
    assert snapshots.take(two, finite=True) is None
    snapshots.check_integrity([one])
    snapshots.publish(one)
    assert snapshots.find(keys) == (4, 0)
    snapshots.check_integrity([])


def test_of_two_equal_ones_the_first_is_published() -> None:
    snapshots = Snapshots(2)
    one, two = standing(prompt(80), 64), standing(prompt(80), 64)
    assert [snapshots.take(s, finite=False) for s in (one, two)] == [0, 1]
    snapshots.publish(two)
    snapshots.publish(one)
    assert snapshots.find(one.block_keys(80)) == (4, 1)
    assert len(snapshots) == 1
    snapshots.check_integrity([])


def test_integrity_can_fail() -> None:
    snapshots = Snapshots(2)
    one = standing(prompt(80), 64)
    snapshots.take(one, finite=False)
    with pytest.raises(AssertionError, match="does not run"):
        snapshots.check_integrity([])
    snapshots._free.append(0)
    with pytest.raises(AssertionError, match="places"):
        snapshots.check_integrity([one])


def test_a_prompt_has_a_snapshot_behind_its_last_whole_block() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM)
    assert simulation.shapes() == [(0, 0, 96)]
    assert simulation.shapes() == [(0, 96, 4)]
    again = simulation.add(SYSTEM)
    longer = simulation.add((*SYSTEM, *prompt(30, seed=1)))
    assert simulation.shapes() == [(1, 96, 4), (2, 96, 34)]
    assert again.cached == longer.cached == 96
    assert simulation.snapshots.stats().hits == 2
    simulation.finish()


def test_a_short_prompt_is_computed_at_once() -> None:
    simulation = RecurrentSimulation()
    simulation.add(prompt(LEAST_GAIN))
    simulation.add(prompt(LEAST_GAIN + 1, seed=1))
    assert simulation.shapes() == [(0, 0, LEAST_GAIN), (1, 0, LEAST_GAIN)]
    simulation.finish()


def test_the_second_prompt_takes_a_snapshot_for_the_third_where_it_parts() -> None:
    simulation = RecurrentSimulation()
    for ending in range(3):
        simulation.add((*SYSTEM, *prompt(100, seed=ending)))
        simulation.finish()
    # The first has snapshots behind 192 tokens, the second also behind the 96 in common.
    assert simulation.computed == 2 * 200 + 104 + 3 * 3
    assert simulation.sequences[-1].cached == 96


def test_of_many_that_come_at_once_two_compute_what_they_have_in_common() -> None:
    simulation = RecurrentSimulation(max_running=16)
    for ending in range(10):
        edit = applied(loreft(1, "l1", seed=ending))
        simulation.add((*SYSTEM, *prompt(30, seed=ending)), edit)
    assert simulation.shapes() == [(0, 0, 128)]
    # The last whole block of the first is its own; of the others, 96 tokens are kept.
    assert simulation.shapes() == [(0, 128, 2), (1, 0, 96)]
    assert simulation.shapes() == [(order, 96, 34) for order in range(1, 10)]
    simulation.finish()


@pytest.mark.parametrize("how", ["is aborted", "is preempted"])
def test_nobody_waits_for_a_snapshot_that_will_not_come(how: str) -> None:
    simulation = RecurrentSimulation()
    simulation.add(prompt(320))
    simulation.finish()
    gone, waits = (
        simulation.add((*prompt(320)[:240], *prompt(60, seed=ending))) for ending in range(2)
    )
    plan = simulation.scheduler.schedule()
    assert [(c.sequence, c.start, c.stop) for c in plan.chunks] == [(gone, 0, 240)]
    assert waits in simulation.scheduler.running
    if how == "is aborted":
        simulation.abort(gone)
    else:
        simulation.preempt(gone)
    assert simulation.shapes() == [(2, 0, 240)]
    simulation.finish()
    assert (gone.cached, waits.cached) == (240 if how == "is preempted" else 0, 0)


def test_a_state_behind_edits_is_kept_once_a_token_came_out_of_it() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM, EDIT)
    simulation.add((*SYSTEM, 5), EDIT)
    assert simulation.shapes() == [(0, 0, 96)]
    assert len(simulation.snapshots) == 0
    assert simulation.shapes() == [(0, 96, 4)]
    assert len(simulation.snapshots) == 1
    assert simulation.shapes() == [(1, 96, 5)]
    simulation.finish()


def test_the_state_of_a_request_of_one_token_is_kept() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM, EDIT, max_tokens=1)
    simulation.finish()
    assert len(simulation.snapshots) == 1


def test_a_state_before_the_edits_is_kept_at_once() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM, applied(loreft(1, "l1")))
    simulation.step()
    assert len(simulation.snapshots) == 1


@pytest.mark.parametrize("how", ["fails", "is aborted", "is preempted", "makes no token"])
def test_a_state_of_which_no_token_came_is_not_kept(how: str) -> None:
    simulation = RecurrentSimulation()
    first = simulation.add(
        SYSTEM, BAD if how == "fails" else EDIT, max_tokens=0 if how == "makes no token" else 4
    )
    length = 100 if how == "makes no token" else 96
    assert simulation.shapes() == [(0, 0, length)]
    if how == "is aborted":
        simulation.abort(first)
    elif how == "is preempted":
        simulation.preempt(first)
    elif how == "fails":
        simulation.step()
        assert simulation.failed == {"0"}
    assert len(simulation.snapshots) == 0
    assert not simulation.snapshots._pending
    simulation.finish()


def test_several_choices_go_on_from_the_last_block_before_the_end() -> None:
    simulation = RecurrentSimulation()
    simulation.add(prompt(97))
    simulation.finish()
    simulation.add(prompt(97), n=2)
    assert simulation.shapes() == [(1, 96, 1)]


def test_who_waits_for_a_pending_snapshot_computes_when_its_sequence_fails() -> None:
    simulation = RecurrentSimulation()
    for _ in range(2):
        simulation.add(SYSTEM, BAD)
    assert simulation.shapes() == [(0, 0, 96)]
    assert simulation.shapes() == [(0, 96, 4)]
    assert simulation.shapes() == [(1, 0, 96)]
    simulation.finish()
    assert simulation.failed == {"0", "1"}


def test_a_pending_snapshot_behind_kept_blocks_is_waited_for() -> None:
    simulation = RecurrentSimulation()
    simulation.add((*SYSTEM, *prompt(100, seed=1)), EDIT)
    simulation.finish()
    for ending in range(2, 4):
        simulation.add((*SYSTEM, *prompt(100, seed=ending)), EDIT)
    assert simulation.shapes() == [(1, 0, 96)]
    assert simulation.shapes() == [(1, 96, 96)]
    assert simulation.shapes() == [(1, 192, 8)]
    assert simulation.shapes() == [(2, 96, 96)]
    simulation.finish()


@pytest.mark.parametrize("kind", ["trace", "scores", "no cache", "no places"])
def test_what_can_not_be_found_is_not_taken(kind: str) -> None:
    simulation = RecurrentSimulation(
        max_step_tokens=72, places=0 if kind == "no places" else 9, cached=kind != "no cache"
    )
    for _ in range(2):
        if kind == "scores":
            simulation.add(SYSTEM, prompt_logprobs=0)
        else:
            simulation.add(SYSTEM, trace=kind == "trace")
        assert [length for _, _, length in simulation.shapes()] == [72]
        simulation.finish()
    assert len(simulation.snapshots) == 0


def test_a_scored_prompt_goes_on_before_what_is_scored() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM)
    simulation.finish()
    scored = simulation.add((*SYSTEM, 1), prompt_logprobs=0)
    scored.request = dataclasses.replace(scored.request, scored_from=99)
    assert simulation.shapes() == [(1, 96, 5)]


@pytest.mark.parametrize("edits", [(), (EDIT,)], ids=["base", "edited"])
def test_small_steps_leave_few_snapshots(edits: tuple[AppliedIntervention, ...]) -> None:
    simulation = RecurrentSimulation(max_step_tokens=72, kv_tokens=20_000)
    simulation.add(prompt(2000), *edits)
    assert [simulation.shapes()[0][2] for _ in range(3)] == [64, 64, 64]
    simulation.finish()
    # At most one for each part of this length, and that behind the last whole block.
    assert len(simulation.snapshots) == 2000 // SPARSE + 1
    # So that the second one that begins so need not compute all of it.
    simulation.add((*prompt(2000)[:1500], *prompt(9)), *edits)
    assert simulation.step().chunks[0].start > 1500 - SPARSE - 72
    simulation.finish()


def test_steps_smaller_than_a_block_are_not_cut() -> None:
    simulation = RecurrentSimulation(max_running=4, max_step_tokens=12)
    simulation.add(SYSTEM)
    assert [simulation.shapes()[0][2] for _ in range(9)] == [12] * 8 + [4]
    simulation.finish()
    assert len(simulation.snapshots) == 1


def test_choices_fork_behind_the_last_chunk() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM, n=3)
    assert not simulation.step().chunks[0].forks
    assert [s.choice for s in simulation.step().chunks[0].forks] == [1, 2]
    simulation.finish()


LABELS = ((5, 6), (5, 7, 8), (11, *range(20, 40)), (12, 13, 14), (30, 31), (9,), (10, 11, 12))


def test_labels_fork_where_the_prompt_ends() -> None:
    simulation = RecurrentSimulation()
    first = simulation.add(SYSTEM, labels=LABELS)
    others = list(first.unforked)
    assert simulation.shapes() == [(0, 0, 96)]
    (chunk,) = simulation.step().chunks
    assert (chunk.start, chunk.stop) == (96, 100)
    assert chunk.forks == others
    assert len(simulation.step().chunks) == 1 + len(others)
    simulation.finish()
    check_scores(simulation)


@pytest.mark.parametrize("length", [96, 100])
@pytest.mark.parametrize("max_running", [1, 2])
def test_labels_without_room_fork_from_one_that_computes_the_prompt(
    max_running: int, length: int
) -> None:
    simulation = RecurrentSimulation(max_running=max_running)
    simulation.add(SYSTEM[:length], labels=LABELS)
    simulation.finish()
    check_scores(simulation)
    assert simulation.computed < 2 * length, "the rest goes on from the snapshot"


def test_an_heir_goes_on_from_before_the_prompts_end() -> None:
    simulation = RecurrentSimulation(max_running=2)
    for ending in range(2):
        simulation.add((*SYSTEM[:96], *prompt(80, seed=ending)))
        simulation.finish()
    sequence = simulation.add(SYSTEM[:96], labels=LABELS)
    assert simulation.snapshots.find(sequence.block_keys(96)) is not None, "it is too late for it"
    simulation.finish()
    check_scores(simulation)


def check_scores(simulation: RecurrentSimulation) -> None:
    """Every place of every label's path has been scored, and each prompt's end once."""
    for sequence in simulation.sequences:
        if sequence.request.labels is not None and sequence.request.id not in simulation.failed:
            first = sequence.first_scored
            assert first is not None
            scored = simulation.scored.get(sequence, set())
            assert scored == set(range(first, len(sequence.tokens)))


def test_a_preempted_sequence_goes_on_from_a_snapshot() -> None:
    simulation = RecurrentSimulation()
    sequence = simulation.add(SYSTEM, max_tokens=40)
    for _ in range(15):
        simulation.step()
    simulation.preempt(sequence)
    assert simulation.step().chunks[0].start == 96
    simulation.finish()


def test_a_prompt_that_is_preempted_on_a_boundary_goes_on_there() -> None:
    simulation = RecurrentSimulation(max_step_tokens=80)
    sequence = simulation.add(prompt(200))
    simulation.step()
    simulation.preempt(sequence)
    assert simulation.shapes() == [(0, 80, 80)]
    simulation.finish()


def test_a_snapshot_without_its_blocks_is_not_used() -> None:
    simulation = RecurrentSimulation()
    simulation.add(SYSTEM)
    simulation.finish()
    assert simulation.cache is not None
    simulation.cache.shrink(3)
    simulation.add(SYSTEM)
    assert simulation.shapes() == [(1, 0, 100)], "there is a snapshot of it already"
    simulation.add(SYSTEM)
    assert simulation.shapes() == [(2, 96, 4)]
    simulation.finish()


TEXTS = [
    prompt(250, seed=1),
    *((*prompt(250, seed=1)[:at], *prompt(250 - at, seed=at)) for at in (70, 100, 170)),
]
EDITS = [
    (),
    (),
    *((applied(loreft(1, p)),) for p in ("l1", "f1", "[100]", "l20+decode")),
    (BAD,),
    (AppliedIntervention(POISON, applied(loreft(1, "[70]")).edits),),
]
ASKED = st.tuples(
    st.sampled_from(TEXTS),
    st.integers(1, 250) | st.integers(65, 250),
    st.sampled_from(EDITS),
    st.sampled_from([0, 1, 2, 5, 30]),
    st.integers(1, 3),
    st.sampled_from([(), (), LABELS]),
    st.sampled_from(["", "", "", "a"]),
    st.integers(0, 20),
    st.none() | st.integers(0, 25),
)
"""Text and how much of it, edits, max_tokens, n, labels, tenant, steps of its arrival and of its
end by force."""


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 8),
    st.integers(0, 100) | st.just(500),
    st.integers(304, 450) | st.just(2000),
    st.sampled_from([0, 1, 1, 2, 3, 9]),
    st.sampled_from([True, True, True, False]),
    st.lists(ASKED, min_size=3, max_size=14),
)
def test_every_chunk_begins_with_the_state_of_its_tokens(
    max_running: int,
    spare: int,
    kv_tokens: int,
    places: int,
    cached: bool,
    asked: list[
        tuple[
            tuple[int, ...],
            int,
            tuple[AppliedIntervention, ...],
            int,
            int,
            tuple[tuple[int, ...], ...],
            str,
            int,
            int | None,
        ]
    ],
) -> None:
    simulation = RecurrentSimulation(
        max_running, max_running + spare, kv_tokens, places, cached=cached
    )
    gone: list[tuple[Sequence, int]] = []
    for at in range(26):
        for text, length, edits, most, n, labels, tenant, arrives, ends in asked:
            if arrives == at:
                most = 0 if labels else most
                sequence = simulation.add(
                    text[:length],
                    *edits,
                    labels=labels,
                    tenant=tenant,
                    max_tokens=most,
                    n=n if most else 1,
                )
                if ends is not None:
                    gone.append((sequence, ends))
        for sequence, ends in gone:
            if ends == at:
                simulation.abort(sequence)
        simulation.step()
    simulation.finish()
    if not gone:
        check_scores(simulation)
