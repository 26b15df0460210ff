"""Labels scored after one prefill: the log-probabilities of transformers' own forward."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Event, Failed, LabelsScored, PromptReused, TokenMade
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.labels import END, LabelTree
from reft_runtime.schedule.request import AppliedIntervention, Request
from tests.helpers.models import (
    DEVICE,
    MAX_LENGTH,
    generate,
    intervention,
    make_core,
    preempt,
    prompt,
    request,
    run,
    tiny,
    tiny_llama,
)
from tests.helpers.reference import Applied, RandomEdit, applied, logits

pytestmark = pytest.mark.usefixtures("storages")

EDITS: dict[str, tuple[Applied, ...]] = {
    "base": (),
    "l7": (applied(RandomEdit("loreft", "l7", seed=1)),),
    "f3+l3": (applied(RandomEdit("loreft", "f3+l3", layer=2, seed=2)),),
    "decode": (applied(RandomEdit("loreft", "decode", seed=3)),),
    "decode[1:]": (applied(RandomEdit("loreft", "decode[1:]", seed=8)),),
    "l2+decode": (applied(RandomEdit("loreft", "l2+decode", layer=0, seed=4)),),
    "all": (applied(RandomEdit("loreft", "all", seed=5)),),
    "composed": (
        applied(RandomEdit("loreft", "l1", seed=6), strength=0.5),
        applied(RandomEdit("loreft", "decode", layer=2, seed=7)),
    ),
}
SINGLE = ((5,), (9,), (200,))
SHARED = ((5, 6), (5, 7, 8), (5, 7, 9, 10), (11,), (12, 13, 14))
INSIDE = ((5,), (5, 6), (5, 6, 7), (8, 9))
MANY = tuple((20 + i % 5, 30 + i, 40 + i) for i in range(6))


def labelled(
    name: str,
    tokens: Sequence[int],
    labels: Sequence[tuple[int, ...]],
    interventions: Sequence[Applied] = (),
) -> Request:
    edits = [each.intervention for each in interventions]
    made = request(name, tokens, *edits, max_tokens=0)
    return dataclasses.replace(made, labels=LabelTree.of(labels))


def scores(core: EngineCore, asked: Sequence[Request]) -> dict[str, tuple[float, ...]]:
    """Run requests, all added at once; the scores of those with labels."""
    for each in asked:
        core.add(each)
    return finish(core)


def finish(core: EngineCore) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    while not core.idle:
        for event in core.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, LabelsScored):
                assert event.request_id not in found
                found[event.request_id] = event.logprobs
        core.check_integrity()
    core.check_integrity()
    return found


def truth(
    tokens: Sequence[int],
    labels: Sequence[tuple[int, ...]],
    interventions: Sequence[Applied] = (),
    model: Any = None,
    eos: Sequence[int] = (),
) -> list[float]:
    """One whole forward of the prompt with each label."""
    found = []
    for label in labels:
        text = [*tokens, *label]
        rows = logits(model or tiny_llama()[0], text, len(tokens), interventions)
        rows = rows.double().log_softmax(-1)[len(tokens) - 1 :]
        score = sum(float(row[token]) for row, token in zip(rows, label, strict=False))
        if any(other != label and other[: len(label)] == label for other in labels):
            score += float(rows[-1][list(eos)].logsumexp(-1)) if eos else -math.inf
        found.append(score)
    return found


def close(found: Sequence[float], wanted: Sequence[float]) -> None:
    assert found == pytest.approx(wanted, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("task", EDITS)
@pytest.mark.parametrize(
    ("labels", "length"),
    [(SHARED, 1), (SINGLE, 5), (SHARED, 40)],
    ids=["shared of 1", "single of 5", "shared of 40"],
)
def test_scores_are_those_of_a_whole_forward(
    task: str, labels: tuple[tuple[int, ...], ...], length: int
) -> None:
    tokens = prompt(length)
    found = scores(make_core(), [labelled("a", tokens, labels, EDITS[task])])["a"]
    close(found, truth(tokens, labels, EDITS[task]))


def test_tokens_of_labels_are_no_part_of_the_prompt() -> None:
    # As a part of the prompt they would move the last seven tokens.
    tokens, edits = prompt(20), EDITS["l7"]
    found = scores(make_core(), [labelled("a", tokens, SHARED, edits)])["a"]
    wrong = []
    for label in SHARED:
        text = [*tokens, *label]
        rows = logits(tiny_llama()[0], text, len(text), edits).double().log_softmax(-1)
        wrong.append(sum(float(rows[19 + i][token]) for i, token in enumerate(label)))
    assert max(abs(a - b) for a, b in zip(found, wrong, strict=True)) > 0.1


def test_the_tree_of_labels() -> None:
    assert LabelTree.of(SINGLE).paths == ((),)
    assert LabelTree.of(((5, 6), (5, 7), (5, 8))).paths == ((5,),)
    tree = LabelTree.of(INSIDE)
    assert tree.labels == ((5, END), (5, 6, END), (5, 6, 7), (8, 9))
    assert tree.paths == ((5, 6), (8,))
    assert tree.following == {(): (5, 8), (5,): (END, 6), (5, 6): (END, 7), (8,): (9,)}
    for wrong in ((), (5,), (5,)), ((5,), ()), ((5, 6), (5, 6)):
        with pytest.raises(ValueError, match="must have tokens"):
            LabelTree.of(wrong)


@pytest.mark.parametrize("eos", [(3,), (3, 4)])
@pytest.mark.parametrize("task", ["base", "l2+decode"])
def test_a_label_inside_another_counts_its_end(eos: tuple[int, ...], task: str) -> None:
    model = tiny("llama", eos_token_id=list(eos))
    core = make_core(adopt_model(copy.deepcopy(model).to(DEVICE)))  # type: ignore[arg-type]
    assert core.loaded.eos_ids == set(eos)
    tokens, edits = prompt(20), EDITS[task]
    found = scores(core, [labelled("a", tokens, INSIDE, edits)])["a"]
    close(found, truth(tokens, INSIDE, edits, model, eos))


def test_one_prefill_and_no_step_more_for_labels_of_one_token() -> None:
    core = make_core()
    scores(core, [labelled("a", prompt(20), SINGLE)])
    assert core.steps == 1
    scores(core, [labelled("b", prompt(21), SHARED)])
    assert core.steps == 3
    assert core.requests.prompt_tokens == 41
    assert core.requests.generation_tokens == 0


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "prefix_cache"),
    [(1, 512, True), (2, 6, True), (3, 512, False), (16, 6, False), (16, 512, True)],
)
def test_mixed_with_others_that_generate(
    max_running: int, max_step_tokens: int, prefix_cache: bool
) -> None:
    core = make_core(
        max_running=max_running, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache
    )
    begin = prompt(35)
    asked = [
        labelled(f"{task} {i}", (*begin, *prompt(6, seed=i)), labels, edits)
        for i, labels in enumerate((SINGLE, MANY))
        for task, edits in EDITS.items()
    ]
    answering = [request(f"g{i}", (*begin, 7 + i), intervention(i)) for i in range(4)]
    wanted = {each.id: run(make_core(), [each])[each.id] for each in answering}
    every = [*asked, *answering]
    random.Random(0).shuffle(every)
    for _ in range(2):  # cold and warm
        found: dict[str, tuple[float, ...]] = {}
        made: dict[str, list[int]] = {}
        for each in every:
            core.add(each)
        while not core.idle:
            for event in core.step():
                if isinstance(event, LabelsScored):
                    found[event.request_id] = event.logprobs
                elif isinstance(event, TokenMade) and event.token is not None:
                    made.setdefault(event.request_id, []).append(event.token)
            core.check_integrity()
        core.check_integrity()
        assert made == {name: tokens[0] for name, tokens in wanted.items()}
        for each in asked:
            task, _, i = each.id.rpartition(" ")
            close(found[each.id], known(task, int(i), each.prompt))


_known: dict[tuple[str, int], list[float]] = {}


def known(task: str, i: int, tokens: Sequence[int]) -> list[float]:
    if (task, i) not in _known:
        _known[task, i] = truth(tokens, (SINGLE, MANY)[i], EDITS[task])
    return _known[task, i]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_when_memory_for_keys_and_values_is_short(prefix_cache: bool) -> None:
    core = make_core(kv_tokens=MAX_LENGTH + 16, max_step_tokens=30, prefix_cache=prefix_cache)
    asked = [labelled(f"{i}", prompt(60 + i), MANY, EDITS["l2+decode"]) for i in range(3)]
    others = [request(f"g{i}", prompt(30 + i), max_tokens=40) for i in range(4)]
    found = scores(core, [asked[0], *others, *asked[1:]])
    assert core.scheduler.preemptions
    for each in asked:
        close(found[each.id], truth(each.prompt, MANY, EDITS["l2+decode"]))


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "prefix_cache"),
    [(1, 512, True), (2, 3, False), (2, 6, True), (16, 512, True)],
)
def test_of_a_model_with_recurrent_layers(
    max_running: int, max_step_tokens: int, prefix_cache: bool
) -> None:
    """Its states cannot be copied as they were at the prompt's end."""
    model, loaded = recurrent()
    core = make_core(
        loaded,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        prefix_cache=prefix_cache,
    )
    labels = (*SHARED, (30, 31, 32, 33, 34, 35), (30, 31, 32, 9))
    labels_of = {"a": labels, "b": MANY}
    asked = [labelled("a", prompt(20), labels), labelled("b", prompt(70), MANY)]
    for _ in range(2):  # cold and warm
        found = scores(core, [asked[0], request("g", prompt(9)), asked[1]])
        for each in asked:
            close(found[each.id], known_recurrent(each.prompt, labels_of[each.id]))
    assert run(core, [request("g", prompt(9))])["g"][0] == generate(model, prompt(9))


