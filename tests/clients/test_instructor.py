"""instructor: pydantic models by its modes, whole and as a stream of partial ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import instructor
import openai
import pytest
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException

from tests.clients.asked import BASE, TICKET, TOO_LONG, Ticket, user

pytestmark = pytest.mark.clients

ASKED: dict[str, Any] = {"messages": [user(TICKET)], "response_model": Ticket, "temperature": 0}


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", [BASE, "formal"])
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_models(client: openai.OpenAI, mode: str, model: str) -> None:
    asked = instructor.from_openai(client, mode=instructor.Mode[mode])
    ticket, answer = asked.chat.completions.create_with_completion(
        model=model, max_tokens=100, max_retries=0, **ASKED
    )
    assert isinstance(ticket, Ticket)
    assert answer.usage.completion_tokens > 0


def test_json_mode(client: openai.OpenAI) -> None:
    """JSON mode promises JSON and no form: a model this small may miss it, and is asked again."""
    answers: list[Any] = []
    asked = instructor.from_openai(client, mode=instructor.Mode.JSON)
    asked.on("completion:response", answers.append)
    with contextlib.suppress(InstructorRetryException, IncompleteOutputException):
        asked.chat.completions.create(model=BASE, max_tokens=200, max_retries=1, **ASKED)
    assert answers
    for answer in answers:
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_responses(client: openai.OpenAI) -> None:
    asked = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    ticket = asked.chat.completions.create(
        model=BASE, max_output_tokens=100, max_retries=0, **ASKED
    )
    assert isinstance(ticket, Ticket)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_partial_models(client: openai.OpenAI, mode: str) -> None:
    asked = instructor.from_openai(client, mode=instructor.Mode[mode])
    partial = list(
        asked.chat.completions.create_partial(model=BASE, max_tokens=100, max_retries=0, **ASKED)
    )
    Ticket.model_validate(partial[-1].model_dump())


def test_errors(client: openai.OpenAI) -> None:
    asked = instructor.from_openai(client)
    with pytest.raises(InstructorRetryException, match="`nobody` does not exist"):
        asked.chat.completions.create(model="nobody", max_retries=0, **ASKED)
    with pytest.raises(InstructorRetryException, match="2048"):
        asked.chat.completions.create(
            model=BASE, max_retries=0, **{**ASKED, "messages": [user(TOO_LONG)]}
        )
