"""Turns and shares of several tenants; no tensors."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.counters import DECODE_COST, PROMPT_COST, TokenCounters
from reft_runtime.schedule.pacing import LEAST_TOKENS, StepPacer, StepTimes
from reft_runtime.schedule.plan import StepPlan
from reft_runtime.schedule.prefix_cache import PrefixCache
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import Scheduler
from reft_runtime.schedule.sequence import Sequence, Status, sequences_of
from reft_runtime.schedule.shares import Share, allot
from reft_runtime.schedule.tenants import RECENT_STEPS
from tests.schedule.test_scheduler import Simulation

TIMES = StepTimes((1, 8, 64), (16.0, 23.0, 79.0), 0.5)
"""A decode step takes 15 and 1 for each sequence."""


class Shared(Simulation):
    """A simulation that counts what each tenant was served, by itself."""

    def __init__(
        self, max_running: int = 8, max_step_tokens: int = 32, kv_tokens: int = 10_000
    ) -> None:
        super().__init__(max_running, max_step_tokens, kv_tokens)
        self.served = dict.fromkeys("abc", 0.0) | {"": 0.0}
        self.farthest: dict[Sequence, int] = {}

    def step(self) -> StepPlan:
        plan = super().step()
        self.count(plan)
        return plan

    def count(self, plan: StepPlan) -> None:
        for index, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            new = chunk.stop - max(chunk.start, self.farthest.get(sequence, 0))
            cost = DECODE_COST if index < plan.decodes else PROMPT_COST
            self.served[sequence.request.tenant] += max(0, new) * cost / sequence.request.weight
            self.farthest[sequence] = max(chunk.stop, self.farthest.get(sequence, 0))
            self.farthest |= dict.fromkeys(chunk.forks, chunk.shared)

    def backlogged(self, *tenants: str) -> bool:
        """Whether something of each waits."""
        return all(self.scheduler.waiting.of(tenant) for tenant in tenants)

    def order(self) -> str:
        """Tenants of the requests, in the order in which they were admitted."""
        tenant_of = {s.order: s.request.tenant for s in self.sequences}
        return "".join(tenant_of[order] for order in self.admitted)


def test_the_tenant_that_was_served_least_is_next() -> None:
    simulation = Shared(max_running=1)
    for tenant, length in (("a", 10), ("a", 30), ("a", 10), *[("b", 10)] * 4):
        simulation.add(length, max_tokens=2, tenant=tenant)
    simulation.finish()
    # Of equals the one that came last. A request of 10 + 2 tokens costs 12, the one of 30 costs 32.
    assert simulation.order() == "bababba"


def test_a_flood_is_not_before_a_newcomer() -> None:
    simulation = Shared(max_running=2)
    for _ in range(50):
        simulation.add(10, tenant="a")
    for _ in range(20):
        simulation.step()
    late = simulation.add(10, tenant="b")
    assert late in [chunk.sequence for chunk in simulation.step().chunks]


def test_idleness_is_no_credit() -> None:
    simulation = Shared(max_running=1)
    for _ in range(40):
        simulation.add(10, tenant="a")
    for _ in range(100):
        simulation.step()
    start = len(simulation.admitted)
    for _ in range(10):
        simulation.add(10, tenant="b")
    simulation.finish()
    assert simulation.order()[start : start + 12] == "ba" * 6


def test_weights_divide_what_is_computed() -> None:
    simulation = Shared(max_running=4)
    for _ in range(200):
        simulation.add(20, max_tokens=10, tenant="a")
        simulation.add(20, max_tokens=10, tenant="b", weight=3)
    while simulation.backlogged("a", "b"):
        simulation.step()
    tokens = {"a": simulation.served["a"], "b": simulation.served["b"] * 3}
    assert tokens["b"] / tokens["a"] == pytest.approx(3, rel=0.05)


def test_within_a_tenant_the_lowest_priority_goes_first() -> None:
    simulation = Shared(max_running=1)
    for priority in (0, 2, -1, 0, 2, -1):
        simulation.add(4, priority=priority)
    simulation.finish()
    assert simulation.admitted == [2, 5, 0, 3, 1, 4]


def test_priority_is_no_matter_between_tenants() -> None:
    simulation = Shared(max_running=1)
    for _ in range(4):
        simulation.add(4, tenant="a", priority=5)
        simulation.add(4, tenant="b", priority=-5)
    simulation.finish()
    assert simulation.order() in ("ba" * 4, "ab" * 4)


def test_a_newcomer_takes_a_place_of_its_share() -> None:
    simulation = Shared(max_running=4)
    flood = [simulation.add(10, max_tokens=100, tenant="a") for _ in range(8)]
    simulation.step()
    new = simulation.add(10, max_tokens=100, tenant="b")
    plan = simulation.step()
    assert plan.preempted == [flood[3]]
    assert new in [chunk.sequence for chunk in plan.prompts]
    # Two of four places are its share, and no more.
    simulation.add(10, max_tokens=100, tenant="b")
    simulation.add(10, max_tokens=100, tenant="b")
    for _ in range(3):
        simulation.step()
    assert Counter(s.request.tenant for s in simulation.scheduler.running) == {"a": 2, "b": 2}
    simulation.finish()


def test_a_newcomer_takes_blocks_of_its_share() -> None:
    simulation = Shared(kv_tokens=8 * BLOCK_TOKENS, max_step_tokens=200)
    flood = [simulation.add(BLOCK_TOKENS, max_tokens=8, tenant="a") for _ in range(4)]
    simulation.step()
    assert simulation.scheduler.budget.free == 0
    new = simulation.add(4 * BLOCK_TOKENS - 1, tenant="b")  # all of its share, with its next token
    plan = simulation.step()
    assert plan.preempted == flood[:1:-1]
    assert new.status is Status.RUNNING
    simulation.finish()


def test_more_than_a_share_is_not_taken() -> None:
    simulation = Shared(kv_tokens=8 * BLOCK_TOKENS, max_step_tokens=200)
    for _ in range(4):
        simulation.add(BLOCK_TOKENS, max_tokens=8, tenant="a")
    simulation.step()
    simulation.add(4 * BLOCK_TOKENS, tenant="b")
    assert not simulation.step().preempted
    simulation.finish()


def test_who_was_served_less_keeps_its_place() -> None:
    simulation = Shared(max_running=4)
    small = [simulation.add(10, max_tokens=100, tenant=tenant) for tenant in "ac"]
    for _ in range(2):
        simulation.add(10, max_tokens=100, tenant="b", weight=9)
    simulation.step()
    # Three of the four places are b's share, but it was served more than those who have one each.
    simulation.scheduler.counters.charge("b", 9 * 1000)
    simulation.add(10, max_tokens=100, tenant="b", weight=9)
    simulation.step()
    assert {sequence.status for sequence in small} == {Status.RUNNING}
    simulation.scheduler.counters.charge("a", 2000)
    assert simulation.step().preempted == small[:1]


def test_one_tenant_preempts_nobody_for_a_place() -> None:
    simulation = Shared(max_running=2)
    for _ in range(6):
        simulation.add(10, max_tokens=20)
    simulation.finish()
    assert simulation.scheduler.preemptions == 0


def test_what_is_computed_again_is_not_charged() -> None:
    simulation = Shared(max_running=2)
    for _ in range(2):
        simulation.add(10, max_tokens=20, tenant="a")
    for _ in range(10):
        simulation.step()
    simulation.add(10, max_tokens=20, tenant="b")
    while simulation.scheduler.waiting or not simulation.scheduler.preemptions:
        simulation.step()
        counters = simulation.scheduler.counters
        assert counters.served("a") == simulation.served["a"]
    assert simulation.scheduler.preemptions == 1


def test_reused_tokens_and_shared_prompts_are_not_charged() -> None:
    scheduler = Scheduler(BlockBudget(10_000, PrefixCache()), 8, 200)
    prompt = tuple(range(5 * BLOCK_TOKENS + 3))

    def run(order: int, n: int) -> float:
        before = scheduler.counters.served("a")
        request = Request("", prompt, SamplingParams(max_tokens=1, n=n), 0, tenant="a")
        first = sequences_of(request, order)
        sequences = [first, *first.unforked]
        scheduler.add(first)
        plan = scheduler.schedule()
        scheduler.advance(plan)
        scheduler.keep(first)
        charged = scheduler.counters.served("a") - before
        for sequence in sequences:
            scheduler.finish(sequence)
        return charged

    keeper = sequences_of(Request("", (1,), SamplingParams(), 0, tenant="a"), 0)
    scheduler.add(keeper)  # a tenant that is never idle keeps its counter
    scheduler.advance(scheduler.schedule())
    assert run(1, n=3) == len(prompt) * PROMPT_COST
    assert run(2, n=1) == 3 * PROMPT_COST


def test_counters_are_forgotten_when_nothing_is_left() -> None:
    simulation = Shared()
    simulation.add(10, tenant="a")
    simulation.finish()
    assert simulation.scheduler.counters.served("a") == 0


def test_who_comes_back_is_lifted_to_the_least_of_those_that_wait() -> None:
    counters = TokenCounters()
    counters.enter("a", 1, [])
    counters.enter("b", 1, ["a"])
    counters.charge("a", 100)
    counters.charge("b", 30)
    counters.enter("c", 2, ["a", "b"])
    assert counters.served("c") == 30
    counters.charge("c", 10)
    assert counters.served("c") == 35
    counters.turn("a")
    counters.enter("d", 1, [])
    assert counters.served("d") == 100
    counters.enter("a", 1, ["b"])
    assert counters.served("a") == 100, "nothing is forgiven"


def test_a_weight_is_that_of_the_last_request() -> None:
    simulation = Shared(max_running=1)
    for weight in (1, 4):
        simulation.add(10, tenant="a", weight=weight)
    assert simulation.scheduler.counters.weight("a") == 4


ARRIVALS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 3)), min_size=30, max_size=30
)
"""Prompt length, max_tokens and n of each of a tenant's requests."""