@cache
def recurrent() -> tuple[PreTrainedModel, LoadedModel]:
    model = tiny("qwen3_5_text")
    return model, adopt_model(copy.deepcopy(model).to(DEVICE))  # type: ignore[arg-type]


@cache
def known_recurrent(tokens: tuple[int, ...], labels: tuple[tuple[int, ...], ...]) -> list[float]:
    return truth(tokens, labels, model=recurrent()[0])


@pytest.mark.parametrize("task", ["l7", "all"])
def test_preempted_at_every_step(task: str) -> None:
    tokens = prompt(20)
    wanted = truth(tokens, SHARED, EDITS[task])
    for at in range(8):
        for which in (0, -1):
            core = make_core(max_step_tokens=8, max_running=2)
            core.add(labelled("a", tokens, SHARED, EDITS[task]))
            core.add(request("b", prompt(5)))
            events = [event for _ in range(at) for event in core.step()]
            if core.scheduler.running:
                preempt(core, core.scheduler.running[which])
            found = [e.logprobs for e in events if isinstance(e, LabelsScored)]
            close((found or [finish(core)["a"]])[0], wanted)
            finish(core)


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_leaves_nothing(steps: int) -> None:
    core = make_core(max_step_tokens=10, max_running=3)
    core.add(labelled("a", prompt(20), MANY))
    core.add(request("b", prompt(5)))
    made: list[Event] = [event for _ in range(steps) for event in core.step()]
    core.abort("a")
    core.check_integrity()
    while not core.idle:
        made += core.step()
        core.check_integrity()
    tokens = [e.token for e in made if isinstance(e, TokenMade)]
    assert tokens == generate(tiny_llama()[0], prompt(5))


