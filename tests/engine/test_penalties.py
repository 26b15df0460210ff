"""Penalties count what was generated, also by requests that were preempted in between."""

from typing import Any

import pytest

from tests.helpers.models import MAX_LENGTH, answers, make_core, prompt, request

KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.2, "temperature": 0.8, "top_p": 0.9, "n": 2},
]


@pytest.mark.parametrize("kind", KINDS, ids=[next(iter(kind)) for kind in KINDS])
def test_a_preempted_request_keeps_them(kind: dict[str, Any]) -> None:
    asked = [request(f"{i}", prompt(9 + i), seed=i, max_tokens=40, **kind) for i in range(6)]
    roomy = answers(make_core(), asked)
    core = make_core(kv_tokens=MAX_LENGTH + 16, max_running=8)
    tight = answers(core, asked)
    assert core.scheduler.preemptions
    assert {k: v.tokens for k, v in tight.items()} == {k: v.tokens for k, v in roomy.items()}
    plain = answers(make_core(), [request("0", prompt(9), max_tokens=40)])
    assert plain["0"].tokens[0] != roomy["0"].tokens[0]


def test_a_large_penalty_lets_no_token_come_twice() -> None:
    asked = request("a", prompt(9), max_tokens=30, repetition_penalty=100.0, logit_bias={7: 50.0})
    tokens = answers(make_core(), [asked])["a"].tokens[0]
    assert len(set(tokens)) == 30
    assert not set(tokens) & set(prompt(9))
