"""Kept recurrent states: with the prefix cache every answer is what it is without."""

import copy
import dataclasses
import math
from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Event, LabelsScored, PromptReused
from reft_runtime.interventions import CanonicalEdit
from reft_runtime.kv.hybrid import HybridStorage
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.labels import LabelTree
from reft_runtime.schedule.prefix_cache import StateCopy
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.snapshots import Snapshots
from tests.helpers.models import (
    DEVICE,
    MAX_LENGTH,
    Answer,
    applied,
    generate,
    loreft,
    make_core,
    preempt,
    prompt,
    request,
    run,
    step,
    tiny,
)
from tests.helpers.schedules import Timed, check_as_alone

TIGHT = MAX_LENGTH + 16
SYSTEM = prompt(70)
TASKS: dict[str, tuple[AppliedIntervention, ...]] = {
    "base": (),
    "l1": (applied(loreft(1, "l1", seed=1)),),
    "l1 half": (applied(loreft(1, "l1", seed=1), strength=0.5),),
    "f1+l1": (applied(loreft(1, "f1+l1", seed=3)),),
    "other f1+l1": (applied(loreft(0, "f1+l1", seed=4)),),
    "middle": (applied(loreft(0, "[20,-5]", seed=9)),),
    "all": (applied(loreft(0, "all", seed=7, size=0.3)),),
}


@cache
def hybrid() -> tuple[PreTrainedModel, LoadedModel]:
    """A gated delta net and a layer of attention, and the same as the engine runs it."""
    layers = ["linear_attention", "full_attention"]
    model = tiny("qwen3_5_text", num_hidden_layers=2, layer_types=layers)
    return model, adopt_model(copy.deepcopy(model).to(DEVICE))  # type: ignore[arg-type]


def warm_core(**limits: Any) -> EngineCore:
    return make_core(hybrid()[1], **limits)


def snapshots(core: EngineCore) -> Snapshots:
    assert core.scheduler.snapshots is not None
    return core.scheduler.snapshots


_alone: dict[tuple[Any, ...], dict[int, list[int]]] = {}


def alone(each: Request) -> dict[int, list[int]]:
    """Its answer on a core of its own, without a cache."""
    used = repr([(a.digest, a.strength) for a in each.interventions])
    key = each.prompt, used, repr(each.sampling)
    if key not in _alone:
        _alone[key] = run(warm_core(prefix_cache=False), [each])[each.id]
    return _alone[key]


def check(core: EngineCore, asked: SequenceOf[Request]) -> None:
    """Run requests at once; every answer must be that of the request alone."""
    found = run(core, asked)
    for each in asked:
        assert found[each.id] == alone(each), each.id


@pytest.mark.parametrize("max_step_tokens", [512, 24])
def test_all_tasks_over_one_beginning_cold_and_warm(max_step_tokens: int) -> None:
    core = warm_core(max_step_tokens=max_step_tokens)
    asked = [
        request(f"{task} {ending}", (*SYSTEM, *prompt(9, seed=ending)), *edits)
        for ending in range(2)
        for task, edits in TASKS.items()
    ]
    check(core, asked)
    before = core.requests.prompt_tokens
    check(core, asked)
    assert core.requests.prompt_tokens - before < len(asked) * 79 / 2
    assert len({tuple(alone(each)[0]) for each in asked}) > len(TASKS), "they do differ"
    assert core.scheduler.cache is not None
    hits = core.scheduler.cache.stats().hits
    assert hits["base"] > 0
    assert hits["own"] > 0
    assert snapshots(core).stats().hits > len(asked)


def test_one_prompt_is_computed_for_all_tasks_that_edit_its_end() -> None:
    core = warm_core(max_running=32)
    asked = [
        request(f"{i}", (*SYSTEM, *prompt(10, seed=i)), applied(loreft(1, "l1", seed=i)))
        for i in range(6)
    ]
    check(core, asked)
    assert core.requests.prompt_tokens == 80 + 5 * (80 - 64)
    assert snapshots(core).stats().hits == 5


def test_a_warm_answer_is_that_of_generate_and_says_what_it_reused() -> None:
    model, _ = hybrid()
    core = warm_core()
    texts = {"cold": SYSTEM, "warm": SYSTEM, "longer": (*SYSTEM, *prompt(30, seed=2))}
    reused = {}
    for name, text in texts.items():
        core.add(request(name, text))
        found: dict[str, Answer] = {}
        events: list[Event] = []
        while not core.idle:
            events += step(core, found)
        assert found[name].tokens[0] == generate(model, text)
        reused[name] = [event.tokens for event in events if isinstance(event, PromptReused)]
    assert reused == {"cold": [], "warm": [64], "longer": [64]}