WEIGHTS = st.sampled_from([0.5, 1.0, 3.0])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.integers(100, 400), ARRIVALS, ARRIVALS, WEIGHTS, st.integers(0, 20))
def test_two_tenants_that_both_wait_are_served_alike(
    max_running: int,
    kv_tokens: int,
    first: list[tuple[int, int, int]],
    second: list[tuple[int, int, int]],
    weight: float,
    head_start: int,
) -> None:
    """The bound of the paper's theorem: twice the most that runs at once, in virtual tokens."""
    simulation = Shared(max_running, 64, kv_tokens)
    for length, max_tokens, n in first:
        simulation.add(length, max_tokens, n, tenant="a")
    for _ in range(head_start):
        simulation.step()
    for length, max_tokens, n in second:
        simulation.add(length, max_tokens, n, tenant="b", weight=weight)
    at_once = min(kv_tokens, max_running * 90)
    bound = 2 * DECODE_COST * at_once / min(weight, 1.0)
    differences = [simulation.served["a"] - simulation.served["b"]]
    while simulation.backlogged("a", "b"):
        simulation.step()
        differences.append(simulation.served["a"] - simulation.served["b"])
    assert max(differences) - min(differences) <= bound


TENANTS = st.lists(
    st.tuples(
        st.integers(1, 100),
        st.integers(1, 40),
        st.integers(1, 4),
        st.sampled_from("abc"),
        st.integers(-1, 1),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=12,
)
"""Prompt length, max_tokens, n, tenant, priority, and the step before which it arrives."""


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 8),
    st.integers(0, 30),
    st.integers(160, 500),
    st.dictionaries(st.sampled_from("abc"), WEIGHTS),
    st.booleans(),
    TENANTS,
)
def test_every_request_of_every_tenant_ends(
    max_running: int,
    spare: int,
    kv_tokens: int,
    weights: dict[str, float],
    measured: bool,
    requests: list[tuple[int, int, int, str, int, int]],
) -> None:
    simulation = Timed(max_running, max_running + spare, kv_tokens, measured=measured)
    for at in range(21):
        for length, max_tokens, n, tenant, priority, arrives in requests:
            if arrives == at:
                weight = weights.get(tenant, 1.0)
                simulation.add(length, max_tokens, n, tenant, weight, priority)
        simulation.step()
    for _ in range(10_000):
        if simulation.scheduler.idle:
            break
        simulation.step()
    simulation.scheduler.check_integrity(idle=True)


