"""Prompt and decode positions are edited alike however the tokens come to be computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from reft_runtime.schedule.request import Request
from tests.helpers.models import (
    MAX_LENGTH,
    Answer,
    generate,
    make_core,
    preempt,
    prompt,
    request,
    run,
    step,
    tiny_llama,
)
from tests.helpers.reference import Applied, RandomEdit, applied, generate_applied, logits

pytestmark = pytest.mark.usefixtures("storages")

TIGHT = MAX_LENGTH + 16
"""The smallest KV budget with which any one request can end."""

MAX_TOKENS = 16

POSITIONS = [
    "all",
    "decode",
    "[0,3,-1]",
    "[0,1000,-1000,-2]",
    "l1+decode",
    "f2+[5,-1]+decode",
    "[3]+decode",
    "f3+l3+[4]",
    "prompt",
    "[1:-2]+decode",
    "decode[:4]",
    "l2+decode[1:3]+decode[6:]",
]

BFLOAT16 = torch.bfloat16

# Sizes keep generated text from settling into one repeated token.
KINDS: dict[str, RandomEdit] = {
    "loreft": RandomEdit("loreft", "all", seed=1),
    "loreft relu": RandomEdit("loreft", "f2+decode", act="relu", seed=2),
    "loreft bfloat16": RandomEdit("loreft", "l2+decode", dtype=BFLOAT16, seed=3),
    "noreft": RandomEdit("noreft", "[0,3,-1]+decode", seed=4),
    "noreft gelu bfloat16": RandomEdit("noreft", "decode", act="gelu", dtype=BFLOAT16, seed=5),
    "direft": RandomEdit("direft", "all", seed=6, rank=1),
    "nodireft": RandomEdit("nodireft", "[0,-1]", seed=7, rank=5),
    "nodireft tanh": RandomEdit("nodireft", "decode", act="tanh", seed=8),
    "consreft": RandomEdit("consreft", "decode", seed=9, layer=2),
    "lobireft": RandomEdit("lobireft", "all", seed=10, layer=2, size=3),
    "lobireft bfloat16": RandomEdit("lobireft", "l3+decode", dtype=BFLOAT16, seed=11, size=3),
    "steering": RandomEdit("steering", "all", seed=12, component="block_input"),
    "red": RandomEdit("red", "decode", seed=13, component="mlp_output"),
    "reft_r1": RandomEdit("reft_r1", "f1+decode", seed=14),
    "activation": RandomEdit(
        "loreft", "all", seed=15, component="mlp_activation", width=48, act="silu"
    ),
    "heads": RandomEdit("steering", "decode", seed=16, component="attention_value_output"),
}

RED = RandomEdit("red", "decode", seed=17)

CASES: dict[str, tuple[int, list[Applied]]] = {
    **{name: (7 + i, [applied(edit)]) for i, (name, edit) in enumerate(KINDS.items())},
    **{
        positions: (9 + i, [applied(RandomEdit("loreft", positions, layer=i % 3, seed=20 + i))])
        for i, positions in enumerate(POSITIONS)
    },
    "one token": (1, [applied(RandomEdit("loreft", "f5+l5+decode", seed=30))]),
    "long": (
        90,
        [applied(RandomEdit("direft", "all", seed=31), RandomEdit("red", "l1", seed=32))],
    ),
    "two": (12, [applied(KINDS["direft"], strength=0.5), applied(RED, strength=-1)]),
    "two, other order": (
        12,
        [applied(RED, strength=-1), applied(KINDS["direft"], strength=0.5)],
    ),
    "same row twice": (10, [applied(KINDS["loreft"]), applied(KINDS["consreft"], KINDS["loreft"])]),
    "two in turn": (
        14,
        [
            applied(RandomEdit("loreft", "decode[:5]", seed=33)),
            applied(RandomEdit("red", "decode[3:9]", seed=34), strength=0.5),
        ],
    ),
    "base": (11, []),
}


def asked(name: str, **sampling: Any) -> Request:
    length, interventions = CASES[name]
    used = [each.intervention for each in interventions]
    return request(name, prompt(length), *used, **{"max_tokens": MAX_TOKENS, **sampling})


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[int]]:
    """By hooks of our own on transformers' model, the whole text in every forward."""
    model, _ = tiny_llama()
    return {
        name: generate_applied(model, prompt(length), interventions, MAX_TOKENS)
        for name, (length, interventions) in CASES.items()
    }


@cache
def of_the_base(length: int) -> list[int]:
    return generate(tiny_llama()[0], prompt(length), MAX_TOKENS)


def test_the_cases_can_tell(wanted: dict[str, list[int]]) -> None:
    for name, (length, _) in CASES.items():
        base = of_the_base(length)
        assert (wanted[name] == base) == (name == "base"), name
        # The first token of what edits generated tokens alone is the base model's.
        if name in KINDS and KINDS[name].positions == "decode":
            assert wanted[name][0] == base[0], name
    assert wanted["two"] != wanted["two, other order"]