def test_the_third_chat_turn_goes_on_from_the_second() -> None:
    core = warm_core()
    turn = (*SYSTEM, *prompt(90, seed=1))
    check(core, [request("first", turn, max_tokens=30)])
    # 189 tokens were computed; the last snapshot lies behind 144 of the prompt's 160.
    turn = (*turn, *alone(request("", turn, max_tokens=30))[0], *prompt(9, seed=5))
    before = core.requests.prompt_tokens
    check(core, [request("second", turn)])
    assert core.requests.prompt_tokens - before == len(turn) - 144


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("max_running", "max_step_tokens"), [(16, 512), (2, 512), (3, 20)])
def test_labels(prefix_cache: bool, max_running: int, max_step_tokens: int) -> None:
    model, loaded = hybrid()
    core = make_core(
        loaded,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        prefix_cache=prefix_cache,
    )
    labels = ((5, 6), (5, 7, 8), (11, *range(20, 40)), (12, 13, 14), (30, 31))
    for turn, text in enumerate((SYSTEM, SYSTEM, (*SYSTEM[:64], *prompt(30)))):
        each = request(f"{turn}", text, max_tokens=0)
        core.add(dataclasses.replace(each, labels=LabelTree.of(labels)))
        events: list[Event] = []
        for at in range(1000):
            if core.idle:
                break
            events += core.step()
            core.check_integrity()
            if max_running == 2 and at in (1, 4) and core.scheduler.running:
                preempt(core, core.scheduler.running[0])
        assert core.idle
        (scored,) = [event for event in events if isinstance(event, LabelsScored)]
        assert list(scored.logprobs) == pytest.approx(truth(model, text, labels), abs=1e-4)
    assert bool(snapshots(core).stats().hits) == prefix_cache


def truth(
    model: PreTrainedModel, text: SequenceOf[int], labels: SequenceOf[tuple[int, ...]]
) -> list[float]:
    """One whole forward of the prompt with each label."""
    found = []
    for label in labels:
        with torch.inference_mode():
            rows = model(torch.tensor([[*text, *label]]), use_cache=False).logits[0]
        rows = rows.double().log_softmax(-1)[len(text) - 1 :]
        found.append(sum(float(row[token]) for row, token in zip(rows, label, strict=False)))
    return found


def bad(positions: str) -> AppliedIntervention:
    """What it does to `positions` is not a number."""
    edit = loreft(0, positions, seed=1).edit
    b = torch.full_like(edit.b, math.nan)
    broken = CanonicalEdit(0, edit.component, edit.positions, edit.V, b, edit.U)
    return AppliedIntervention(f"bad {positions}", (broken,))


def kept_states_are_finite(core: EngineCore) -> bool:
    storage = core.runner.storage
    assert isinstance(storage, HybridStorage)
    places = list(snapshots(core)._kept.values())
    tensors = [t[places] for mixer in storage.states._kept for t in mixer.values()]
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("max_step_tokens", [512, 64])
@pytest.mark.parametrize("positions", ["f1", "[40]", "l1", "all"])
def test_what_is_not_finite_is_never_kept(positions: str, max_step_tokens: int) -> None:
    core = warm_core(max_step_tokens=max_step_tokens)
    for _ in range(2):
        core.add(request("bad", SYSTEM, bad(positions)))
        core.add(request("waits", SYSTEM, bad(positions)))
        found: dict[str, Answer] = {}
        while not core.idle:
            step(core, found)
            assert kept_states_are_finite(core)
        assert "not finite" in (found["bad"].failed or "")
        assert "not finite" in (found["waits"].failed or "")
    assert bool(len(snapshots(core))) == (positions == "l1"), "before the edits"
    check(core, [request("good", SYSTEM)])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_out_of_memory_while_keeping_forgets_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    core = warm_core(max_step_tokens=64)
    calls = iter(range(1000))
    real = core.runner.storage.keep_states

    def keep_states(copies: list[StateCopy]) -> None:
        if next(calls) == at:
            raise MemoryError
        real(copies)

    monkeypatch.setattr(core.runner.storage, "keep_states", keep_states)
    check(core, [request(f"{i}", (*SYSTEM, *prompt(60, seed=i))) for i in range(5)])
    assert next(calls) > at
    check(core, [request(f"{i}", (*SYSTEM, *prompt(60, seed=i))) for i in range(5)])


TEXTS = [
    (*SYSTEM, *prompt(60, seed=1)),
    (*SYSTEM, *prompt(60, seed=2)),
    (*SYSTEM[:33], *prompt(90, seed=3)),
]
ASKED = st.tuples(
    st.sampled_from(range(len(TEXTS))),
    st.sampled_from([16, 65, 80, 81, 100]),
    st.sampled_from(list(TASKS)),
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([1, 1, 2]),
    st.integers(0, 12),
    st.none() | st.integers(0, 25),
)
"""Text, how much of it, task, max_tokens, n, and the steps before which it arrives and is aborted.
"""


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 8),
    st.sampled_from([7, 64, 300]),
    st.sampled_from([TIGHT, TIGHT + 100, 16 * TIGHT]),
    st.sampled_from([1, 3, 20]),
    st.lists(ASKED, min_size=2, max_size=8),
)
def test_random_schedules(
    max_running: int,
    spare: int,
    kv_tokens: int,
    places: int,
    asked: list[tuple[int, int, str, int, int, int, int | None]],
) -> None:
    core = warm_core(
        max_running=max_running,
        max_step_tokens=max_running + spare,
        kv_tokens=kv_tokens,
        snapshots=places,
    )
    requests: list[Timed] = []
    for number, (text, length, task, max_tokens, n, arrives, aborts) in enumerate(asked):
        sampling = {"temperature": 1.0} if n > 1 else {}
        tokens = TEXTS[text][:length]
        each = request(
            f"{number}", tokens, *TASKS[task], max_tokens=max_tokens, n=n, seed=1, **sampling
        )
        requests.append((each, arrives, aborts))
    check_as_alone(core, requests, alone)
