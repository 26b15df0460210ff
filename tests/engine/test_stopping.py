"""When an answer ends, and why."""

import copy
from typing import Any

import pytest

from reft_runtime.base.model import LoadedModel
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import (
    Answer,
    answers,
    generate,
    make_core,
    prompt,
    request,
    tiny_llama,
)

LENGTH = 9


@pytest.fixture(scope="module")
def free() -> list[int]:
    """The answer that nothing ends; no token comes twice in what the tests use of it."""
    tokens = generate(tiny_llama()[0], prompt(LENGTH), 20)
    assert len(set(tokens[:6])) == 6
    return tokens


@pytest.fixture(scope="module")
def with_eos(free: list[int]) -> LoadedModel:
    """The same model, whose fourth token means the end."""
    model = copy.deepcopy(tiny_llama()[0])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [free[3], 2]
    return adopt_model(model)


def ask(loaded: LoadedModel | None = None, **sampling: Any) -> Answer:
    return answers(make_core(loaded), [request("a", prompt(LENGTH), **sampling)])["a"]


def test_max_tokens(free: list[int]) -> None:
    for count in (1, 2, 20):
        found = ask(max_tokens=count)
        assert (found.tokens[0], found.reasons) == (free[:count], {0: "length"})


def test_a_stop_id_is_the_last_token_and_is_named(free: list[int]) -> None:
    found = ask(stop_token_ids=(free[4], free[2]))
    assert found.tokens[0] == free[:3]
    assert (found.reasons, found.stop_ids) == ({0: "stop"}, {0: free[2]})


def test_the_end_token(free: list[int], with_eos: LoadedModel) -> None:
    found = ask(with_eos)
    assert found.tokens[0] == free[:4]
    assert (found.reasons, found.stop_ids) == ({0: "stop"}, {0: None})


def test_a_stop_id_that_is_the_end_token_is_named(free: list[int], with_eos: LoadedModel) -> None:
    assert ask(with_eos, stop_token_ids=(free[3],)).stop_ids == {0: free[3]}


def test_a_stop_on_the_last_allowed_token_is_a_stop(free: list[int], with_eos: LoadedModel) -> None:
    assert ask(with_eos, max_tokens=4).reasons == {0: "stop"}
    assert ask(with_eos, max_tokens=3).reasons == {0: "length"}


def test_ignore_eos(free: list[int], with_eos: LoadedModel) -> None:
    found = ask(with_eos, ignore_eos=True, max_tokens=20)
    assert (found.tokens[0], found.reasons) == (free, {0: "length"})
    found = ask(with_eos, ignore_eos=True, stop_token_ids=(free[5],))
    assert found.tokens[0] == free[:6]


def test_min_tokens_bans_every_stop_until_then(free: list[int], with_eos: LoadedModel) -> None:
    stops = (free[1], free[4])
    found = ask(with_eos, min_tokens=6, stop_token_ids=stops, max_tokens=20)
    early = found.tokens[0][:6]
    assert len(early) == 6
    assert not {*stops, free[3], 2} & set(early[:5])
    # What nothing bans yet is as it was, and up to the ban of its own second token.
    assert early[0] == free[0]
    assert early[1] != free[1]


def test_min_tokens_reached_exactly(free: list[int], with_eos: LoadedModel) -> None:
    # The fourth token would end it: allowed when three must come before, not when four must.
    assert ask(with_eos, min_tokens=3).tokens[0] == free[:4]
    assert ask(with_eos, min_tokens=4).tokens[0][:4] != free[:4]


def test_without_max_tokens_the_models_length_ends_it(free: list[int]) -> None:
    loaded = adopt_model(copy.deepcopy(tiny_llama()[0]), max_model_len=24)
    found = ask(loaded, max_tokens=None)
    assert (found.tokens[0], found.reasons) == (free[: 24 - LENGTH], {0: "length"})


def test_choices_end_each_on_their_own() -> None:
    core = make_core()
    asked = request("a", prompt(LENGTH), n=8, temperature=1.5, seed=3, max_tokens=40)
    long = answers(core, [asked])["a"].tokens
    stops = tuple(tokens[5 * choice] for choice, tokens in long.items())
    stopped = request(
        "a", prompt(LENGTH), n=8, temperature=1.5, seed=3, max_tokens=40, stop_token_ids=stops
    )
    found = answers(core, [stopped])["a"]
    for choice, tokens in long.items():
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), 40)
        assert found.tokens[choice] == tokens[:end]
    assert len({len(tokens) for tokens in found.tokens.values()}) > 2
