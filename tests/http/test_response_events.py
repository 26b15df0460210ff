"""Chunks of a chat as events of /v1/responses: text, calls, log-probabilities, ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from reft_runtime.outputs import Choice, ChoiceDelta
from server.choices import ChoiceWriter
from server.generation import Run
from server.response_events import ResponseWriter
from server.translation import translated
from tests.http.test_responses import asked, events


class Chunks(ChoiceWriter):
    """A chat's writer whose chunks are given, one list a step, and so is its message."""

    def __init__(self, steps: list[list[dict[str, Any]]], message: dict[str, Any]) -> None:
        super().__init__(translated(asked()).chat)
        self._steps = iter(steps)
        self._message = message

    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        return next(self._steps)

    def choice(self, run: Run, choice: Choice) -> dict[str, Any]:
        return self._message


RUN = cast(
    Run,
    SimpleNamespace(
        job=SimpleNamespace(id="resp_1", label="tiny", thinking=None),
        created=1,
        reasoning_tokens=0,
        usage=lambda: {
            "prompt_tokens": 1,
            "completion_tokens": 2,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    ),
)


def chunk(logprobs: list[str] | None = None, end: str | None = None, **delta: Any) -> Any:
    scored = None
    if logprobs is not None:
        fields: dict[str, Any] = {"logprob": -1.0, "bytes": [], "top_logprobs": []}
        scored = {"content": [{"token": token, **fields} for token in logprobs]}
    return {"index": 0, "delta": delta, "logprobs": scored, "finish_reason": end}


def head(index: int, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"index": index, "id": f"call_{index}", "type": "function", "function": function}


def more(index: int, arguments: str) -> dict[str, Any]:
    return {"index": index, "function": {"arguments": arguments}}


def streamed(*steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events after the first two of what a chat's chunks become."""
    writer = ResponseWriter(translated(asked()), Chunks(list(steps), {}))
    delta = ChoiceDelta(0, "")
    written = b"".join(writer.events(RUN, [(0, delta)]) for _ in steps) + writer.end(RUN, [])
    return events(written.decode())[2:]


def whole(message: dict[str, Any], end: str) -> dict[str, Any]:
    written = {"message": message, "logprobs": None, "finish_reason": end}
    writer = ResponseWriter(translated(asked()), Chunks([], written))
    return writer.body(RUN, [Choice(0)], [])


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


CALL_EVENTS = ["output_item.added", "function_call_arguments.delta"]
CALL_ENDS = ["function_call_arguments.done", "output_item.done"]


@pytest.mark.parametrize("end", ["tool_calls", "length"])
def test_text_and_two_calls(end: str) -> None:
    found = streamed(
        [chunk(role="assistant", content=""), chunk(content="Wait")],
        [chunk(tool_calls=[head(0, "f")])],
        [chunk(tool_calls=[more(0, '{"a":')]), chunk(tool_calls=[more(0, "1}")])],
        [chunk(tool_calls=[head(1, "g"), more(1, "{")]), chunk(end=end)],
    )
    assert kinds(found) == [
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *CALL_EVENTS,
        CALL_EVENTS[1],
        *CALL_ENDS,
        *CALL_EVENTS,
        *CALL_ENDS,
        "incomplete" if end == "length" else "completed",
    ]
    response = found[-1]["response"]
    last = "incomplete" if end == "length" else "completed"
    text, first, second = response["output"]
    assert (text["content"][0]["text"], text["status"]) == ("Wait", "completed")
    assert first == {
        "id": "fc_1_1",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_0",
        "name": "f",
        "arguments": '{"a":1}',
    }
    assert (second["name"], second["arguments"], second["status"]) == ("g", "{", last)
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == response["output"]
    calls = [
        head(0, "f") | {"function": {"name": "f", "arguments": '{"a":1}'}},
        head(1, "g") | {"function": {"name": "g", "arguments": "{"}},
    ]
    answer = whole({"content": "Wait", "tool_calls": calls}, end)
    assert (answer["output"], answer["status"]) == (response["output"], response["status"])


def test_a_call_alone_is_the_only_item() -> None:
    found = streamed(
        [chunk(role="assistant", content=None), chunk([" "])],
        [chunk(["x"], tool_calls=[head(0, "f"), more(0, "{}")])],
        [chunk(["y"], end="tool_calls")],
    )
    assert kinds(found) == [*CALL_EVENTS, *CALL_ENDS, "completed"]
    call = head(0, "f") | {"function": {"name": "f", "arguments": "{}"}}
    answer = whole({"content": None, "tool_calls": [call]}, "tool_calls")
    assert answer["output"] == found[-1]["response"]["output"]


def test_an_answer_without_text_has_an_empty_message() -> None:
    found = streamed([chunk(role="assistant", content=""), chunk(end="stop")])
    assert "output_text.delta" not in kinds(found)
    (item,) = found[-1]["response"]["output"]
    assert item["content"][0]["text"] == ""
    assert whole({"content": ""}, "stop")["output"] == [item]


def test_log_probabilities_of_tokens_without_text_come_with_the_next() -> None:
    found = streamed(
        [chunk(role="assistant", content=""), chunk(["a"])],
        [chunk(["b"], content="\u65e5")],
        [chunk(["c"], end="stop")],
    )
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [
        ["a", "b"],
        ["c"],
    ]
    part = found[-1]["response"]["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b", "c"]
