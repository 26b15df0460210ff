"""OpenAI's own client: chat, completions, parse, tools, streams of them, responses, its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.clients.asked import (
    AUTHOR,
    BASE,
    HELLO,
    TICKET,
    TOO_LONG,
    WEATHER,
    WEATHER_TOOL,
    Ticket,
    Weather,
    check_object,
    user,
)

pytestmark = pytest.mark.clients

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
TOOLS: Any = [WEATHER_TOOL]
FLAT_TOOLS: Any = [{"type": "function", "strict": True, **WEATHER_TOOL["function"]}]
"""The same tools as /v1/responses takes them."""


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str, model: str = BASE, **fields: Any) -> Any:
    """A chat of one user message."""
    messages: Any = [user(text)]
    return client.chat.completions.create(model=model, messages=messages, **{**GREEDY, **fields})


# Chat and completions


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client, HELLO, n=2, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    choice = answer.choices[0]
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert answer.usage.completion_tokens == 2 * len(choice.logprobs.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(ask(client, HELLO, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = ask(client, HELLO)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=["One", "Two"], max_tokens=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 4


def test_interventions(client: openai.OpenAI) -> None:
    pirate = ask(client, HELLO, "pirate")
    assert pirate.model == "pirate"
    assert pirate.choices != ask(client, HELLO).choices
    body = {"interventions": [{"name": "pirate", "strength": 1.0}]}
    assert ask(client, HELLO, extra_body=body).choices == pirate.choices
    raw = client.chat.completions.with_raw_response.create(
        model="pirate", messages=[{"role": "user", "content": HELLO}], max_tokens=2
    )
    assert raw.headers["x-intervention"].startswith("pirate@")
    assert "pirate" in [model.id for model in client.models.list()]


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist") as unknown:
        ask(client, HELLO, "nobody")
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        ask(client, HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, TOO_LONG)
    assert long.value.code == "context_length_exceeded"


# Structured outputs


@pytest.mark.parametrize("model", [BASE, "pirate"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_parse(client: openai.OpenAI, model: str, temperature: float) -> None:
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": TICKET}],
        response_format=Ticket,
        temperature=temperature,
        max_tokens=100,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Ticket)


def test_streamed_parse(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=BASE,
        messages=[{"role": "user", "content": TICKET}],
        response_format=Ticket,
        temperature=0,
        max_tokens=100,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Ticket)
    assert "".join(deltas) == message.content


def test_parse_that_is_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=BASE,
            messages=[{"role": "user", "content": TICKET}],
            response_format=Ticket,
            max_tokens=3,
        )


def test_json_object(client: openai.OpenAI) -> None:
    answer = ask(client, AUTHOR, response_format={"type": "json_object"}, max_tokens=200)
    check_object(answer.choices[0])


def test_a_schema_that_cannot_be(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        ask(client, TICKET, response_format=form)


# Tools


def checked(call: Any) -> Weather:
    """The arguments of a call of the weather's tool, which the client gave an id."""
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.id
    assert call.function.name == "get_weather"
    return Weather.model_validate_json(call.function.arguments)


@pytest.mark.parametrize("model", [BASE, "formal"])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_tools_that_must_be_called(client: openai.OpenAI, model: str, choice: Any) -> None:
    answer = ask(client, WEATHER, model, tools=TOOLS, tool_choice=choice, max_tokens=100)
    calls = answer.choices[0].message.tool_calls
    assert calls
    for call in calls:
        checked(call)
    expected = ("tool_calls",) if choice == "required" else ("tool_calls", "stop")
    assert answer.choices[0].finish_reason in expected
    assert answer.usage.completion_tokens > 0


def test_tools_that_may_be_called(client: openai.OpenAI) -> None:
    message = ask(client, WEATHER, tools=TOOLS, max_tokens=60).choices[0].message
    assert message.content or message.tool_calls
    for call in message.tool_calls or ():
        assert json.loads(call.function.arguments) is not None


def test_tools_that_must_not_be_called(client: openai.OpenAI) -> None:
    message = ask(client, WEATHER, tools=TOOLS, tool_choice="none").choices[0].message
    assert message.content
    assert not message.tool_calls


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        WEATHER,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
    )
    assert len(answer.choices[0].message.tool_calls) == 1


def test_parsed_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=BASE,
        messages=[{"role": "user", "content": WEATHER}],
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Weather)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_streamed_tools(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 100}
    whole = ask(client, WEATHER, **asked).choices[0]
    first: dict[int, Any] = {}
    arguments: dict[int, str] = {}
    ends = []
    for chunk in ask(client, WEATHER, stream=True, **asked):
        assert chunk.object == "chat.completion.chunk"
        for call in chunk.choices[0].delta.tool_calls or ():
            seen = first.setdefault(call.index, call)
            # Only the first delta of a call says which it is.
            assert bool(call.id) == bool(call.function.name) == (call is seen)
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert list(first) == list(range(len(whole.message.tool_calls)))
    assert list(arguments.values()) == [c.function.arguments for c in whole.message.tool_calls]
    assert {call.function.name for call in first.values()} == {"get_weather"}
    assert ends == [whole.finish_reason]


def test_streamed_parsed_tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=BASE,
        messages=[{"role": "user", "content": WEATHER}],
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    ) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert done
    assert all(isinstance(event.parsed_arguments, Weather) for event in done)


def test_a_turn_with_a_tool(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "max_tokens": 100}
    call = ask(client, WEATHER, tool_choice=NAMED, **asked).choices[0].message
    messages: Any = [
        user(WEATHER),
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "14 degrees"},
    ]
    answer = client.chat.completions.create(model=BASE, messages=messages, tools=TOOLS, **GREEDY)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


# Responses


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=BASE, input=HELLO, instructions="Be brief.", temperature=0, max_output_tokens=24
    )
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.usage is not None
    assert 0 < answer.usage.output_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_streamed_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": BASE, "input": [user(HELLO)], "temperature": 0, "max_output_tokens": 24}
    events: list[Any] = list(client.responses.create(stream=True, **asked))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == client.responses.create(**asked).output_text


def test_responses_of_an_intervention(client: openai.OpenAI) -> None:
    asked: Any = {"input": HELLO, "temperature": 0, "max_output_tokens": 24}
    pirate = client.responses.create(model="pirate", **asked)
    composed = client.responses.create(
        model=BASE, extra_body={"interventions": [{"name": "pirate"}]}, **asked
    )
    assert composed.output_text == pirate.output_text
    assert client.responses.create(model=BASE, **asked).output_text != pirate.output_text


def test_parsed_responses(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model=BASE, input=TICKET, text_format=Ticket, temperature=0, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, Ticket)


def test_tools_of_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": BASE, "tools": FLAT_TOOLS, "temperature": 0, "max_output_tokens": 100}
    answer = client.responses.create(input=WEATHER, tool_choice="required", **asked)
    calls: list[Any] = [item for item in answer.output if item.type == "function_call"]
    assert calls
    assert calls[0].name == "get_weather"
    Weather.model_validate_json(calls[0].arguments)
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "14 degrees"}
    turns: Any = [user(WEATHER), *(item.to_dict() for item in answer.output), result]
    again = client.responses.create(input=turns, **asked)
    assert again.output


def test_what_responses_refuse(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=BASE, input=HELLO, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        client.responses.create(model="nobody", input=HELLO)
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=BASE, input=TOO_LONG)
    assert long.value.code == "context_length_exceeded"
