"""LangChain's ChatOpenAI: answers, streams, structured output by each method, bound tools."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.clients.asked import (
    BASE,
    HELLO,
    TICKET,
    TOO_LONG,
    WEATHER,
    WEATHER_TOOL,
    Ticket,
    Weather,
)

pytestmark = pytest.mark.clients


def chat(base_url: str, model: str = BASE, **fields: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 100, "max_retries": 0, **fields}
    return ChatOpenAI(model=model, base_url=base_url, api_key="none", **settings)


def test_chat(base_url: str) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage(HELLO, name="anna")]
    answer = chat(base_url).invoke(messages)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    streamed = list(chat(base_url, stream_usage=True).stream(messages))
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk
    assert whole.content == answer.content
    assert whole.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]


def test_interventions(base_url: str) -> None:
    pirate = chat(base_url, "pirate").invoke(HELLO).content
    assert pirate != chat(base_url).invoke(HELLO).content
    body = {"interventions": [{"name": "pirate"}]}
    assert chat(base_url, extra_body=body).invoke(HELLO).content == pirate


def test_errors(base_url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        chat(base_url, "nobody").invoke(HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(base_url, temperature=9).invoke(HELLO)
    # Not its ContextOverflowError: it looks for the code in a text that has it no longer.
    with pytest.raises(openai.BadRequestError) as long:
        chat(base_url).invoke(TOO_LONG)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("model", [BASE, "formal"])
def test_structured_output(base_url: str, method: str, model: str) -> None:
    asked = chat(base_url, model).with_structured_output(Ticket, method=method)
    assert isinstance(asked.invoke(TICKET), Ticket)


def test_structured_output_of_any_form(base_url: str) -> None:
    """JSON mode promises JSON and no form: what does not fit is told as LangChain tells it."""
    asked = chat(base_url, max_tokens=200).with_structured_output(
        Ticket, method="json_mode", include_raw=True
    )
    answer = asked.invoke(f"{TICKET} Answer in JSON with category, urgent and priority.")
    assert isinstance(answer["parsed"], Ticket) or answer["parsing_error"] is not None
    if answer["raw"].response_metadata["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["raw"].content), dict)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_bound_tools(base_url: str, choice: str) -> None:
    asked = chat(base_url).bind_tools([WEATHER_TOOL], tool_choice=choice)
    answer = asked.invoke(WEATHER)
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert call["name"] == "get_weather"
        Weather.model_validate(call["args"])
    chunks = list(asked.stream(WEATHER))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    arguments = [(call["name"], call["args"]) for call in answer.tool_calls]
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == arguments


def test_a_turn_with_a_tool(base_url: str) -> None:
    model = chat(base_url)
    call = model.bind_tools([WEATHER_TOOL], tool_choice="get_weather").invoke(WEATHER)
    result = ToolMessage("14 degrees", tool_call_id=call.tool_calls[0]["id"])
    answer = model.bind_tools([WEATHER_TOOL]).invoke([HumanMessage(WEATHER), call, result])
    assert answer.content or answer.tool_calls


def test_responses(base_url: str) -> None:
    model = chat(base_url, use_responses_api=True)
    answer = model.invoke(HELLO)
    assert answer.text
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream(HELLO)) == answer.text
    assert isinstance(model.with_structured_output(Ticket).invoke(TICKET), Ticket)
    called = model.bind_tools([WEATHER_TOOL], tool_choice="required").invoke(WEATHER)
    Weather.model_validate(called.tool_calls[0]["args"])
