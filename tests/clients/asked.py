"""What every client is asked for: bounded forms, so that a small model ends them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BASE = "SmolLM2-135M-Instruct"
CONTEXT = 2048
"""The server's longest prompt and answer together, in tokens."""

HELLO = "Who are you?"
TICKET = "I was charged twice this month and want my money back. Which kind of ticket is it?"
WEATHER = "What is the weather in Paris, in celsius?"
AUTHOR = 'Answer in JSON, {"name": "..."}: who wrote Hamlet?'
TOO_LONG = "a word " * CONTEXT


class Ticket(BaseModel):
    """A ticket of a help desk."""

    model_config = ConfigDict(extra="forbid")

    category: Literal["billing", "shipping", "technical"]
    urgent: bool
    priority: int = Field(ge=1, le=5)


class Weather(BaseModel):
    """Look up the weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome", "Oslo"]
    unit: Literal["celsius", "fahrenheit"]


WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": Weather.model_json_schema(),
    },
}
"""A tool as /v1/chat/completions takes it."""


def check_object(choice: Any) -> None:
    """Assert that a choice is a JSON object, or one that its length cut."""
    text = choice.message.content
    assert text.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}
