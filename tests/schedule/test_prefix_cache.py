"""What is kept for reuse, and who waits for whom; no tensors."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import Chunk, StepPlan
from reft_runtime.schedule.prefix_cache import BlockCopy, PrefixCache
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of
from tests.helpers.models import applied, loreft, prompt

KEYS = [bytes([number]) for number in range(100)]


def test_what_is_added_is_found_from_the_beginning_on() -> None:
    cache = PrefixCache()
    assert cache.add(KEYS[:3], 2, 10) == [(0, 0), (1, 1), (2, 2)]
    assert cache.add(KEYS[:5], 2, 10) == [(3, 3), (4, 4)]
    assert cache.find(KEYS[:9]) == [0, 1, 2, 3, 4]
    assert cache.find(KEYS[2:9]) == [2, 3, 4]
    assert cache.find(KEYS[7:]) == []
    assert dict(cache.stats().blocks) == {"base": 2, "own": 3}
    cache.check_integrity(5)


def test_the_least_recently_used_goes_and_of_a_sequence_the_last_block() -> None:
    cache = PrefixCache()
    cache.add(KEYS[:3], 3, 6)
    cache.add(KEYS[10:13], 0, 6)
    cache.find(KEYS[:3])
    cache.shrink(4)
    assert len(cache.find(KEYS[:3])) == 3
    assert len(cache.find(KEYS[10:13])) == 1
    assert cache.stats().evictions == 2
    assert dict(cache.stats().blocks) == {"base": 3, "own": 1}
    assert len(cache.take_freed()) == 2
    # Their places are used again, and what was used last stays.
    cache.find(KEYS[:3])
    cache.shrink(3)
    assert {place for _, place in cache.add(KEYS[20:23], 3, 6)} < set(range(6))
    assert cache.take_freed() == set()  # the third place is no longer free
    assert len(cache.find(KEYS[:3])) == 3
    cache.check_integrity(6)


def test_a_sequence_too_long_keeps_its_beginning() -> None:
    cache = PrefixCache()
    cache.add(KEYS[50:54], 4, 4)
    assert [index for index, _ in cache.add(KEYS[:9], 9, 4)] == [0, 1, 2, 3]
    assert cache.find(KEYS[50:54]) == []
    assert cache.add(KEYS[60:64], 4, 0) == []
    assert len(cache) == 0


def test_integrity_can_fail() -> None:
    cache = PrefixCache()
    cache.add(KEYS[:3], 3, 3)
    cache._free.append(1)
    with pytest.raises(AssertionError, match="places"):
        cache.check_integrity(3)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 20), st.booleans()),
        max_size=40,
    )
)
def test_slots_are_never_lost_nor_given_twice(
    moves: list[tuple[int, int, int, bool]],
) -> None:
    cache = PrefixCache()
    content: dict[int, bytes] = {}
    for first, length, limit, add in moves:
        keys = KEYS[10 * first : 10 * first + length]
        if add:
            for index, place in cache.add(keys, length // 2, limit):
                content[place] = keys[index]
            assert len(cache) <= limit
            assert len(cache.find(keys)) == min(length, limit)
        else:
            cache.shrink(limit)
        cache.check_integrity(max(limit, len(cache)))
        found = cache.find(keys)
        assert [content[place] for place in found] == keys[: len(found)]


class Simulation:
    """A scheduler with a cache, whose rows and places hold the keys of what they would hold."""

    def __init__(
        self, max_running: int = 8, max_step_tokens: int = 512, kv_tokens: int = 10_000
    ) -> None:
        self.cache = PrefixCache()
        budget = BlockBudget(kv_tokens, self.cache)
        self.scheduler = Scheduler(budget, max_running, max_step_tokens)
        self.places: dict[int, bytes] = {}
        self.computed = 0
        self.arrived = 0
        self.sequences: list[Sequence] = []

    def add(
        self,
        tokens: tuple[int, ...],
        *interventions: AppliedIntervention,
        salt: bytes = b"",
        **sampling: Any,
    ) -> Sequence:
        params = SamplingParams(**{"max_tokens": 4, **sampling})
        request = Request(f"{self.arrived}", tokens, params, 0, interventions, salt)
        sequence = sequences_of(request, self.arrived)
        self.sequences += [sequence, *sequence.unforked]
        self.arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self, failed: tuple[Sequence, ...] = ()) -> StepPlan:
        """Plan a step, check every copy, and pretend to compute it."""
        plan = self.scheduler.schedule()
        assert plan.chunks or self.scheduler.idle, "something is computed while there is something"
        self._keep(plan.kept)
        for chunk in plan.chunks:
            self._check_reuse(chunk)
            self.computed += chunk.length
        completes = [
            s for chunk in plan.chunks if chunk.completes for s in (chunk.sequence, *chunk.forks)
        ]
        self.scheduler.advance(plan)
        for sequence in failed:
            self.scheduler.finish(sequence)
        for sequence in completes:
            if sequence.status is Status.RUNNING and sequence.request.sampling.max_tokens:
                sequence.tokens.append(0)
        ended = [s for s in completes if s.generated_length == s.request.sampling.max_tokens]
        for sequence in ended:
            if sequence.status is Status.RUNNING:
                self.scheduler.finish(sequence)
                self._keep(self.scheduler.keep(sequence))
        for sequence in [c.sequence for c in plan.prompts]:
            if sequence.status is Status.RUNNING:
                self._keep(self.scheduler.keep(sequence))
        self.scheduler.check_integrity(idle=self.scheduler.idle)
        return plan

    def _keep(self, copies: list[BlockCopy]) -> None:
        for copy in copies:
            sequence = copy.sequence
            keys = sequence.keys.upto(copy.block + 1, sequence.tokens)
            self.places[copy.place] = keys[copy.block]

    def _check_reuse(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert chunk.length > 0
        if not chunk.reused:
            assert chunk.start == sequence.computed
            return
        blocks = [copy.block for copy in chunk.reused]
        assert blocks == list(range(sequence.computed // BLOCK_TOKENS, chunk.start // BLOCK_TOKENS))
        assert chunk.start % BLOCK_TOKENS == 0
        assert chunk.start < len(sequence.tokens), "the last token is computed"
        keys = sequence.block_keys(chunk.start)
        assert [self.places[copy.place] for copy in chunk.reused] == [keys[b] for b in blocks]

    def finish(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        assert all(s.status is Status.FINISHED for s in self.sequences)


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Order of arrival, start and length of every chunk of a prompt."""
    return [(c.sequence.order, c.start, c.length) for c in plan.prompts]


