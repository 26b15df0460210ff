"""What a request may ask of the sampler: bounds, types, and errors that name the setting."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reft_runtime import SamplingParams
from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import Grammar


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 10**400},
        {"max_tokens": -(10**400)},
        {"temperature": math.nan},
        {"prompt_logprobs": 2.0},
        {"max_tokens": 2.5},
        {"max_tokens": "3"},
        {"top_k": 5.5},
        {"top_k": None},
        {"n": 2.0},
        {"seed": 1.5},
        {"logprobs": "1"},
        {"min_tokens": 1.5},
        {"temperature": "1"},
        {"top_p": None},
        {"repetition_penalty": "a"},
        {"stop": None},
        {"stop": (b"a",)},
        {"stop": [3]},
        {"stop_token_ids": 5},
        {"stop_token_ids": (1.5,)},
        {"logit_bias": [5]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: None}},
        {"kept_special_tokens": (5,)},
        {"kept_special_tokens": "<think>"},
        {"grammar": {"kind": "regex"}},
    ],
    ids=str,
)
def test_settings_out_of_bounds_or_of_another_type_are_named(given: dict[str, Any]) -> None:
    [name] = given
    with pytest.raises(InvalidRequest, match=f"^{name} must be") as refused:
        SamplingParams(**given)
    assert refused.value.param == name


BIASES = dict.fromkeys(range(1024), 1)


@pytest.mark.parametrize(
    ("name", "least", "most", "below", "above"),
    [
        ("max_tokens", 0, 2**31 - 1, -1, 2**31),
        ("temperature", 0.0, 100.0, -1e-9, 100.001),
        ("top_k", 0, 2**31 - 1, -1, 2**31),
        ("top_p", 1e-9, 1.0, 0.0, 1.001),
        ("min_p", 0.0, 1.0, -1e-9, 1.001),
        ("repetition_penalty", 1e-9, 100.0, 0.0, 100.001),
        ("presence_penalty", -2.0, 2.0, -2.001, 2.001),
        ("frequency_penalty", -2.0, 2.0, -2.001, 2.001),
        ("logit_bias", {5: -100.0}, {5: 100.0}, {4: 0.0, 5: -100.001}, {4: 0.0, 5: 100.001}),
        ("n", 1, 128, 0, 129),
        ("min_tokens", 0, 2**31 - 1, -1, 2**31),
        ("seed", -(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
        ("logprobs", 0, 20, -1, 21),
        ("prompt_logprobs", 0, 20, -1, 21),
        ("stop", "a", ("a",) * 128, "", ("a",) * 129),
        ("stop_token_ids", (), (5,) * 128, (5.5,), (5,) * 129),
        ("logit_bias", {}, BIASES, {5: math.nan}, BIASES | {1024: 1}),
    ],
)  # fmt: skip
def test_the_least_and_the_most_of_each_setting(
    name: str, least: Any, most: Any, below: Any, above: Any
) -> None:
    others: dict[str, Any] = {} if name == "max_tokens" else {"max_tokens": None}
    for fits in (least, most):
        SamplingParams(**others, **{name: fits})
    for wrong in (below, above):
        with pytest.raises(InvalidRequest, match=f"^{name}(:| must be)") as refused:
            SamplingParams(**others, **{name: wrong})
        assert refused.value.param == name


def test_what_a_caller_changes_later_changes_no_settings() -> None:
    """Nobody would check it, and a list is no tuple, to which a model's own marks are added."""
    given: dict[str, Any] = {
        "stop": ["a"],
        "stop_token_ids": [5],
        "kept_special_tokens": ["<a>"],
        "logit_bias": {5: 1.0},
    }
    made = SamplingParams(**given)
    for value in given.values():
        value.clear()
    assert made == SamplingParams(
        stop=("a",), stop_token_ids=(5,), kept_special_tokens=("<a>",), logit_bias={5: 1.0}
    )


def test_no_more_tokens_are_wanted_than_may_be_made() -> None:
    SamplingParams(min_tokens=3, max_tokens=3)
    with pytest.raises(InvalidRequest, match=r"min_tokens \(4\) is larger than max_tokens \(3\)"):
        SamplingParams(min_tokens=4, max_tokens=3)


@pytest.mark.parametrize("given", [("nope", "a"), ("regex", None), ("regex", 5)], ids=str)
def test_a_grammar_that_is_none_is_told(given: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^grammar: give one of json_schema, .* as text"):
        Grammar(*given)
