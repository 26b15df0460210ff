"""An answer depends on its request alone, whatever else runs and however it is scheduled."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.engine.events import Started
from tests.helpers.models import (
    MAX_LENGTH,
    Answer,
    generate,
    intervention,
    make_core,
    prompt,
    request,
    run,
    step,
    tiny_llama,
)
from tests.helpers.schedules import Timed, check_as_alone

pytestmark = pytest.mark.usefixtures("storages")

TIGHT = MAX_LENGTH + 16
"""The smallest KV budget with which any one request can end."""

MIXED = [
    request(
        f"r{i}",
        prompt(length, seed=i),
        *(
            []
            if i % 3 == 0
            else [intervention(i)]
            if i % 3 == 1
            else [intervention(i, 0.5), intervention(i + 1)]
        ),
        max_tokens=6 + 3 * (i % 4),
        **({"temperature": 1.0, "top_k": 50} if i % 4 == 3 else {}),
        seed=i,
    )
    for i, length in enumerate((1, 5, 17, 40, 2, 9, 33, 70, 12, 3, 25, 48))
]


@pytest.fixture(scope="module")
def solo() -> dict[str, dict[int, list[int]]]:
    """Every mixed request alone, on a core of its own."""
    return {each.id: run(make_core(), [each])[each.id] for each in MIXED}


def test_the_requests_differ_in_what_they_answer(solo: dict[str, dict[int, list[int]]]) -> None:
    model, _ = tiny_llama()
    for each in MIXED:
        base = generate(model, each.prompt, each.sampling.max_tokens or 0)
        same = not each.interventions and not each.sampling.temperature
        # A prompt of one token is not edited; two are seldom enough to change every token.
        assert (solo[each.id][0] == base) == same, each.id


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "kv_tokens"),
    [(16, 512, 4096), (3, 3, 4096), (8, 8, 4096), (5, 37, 4096), (12, 64, TIGHT), (12, 24, TIGHT)],
    ids=["at once", "by 3", "by 8", "by 37", "preempted", "preempted by 24"],
)
def test_alone_is_batched_chunked_and_preempted(
    solo: dict[str, dict[int, list[int]]], max_running: int, max_step_tokens: int, kv_tokens: int
) -> None:
    core = make_core(max_running=max_running, max_step_tokens=max_step_tokens, kv_tokens=kv_tokens)
    assert run(core, MIXED) == solo
    assert (core.scheduler.preemptions > 0) == (kv_tokens == TIGHT)


def test_in_any_order(solo: dict[str, dict[int, list[int]]]) -> None:
    shuffled = random.Random(0)
    core = make_core(max_running=6, max_step_tokens=48)
    for _ in range(4):
        assert run(core, shuffled.sample(MIXED, len(MIXED))) == solo


def test_a_request_starts_once_and_before_its_tokens() -> None:
    core = make_core(max_running=12, max_step_tokens=24, kv_tokens=TIGHT)
    for each in MIXED:
        core.add(each)
    found: dict[str, Answer] = {}
    started: list[str] = []
    while not core.idle:
        for event in step(core, found):
            if isinstance(event, Started):
                started.append(event.request_id)
            else:
                assert event.request_id in started
    assert core.scheduler.preemptions
    assert started == [each.id for each in MIXED]


ARRIVALS = st.lists(
    st.tuples(st.sampled_from(MIXED), st.integers(0, 12), st.none() | st.integers(0, 25)),
    min_size=1,
    max_size=12,
    unique_by=lambda arrival: arrival[0].id,
)
"""Requests, each with the step it arrives before and the one it is cancelled before."""


SCHEDULES = given(st.integers(1, 8), st.integers(0, 40), st.integers(TIGHT, 2 * TIGHT), ARRIVALS)

Solo = dict[str, dict[int, list[int]]]


def check_schedule(
    solo: Solo, max_running: int, spare: int, kv_tokens: int, arrivals: list[Timed]
) -> None:
    core = make_core(
        max_running=max_running, max_step_tokens=max_running + spare, kv_tokens=kv_tokens
    )
    check_as_alone(core, arrivals, lambda each: solo[each.id])


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@SCHEDULES
def test_random_schedules_with_cancellations(
    solo: Solo, max_running: int, spare: int, kv_tokens: int, arrivals: list[Timed]
) -> None:
    check_schedule(solo, max_running, spare, kv_tokens, arrivals)


@pytest.mark.long
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@SCHEDULES
def test_many_random_schedules_with_cancellations(
    solo: Solo, max_running: int, spare: int, kv_tokens: int, arrivals: list[Timed]
) -> None:
    check_schedule(solo, max_running, spare, kv_tokens, arrivals)
