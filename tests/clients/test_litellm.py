"""LiteLLM with its `openai/` provider: chat, completions, tools, forms, responses, its errors."""

from __future__ import annotations

import os
from typing import Any

import pytest

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

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # before it is imported: else it asks GitHub
import litellm

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]  # it warns of its own

NAMED = {"type": "function", "function": {"name": "get_weather"}}


def ask(base_url: str, text: str, model: str = BASE, **fields: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 100, "num_retries": 0, **fields}
    return litellm.completion(
        model=f"openai/{model}",
        api_base=base_url,
        api_key="none",
        messages=[user(text)],
        **settings,
    )


def test_chat(base_url: str) -> None:
    answer = ask(base_url, HELLO)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    chunks = list(ask(base_url, HELLO, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == answer.choices[0].message.content
    assert whole.usage.completion_tokens == answer.usage.completion_tokens


def test_completions(base_url: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{BASE}",
        api_base=base_url,
        api_key="none",
        prompt="One, two,",
        max_tokens=4,
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 4


def test_interventions(base_url: str) -> None:
    pirate = ask(base_url, HELLO, "pirate").choices[0].message.content
    assert pirate != ask(base_url, HELLO).choices[0].message.content
    body = {"interventions": [{"name": "pirate"}]}
    composed = ask(base_url, HELLO, extra_body=body)
    assert composed.choices[0].message.content == pirate


def test_errors(base_url: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="`nobody` does not exist"):
        ask(base_url, HELLO, "nobody")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(base_url, HELLO, temperature=9)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(base_url, TOO_LONG)


@pytest.mark.parametrize("model", [BASE, "formal"])
def test_response_format(base_url: str, model: str) -> None:
    answer = ask(base_url, TICKET, model, response_format=Ticket)
    Ticket.model_validate_json(answer.choices[0].message.content)


def test_json_object(base_url: str) -> None:
    answer = ask(base_url, AUTHOR, response_format={"type": "json_object"}, max_tokens=200)
    check_object(answer.choices[0])


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_tools(base_url: str, choice: Any) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER_TOOL], "tool_choice": choice}
    calls = ask(base_url, WEATHER, **asked).choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.function.name == "get_weather"
        Weather.model_validate_json(call.function.arguments)
    chunks = list(ask(base_url, WEATHER, stream=True, **asked))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [
        call.function.arguments for call in calls
    ]


def test_responses(base_url: str) -> None:
    asked: dict[str, Any] = {
        "model": f"openai/{BASE}",
        "api_base": base_url,
        "api_key": "none",
        "temperature": 0,
        "max_output_tokens": 100,
    }
    answer = litellm.responses(input=HELLO, **asked)
    assert answer.output_text
    assert answer.usage.output_tokens > 0
    events = list(litellm.responses(input=HELLO, stream=True, **asked))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text


def test_anthropics_messages(base_url: str) -> None:
    """Its bridge for programs that speak Anthropic's API asks at /v1/responses."""
    answer = litellm.anthropic.messages.create(
        model=f"openai/{BASE}",
        api_base=base_url,
        api_key="none",
        messages=[user(HELLO)],
        max_tokens=24,
    )
    assert answer["content"][0]["text"]
