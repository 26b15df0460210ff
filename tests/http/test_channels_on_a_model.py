"""Forms of answers on channels, as of gpt-oss, on the real engine with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from tokenizers import AddedToken

from reft_runtime import Engine
from reft_runtime.reasoning import Channels
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.serving import ask_chat, client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.http.test_thoughts_on_a_model import EOS, SCHEMA
from tests.tools.templates import HARMONY

FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"guided_regex": r'\{"day": true, "of": "(week)"\}'},
    {"guided_choice": ['{"day": true, "of": "week"}', '{"day": false, "of": "week"}']},
    {"guided_grammar": 'start: "{\\"day\\": true, \\"of\\": \\"week\\"" END\nEND: "}"'},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine whose tokenizer has the tokens of channels."""
    inner = tiny_tokenizer(VOCABULARY - 5)
    for text in ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"):
        inner.add_tokens([AddedToken(text, special=True)])
    inner.chat_template = HARMONY
    assert len(inner) == VOCABULARY
    model = tiny("llama", max_position_embeddings=1024)
    with Engine(model, tokenizer=inner, max_running=16) as engine:
        yield engine


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(engine, Settings())) as client:
        yield client
    engine.check_integrity()


def channels(engine: Engine) -> Channels:
    found = engine.tokenizer.marks
    assert isinstance(found, Channels)
    return found


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await ask_chat(http, **({"max_tokens": 300} | fields))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
async def test_a_form_is_that_of_the_last_message(
    http: httpx.AsyncClient, engine: Engine, form: dict[str, Any]
) -> None:
    ids = channels(engine)
    # The model begins a message, and would end its answer, or else what it thinks.
    bias = {ids.channel_id: 20, ids.end_id: 8, EOS: 100}
    answer = await ask(http, n=16, seed=1, temperature=1.5, logit_bias=bias, **form)
    thoughts = counted = 0
    ended = [each for each in answer["choices"] if each["finish_reason"] == "stop"]
    assert ended
    for choice in answer["choices"]:
        tokens = choice["token_ids"]
        assert tokens[0] == ids.channel_id
        ends = [place for place, token in enumerate(tokens, 1) if token == ids.end_id]
        counted += ends[-1] if ends else len(tokens) if choice not in ended else 0
        thoughts += bool(ends)
    for choice in ended:
        message = choice["message"]
        jsonschema.validate(json.loads(message["content"]), SCHEMA)
        assert ("<|" in message["content"]) is False
    assert thoughts
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= counted


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
async def test_an_answer_without_a_header_has_the_form_too(
    http: httpx.AsyncClient, engine: Engine, form: dict[str, Any]
) -> None:
    answer = await ask(http, logit_bias={channels(engine).channel_id: -100, EOS: 100}, **form)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_streams_say_what_whole_answers_say(http: httpx.AsyncClient, engine: Engine) -> None:
    ids = channels(engine)
    marks = (ids.start_id, ids.channel_id, ids.message_id, ids.end_id)
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    seen: set[str] = set()
    for seed in range(12):
        bias = dict.fromkeys(marks, 9 - seed % 4)
        asked = {"seed": seed, "temperature": 1.5, "max_tokens": 60, "logit_bias": bias}
        if seed % 3 == 0:
            asked |= FORMS[0] | {"max_tokens": 200}
        if seed % 3 == 1:
            asked |= {"tools": [tool], "tool_choice": "required", "max_tokens": 200}
        answer = await ask(http, n=3, **asked)
        body = {"model": engine.info.model, "messages": [{"role": "user", "content": "Hi"}]}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        response = await http.post("/v1/chat/completions", json=body | asked | streamed | {"n": 3})
        *events, last = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
        assert last["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
        assert (
            last["usage"]["completion_tokens_details"]
            == answer["usage"]["completion_tokens_details"]
        )
        for choice in answer["choices"]:
            message, deltas = choice["message"], list[dict[str, Any]]()
            for event in events:
                deltas += [c["delta"] for c in event["choices"] if c["index"] == choice["index"]]
            for key in ("content", "reasoning_content"):
                said = "".join(delta.get(key) or "" for delta in deltas)
                assert said == (message.get(key) or "")
                seen |= {key} if said else set()
            calls = [call["function"] for call in message.get("tool_calls") or []]
            pieces = [piece for d in deltas for piece in d.get("tool_calls") or []]
            called = "".join(piece["function"]["arguments"] for piece in pieces)
            assert called == "".join(call["arguments"] for call in calls)
            seen |= {"calls"} if calls else set()
    assert seen == {"content", "reasoning_content", "calls"}


async def test_items_of_a_response_stand_in_the_order_in_which_they_come(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    for seed in range(8):
        ids = channels(engine)
        asked = {
            "model": engine.info.model,
            "input": "Hi",
            "max_output_tokens": 60,
            "seed": seed,
            "temperature": 1.5,
            "logit_bias": {ids.start_id: 8, ids.channel_id: 8, ids.message_id: 10, ids.end_id: 8},
            "include": ["message.output_text.logprobs"],
        }
        whole = (await http.post("/v1/responses", json=asked)).json()
        response = await http.post("/v1/responses", json=asked | {"stream": True})
        events = [
            json.loads(each.split("data: ", 1)[1]) for each in response.text.split("\n\n")[:-1]
        ]
        output = events[-1]["response"]["output"]
        texts = dict.fromkeys(("reasoning", "message"), "")
        for found in (whole["output"], output):
            said = dict.fromkeys(texts, "")
            for item in found:
                said[item["type"]] += "".join(part["text"] for part in item["content"])
            texts = texts if found is output else said
        assert said == texts
        added = [e["item"]["type"] for e in events if e["type"] == "response.output_item.added"]
        done = [e["item"]["type"] for e in events if e["type"] == "response.output_item.done"]
        assert added == done == [item["type"] for item in output]
        deltas = {
            "response.reasoning_text.delta": "reasoning",
            "response.output_text.delta": "message",
        }
        for event in events:
            if event["type"] in deltas:
                assert output[event["output_index"]]["type"] == deltas[event["type"]]


async def test_an_answer_that_goes_on_with_a_turn_is_in_its_message(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So:"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    bias = {channels(engine).channel_id: 100, EOS: 100}
    answer = await ask(http, messages=turns, logit_bias=bias, **fields, **FORMS[0])
    [choice] = answer["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert "completion_tokens_details" not in answer["usage"]


async def test_a_form_that_cannot_be_read_is_refused_as_without_channels(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    body = {
        "model": engine.info.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "guided_grammar": "start: nothing",
    }
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_grammar"