class Timed(Shared):
    """A simulation on a machine with the step times `TIMES`, known from the start if `measured`."""

    def __init__(
        self,
        max_running: int = 64,
        max_step_tokens: int = 512,
        kv_tokens: int = 10_000,
        *,
        measured: bool = True,
    ) -> None:
        super().__init__(max_running, max_step_tokens, kv_tokens)
        pacer = self.scheduler.pacer
        for size, seconds in zip(TIMES.decodes, TIMES.seconds, strict=True):
            if measured:
                pacer.record(int(size), 0, seconds)
                pacer.record(0, 100, 100 * TIMES.prompt_token)
        self.seconds: list[float] = []

    def step(self) -> StepPlan:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        assert plan.chunks or scheduler.idle or plan.preempted
        completes = [
            s for chunk in plan.chunks if chunk.completes for s in (chunk.sequence, *chunk.forks)
        ]
        scheduler.advance(plan)
        self.count(plan)
        self.seconds.append(15 + plan.decodes + plan.prompt_tokens * TIMES.prompt_token)
        scheduler.pacer.record(plan.decode_tokens, plan.prompt_tokens, self.seconds[-1])
        for sequence in completes:
            sequence.tokens.append(0)
            if sequence.generated_length == sequence.request.sampling.max_tokens:
                scheduler.finish(sequence)
        scheduler.check_integrity(idle=scheduler.idle)
        return plan


def seconds_of_an_answer(simulation: Timed, weight: float) -> float:
    """How long 40 + 40 tokens of tenant b take."""
    sequence = simulation.add(40, 40, tenant="b", weight=weight)
    before = len(simulation.seconds)
    while sequence.status is not Status.FINISHED:
        simulation.step()
    return sum(simulation.seconds[before:])


