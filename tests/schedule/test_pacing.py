"""How large steps are made, on machines whose step times are invented."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.pacing import (
    FIRST_TOKENS,
    LEAST_TOKENS,
    LONGEST_SECONDS,
    MEASURED_EVERY,
    MOMENT_SECONDS,
    PRESSED_SECONDS,
    SHARE,
    StepPacer,
    StepTimes,
)
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.scheduler import MAX_SCORED_TOKENS, Scheduler
from reft_runtime.schedule.sequence import Sequence, sequences_of

Seconds = Callable[[int, int], float]
"""Time of a step, by its decode rows and prompt tokens."""


class Machine:
    """A scheduler on a machine with step times of its own."""

    def __init__(self, seconds: Seconds, max_running: int = 64) -> None:
        self.seconds = seconds
        self.scheduler = Scheduler(BlockBudget(100_000), max_running, 2048)
        self.arrived = 0

    def add(
        self, length: int, max_tokens: int = 1000, prompt_logprobs: int | None = None
    ) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = Request("", (1,) * length, params, 0)
        sequence = sequences_of(request, self.arrived)
        self.arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[int, int, float]:
        """Decode rows, prompt tokens and seconds of a step."""
        plan = self.scheduler.schedule()
        taken = self.seconds(plan.decodes, plan.prompt_tokens)
        completing = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        self.scheduler.advance(plan)
        for sequence in completing:
            sequence.tokens.append(0)
        self.scheduler.pacer.record(plan.decodes, plan.prompt_tokens, taken)
        return plan.decodes, plan.prompt_tokens, taken

    def streams(self, count: int) -> None:
        """Let so many sequences decode for a while."""
        for _ in range(count):
            self.add(64)
        for _ in range(20):
            self.step()


def linear(decodes: int, prompt_tokens: int) -> float:
    return 0.02 + 0.001 * decodes + 0.001 * prompt_tokens


def slow(decodes: int, prompt_tokens: int) -> float:
    return 40 * linear(decodes, prompt_tokens)


def uneven(decodes: int, prompt_tokens: int) -> float:
    """Large products cost half as much a token as small ones."""
    return 0.02 + 0.001 * decodes + (0.002 * min(prompt_tokens, 64) + 0.001 * prompt_tokens) / 2


MACHINES = pytest.mark.parametrize("seconds", [linear, slow, uneven])


@MACHINES
def test_a_long_prompt_adds_a_moment_or_stays_below_twice_the_step(seconds: Seconds) -> None:
    machine = Machine(seconds)
    machine.streams(16)
    machine.add(20_000)
    steps = [machine.step() for _ in range(20)]
    assert all(decodes == 16 for decodes, _, _ in steps)
    assert all(tokens >= LEAST_TOKENS for _, tokens, _ in steps)
    # The first rest on an estimate from prompts of another size.
    alone = seconds(16, 0)
    most = max(MOMENT_SECONDS, SHARE * alone)
    assert all(taken - alone < 1.34 * most for _, _, taken in steps[3:])
    assert steps[-1][2] - alone > 0.5 * most, "the moment is used"


def test_many_prompts_have_the_steps_to_themselves() -> None:
    pacer = StepPacer()
    pacer.record(0, 1000, 1.0)
    pacer.record(16, 0, 0.064)
    assert [pacer.prompt_tokens(16, prompts) for prompts in (1, 2, 4)] == [248, 500, 1000]
    assert pacer.prompt_tokens(16, 100) == 1000 * PRESSED_SECONDS
    pacer.record(0, 1000, 0.1)
    for _ in range(20):
        pacer.record(0, 1000, 0.1)
    assert pacer.prompt_tokens(16, 100) == pacer.mixed_tokens


def test_on_a_slow_machine_a_prompt_may_add_more_than_a_moment() -> None:
    pacer = StepPacer()
    pacer.record(0, 1000, 100.0)
    pacer.record(16, 0, 4.0)
    pacer.record(17, 0, 400.0)  # of another size
    assert pacer.prompt_tokens(16, 1) == pacer.prompt_tokens(16, 8) == SHARE * 4.0 * 10 // 4 * 4


def test_only_prompts_that_can_run_count() -> None:
    machine = Machine(linear, max_running=18)
    machine.streams(16)
    for _ in range(10):
        machine.add(1000)
    expected = machine.scheduler.pacer.prompt_tokens(16, 2)
    assert machine.step()[1] == expected < machine.scheduler.pacer.prompt_tokens(16, 10)


def test_a_prompt_goes_on_whatever_it_costs() -> None:
    pacer = StepPacer()
    pacer.record(0, 1000, 100.0)
    pacer.record(1, 0, 0.001)
    assert pacer.prompt_tokens(1, 1) == LEAST_TOKENS


def test_a_fixed_cost_of_steps_with_prompts_does_not_make_them_ever_smaller() -> None:
    """As on a device, where steps that only decode are launched ahead."""
    pacer = StepPacer(mixed_tokens=2048, least_tokens=256)
    pacer.record(16, 0, 0.006)
    for _ in range(100):
        tokens = pacer.prompt_tokens(16, 1)
        if tokens:
            assert tokens >= 256
            pacer.record(16, tokens, 0.014 + 0.00003 * tokens)
            pacer.record(16, 20, 0.0146)  # the end of a prompt says little
        else:
            pacer.record(16, 0, 0.006)


def test_where_nobody_decodes_all_prompts_are_computed_at_once() -> None:
    machine = Machine(linear)
    machine.add(64, max_tokens=1)
    machine.step()
    machine.scheduler.finish(machine.scheduler.running[0])
    for _ in range(32):
        machine.add(64)
    assert machine.step()[:2] == (0, 32 * 64)


def test_where_nobody_decodes_a_slow_machine_still_turns() -> None:
    machine = Machine(slow)
    machine.add(64)
    machine.step()
    machine.scheduler.finish(machine.scheduler.running[0])
    machine.add(2000)
    decodes, tokens, taken = machine.step()
    assert decodes == 0
    assert 0 < tokens < FIRST_TOKENS
    assert taken <= LONGEST_SECONDS


def test_before_anything_is_measured_steps_are_moderate() -> None:
    pacer = StepPacer()
    assert pacer.prompt_tokens(0, 1) == FIRST_TOKENS
    assert pacer.prompt_tokens(16, 1) == FIRST_TOKENS
    pacer.record(0, 1000, 1.0)
    assert pacer.prompt_tokens(16, 1) == FIRST_TOKENS


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    pacer = StepPacer()
    for decodes, tokens in ((0, 512), (8, 0), (8, 64), (0, 0)):
        pacer.record(decodes, tokens, 0.0)
    assert pacer.prompt_tokens(8, 1) == FIRST_TOKENS


def test_other_numbers_of_rows_begin_with_the_nearest() -> None:
    pacer = StepPacer()
    pacer.record(0, 1000, 1.0)
    pacer.record(1, 0, 0.1)
    pacer.record(64, 0, 0.4)
    assert pacer.prompt_tokens(2, 1) == pacer.prompt_tokens(1, 1) < pacer.prompt_tokens(33, 1)


def test_one_outlier_moves_the_estimate_a_little() -> None:
    pacer = StepPacer()
    pacer.record(0, 1000, 1.0)
    pacer.record(16, 0, 0.1)
    usual = pacer.prompt_tokens(16, 1)
    pacer.record(16, 0, 60.0)
    assert usual <= pacer.prompt_tokens(16, 1) <= 1.5 * usual


def test_estimates_follow_a_machine_that_changes() -> None:
    speed = 1.0
    machine = Machine(lambda decodes, tokens: speed * linear(decodes, 2 * tokens))
    machine.streams(16)
    machine.add(40_000)
    for speed, rounds in ((1.0, 4), (5.0, 24)):
        steps = [machine.step() for _ in range(rounds * MEASURED_EVERY)]
        decodes, tokens, taken = next(step for step in reversed(steps) if step[1])
        assert decodes == 16
        assert taken - speed * linear(16, 0) == pytest.approx(MOMENT_SECONDS, rel=0.15)
        assert tokens == pytest.approx(MOMENT_SECONDS / speed / 0.002, rel=0.15)


def test_now_and_then_a_step_goes_without_prompts_to_measure_it() -> None:
    machine = Machine(linear)
    machine.streams(16)
    machine.add(50_000)
    without = [i for i in range(100) if machine.step()[1] == 0]
    assert without == [MEASURED_EVERY, 2 * MEASURED_EVERY + 1, 3 * MEASURED_EVERY + 2]


def test_scored_prompts_bound_the_rows_of_logits() -> None:
    machine = Machine(linear)
    machine.add(64, max_tokens=1)
    machine.step()
    machine.scheduler.finish(machine.scheduler.running[0])
    for _ in range(4):
        machine.add(300, prompt_logprobs=0)
    plain = machine.add(700)
    plan = machine.scheduler.schedule()
    scored = [chunk.length for chunk in plan.chunks if chunk.sequence is not plain]
    assert scored == [300, MAX_SCORED_TOKENS - 300]
    assert plain in {chunk.sequence for chunk in plan.chunks}


def test_what_a_step_is_expected_to_take() -> None:
    pacer = StepPacer()
    assert pacer.expected(1, 0) is None
    assert pacer.expected(0, 100) is None
    pacer.record(4, 0, 0.5)
    assert pacer.expected(4, 0) == 0.5
    assert pacer.expected(4, 10) is None
    pacer.record(0, 100, 2.0)
    assert pacer.expected(0, 50) == 1.0
    assert pacer.expected(4, 50) == 1.5


def test_step_times_between_and_beyond_what_was_measured() -> None:
    pacer = StepPacer()
    pacer.record(8, 0, 0.02)
    assert pacer.times() is None
    pacer.record(0, 100, 0.1)
    pacer.record(24, 0, 0.04)
    times = pacer.times()
    assert times == StepTimes((8, 24), (0.02, 0.04), 0.001)
    assert [times.step(decodes, 0) for decodes in (1, 8, 16, 24, 34)] == pytest.approx(
        [0.02, 0.02, 0.03, 0.04, 0.05]
    )
    assert times.step(0, 10) == pytest.approx(0.03)
    assert times.prompt_tokens(0.0112) == 8
    assert times.prompt_tokens(-1) == 0
