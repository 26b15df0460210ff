"""With the prefix cache every answer is what it is without, whatever came before or runs beside."""

import dataclasses
import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Event, PromptReused
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.interventions import CanonicalEdit
from reft_runtime.kv.rows import RowStorage
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import AppliedIntervention, Request
from tests.helpers.models import (
    MAX_LENGTH,
    Answer,
    answers,
    applied,
    loreft,
    make_core,
    prompt,
    request,
    run,
    step,
    tiny,
)
from tests.helpers.reference import RandomEdit
from tests.helpers.reference import applied as applied_random
from tests.helpers.schedules import Timed, check_as_alone

pytestmark = pytest.mark.usefixtures("storages")

TIGHT = MAX_LENGTH + 16

SYSTEM = prompt(70)
TASKS: dict[str, tuple[AppliedIntervention, ...]] = {
    "base": (),
    "l1": (applied(loreft(1, "l1", seed=1)),),
    "l1 half": (applied(loreft(1, "l1", seed=1), strength=0.5),),
    "l20": (applied(loreft(0, "l20", seed=2)),),
    "f1+l1": (applied(loreft(1, "f1+l1", seed=3)),),
    "f1+l1 stronger": (applied(loreft(1, "f1+l1", seed=3), strength=1.5),),
    "other f1+l1": (applied(loreft(2, "f1+l1", seed=4)),),
    "composed": (applied(loreft(1, "f3", seed=5)), applied(loreft(1, "f3+l3", seed=6))),
    "turned": (applied(loreft(1, "f3+l3", seed=6)), applied(loreft(1, "f3", seed=5))),
    "all": (applied_random(RandomEdit("loreft", "all", seed=7)).intervention,),
    "decode": (applied_random(RandomEdit("loreft", "decode", seed=8)).intervention,),
    "window": (applied_random(RandomEdit("loreft", "decode[3:9]", seed=12)).intervention,),
    "middle": (applied_random(RandomEdit("red", "[20,-5]", seed=9, size=0.3)).intervention,),
    "slice": (applied_random(RandomEdit("loreft", "[20:-5]", seed=11)).intervention,),
    "key": (
        applied_random(
            RandomEdit("loreft", "f2", component="key_output", width=16, seed=10)
        ).intervention,
    ),
}

_alone: dict[tuple[Any, ...], dict[int, list[int]]] = {}


def alone(each: Request) -> dict[int, list[int]]:
    """Its answer on a core of its own, without a cache."""
    key = (
        each.prompt,
        repr([(a.digest, a.strength) for a in each.interventions]),
        repr(each.sampling),
    )
    if key not in _alone:
        _alone[key] = run(make_core(prefix_cache=False), [each])[each.id]
    return _alone[key]


def check(core: EngineCore, asked: SequenceOf[Request]) -> None:
    """Run requests at once; every answer must be that of the request alone."""
    found = run(core, asked)
    for each in asked:
        assert found[each.id] == alone(each), each.id


@pytest.mark.parametrize("max_step_tokens", [512, 100, 24])
def test_all_tasks_over_one_beginning_cold_and_warm(max_step_tokens: int) -> None:
    core = make_core(max_step_tokens=max_step_tokens)
    asked = [
        request(f"{task} {ending}", (*SYSTEM, *prompt(9, seed=ending)), *edits)
        for ending in range(2)
        for task, edits in TASKS.items()
    ]
    check(core, asked)
    check(core, asked)
    assert len({tuple(alone(each)[0]) for each in asked}) > len(TASKS), "they do differ"
    stats = core.scheduler.budget.cache
    assert stats is not None
    hits = stats.stats().hits
    assert hits["base"] > 0
    assert hits["own"] > 0


def test_one_prompt_is_computed_for_all_tasks_that_edit_its_end() -> None:
    core = make_core(max_running=32)
    asked = [
        request(f"{i}", (*SYSTEM, *prompt(10, seed=i)), applied(loreft(1, "l1", seed=i)))
        for i in range(20)
    ]
    check(core, asked)
    assert core.requests.prompt_tokens == 80 + 19 * (80 - 64)


