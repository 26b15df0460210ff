"""Tools over HTTP: what is asked of the engine, and how calls are answered, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.settings import Settings
from tests.http.conftest import chat
from tests.http.fake_engine import FakeEngine
from tests.tools.templates import LLAMA, MISTRAL, QWEN

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LOOK = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": PARAMETERS},
}
ADD = {"type": "function", "function": {"name": "add", "strict": None}}
STRICT = {"type": "function", "function": {"name": "sum", "parameters": {}, "strict": True}}
ROME = '{"city": "Rome \\u00e9"}'
CALL = f'<tool_call>\n{{"name": "look", "arguments": {ROME}}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.tokenizer.tool_template = QWEN
    engine.says = f"Let me see.\n{CALL}\n{OTHER}".encode()
    return engine


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def body(**fields: Any) -> dict[str, Any]:
    return chat(**{"max_tokens": 90, "tools": [LOOK, ADD], **fields})


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post("/v1/chat/completions", json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.fixture(autouse=True)
def long(engine: FakeEngine) -> None:
    """Room for answers with calls."""
    engine.info = replace(engine.info, max_model_len=1000)


async def test_whole(client: httpx.AsyncClient) -> None:
    answer = await ask(client, max_tokens=200, n=2, logprobs=True, top_logprobs=1)
    ids = set()
    for choice in answer["choices"]:
        message = choice["message"]
        assert message["content"] == "Let me see."
        assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
        assert [call["function"] for call in message["tool_calls"]] == [
            {"name": "look", "arguments": ROME},
            {"name": "add", "arguments": "{}"},
        ]
        ids |= {call["id"] for call in message["tool_calls"]}
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"] // 2
    assert len(ids) == 4


async def test_streamed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {"include_usage": True}
    events = await stream(
        client, max_tokens=200, n=2, logprobs=True, return_token_ids=True, stream_options=options
    )
    *events, last = events
    assert engine.says is not None
    assert last["usage"]["completion_tokens"] == 2 * len(engine.says)
    for index in (0, 1):
        chunks = [c for e in events for c in e["choices"] if c["index"] == index]
        assert chunks[0]["delta"] == {"role": "assistant", "content": None}
        assert all("role" not in chunk["delta"] for chunk in chunks[1:])
        deltas = [chunk["delta"] for chunk in chunks[1:] if chunk["delta"]]
        texts = [delta["content"] for delta in deltas if "content" in delta]
        assert "".join(texts) == "Let me see."
        calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert all(len(call) == 1 for call in calls)
        first, *arguments = [call[0] for call in calls if call[0]["index"] == 0]
        assert first.pop("id").startswith("call_")
        look = {"name": "look", "arguments": ""}
        assert first == {"index": 0, "type": "function", "function": look}
        assert all(piece.keys() == {"index", "function"} for piece in arguments)
        assert "".join(piece["function"]["arguments"] for piece in arguments) == ROME
        assert [call[0]["function"] for call in calls if call[0]["index"] == 1] == [
            {"name": "add", "arguments": ""},
            {"arguments": "{}"},
        ]
        assert chunks[-1]["delta"] == {}
        assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["tool_calls"]
        scored = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
        tokens = [token for chunk in chunks for token in chunk.get("token_ids", [])]
        assert len(scored) == len(tokens) == len(engine.says)


async def test_a_call_that_is_cut_off_is_content(client: httpx.AsyncClient) -> None:
    answer = await ask(client, max_tokens=40)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("Let me see.\n<tool_call>\n{")
    assert "tool_calls" not in choice["message"]
    chunks = [c for e in await stream(client, max_tokens=40) for c in e["choices"]]
    text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    assert text == choice["message"]["content"]
    assert chunks[-1]["finish_reason"] == "length"


async def test_an_answer_without_calls(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.says = b"No call.\n"
    [choice] = (await ask(client))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "No call.\n", "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "forced", "reason"),
    [
        ({}, None, "tool_calls"),
        ({"tool_choice": "auto"}, None, "tool_calls"),
        ({"tool_choice": "required"}, True, "tool_calls"),
        ({"tool_choice": named("look")}, True, "stop"),
        ({"tools": [LOOK, STRICT]}, False, "tool_calls"),
    ],
)
async def test_what_the_engine_is_asked(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    fields: dict[str, Any],
    forced: bool | None,
    reason: str,
) -> None:
    engine.says = CALL.encode()
    [choice] = (await ask(client, **fields))["choices"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == reason
    sampling = engine.streams[-1].sampling
    assert sampling.kept_special_tokens == ("<tool_call>", "</tool_call>")
    assert [tool["function"]["name"] for tool in engine.tokenizer.last_options.tools] == [
        tool["function"]["name"] for tool in fields.get("tools", [LOOK, ADD])
    ]
    grammar = sampling.grammar
    if forced is None:
        assert grammar is None
        return
    assert grammar is not None
    assert grammar.kind == "lark"
    assert ("TEXT" in grammar.source) is not forced
    others = [name for name in ("add", "sum") if f'name\\": \\"{name}' in grammar.source]
    assert bool(others) is (fields.get("tool_choice") != named("look"))


async def test_one_call_at_most(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {"max_tokens": 200, "parallel_tool_calls": False}
    [choice] = (await ask(client, **fields))["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["look"]
    chunks = [c for e in await stream(client, **fields) for c in e["choices"]]
    calls = [c["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["delta"]]
    assert {call["index"] for call in calls} == {0}
    await ask(client, tool_choice="required", **fields)
    grammar = engine.streams[-1].sampling.grammar
    assert grammar is not None
    assert "turn (" not in grammar.source


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}])
@pytest.mark.parametrize("choice", ["none", "auto", "required", None])
async def test_without_tools_text_is_text(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], choice: str | None
) -> None:
    if fields == {"tools": []}:
        fields = fields | {"tool_choice": choice}
    engine.says = CALL.encode()
    [answered] = (await ask(client, **fields))["choices"]
    assert answered["message"]["content"] == CALL
    assert answered["finish_reason"] == "stop"
    assert not engine.tokenizer.last_options.tools
    assert engine.streams[-1].sampling.grammar is None


async def test_calls_and_results_reach_the_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    def call(arguments: str, **more: Any) -> dict[str, Any]:
        return {
            "id": "c1",
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        } | more

    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}'), call("", index=1)]},
        {"role": "tool", "tool_call_id": "c1", "content": "5", "name": "f"},
        {"role": "assistant", "tool_calls": [call("broken")]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "6"}]},
    ]
    await ask(client, messages=messages)
    _, first, result, second, part = engine.tokenizer.last_messages
    assert [one["function"]["arguments"] for one in first["tool_calls"]] == [{"a": 1}, {}]
    assert first["content"] == ""
    assert result == {"role": "tool", "content": "5", "name": "f", "tool_call_id": "c1"}
    assert second["tool_calls"][0]["function"]["arguments"] == "broken"
    assert part["content"] == "6"


async def test_tokenize_takes_tools(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked = {"messages": chat()["messages"], "tools": [LOOK]}
    assert (await client.post("/tokenize", json=asked)).status_code == 200
    assert engine.tokenizer.last_options.tools == (LOOK,)
    refused = await client.post("/tokenize", json={"prompt": "x", "tools": [LOOK]})
    assert refused.json()["error"]["message"] == "tools needs messages."


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [ADD] * 129}, "tools", "at most 128 items"),
        ({"tools": [ADD, ADD]}, "tools", "the name 'add' is there twice"),
        ({"tools": [{"type": "custom"}]}, "tools.0.type", "should be 'function'"),
        (function(name="a b"), "tools.0.function.name", "should match pattern"),
        (function(name="x" * 65), "tools.0.function.name", "should match pattern"),
        (function(parameters={"type": "array"}), "tools.0.function.parameters", 'type "object"'),
        (function(parameters=nested(65)), "tools", "nested deeper than 64"),
        (function(parameters={"enum": [0] * 16_385}), "tools", "more than 16384 values"),
        (function(parameters={"a": "x" * 2**18}), "tools", "more than 262144 bytes"),
        (function(nonsense=1), "tools.0.function.nonsense", "not supported"),
        (
            {"tool_choice": named("who")},
            "tool_choice",
            "there is no tool 'who'; tools has look, add",
        ),
        ({"tool_choice": named("who"), "tools": []}, "tool_choice", "tools has none"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": 5}, "tool_choice", 'give "none", "auto", "required", or {"type"'),
        (
            {"messages": [USER | {"tool_calls": [{"id": "1", **named("f")}]}]},
            "messages.0",
            "assistant",
        ),
        ({"messages": [USER | {"tool_call_id": "x"}]}, "messages.0", "no other turn has one"),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            "messages.1",
            "has a tool_call_id",
        ),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [named("f")]}]},
            "messages.0.tool_calls.0.id",
            "field required",
        ),
    ],
)
async def test_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    response = await client.post("/v1/chat/completions", json=body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


class TestWithoutATemplateForTools:
    @pytest.fixture
    def engine(self) -> FakeEngine:
        return FakeEngine()

    async def test_refused(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/chat/completions", json=body())
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["param"] == "tools"
        assert "--tool-template hermes" in error["message"]


@pytest.mark.parametrize("settings", [Settings(tool_parser="mistral")])
async def test_another_format(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.says = f'[TOOL_CALLS][{{"name": "look", "arguments": {ROME}}}]'.encode()
    [choice] = (await ask(client))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ROME


@pytest.fixture
def opened(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


class look(BaseModel):  # noqa: N801 - the name of a function
    """Looks."""

    city: str


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, f"So: {CALL}"),
        (LLAMA, f'{{"name": "look", "parameters": {ROME}}}'),
        (MISTRAL, f'[TOOL_CALLS] [{{"name": "look", "arguments": {ROME}}}]'),
    ],
)
class TestClient:
    """The official client, with a conversation that goes on after a call."""

    @pytest.fixture
    def engine(self, template: str, text: str) -> FakeEngine:
        engine = FakeEngine(says=text.encode())
        engine.tokenizer.tool_template = template
        return engine

    def test_parse(self, opened: openai.OpenAI, text: str) -> None:
        completion = opened.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[openai.pydantic_function_tool(look)],
            max_tokens=90,
        )
        [choice] = completion.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        [call] = choice.message.tool_calls
        assert call.function.parsed_arguments == look(city="Rome \u00e9")
        again = opened.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "user", "content": "Hi"},
                choice.message,  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
            ],
            max_tokens=90,
        )
        assert again.choices[0].message.content == text

    def test_stream(self, opened: openai.OpenAI, text: str) -> None:
        with opened.chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[openai.pydantic_function_tool(look)],
            max_tokens=90,
        ) as events:
            kinds = [event.type for event in events]
            completion = events.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        [choice] = completion.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == ("So:" if text.startswith("So") else None)
        assert choice.message.tool_calls
        assert choice.message.tool_calls[0].function.parsed_arguments == look(city="Rome \u00e9")