SYSTEM = prompt(100)
"""A beginning of six whole blocks and four tokens."""


def test_who_needs_the_block_that_is_being_computed_waits_for_it() -> None:
    simulation = Simulation(max_step_tokens=64)
    for ending in range(3):
        simulation.add((*SYSTEM, 200 + ending, 5, 6), applied(loreft(1, "l1", seed=ending)))
    simulation.add(prompt(10, seed=7))
    assert shape(simulation.step()) == [(0, 0, 64)]
    # The rest of the first, and what needs nothing of it; then the others from the block on.
    assert shape(simulation.step()) == [(0, 64, 39), (3, 0, 10)]
    assert shape(simulation.step()) == [(1, 96, 7), (2, 96, 7)]
    simulation.finish()
    assert dict(simulation.cache.stats().queries) == {"base": 3 * 96, "own": 0}
    assert dict(simulation.cache.stats().hits) == {"base": 2 * 96, "own": 0}


def test_who_comes_in_the_middle_takes_what_there_is_and_waits_for_the_rest() -> None:
    simulation = Simulation(max_step_tokens=40)
    simulation.add(SYSTEM)
    simulation.step()
    late = simulation.add((*SYSTEM, 9))
    assert shape(simulation.step()) == [(0, 40, 40)]
    assert shape(simulation.step()) == [(0, 80, 20)]
    assert shape(simulation.step()) == [(1, 96, 5)]
    assert late.cached == 96