def test_a_beginning_that_is_edited_is_shared_within_the_task_alone() -> None:
    core = make_core()
    task, other = TASKS["f1+l1"], TASKS["other f1+l1"]
    check(core, [request(f"{i}", (*SYSTEM, 5 + i), *task) for i in range(4)])
    assert core.requests.prompt_tokens == 71 + 3 * 7
    check(core, [request("other", (*SYSTEM, 5), *other)])
    assert core.requests.prompt_tokens == 71 + 3 * 7 + 71


@pytest.mark.parametrize(("task", "saved"), [("base", 96), ("f1+l1", 64), ("l1", 64), ("all", 96)])
def test_the_next_turn_of_a_chat(task: str, saved: int) -> None:
    core = make_core()
    first = request("first", SYSTEM, *TASKS[task], max_tokens=40)
    check(core, [first])
    before = core.requests.prompt_tokens
    turn = (*SYSTEM, *alone(first)[0], *prompt(10, seed=5))
    check(core, [request("second", turn, *TASKS[task])])
    # 109 tokens were computed; l1 edited the 70th, all edits every token of both turns.
    assert core.requests.prompt_tokens - before == len(turn) - saved


def test_a_warm_answer_says_what_it_reused() -> None:
    core = make_core(max_step_tokens=16)
    cold, warm, longer = (request(name, SYSTEM) for name in ("cold", "warm", "longer"))
    longer = dataclasses.replace(longer, prompt=(*SYSTEM, *prompt(30, seed=2)))
    assert reused(core, cold) == []
    assert reused(core, warm) == [PromptReused("warm", 64)]
    assert reused(core, longer) == [PromptReused("longer", 64)]


def reused(core: EngineCore, each: Request) -> list[Event]:
    core.add(each)
    events: list[Event] = []
    while not core.idle:
        events += core.step()
    return [event for event in events if isinstance(event, PromptReused)]


def test_scores_and_traces_are_the_same_warm() -> None:
    core, cold = make_core(), make_core(prefix_cache=False)
    check(core, [request("warm", SYSTEM)])
    scored = request("scored", SYSTEM, prompt_logprobs=1)
    found, wanted = answers(core, [scored]), answers(cold, [scored])
    assert found["scored"].prompt_logprobs == wanted["scored"].prompt_logprobs
    assert len(found["scored"].prompt_logprobs) == 69
    traced = dataclasses.replace(request("t", SYSTEM, *TASKS["middle"]), trace=True)
    check(core, [dataclasses.replace(traced, trace=False)])
    kinds = []
    core.add(traced)
    while not core.idle:
        kinds += [type(event).__name__ for event in core.step()]
    assert "Traced" in kinds
    assert "PromptReused" not in kinds


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gemma3_text"])
def test_other_architectures(model_type: str) -> None:
    loaded = adopt_model(tiny(model_type))
    asked = [
        request(f"{i}", (*SYSTEM[:40], *prompt(5 + i, seed=i)), applied(loreft(1, "l1", seed=i)))
        for i in range(4)
    ]
    wanted = run(make_core(loaded, prefix_cache=False), asked)
    core = make_core(loaded)
    assert run(core, asked) == wanted
    assert run(core, asked) == wanted
    # 45 to 48 tokens: at first the first one whole, then all without their two shared blocks.
    assert core.requests.prompt_tokens == 45 + (14 + 15 + 16) + (13 + 14 + 15 + 16)


def bad(positions: str) -> AppliedIntervention:
    """Finite in its first rows; what it does to `positions` is not a number."""
    good = loreft(1, positions, seed=1)
    edit = good.edit
    b = torch.full_like(edit.b, math.nan)
    return AppliedIntervention(
        f"bad {positions}",
        (CanonicalEdit(1, edit.component, edit.positions, edit.V, b, edit.U),),
    )


