"""OpenAI's agents SDK: runs with text, an output type, tools and hand-offs, on both its models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import agents
import openai
import pytest
from agents.items import ToolCallItem

from tests.clients.asked import BASE, HELLO, TICKET, TOO_LONG, WEATHER, Ticket, Weather

pytestmark = pytest.mark.clients

Agents = Callable[..., Any]


@pytest.fixture(params=[agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
async def agent(request: pytest.FixtureRequest, base_url: str) -> AsyncIterator[Agents]:
    """Makes an agent of a model by its name, which asks at one of the two routes."""
    agents.set_tracing_disabled(True)  # it would be sent to OpenAI
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)

    def make(model: str = BASE, settings: dict[str, Any] | None = None, **fields: Any) -> Any:
        return agents.Agent(
            name="helper",
            model=request.param(model, client),
            model_settings=agents.ModelSettings(
                **{"temperature": 0, "max_tokens": 100, **(settings or {})}
            ),
            **fields,
        )

    async with client:
        yield make


def weather_tool() -> Any:
    """A tool that validates what the model calls it with."""

    async def call(context: Any, arguments: str) -> str:
        return f"14 degrees in {Weather.model_validate_json(arguments).city}"

    return agents.FunctionTool(
        name="get_weather",
        description="Look up the weather of a city.",
        params_json_schema=Weather.model_json_schema(),
        on_invoke_tool=call,
    )


async def test_text(agent: Agents) -> None:
    one = agent("pirate", instructions="Be brief.")  # it is, where the base is cut by its limit
    result = await agents.Runner.run(one, HELLO)
    assert result.final_output
    assert result.context_wrapper.usage.output_tokens > 0
    streamed = agents.Runner.run_streamed(one, HELLO)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == streamed.final_output == result.final_output


async def test_interventions(agent: Agents) -> None:
    pirate = await agents.Runner.run(agent("pirate"), HELLO)
    body = {"extra_body": {"interventions": [{"name": "pirate"}]}}
    composed = await agents.Runner.run(agent(settings=body), HELLO)
    assert composed.final_output == pirate.final_output
    assert (await agents.Runner.run(agent(), HELLO)).final_output != pirate.final_output


async def test_errors(agent: Agents) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        await agents.Runner.run(agent("nobody"), HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await agents.Runner.run(agent(settings={"temperature": 9}), HELLO)
    with pytest.raises(openai.BadRequestError) as long:
        await agents.Runner.run(agent(), TOO_LONG)
    assert long.value.code == "context_length_exceeded"


async def test_output_type(agent: Agents) -> None:
    one = agent(output_type=Ticket)
    assert isinstance((await agents.Runner.run(one, TICKET)).final_output, Ticket)
    streamed = agents.Runner.run_streamed(one, TICKET)
    async for _ in streamed.stream_events():
        pass
    assert isinstance(streamed.final_output, Ticket)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
async def test_tools(agent: Agents, choice: str) -> None:
    """The model must call the tool, and what that said is the answer."""
    settings = {"tool_choice": choice}
    one = agent(settings=settings, tools=[weather_tool()], tool_use_behavior="stop_on_first_tool")
    result = await agents.Runner.run(one, WEATHER)
    assert any(isinstance(item, ToolCallItem) for item in result.new_items)
    assert str(result.final_output).startswith("14 degrees in")
    streamed = agents.Runner.run_streamed(one, WEATHER)
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == result.final_output


async def test_a_turn_with_a_tool(agent: Agents) -> None:
    """What a tool said goes back to the model, which answers."""
    tools = [weather_tool()]
    one = agent(
        settings={"tool_choice": "required"}, tools=tools, tool_use_behavior="stop_on_first_tool"
    )
    called = await agents.Runner.run(one, WEATHER)
    assert str(called.final_output).startswith("14 degrees in")
    other = agent(settings={"tool_choice": "none"}, tools=tools)
    answer = await agents.Runner.run(other, called.to_input_list())
    assert answer.final_output


async def test_a_hand_off(agent: Agents) -> None:
    settings = {"tool_choice": "required", "parallel_tool_calls": False}  # one hand-off
    one = agent(settings=settings, handoffs=[agent("formal")])
    result = await agents.Runner.run(one, HELLO)
    assert result.last_agent is not one
    assert result.final_output
