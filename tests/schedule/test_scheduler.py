"""Who computes what in a step; no tensors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import StepPlan
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of

Shape = tuple[int, int, int, bool]
"""Order of arrival, start, length, and whether it decodes."""


class Simulation:
    """A scheduler whose tokens come out of nowhere."""

    def __init__(
        self, max_running: int = 8, max_step_tokens: int = 32, kv_tokens: int = 10_000
    ) -> None:
        self.scheduler = Scheduler(BlockBudget(kv_tokens), max_running, max_step_tokens)
        self.arrived = 0
        self.sequences: list[Sequence] = []
        self.admitted: list[int] = []

    def add(
        self,
        length: int,
        max_tokens: int = 4,
        n: int = 1,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        prompt = tuple(range(length))
        request = Request("", prompt, sampling, 0, tenant=tenant, weight=weight, priority=priority)
        sequence = sequences_of(request, self.arrived)
        self.sequences += [sequence, *sequence.unforked]
        self.arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        """Plan a step, check what holds for every plan, and pretend to compute it."""
        scheduler = self.scheduler
        running = set(scheduler.running)
        decoding = {s for s in running if s.decoding}
        plan = scheduler.schedule()
        kinds = [chunk.sequence in decoding for chunk in plan.chunks]
        assert kinds == sorted(kinds, reverse=True), "decoding chunks come first"
        assert sum(chunk.length for chunk in plan.chunks) <= scheduler.max_step_tokens
        assert plan.chunks or scheduler.idle, "something is computed while there is something"
        assert decoding == {c.sequence for c in plan.chunks if c.sequence in decoding} | (
            decoding & set(plan.preempted)
        ), "every sequence that can decode does"
        if plan.preempted:
            losers = {sequence.request.tenant for sequence in plan.preempted}
            assert all(
                chunk.sequence in running or chunk.sequence.request.tenant not in losers
                for chunk in plan.chunks
            ), "what came free is not given away"
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.length > 0
            assert chunk.sequence in scheduler.running
            assert scheduler.budget._held[chunk.sequence] >= blocks_for(chunk.stop)
            if chunk.sequence.order not in self.admitted:
                self.admitted.append(chunk.sequence.order)
        for sequence in plan.preempted:
            assert sequence.status is Status.WAITING
            assert sequence.computed == 0
        for tenant in scheduler.waiting.tenants:
            waiting = [
                (s.request.priority, s.order, s.choice) for s in scheduler.waiting.of(tenant)
            ]
            assert waiting == sorted(waiting), "of one tenant, by priority and in order of arrival"
        completes = [
            s for chunk in plan.chunks if chunk.completes for s in (chunk.sequence, *chunk.forks)
        ]
        scheduler.advance(plan)
        for sequence in completes:
            sequence.tokens.append(0)
            if sequence.generated_length == sequence.request.sampling.max_tokens:
                scheduler.finish(sequence)
        scheduler.check_integrity(idle=scheduler.idle)
        return plan

    def shapes(self) -> list[Shape]:
        return [
            (c.sequence.order, c.start, c.length, c.start >= c.sequence.prompt_length)
            for c in self.step().chunks
        ]

    def finish(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        for sequence in self.sequences:
            assert sequence.status is Status.FINISHED
            assert sequence.generated_length == sequence.request.sampling.max_tokens


def test_prompts_fill_the_step_in_order_of_arrival() -> None:
    simulation = Simulation(max_step_tokens=32)
    for length in (10, 40, 5):
        simulation.add(length)
    assert simulation.shapes() == [(0, 0, 10, False), (1, 0, 22, False)]
    assert simulation.shapes() == [(0, 10, 1, True), (1, 22, 18, False), (2, 0, 5, False)]
    assert simulation.shapes() == [(0, 11, 1, True), (1, 40, 1, True), (2, 5, 1, True)]
    simulation.finish()


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    simulation = Simulation(max_step_tokens=8)
    for _ in range(3):
        simulation.add(2, max_tokens=50)
    simulation.step()
    simulation.add(100)
    for start in range(0, 100, 5):
        assert simulation.shapes() == [
            *((order, 2 + start // 5, 1, True) for order in range(3)),
            (3, start, 5, False),
        ]


def test_a_later_short_prompt_does_not_overtake_what_does_not_fit() -> None:
    simulation = Simulation(kv_tokens=160)
    simulation.add(100, max_tokens=4)
    simulation.add(100, max_tokens=4)
    simulation.add(1)
    simulation.finish()
    assert simulation.admitted == [0, 1, 2]


def test_no_more_run_than_may() -> None:
    simulation = Simulation(max_running=2)
    for _ in range(5):
        simulation.add(4)
    simulation.step()
    assert len(simulation.scheduler.running) == 2
    assert len(simulation.scheduler.waiting) == 3
    simulation.finish()


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    # Two blocks each to begin with, and five in all: soon each wants a third one.
    simulation = Simulation(kv_tokens=5 * BLOCK_TOKENS, max_running=4)
    old, new = simulation.add(20, max_tokens=30), simulation.add(20, max_tokens=30)
    late = simulation.add(20, max_tokens=30)
    preempted = []
    while old.status is not Status.FINISHED:
        preempted += simulation.step().preempted
    assert preempted
    assert set(preempted) == {new}
    assert len(new.tokens) > 20
    assert late.status is Status.WAITING
    simulation.finish()


def test_a_preempted_sequence_computes_all_its_tokens_again() -> None:
    simulation = Simulation(kv_tokens=5 * BLOCK_TOKENS)
    old, new = simulation.add(20, max_tokens=30), simulation.add(20, max_tokens=30)
    while not simulation.scheduler.preemptions:
        simulation.step()
    kept = len(new.tokens)
    while new.computed == 0:
        plan = simulation.step()
    assert old.status is Status.FINISHED
    assert [(c.start, c.length) for c in plan.chunks if c.sequence is new] == [(0, 32)]
    assert kept == len(new.tokens) > 32


def test_an_old_long_prompt_ends_while_short_ones_keep_coming() -> None:
    simulation = Simulation(max_running=4, max_step_tokens=16, kv_tokens=25 * BLOCK_TOKENS)
    for _ in range(4):
        simulation.add(10, max_tokens=20)
    long = simulation.add(300, max_tokens=50)
    for _ in range(300):
        simulation.add(10, max_tokens=20)
        simulation.step()
        if long.status is Status.FINISHED:
            break
    assert long.status is Status.FINISHED
    # With all of them still waiting behind it, nobody was starved.
    simulation.finish()


def test_choices_fork_where_the_prompt_ends() -> None:
    simulation = Simulation(max_step_tokens=8)
    first = simulation.add(12, n=3)
    assert [len(chunk.forks) for chunk in simulation.step().chunks] == [0]
    (chunk,) = simulation.step().chunks
    assert [s.choice for s in chunk.forks] == [1, 2]
    assert not first.unforked
    assert {s.computed for s in simulation.scheduler.running} == {12}
    assert len(simulation.step().chunks) == 3
    simulation.finish()


@pytest.mark.parametrize(
    ("max_running", "kv_tokens"), [(2, 10_000), (8, 4 * BLOCK_TOKENS)], ids=["running", "KV"]
)
def test_choices_without_room_queue_before_later_requests(max_running: int, kv_tokens: int) -> None:
    simulation = Simulation(max_running=max_running, kv_tokens=kv_tokens)
    simulation.add(20, n=4)
    simulation.add(1)
    (chunk,) = [c for c in simulation.step().chunks if c.sequence.order == 0]
    assert len(chunk.forks) == 1
    assert [(s.order, s.choice) for s in simulation.scheduler.waiting] == [(0, 2), (0, 3), (1, 0)]
    simulation.finish()


def test_finishing_twice_or_while_waiting_is_fine() -> None:
    simulation = Simulation(max_running=1)
    running, waiting = simulation.add(4), simulation.add(4)
    simulation.step()
    for sequence in (running, waiting, running, waiting):
        simulation.scheduler.finish(sequence)
    simulation.scheduler.check_integrity(idle=True)


def test_every_running_sequence_must_be_able_to_decode() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        Scheduler(BlockBudget(100), max_running=9, max_step_tokens=8)


def test_integrity_notices_what_is_left() -> None:
    simulation = Simulation()
    simulation.add(4)
    simulation.step()
    with pytest.raises(AssertionError, match="1 running"):
        simulation.scheduler.check_integrity(idle=True)


REQUESTS = st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(1, 4), st.integers(0, 20))
"""Prompt length, max_tokens, n, and the step before which it arrives."""


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 8),
    st.integers(0, 30),
    st.integers(160, 500),
    st.lists(REQUESTS, min_size=1, max_size=10),
)
def test_every_request_ends_under_any_limits(
    max_running: int, spare: int, kv_tokens: int, requests: list[tuple[int, int, int, int]]
) -> None:
    simulation = Simulation(max_running, max_running + spare, kv_tokens)
    for at in range(21):
        for length, max_tokens, n, arrives in requests:
            if arrives == at:
                simulation.add(length, max_tokens, n)
        simulation.step()
    simulation.finish()
