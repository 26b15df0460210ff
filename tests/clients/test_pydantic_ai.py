"""pydantic-ai: agents with text, each kind of output, tools, streams; both of its OpenAI models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from pydantic_ai import (
    Agent,
    NativeOutput,
    PromptedOutput,
    ToolOutput,
    UnexpectedModelBehavior,
    capture_run_messages,
)
from pydantic_ai.direct import model_request
from pydantic_ai.exceptions import (
    ModelContextWindowExceededError,
    ModelNotFoundError,
    ModelRequestRejectedError,
)
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolReturnPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

from tests.clients.asked import BASE, HELLO, TICKET, TOO_LONG, WEATHER, Ticket, Weather

pytestmark = pytest.mark.clients

SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 100}
GET_WEATHER = ToolDefinition(
    name="get_weather",
    description="Look up the weather of a city.",
    parameters_json_schema=Weather.model_json_schema(),
)

Models = Callable[..., Any]


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
async def model(request: pytest.FixtureRequest, base_url: str) -> AsyncIterator[Models]:
    """Makes a model by its name, which asks at one of the two routes."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        provider = OpenAIProvider(openai_client=client)
        yield lambda name=BASE: request.param(name, provider=provider)


async def test_text(model: Models) -> None:
    agent = Agent(model(), instructions="Be brief.", model_settings=SETTINGS)
    result = await agent.run(HELLO)
    assert result.output
    assert result.usage.output_tokens > 0
    again = await agent.run("And where are you from?", message_history=result.all_messages())
    assert again.output
    async with agent.run_stream(HELLO) as stream:
        deltas = [text async for text in stream.stream_text(delta=True)]
    assert "".join(deltas) == result.output
    assert stream.usage.output_tokens == result.usage.output_tokens


async def test_interventions(model: Models) -> None:
    pirate = await Agent(model("pirate"), model_settings=SETTINGS).run(HELLO)
    body = {"interventions": [{"name": "pirate"}]}
    composed = await Agent(model(), model_settings={**SETTINGS, "extra_body": body}).run(HELLO)
    assert composed.output == pirate.output
    assert (await Agent(model(), model_settings=SETTINGS).run(HELLO)).output != pirate.output


async def test_errors(model: Models) -> None:
    with pytest.raises(ModelNotFoundError, match="`nobody` does not exist"):
        await Agent(model("nobody")).run(HELLO)
    with pytest.raises(ModelRequestRejectedError, match="temperature"):
        await Agent(model(), model_settings={"temperature": 9}).run(HELLO)
    with pytest.raises(ModelContextWindowExceededError):
        await Agent(model()).run(TOO_LONG)


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
async def test_output(model: Models, kind: Any) -> None:
    agent = Agent(model(), output_type=kind(Ticket), model_settings=SETTINGS, retries=0)
    assert isinstance((await agent.run(TICKET)).output, Ticket)
    async with agent.run_stream(TICKET) as stream:
        assert isinstance(await stream.get_output(), Ticket)


async def test_prompted_output(model: Models) -> None:
    """JSON mode promises JSON and no form: a model this small may miss it."""
    settings = {**SETTINGS, "max_tokens": 200}
    agent = Agent(model(), output_type=PromptedOutput(Ticket), model_settings=settings, retries=0)
    with capture_run_messages() as messages, contextlib.suppress(UnexpectedModelBehavior):
        await agent.run(TICKET)
    answer = messages[1]
    assert isinstance(answer, ModelResponse)
    assert answer.text
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize("choice", ["required", ["get_weather"]])
async def test_tools_that_must_be_called(model: Models, choice: Any) -> None:
    answer = await model_request(
        model(),
        [ModelRequest.user_text_prompt(WEATHER)],
        model_settings={**SETTINGS, "tool_choice": choice},
        model_request_parameters=ModelRequestParameters(function_tools=[GET_WEATHER]),
    )
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert call.tool_name == "get_weather"
        Weather.model_validate(call.args_as_dict())


async def test_a_turn_with_a_tool(model: Models) -> None:
    """What a tool said goes back to the model, which answers."""
    messages: list[Any] = [ModelRequest.user_text_prompt(WEATHER)]
    asked = ModelRequestParameters(function_tools=[GET_WEATHER])
    settings = {**SETTINGS, "tool_choice": "required"}
    called = await model_request(
        model(), messages, model_settings=settings, model_request_parameters=asked
    )
    results = [
        ToolReturnPart(call.tool_name, {"degrees": 14}, call.tool_call_id)
        for call in called.tool_calls
    ]
    messages += [called, ModelRequest(parts=results)]
    answer = await model_request(
        model(), messages, model_settings=SETTINGS, model_request_parameters=asked
    )
    assert answer.text or answer.tool_calls
