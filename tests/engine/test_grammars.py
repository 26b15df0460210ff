"""Answers of a given form, beside others: the same tokens in any batch, and always of that form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from llguidance import LLParserLimits

from reft_runtime.engine.events import Failed
from reft_runtime.grammar import GrammarCompiler, source
from reft_runtime.grammar.state import allow_each
from reft_runtime.loading.loader import adopt_model
from reft_runtime.sampling import Grammar
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import MOST_FORCED
from reft_runtime.text import Tokenizer
from tests.helpers.models import (
    DEVICE,
    MAX_LENGTH,
    VOCABULARY,
    Answer,
    answers,
    finish,
    intervention,
    make_core,
    preempt,
    prompt,
    request,
    run,
    step,
    tiny,
    tiny_llama,
)
from tests.helpers.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("storages")

EOS = 2
TOKENIZER = Tokenizer(tiny_tokenizer(VOCABULARY), MAX_LENGTH)
COMPILER = GrammarCompiler(TOKENIZER.definition, VOCABULARY, {EOS})


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    COMPILER.close()


PERSON = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "forename": {"type": "string", "maxLength": 5},
                "grade": {"enum": ["the best", "the rest"]},
            },
            "required": ["forename", "grade"],
            "additionalProperties": False,
        }
    ),
)
CODE = Grammar("regex", "[a-z]{4}-[0-9]{3}(; the end)?")


def constrained(
    grammar: Grammar, name: str = "g", length: int = 20, *edits: Any, **sampling: Any
) -> Request:
    settings = {"max_tokens": 100, "grammar": grammar, **sampling}
    made = request(name, prompt(length), *edits, seed=11, **settings)
    return replace(made, grammar=COMPILER.start(grammar))


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


@torch.inference_mode()
def by_the_model(grammar: Grammar, length: int) -> list[int]:
    """Greedy, a whole forward for every token, of those that the grammar allows."""
    model, text, state = tiny_llama()[0], list(prompt(length)), COMPILER.start(grammar)
    mask = torch.zeros(VOCABULARY // 32, dtype=torch.int32)
    while not state.complete:
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        allow_each([state], mask.data_ptr(), mask.nbytes, threads=1)
        bits = mask[:, None].bitwise_right_shift(torch.arange(32)) & 1
        text.append(int(logits.where(bits.flatten().bool(), -torch.inf).argmax()))
        state.advance(text[-1])
    return text[length:]


@pytest.mark.parametrize("grammar", [PERSON, CODE])
def test_tokens_are_the_best_that_are_allowed(grammar: Grammar) -> None:
    wanted = by_the_model(grammar, 20)
    found = answers(make_core(), [constrained(grammar)])["g"]
    # The end token, where it was picked, is told as for any answer.
    assert found.tokens[0] == wanted
    assert found.reasons[0] == "stop"


def test_no_step_is_spent_on_forced_tokens_or_the_end() -> None:
    core = make_core()
    found = answers(core, [constrained(PERSON)])["g"]
    if core.runner.decoder is None:
        assert core.steps < len(found.tokens[0]) * 2 / 3
    else:
        assert core.steps <= len(found.tokens[0]) + 1
    assert EOS not in found.tokens[0]


def mixed() -> list[Request]:
    """Grammars, interventions, sampling and n, and free requests beside them."""
    edits = [intervention(seed) for seed in range(4)]
    return [
        constrained(PERSON, "greedy", 20, edits[0]),
        constrained(CODE, "drawn", 33, edits[1], temperature=1.0, n=3),
        request("free", prompt(40), edits[2], max_tokens=30),
        constrained(PERSON, "both", 9, edits[3], edits[1], temperature=0.8, top_p=0.9, top_k=40),
        constrained(CODE, "penalised", 20, temperature=1.3, frequency_penalty=1.0, min_tokens=5),
        request("base", prompt(12), seed=4, max_tokens=12, temperature=1.0),
        constrained(Grammar("json_object"), "object", 50, temperature=1.0, max_tokens=20),
    ]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[int, list[int]]]:
    return {one.id: run(make_core(), [one])[one.id] for one in mixed()}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_running": 3},
        {"max_step_tokens": 16},
        {"kv_tokens": MAX_LENGTH + 16},
        {"prefix_cache": False},
    ],
)
def test_a_batch_changes_no_token(
    alone: dict[str, dict[int, list[int]]], limits: dict[str, int]
) -> None:
    assert run(make_core(**limits), mixed()) == alone  # type: ignore[arg-type]


def test_answers_have_their_form(alone: dict[str, dict[int, list[int]]]) -> None:
    for name in ("greedy", "both"):
        person = json.loads(text_of(alone[name][0]))
        assert set(person) == {"forename", "grade"}
        assert person["grade"] in ("the best", "the rest")
    for choice in alone["drawn"].values():
        made = [token for token in choice if token != EOS]
        assert re.fullmatch(r"[a-z]{4}-\d{3}(; the end)?", text_of(made))


def test_a_preemption_at_any_step_changes_no_token(
    alone: dict[str, dict[int, list[int]]],
) -> None:
    for at in range(1, 6):
        core = make_core()
        found: dict[str, Answer] = {}
        core.add(mixed()[0])
        for _ in range(at):
            step(core, found)
        preempt(core, core.scheduler.running[0])
        finish(core, found)
        assert found["greedy"].tokens == alone["greedy"]


def test_log_probabilities_change_no_token() -> None:
    plain = answers(make_core(), [constrained(PERSON)])["g"]
    scored = answers(make_core(), [constrained(PERSON, logprobs=1)])["g"]
    assert scored.tokens == plain.tokens
    assert all(scored.logprobs[0])
    # They are the model's own, before the grammar: allowed tokens are often not its best.
    assert any(one and one.top[0][0] != one.token for one in scored.logprobs[0])


def test_an_answer_cut_by_its_length_says_so() -> None:
    whole = answers(make_core(), [constrained(PERSON)])["g"].tokens[0]
    for most in (*range(1, len(whole) - 1, 4), len(whole) - 1, len(whole)):
        found = answers(make_core(), [constrained(PERSON, max_tokens=most)])["g"]
        assert found.tokens[0] == whole[:most]
        assert found.reasons[0] == ("stop" if most == len(whole) else "length")


def test_an_end_may_be_put_off_but_not_past_the_form() -> None:
    loaded = adopt_model(tiny("llama", eos_token_id=EOS).to(DEVICE))  # type: ignore[arg-type]
    grammar = Grammar("regex", "a{2,6}")
    ended = answers(make_core(loaded), [constrained(grammar, logit_bias={EOS: 100})])["g"]
    assert text_of(ended.tokens[0][:-1]) == "aa"
    assert ended.reasons[0] == "stop"
    put_off = constrained(grammar, min_tokens=5, logit_bias={EOS: 100})
    found = answers(make_core(loaded), [put_off])["g"]
    assert text_of(found.tokens[0][:-1]) == "aaaaa"
    found = answers(make_core(loaded), [constrained(grammar, min_tokens=50)])["g"]
    assert text_of(found.tokens[0]) == "aaaaaa"
    assert found.reasons[0] == "stop"
    # A stop id that must come comes, whatever min_tokens says.
    a = TOKENIZER.encode("a")[0]
    stopping = constrained(grammar, min_tokens=2, stop_token_ids=(a,))
    found = answers(make_core(loaded), [stopping])["g"]
    assert text_of(found.tokens[0]) == "aa"
    assert found.stop_ids[0] == a


def test_ignoring_the_end_token_does_not_break_the_form() -> None:
    grammar = Grammar("regex", "a{2,6}")
    found = answers(make_core(), [constrained(grammar, ignore_eos=True, logit_bias={EOS: 100})])
    assert found["g"].reasons[0] == "stop"


def test_many_forced_tokens_come_in_several_steps() -> None:
    core = make_core()
    long = Grammar("regex", "[xy]" + "qwertzuiop" * 5)
    found = answers(core, [constrained(long), request("free", prompt(9), max_tokens=5)])
    assert text_of(found["g"].tokens[0])[1:] == "qwertzuiop" * 5
    if core.runner.decoder is None:
        assert core.steps == -(-len(found["g"].tokens[0]) // (1 + MOST_FORCED))


def test_a_grammar_that_proves_too_complex_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = LLParserLimits(max_lexer_states=20, verbose_errors=False)
    with monkeypatch.context() as patch:  # for this one alone: what is compiled is kept
        patch.setattr(source, "LIMITS", narrow)
        bad = COMPILER.start(Grammar("regex", "x(.*a){12}(.*b){12}(.*c){12}", "response_format"))
    core = make_core()
    core.add(replace(constrained(CODE, "bad", n=3, max_tokens=100), grammar=bad))
    core.add(request("free", prompt(9), max_tokens=40))
    found: dict[str, Answer] = {}
    failed: list[Failed] = []
    while not core.idle:
        failed += [event for event in step(core, found) if isinstance(event, Failed)]
    assert found["free"].reasons[0] == "length"
    assert not found["bad"].reasons
    [said] = failed
    assert said.param == "response_format"
    assert said.reason.startswith("the grammar is too complex; make it smaller")
    assert "too many states" in said.reason