@pytest.mark.parametrize("name", CASES)
def test_alone(wanted: dict[str, list[int]], name: str) -> None:
    assert run(make_core(), [asked(name)])[name][0] == wanted[name]


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "kv_tokens"),
    [
        (len(CASES), 512, 8192),
        (1, 1, 8192),
        (2, 2, 8192),
        (5, 5, 8192),
        (len(CASES), 64, TIGHT),
        (16, 20, TIGHT),
    ],
    ids=["at once", "by 1", "by 2", "by 5", "preempted", "preempted by 20"],
)
def test_batched_chunked_and_preempted(
    wanted: dict[str, list[int]], max_running: int, max_step_tokens: int, kv_tokens: int
) -> None:
    core = make_core(max_running=max_running, max_step_tokens=max_step_tokens, kv_tokens=kv_tokens)
    # Few at a time take many steps, in which they decode as others do.
    max_tokens = 8 if max_running <= 5 else MAX_TOKENS
    # By 1 and by 2 every other case: it is a step for nearly each token of them all.
    names = list(CASES)[max_running - 1 :: 2] if max_running <= 2 else list(CASES)
    got = run(core, [asked(name, max_tokens=max_tokens) for name in names])
    for name in names:
        assert got[name][0] == wanted[name][:max_tokens], name
    assert (core.scheduler.preemptions > 0) == (kv_tokens == TIGHT)


@pytest.mark.parametrize("max_step_tokens", [512, 4])
@pytest.mark.parametrize("after", [1, 5, MAX_TOKENS - 1])
def test_generated_tokens_keep_their_positions_when_prefilled_again(
    wanted: dict[str, list[int]], after: int, max_step_tokens: int
) -> None:
    names = ["loreft relu", "decode", "[0,3,-1]", "red", "long", "two in turn"]
    core = make_core(max_running=8, max_step_tokens=max(8, max_step_tokens))
    found: dict[str, Answer] = {}
    for name in names:
        core.add(asked(name))
    preempted = 0
    while not core.idle:
        # Preempt as the scheduler does when KV runs out, each request once.
        for sequence in [s for s in core.scheduler.running if s.generated_length == after]:
            if sequence.decoding and sequence.request.id in names:
                names.remove(sequence.request.id)
                preempt(core, sequence)
                preempted += 1
        step(core, found)
    assert preempted == 6
    for name, answer in found.items():
        assert answer.tokens[0] == wanted[name], name


def sampled(name: str) -> Request:
    return asked(name, n=3, temperature=1.0, seed=5, logprobs=0, max_tokens=12)


@pytest.mark.parametrize(
    ("max_running", "max_step_tokens", "kv_tokens"),
    [(16, 512, 8192), (2, 2, 8192), (16, 32, TIGHT)],
    ids=["forked", "on their own", "preempted"],
)
def test_every_choice_is_edited_as_it_goes(
    max_running: int, max_step_tokens: int, kv_tokens: int
) -> None:
    core = make_core(max_running=max_running, max_step_tokens=max_step_tokens, kv_tokens=kv_tokens)
    names = ["all", "l1+decode", "noreft", "two", "long", "two in turn"]
    found: dict[str, Answer] = {}
    for name in names:
        core.add(sampled(name))
    while not core.idle:
        step(core, found)
    assert (core.scheduler.preemptions > 0) == (kv_tokens == TIGHT)
    model, _ = tiny_llama()
    for name in names:
        length, interventions = CASES[name]
        answer = found[name]
        assert len({tuple(tokens) for tokens in answer.tokens.values()}) == 3
        for choice, tokens in answer.tokens.items():
            text = [*prompt(length), *tokens]
            table = logits(model, text, length, interventions).log_softmax(-1)
            expected = [float(table[length - 1 + i, token]) for i, token in enumerate(tokens)]
            got = [scored.logprob for scored in answer.logprobs[choice] if scored is not None]
            assert got == pytest.approx(expected, abs=1e-3), (name, choice)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_aborting_an_edited_choice_leaves_the_others(
    wanted: dict[str, list[int]], steps: int
) -> None:
    whole = run(make_core(), [sampled("all")])["all"]
    core = make_core()
    found: dict[str, Answer] = {}
    for each in (sampled("all"), asked("noreft"), asked("heads"), asked("long")):
        core.add(each)
    for _ in range(steps):
        step(core, found)
    core.abort("all", 0)  # the choice that leads
    core.abort("heads")
    core.check_integrity()
    while not core.idle:
        step(core, found)
    core.check_integrity()
    assert {choice: found["all"].tokens[choice] for choice in (1, 2)} == {1: whole[1], 2: whole[2]}
    assert len(found["all"].tokens[0]) == len(found["heads"].tokens[0]) == steps
    for name in ("noreft", "long"):
        assert found[name].tokens[0] == wanted[name]