def test_a_part_of_a_block_is_no_reason_to_compute_the_rest() -> None:
    simulation = Simulation(max_step_tokens=24)
    one = simulation.add(SYSTEM)
    simulation.step()
    assert one.computed == 24, "in the middle of a block"
    # Meanwhile another has computed it, in a way that does not matter here.
    keys = one.block_keys(100)
    for index, place in simulation.cache.add(keys, len(keys), 100):
        simulation.places[place] = keys[index]
    assert shape(simulation.step()) == [(0, 96, 4)]
    assert dict(simulation.cache.stats().hits) == {"base": 72, "own": 0}


@pytest.mark.parametrize("how", ["fails", "is aborted", "is preempted"])
def test_nobody_waits_for_one_that_is_gone(how: str) -> None:
    simulation = Simulation()
    edit = applied(loreft(1, "f1"))
    first = simulation.add(SYSTEM, edit)
    second = simulation.add((*SYSTEM[:90], 3), edit)
    if how == "fails":
        assert shape(simulation.step(failed=(first,))) == [(0, 0, 100)]
    else:
        assert shape(simulation.scheduler.schedule()) == [(0, 0, 100)]
    assert simulation.scheduler.running[-1] is second, "it waited for the first"
    if how == "is aborted":
        simulation.scheduler.finish(first)
    elif how == "is preempted":
        simulation.scheduler._preempt(first, StepPlan())
    # When the first comes back, the second is ahead of it.
    assert shape(simulation.step()) == [(1, 0, 91)]
    simulation.finish()
    assert second.cached == 0
    assert first.cached == (80 if how == "is preempted" else 0)


def test_edited_blocks_are_kept_only_once_a_token_came_out_of_them() -> None:
    simulation = Simulation(max_step_tokens=32)
    simulation.add(SYSTEM, applied(loreft(1, "f1")))
    for _ in range(3):
        simulation.step()
        assert len(simulation.cache) == 0
    simulation.step()
    assert dict(simulation.cache.stats().blocks) == {"base": 0, "own": 6}


def test_base_blocks_are_kept_at_once() -> None:
    simulation = Simulation(max_step_tokens=32)
    simulation.add(SYSTEM, applied(loreft(1, "[50]")))
    kept = []
    for _ in range(4):
        simulation.step()
        kept.append(tuple(simulation.cache.stats().blocks.values()))
    assert kept == [(2, 0), (3, 0), (3, 0), (3, 3)]


def test_who_makes_no_token_keeps_no_edited_block_and_nobody_waits_for_it() -> None:
    simulation = Simulation(max_step_tokens=64)
    edit = applied(loreft(1, "[20]"))
    simulation.add(SYSTEM, edit, max_tokens=0)
    simulation.add(SYSTEM, edit)
    simulation.step()
    # Only the first block will be kept by the one before.
    assert shape(simulation.step()) == [(0, 64, 36), (1, 16, 28)]
    simulation.finish()
    assert dict(simulation.cache.stats().hits) == {"base": 16, "own": 0}


def test_scores_and_traces_read_nothing_but_are_read() -> None:
    simulation = Simulation()
    simulation.add(SYSTEM, prompt_logprobs=0)
    again = simulation.add(SYSTEM, prompt_logprobs=0)
    assert shape(simulation.step()) == [(0, 0, 100), (1, 0, 100)]
    assert again.cached == 0
    simulation.add(SYSTEM)
    assert shape(simulation.step()) == [(2, 96, 4)]


def test_salts_share_nothing() -> None:
    simulation = Simulation()
    for salt in (b"", b"a", b"b", b"a"):
        simulation.add(SYSTEM, salt=salt)
    assert shape(simulation.step()) == [(0, 0, 100), (1, 0, 100), (2, 0, 100)]
    assert shape(simulation.step()) == [(3, 96, 4)]


