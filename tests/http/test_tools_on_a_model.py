"""Calls that a grammar forces, on the real engine with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken

from reft_runtime import Engine
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.tools.templates import (
    GEMMA,
    GLM,
    HARMONY,
    LFM2,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMES,
    QWEN,
    QWEN_CODER,
)

ENUM = {"enum": ["Rome", "\u00e9", "<tool_call>", "</tool_call>", '"}']}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": ENUM,
                    "days": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "add"}},
]
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")
TEMPLATES = {
    "qwen": QWEN,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral names": MISTRAL_NAMES,
    "qwen coder": QWEN_CODER,
    "glm": GLM,
    "gemma": GEMMA,
    "harmony": HARMONY,
    "lfm2": LFM2,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine whose tokenizer has the tags as tokens, some of them special."""
    inner = tiny_tokenizer(VOCABULARY - 6 - len(CHANNELS))
    for tag in ("<tool_call>", "</tool_call>"):
        inner.add_tokens([AddedToken(tag, special=False)])
    for tag in ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[OTHER]", *CHANNELS):
        inner.add_tokens([AddedToken(tag, special=True)])
    assert len(inner) == VOCABULARY
    model = tiny("llama", max_position_embeddings=1024)
    with Engine(model, tokenizer=inner, max_running=16) as engine:
        yield engine


@pytest.fixture(params=TEMPLATES)
async def http(
    engine: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", TEMPLATES[request.param])
    engine.tokenizer.__dict__.pop("marks", None)  # it is kept
    async with client_of(create_app(engine, Settings())) as client:
        yield client
    engine.check_integrity()


def body(engine: Engine, **fields: Any) -> dict[str, Any]:
    return {
        "model": engine.info.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": TOOLS,
        "max_tokens": 200,
        **fields,
    }


def check(call: dict[str, Any]) -> None:
    function = call["function"]
    arguments = json.loads(function["arguments"])
    if function["name"] == "add":
        assert arguments == {}
    else:
        assert function["name"] == "look"
        assert arguments["city"] in ENUM["enum"]
        assert arguments.keys() <= {"city", "days"}


async def test_forced_calls_always_parse(http: httpx.AsyncClient, engine: Engine) -> None:
    asked = body(engine, tool_choice="required", n=8, seed=1, temperature=1.5, logprobs=True)
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    ended = [c for c in answer["choices"] if c["finish_reason"] != "length"]
    assert ended
    for choice in ended:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            check(call)
    response = await http.post("/v1/chat/completions", json=asked | {"stream": True})
    got: dict[int, list[dict[str, Any]]] = {}
    for line in response.text.split("\n\n")[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            for piece in choice["delta"].get("tool_calls", ()):
                calls = got.setdefault(choice["index"], [])
                if "id" in piece:
                    calls.append(piece["function"])
                else:
                    calls[-1]["arguments"] += piece["function"]["arguments"]
    for choice in answer["choices"]:
        calls = choice["message"].get("tool_calls", ())
        assert got.get(choice["index"], []) == [call["function"] for call in calls]


async def test_a_named_function(http: httpx.AsyncClient, engine: Engine) -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    asked = body(engine, tool_choice=choice, n=4, seed=2, stop="zzz")
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "look"
        check(call)


async def test_an_answer_of_a_form_beside_tools(http: httpx.AsyncClient, engine: Engine) -> None:
    """Each choice is either calls or JSON of the schema."""
    schema = {
        "type": "object",
        "properties": {"name": ENUM},
        "required": ["name"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = body(engine, response_format=form, n=16, seed=3, temperature=2)
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    ended = [c for c in answer["choices"] if c["finish_reason"] != "length"]
    assert ended
    for choice in ended:
        message = choice["message"]
        if choice["finish_reason"] == "tool_calls":
            assert message["content"] is None
            for call in message["tool_calls"]:
                check(call)
        else:
            assert json.loads(message["content"])["name"] in ENUM["enum"]
    assert {c["finish_reason"] for c in ended} == {"stop", "tool_calls"}


async def test_special_tokens_that_are_no_tags_stay_out(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    other = engine.tokenizer.token_id("[OTHER]")
    asked = body(engine, logit_bias={str(other): 100}, max_tokens=3)
    [choice] = (await http.post("/v1/chat/completions", json=asked)).json()["choices"]
    assert choice["message"]["content"] == ""


async def test_a_schema_that_cannot_be_compiled(http: httpx.AsyncClient, engine: Engine) -> None:
    function = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}
    asked = body(engine, tools=[{"type": "function", "function": function}])
    response = await http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert response.json()["error"]["message"].startswith("tools: ")
