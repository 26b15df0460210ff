"""n choices of a request: one prefill where there is room, the same tokens where there is not."""

from typing import Any

import pytest

from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Started
from reft_runtime.schedule.request import Request
from tests.helpers.models import (
    MAX_LENGTH,
    Answer,
    answers,
    finish,
    generate,
    intervention,
    make_core,
    prompt,
    request,
    run,
    step,
    tiny_llama,
)

pytestmark = pytest.mark.usefixtures("storages")

N = 4
TIGHT = MAX_LENGTH + 16


def sampled(name: str = "s", length: int = 20, **sampling: Any) -> Request:
    settings = {"n": N, "temperature": 1.0, "max_tokens": 10, **sampling}
    return request(name, prompt(length), intervention(2), seed=7, **settings)


@pytest.fixture(scope="module")
def wanted() -> dict[int, list[int]]:
    return run(make_core(), [sampled()])["s"]


def test_greedy_choices_are_equal_and_share_one_prefill() -> None:
    core = make_core()
    got = run(core, [request("a", prompt(20), n=N)])["a"]
    assert got == dict.fromkeys(range(N), generate(tiny_llama()[0], prompt(20)))
    assert core.requests.prompt_tokens == 20
    assert core.requests.generation_tokens == 8 * N


def test_sampled_choices_differ(wanted: dict[int, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in wanted.values()}) == N


def test_the_first_choice_is_that_of_n_1(wanted: dict[int, list[int]]) -> None:
    assert run(make_core(), [sampled(n=1)])["s"][0] == wanted[0]


def test_another_seed_gives_other_tokens(wanted: dict[int, list[int]]) -> None:
    other = request("s", prompt(20), intervention(2), seed=8, n=N, temperature=1.0, max_tokens=10)
    got = run(make_core(), [other])["s"]
    assert all(got[choice] != wanted[choice] for choice in range(N))


@pytest.mark.parametrize("max_running", [1, 2, 3, 8])
@pytest.mark.parametrize("max_step_tokens", [8, 512])
def test_choices_that_cannot_fork_compute_on_their_own(
    wanted: dict[int, list[int]], max_running: int, max_step_tokens: int
) -> None:
    core = make_core(max_running=max_running, max_step_tokens=max_step_tokens)
    got = run(core, [sampled(), request("other", prompt(5), max_tokens=20)])
    assert got["s"] == wanted
    assert (core.requests.prompt_tokens > 25) == (max_running < N)


def test_choices_in_a_batch_and_preempted(wanted: dict[int, list[int]]) -> None:
    core = make_core(kv_tokens=TIGHT, max_step_tokens=30)
    requests = [sampled(), *(request(f"{i}", prompt(30 + i), max_tokens=20) for i in range(4))]
    requests += [sampled("long", length=60, n=6, max_tokens=40)]
    got = run(core, requests)
    assert core.scheduler.preemptions
    assert got["s"] == wanted
    assert got["long"] == run(make_core(), requests[-1:])["long"]


def start(core: EngineCore, *requests: Request, steps: int) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for each in requests:
        core.add(each)
    for _ in range(steps):
        step(core, found)
    return found


@pytest.mark.parametrize("max_running", [2, 8])
@pytest.mark.parametrize(
    ("choice", "steps"), [(0, 0), (0, 1), (0, 3), (0, 5), (1, 5), (2, 3), (3, 1), (3, 5)]
)
def test_aborting_one_choice_leaves_the_others(
    wanted: dict[int, list[int]], choice: int, steps: int, max_running: int
) -> None:
    # The prompt takes three steps: choices are aborted queued, in prefill and while they decode.
    core = make_core(max_running=max_running, max_step_tokens=8)
    found = start(core, sampled(prompt_logprobs=0), steps=steps)
    core.abort("s", choice)
    core.check_integrity()
    finish(core, found)
    aborted = found["s"].tokens.pop(choice, [])
    assert aborted == wanted[choice][: len(aborted)]
    assert len(aborted) < len(wanted[choice])
    assert found["s"].tokens == {c: t for c, t in wanted.items() if c != choice}
    assert len(found["s"].prompt_logprobs) == 19


def test_a_request_whose_first_choice_is_aborted_still_starts_once() -> None:
    for steps in (0, 1):
        core = make_core(max_step_tokens=16)
        core.add(sampled())
        events = [core.step() for _ in range(steps)]
        core.abort("s", 0)
        while not core.idle:
            events.append(core.step())
        assert [type(e) for step in events for e in step].count(Started) == 1


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_aborting_a_request_ends_all_its_choices(steps: int) -> None:
    core = make_core(max_step_tokens=16)
    other = request("other", prompt(5))
    found = start(core, other, sampled(), steps=steps)
    core.abort("s")
    core.check_integrity()
    before = {choice: list(tokens) for choice, tokens in found.get("s", Answer()).tokens.items()}
    finish(core, found)
    assert found.get("s", Answer()).tokens == before
    assert found["other"].tokens[0] == generate(tiny_llama()[0], other.prompt)


def test_what_is_unknown_or_has_ended_is_not_aborted() -> None:
    core = make_core()
    found = start(core, request("a", prompt(4), max_tokens=1), steps=1)
    assert core.idle
    core.abort("a")
    core.abort("never")
    core.abort("a", 3)
    core.check_integrity()
    assert found["a"].reasons == {0: "length"}


def test_a_repeated_id_can_be_used_after_its_end(wanted: dict[int, list[int]]) -> None:
    core = make_core()
    for _ in range(3):
        assert run(core, [sampled()])["s"] == wanted


@pytest.mark.parametrize("max_running", [1, 8])
@pytest.mark.parametrize("length", [1, 20])
def test_no_tokens_asked(length: int, max_running: int) -> None:
    core = make_core(max_running=max_running, max_step_tokens=8)
    asked = request("a", prompt(length), max_tokens=0, n=3, prompt_logprobs=0)
    found = answers(core, [asked, request("b", prompt(6))])
    assert found["a"].tokens == {0: [], 1: [], 2: []}
    assert found["a"].reasons == dict.fromkeys(range(3), "length")
    assert len(found["a"].prompt_logprobs) == length - 1
    assert found["b"].tokens[0] == generate(tiny_llama()[0], prompt(6))