@pytest.mark.parametrize(("weight", "times"), [(1.0, 2.1), (2.0, 1.35), (10.0, 1.1)])
def test_answers_beside_a_flood_take_their_share_of_the_time(weight: float, times: float) -> None:
    alone = seconds_of_an_answer(Timed(), weight)
    beside = Timed()
    for _ in range(300):
        beside.add(40, 40, tenant="a")
    for _ in range(60):
        beside.step()
    before = beside.served["a"]
    assert seconds_of_an_answer(beside, weight) <= times * alone
    assert beside.served["a"] > before


def test_without_tenants_the_same_flood_is_felt() -> None:
    """The control of the test above."""
    beside = Timed()
    for _ in range(300):
        beside.add(40, 40, tenant="b")
    for _ in range(60):
        beside.step()
    assert seconds_of_an_answer(beside, 1.0) > 5 * seconds_of_an_answer(Timed(), 1.0)


def test_a_tenant_is_reckoned_with_for_a_while() -> None:
    simulation = Timed()
    for _ in range(64):
        simulation.add(8, 300, tenant="a")
    seconds_of_an_answer(simulation, 1.0)
    wanted = simulation.scheduler._tenants.wanted(0, 384)
    assert wanted["b"] == Share(1, 1)
    rests = [simulation.step().decodes for _ in range(RECENT_STEPS + 10)]
    assert max(rests[: RECENT_STEPS - 1]) < 30
    assert rests[-1] == 64


def test_a_step_ahead_waits_for_a_tenants_turn() -> None:
    simulation = Shared(max_running=2)
    for _ in range(3):
        simulation.add(4, max_tokens=50, tenant="a")
    simulation.step()
    simulation.step()
    scheduler = simulation.scheduler
    assert scheduler.after(scheduler.running)
    simulation.add(4, tenant="b")
    assert not scheduler.after(scheduler.running)


def test_a_step_ahead_is_planned_anew_where_somebody_rests() -> None:
    simulation = Timed()
    for _ in range(40):
        simulation.add(4, 300, tenant="a")
    for _ in range(10):
        simulation.step()
    scheduler = simulation.scheduler
    assert scheduler.after(scheduler.running)
    assert scheduler._tenants.wanted(0, 384) == {"a": Share(1, 40)}
    simulation.add(4, 300, tenant="b")
    for _ in range(3):
        plan = simulation.step()
    assert all(sequence.decoding for sequence in scheduler.running)
    assert plan.decodes < 41
    assert not scheduler.after([chunk.sequence for chunk in plan.chunks])
    # Also where all could go on now: those that rested are in no step ahead.
    scheduler.pacer = StepPacer()
    assert not scheduler.after([chunk.sequence for chunk in plan.chunks])


def test_all_get_what_they_want_where_steps_are_short_enough() -> None:
    wanted = {"a": Share(1, 20), "b": Share(1, 10)}
    assert allot(wanted, 384, TIMES) is None
    assert allot({"a": Share(1, 64, 384)}, 384, TIMES) is None


def test_the_bound_is_on_the_time_of_a_step() -> None:
    # Alone b's step takes 16, so with equal weights 32: 17 decodes, b's own among them.
    assert allot({"a": Share(1, 64, 100), "b": Share(1, 1)}, 384, TIMES) == {
        "b": Share(1, 1),
        "a": Share(1, 16),
    }
    # A tenant of half of the weight of all is slowed by the share of the rest, and that once more.
    allotted = allot({"a": Share(1, 64), "b": Share(2, 1)}, 384, TIMES)
    assert allotted is not None
    assert allotted["a"].decodes == 4


def test_prompts_take_what_decodes_leave() -> None:
    allotted = allot({"a": Share(1, 4, 300), "b": Share(1, 1)}, 384, TIMES)
    assert allotted is not None
    # 32 less 20 for five decodes leave 24 tokens.
    assert (allotted["a"].decodes, allotted["a"].prompt_tokens) == (4, 24)


def test_everybody_goes_on_in_every_step() -> None:
    linear = StepTimes((1, 64), (1.0, 64.0), 1.0)
    wanted = {"a": Share(1, 64), "b": Share(9, 1), "c": Share(1, 0, 200)}
    allotted = allot(wanted, 384, linear)
    assert allotted == {"b": Share(9, 1), "a": Share(1, 1), "c": Share(1, 0, LEAST_TOKENS)}


def test_the_last_in_turn_of_all_tenants_is_of_the_one_served_most() -> None:
    simulation = Shared()
    old, _ = (simulation.add(30, max_tokens=50, tenant="a") for _ in range(2))
    for _ in range(5):
        simulation.step()
    new = simulation.add(4, max_tokens=50, tenant="b")
    for _ in range(3):
        simulation.step()
    assert max((old, new), key=simulation.scheduler.turn) is old