def test_a_chat_goes_on_where_it_stopped() -> None:
    simulation = Simulation()
    first = simulation.add(SYSTEM, max_tokens=20)
    while not simulation.scheduler.idle:
        simulation.step()
    simulation.add((*first.tokens, 7, 8, 9))
    # 119 tokens were computed: the last one had no step of its own.
    assert shape(simulation.step()) == [(1, 112, 11)]


def test_a_preempted_sequence_takes_back_what_it_had() -> None:
    # Two blocks each to begin with, and five in all: soon each wants a third one.
    simulation = Simulation(kv_tokens=5 * BLOCK_TOKENS)
    old = simulation.add(prompt(20, seed=1), max_tokens=30)
    new = simulation.add(prompt(20, seed=2), max_tokens=30)
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert new.status is Status.WAITING
    kept = len(simulation.cache)
    assert kept == 2
    while new.status is Status.WAITING:
        plan = simulation.step()
    (chunk,) = [c for c in plan.chunks if c.sequence is new]
    assert old.status is Status.FINISHED
    # What the older one needed of that room was taken, the later block first.
    assert chunk.start == len(chunk.reused) * BLOCK_TOKENS >= BLOCK_TOKENS


def test_room_is_not_made_of_what_will_be_reused() -> None:
    simulation = Simulation(kv_tokens=14 * BLOCK_TOKENS)
    simulation.add(SYSTEM, max_tokens=1)
    simulation.step()
    simulation.add(prompt(95, seed=3), max_tokens=1)
    simulation.step()
    assert len(simulation.cache) == 11
    # Seven blocks for it, so four of the eleven must go: not those that it asks for.
    simulation.add((*SYSTEM, 1), max_tokens=1)
    assert shape(simulation.step()) == [(2, 96, 5)]


def test_nobody_waits_for_what_cannot_be_kept() -> None:
    simulation = Simulation(kv_tokens=14 * BLOCK_TOKENS)
    simulation.add(SYSTEM)
    simulation.add(SYSTEM)
    assert shape(simulation.step()) == [(0, 0, 100), (1, 0, 100)]


TEXTS = [prompt(150, seed=1), prompt(150, seed=2), (*prompt(150, seed=1)[:70], *prompt(80, seed=3))]
EDITS = [
    (),
    *((applied(loreft(1, p)),) for p in ("l1", "f1", "f1+l1", "all", "[40]", "l20+decode")),
]
ASKED = st.tuples(
    st.sampled_from(TEXTS),
    st.integers(1, 150),
    st.sampled_from(EDITS),
    st.integers(0, 30),
    st.integers(1, 3),
    st.integers(0, 20),
    st.none() | st.integers(0, 25),
    st.booleans(),
)
"""Text and how much of it, edits, max_tokens, n, steps of its arrival and of its end by force,
and whether it fails then (or is aborted)."""


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 8),
    st.integers(0, 60),
    st.integers(208, 700),
    st.lists(ASKED, min_size=1, max_size=10),
)
def test_every_request_ends_and_reuses_only_what_is_equal(
    max_running: int,
    spare: int,
    kv_tokens: int,
    asked: list[
        tuple[
            tuple[int, ...],
            int,
            tuple[AppliedIntervention, ...],
            int,
            int,
            int,
            int | None,
            bool,
        ]
    ],
) -> None:
    simulation = Simulation(max_running, max_running + spare, kv_tokens)
    gone: list[tuple[Sequence, int, bool]] = []
    for at in range(26):
        for text, length, edits, max_tokens, n, arrives, ends, fails in asked:
            if arrives == at:
                # A request that makes no token has one choice, as far as a simulation goes.
                sequence = simulation.add(
                    text[:length], *edits, max_tokens=max_tokens, n=n if max_tokens else 1
                )
                if ends is not None and n == 1:
                    gone.append((sequence, ends, fails))
        for sequence, ends, fails in gone:
            if ends == at and not fails:
                simulation.scheduler.finish(sequence)
        simulation.step(tuple(s for s, ends, fails in gone if ends == at and fails))
    simulation.finish()