def cache_is_finite(core: EngineCore) -> bool:
    cache = core.scheduler.cache
    assert cache is not None
    kept = [place for place, _ in cache._kept.values()]
    storage: Any = core.runner.storage
    if isinstance(storage, RowStorage):
        parts = range(len(storage._layout.parts))
        blocks = [storage._pool.part(part, place, 1) for part in parts for place in kept]
    else:
        kept = [storage._kept[place] for place in kept]
        blocks = [pool[kept] for pool in (*storage.keys, *storage.values)]
    return all(bool(block.isfinite().all()) for block in blocks)


@pytest.mark.parametrize("max_step_tokens", [512, 16])
@pytest.mark.parametrize("positions", ["f1", "[40]", "l1", "all"])
def test_what_is_not_finite_is_never_kept(positions: str, max_step_tokens: int) -> None:
    core = make_core(max_step_tokens=max_step_tokens)
    for _ in range(2):
        core.add(request("bad", SYSTEM, bad(positions)))
        core.add(request("waits", SYSTEM, bad(positions)))
        found: dict[str, Answer] = {}
        while not core.idle:
            step(core, found)
            assert cache_is_finite(core)
        assert "not finite" in (found["bad"].failed or "")
        assert "not finite" in (found["waits"].failed or "")
    cache = core.scheduler.cache
    assert cache is not None
    assert cache.stats().blocks["own"] == 0
    check(core, [request("good", SYSTEM)])


@pytest.mark.parametrize("how", ["fails", "is aborted"])
def test_edits_of_generated_tokens_that_are_not_finite_are_not_kept(how: str) -> None:
    core = make_core()
    edit = TASKS["decode"][0].edits[0]
    broken = AppliedIntervention("bad", (dataclasses.replace(edit, b=edit.b * math.nan),))
    core.add(request("bad", SYSTEM[:60], broken, max_tokens=30))
    found: dict[str, Answer] = {}
    step(core, found)
    if how == "is aborted":
        core.abort("bad")
    while not core.idle:
        step(core, found)
    assert (found["bad"].failed is not None) == (how == "fails")
    assert cache_is_finite(core)
    cache = core.scheduler.cache
    assert cache is not None
    assert dict(cache.stats().blocks) == {"base": 3, "own": 0}


def test_a_request_of_one_token_is_kept() -> None:
    core = make_core()
    check(core, [request("a", SYSTEM, *TASKS["f1+l1"], max_tokens=1)])
    cache = core.scheduler.cache
    assert cache is not None
    assert dict(cache.stats().blocks) == {"base": 0, "own": 4}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_out_of_memory_while_keeping_forgets_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    core = make_core(kv_tokens=TIGHT, max_step_tokens=64)
    calls = iter(range(1000))
    real = core.runner.storage.keep

    def keep(copies: list[BlockCopy]) -> None:
        if next(calls) == at:
            raise MemoryError
        real(copies)

    monkeypatch.setattr(core.runner.storage, "keep", keep)
    check(
        core,
        [request(f"{i}", (*SYSTEM, i), *TASKS["f1+l1"], max_tokens=60) for i in range(5)],
    )
    assert next(calls) > at