def test_memory_that_runs_out_fails_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    core.add(request("old", prompt(5)))
    core.step()
    core.add(labelled("new", prompt(9), SHARED))
    core.step()
    real = core.runner.run

    def short(chunks: Any) -> Any:
        monkeypatch.setattr(core.runner, "run", real)
        raise MemoryError

    monkeypatch.setattr(core.runner, "run", short)
    [failed] = core.step()
    assert failed == Failed("new", OUT_OF_MEMORY, out_of_memory=True)
    assert finish(core) == {}


def test_a_label_that_is_not_finite_fails_its_request_alone() -> None:
    core = make_core()
    [edit] = EDITS["decode"][0].intervention.edits
    bad = AppliedIntervention("bad", (dataclasses.replace(edit, b=edit.b * math.nan),))
    for name, labels, edits in (
        ("bad", SHARED, (bad,)),
        ("fine", SHARED, ()),
        ("one token", SINGLE, (bad,)),  # no token of it is edited
    ):
        each = labelled(name, prompt(9), labels)
        core.add(dataclasses.replace(each, interventions=edits))
    events: list[Event] = []
    while not core.idle:
        events += core.step()
    core.check_integrity()
    ends = {e.request_id: type(e) for e in events if isinstance(e, Failed | LabelsScored)}
    assert ends == {"bad": Failed, "fine": LabelsScored, "one token": LabelsScored}


def test_reuse_is_told_and_long_labels_take_turns() -> None:
    core = make_core(max_step_tokens=512)
    long = [tuple(range(10 + i, 90 + i)) for i in range(8)]
    asked = [labelled("a", prompt(40), long), labelled("b", prompt(40), SHARED)]
    found = scores(core, asked)
    close(found["a"], truth(prompt(40), long))
    core.add(labelled("c", prompt(40), SHARED))
    assert PromptReused("c", 32) in core.step()
    finish(core)


def test_choices_may_be_forked_while_others_decode() -> None:
    """A path of two tokens, cut so that its second is computed as a decode step."""
    core = make_core(max_step_tokens=21, max_running=16)
    labels = ((5, 6, 7), (8, 9, 10))
    found = scores(core, [labelled("a", prompt(20), labels)])
    close(found["a"], truth(prompt(20), labels))


def test_blocks_of_a_label_are_reused_for_their_own_tokens_alone() -> None:
    core = make_core(max_step_tokens=20)  # the first block, with ten tokens of a label, comes first
    begin, long = prompt(10), [prompt(length, seed=length) for length in (14, 40, 41)]
    found = scores(core, [labelled("a", begin, long)])["a"]
    close(found, truth(begin, long))
    for first in long:
        for second in long:
            asked = request("g", (*begin, *first[:6], *second[6:]))
            assert run(core, [asked])["g"][0] == generate(tiny_llama()[0], asked.prompt)