def test_out_of_memory_while_preempting(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(kv_tokens=TIGHT, max_step_tokens=64)
    for i in range(4):
        core.add(request(f"{i}", (*SYSTEM[:40], i), max_tokens=100))
    found: dict[str, Answer] = {}
    preempted = 0

    def keep(copies: list[BlockCopy]) -> None:
        raise MemoryError

    while not core.idle:
        before = core.scheduler.preemptions
        with monkeypatch.context() as patch:
            if len(core.scheduler.running) > 1:
                patch.setattr(core.runner.storage, "keep", keep)
            step(core, found)
        preempted += core.scheduler.preemptions - before
    assert preempted
    for i in range(4):
        each = request(f"{i}", (*SYSTEM[:40], i), max_tokens=100)
        assert found[f"{i}"].tokens == alone(each)


def test_nothing_is_computed_over_blocks_that_could_not_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    each = request("a", SYSTEM)
    core.add(each)
    plan = core.scheduler.schedule()
    plan.kept = [BlockCopy(plan.chunks[0].sequence, 0, 0)]

    def broken(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(core.scheduler, "schedule", lambda: plan)
        patch.setattr(core.runner.storage, "keep", broken)
        patch.setattr(core.runner, "run", lambda _: pytest.fail("the step was computed"))
        assert core.step() == []
    found: dict[str, Answer] = {}
    while not core.idle:
        step(core, found)
    assert found["a"].tokens == alone(each)


def test_out_of_memory_in_a_step_that_reuses(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    asked = [request(f"{i}", (*SYSTEM, i), *TASKS["l1"]) for i in range(3)]
    check(core, asked[:1])
    storage: Any = core.runner.storage
    real = storage.reuse
    broken = True

    def reuse(copies: Any) -> None:
        nonlocal broken
        real(copies)
        if broken:
            broken = False
            raise MemoryError

    monkeypatch.setattr(core.runner.storage, "reuse", reuse)
    found = answers(core, asked[1:])
    assert found["2"].failed == OUT_OF_MEMORY
    assert found["1"].tokens == alone(asked[1])


TEXTS = [
    (*SYSTEM, *prompt(60, seed=1)),
    (*SYSTEM, *prompt(60, seed=2)),
    (*SYSTEM[:33], *prompt(90, seed=3)),
]
ASKED = st.tuples(
    st.sampled_from(range(len(TEXTS))),
    st.sampled_from([1, 16, 17, 32, 65, 80, 81, 100]),
    st.sampled_from(list(TASKS)),
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from([1, 1, 2, 3]),
    st.booleans(),
    st.integers(0, 12),
    st.none() | st.integers(0, 25),
)
"""Text, how much of it, task, max_tokens, n, whether it goes on from an earlier answer (a chat),
and the steps before which it arrives and is aborted."""

Asked = tuple[int, int, str, int, int, bool, int, int | None]
SCHEDULES = given(
    st.integers(1, 8),
    st.sampled_from([0, 7, 40, 300]),
    st.sampled_from([TIGHT, TIGHT + 100, 2 * TIGHT, 16 * TIGHT]),
    st.lists(ASKED, min_size=1, max_size=8),
)


def check_schedule(max_running: int, spare: int, kv_tokens: int, asked: list[Asked]) -> None:
    core = make_core(
        max_running=max_running, max_step_tokens=max_running + spare, kv_tokens=kv_tokens
    )
    requests: list[Timed] = []
    for number, (text, length, task, max_tokens, n, chat, arrives, aborts) in enumerate(asked):
        tokens = TEXTS[text][:length]
        if chat:
            turn = request("turn", tokens, *TASKS[task], max_tokens=40)
            tokens = (*tokens, *alone(turn)[0], *prompt(3, seed=9))
            requests.append((dataclasses.replace(turn, id=f"{number} before"), 0, None))
        sampling = {"temperature": 1.0} if n > 1 else {}
        each = request(
            f"{number}", tokens, *TASKS[task], max_tokens=max_tokens, n=n, seed=1, **sampling
        )
        requests.append((each, arrives, aborts))
    check_as_alone(core, requests, alone)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@SCHEDULES
def test_random_schedules(max_running: int, spare: int, kv_tokens: int, asked: list[Asked]) -> None:
    check_schedule(max_running, spare, kv_tokens, asked)


@pytest.mark.long
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@SCHEDULES
def test_many_random_schedules(
    max_running: int, spare: int, kv_tokens: int, asked: list[Asked]
) -> None:
    check_schedule(max_running, spare, kv_tokens, asked)
