"""A request to /v1/responses as the chat that it asks for, and errors in its own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic_core import PydanticSerializationError, to_json

from reft_runtime.errors import InvalidRequest
from server.body import validated
from server.schemas.chat import ChatRequest
from server.schemas.common import Sampled
from server.schemas.responses import (
    LOGPROBS,
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    Text,
)

_NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What a field of a chat is called in a request to /v1/responses, also inside messages."""

_PATHS = _NAMES | {
    "response_format.json_schema": "text.format",
    "logprobs": "top_logprobs",
    "verbosity": "text.verbosity",
    "messages": "input",
    "tool_choice.function": "tool_choice",
}
"""The same for the path of the field that an error names, or for its beginning."""

_NAMED = re.compile(rf"\b({'|'.join(_NAMES)})\b")


@dataclass(frozen=True, slots=True)
class Translation:
    """A chat that stands for a request to /v1/responses.

    `said` are the fields of the answer that repeat the request; large ones are JSON already.
    """

    chat: ChatRequest
    said: dict[str, Any]
    _paths: dict[str, str]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the `InvalidRequest`s of the block with the request's own names of fields."""
        with _named(self._paths):
            yield


def translated(data: Any) -> Translation:
    """Translate the value of a body; raises `InvalidRequest`, which names the field at fault."""
    body = validated(ResponsesRequest, data)
    messages = _Messages()
    if body.instructions is not None:
        messages.add({"role": "system", "content": body.instructions}, "instructions")
        messages.paths["messages.0.content"] = "instructions"
    if isinstance(body.input, str):
        messages.add({"role": "user", "content": body.input}, "input")
        messages.paths[f"messages.{len(messages.made) - 1}.content"] = "input"
    else:
        for position, item in enumerate(body.input):
            messages.add_item(item, f"input.{position}")
    paths = (
        _PATHS
        | messages.paths
        | {f"tools.{position}.function": f"tools.{position}" for position in range(len(body.tools))}
    )
    sampled = body.model_dump(include=set(Sampled.model_fields), exclude_unset=True)
    asked = sampled | {
        "messages": messages.made,
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": LOGPROBS in body.include or body.top_logprobs > 0,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body.text.format),
        "verbosity": body.text.verbosity,
        "reasoning_effort": body.reasoning.effort,
        "chat_template_kwargs": body.chat_template_kwargs,
        "tools": [_nested(tool) for tool in body.tools],
        "tool_choice": _nested(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    with _named(paths):
        chat = validated(ChatRequest, asked)
    return Translation(chat, _said(body), paths)


@dataclass(slots=True)
class _Messages:
    """Messages of a chat, and the paths of what they were made of."""

    made: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    thought: str = ""
    """What was thought before the next turn, if that is an assistant's."""

    def add(self, message: dict[str, Any], path: str) -> str:
        """Add a message that is made of what lies at `path`; returns its own path."""
        here = f"messages.{len(self.made)}"
        self.made.append(message)
        self.paths[here] = path
        return here

    def add_item(self, item: Any, path: str) -> None:
        """Add an item. An answer's calls, and the text and thought before them, are one turn."""
        if isinstance(item, ReasoningItem):
            self.thought = "".join(part.text for part in item.content or [])
        elif isinstance(item, MessageItem):
            said = {"role": item.role, "content": _joined(item.content)}
            self.add(said | self._thought(item.role), path)
        elif isinstance(item, FunctionCallOutputItem):
            content = _joined(item.output)
            result = {"role": "tool", "tool_call_id": item.call_id, "content": content}
            here = self.add(result, path)
            self.paths[f"{here}.content"] = f"{path}.output"
            self.paths[f"{here}.tool_call_id"] = f"{path}.call_id"
        elif isinstance(item, FunctionCallItem):
            if not self.made or self.made[-1]["role"] != "assistant":
                self.add({"role": "assistant"} | self._thought("assistant"), path)
            calls = self.made[-1].setdefault("tool_calls", [])
            here = f"messages.{len(self.made) - 1}.tool_calls"
            self.paths.setdefault(here, path)
            self.paths[f"{here}.{len(calls)}"] = path
            self.paths[f"{here}.{len(calls)}.function"] = path
            self.paths[f"{here}.{len(calls)}.id"] = f"{path}.call_id"
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})

    def _thought(self, role: str) -> dict[str, str]:
        thought, self.thought = self.thought, ""
        return {"reasoning_content": thought} if thought and role == "assistant" else {}


def _joined(text: Text) -> str:
    return text if isinstance(text, str) else "".join(part.text for part in text)


def _nested(flat: Any) -> Any:
    """A tool, or the choice of one, with its function's fields where a chat has them."""
    if not isinstance(flat, dict) or flat.get("type") != "function":
        return flat
    function = {name: value for name, value in flat.items() if name != "type"}
    return {"type": "function", "function": function}


def _response_format(flat: dict[str, Any]) -> dict[str, Any]:
    if flat.get("type") != "json_schema":
        return flat
    schema = {name: value for name, value in flat.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _said(body: ResponsesRequest) -> dict[str, Any]:
    def written(value: Any) -> orjson.Fragment:
        # A schema may have whole numbers of more than 64 bits, which orjson refuses.
        try:
            return orjson.Fragment(to_json(value, inf_nan_mode="null"))
        except PydanticSerializationError:  # of the free values only a schema may be that deep
            raise InvalidRequest(
                "text.format.schema: it is nested too deeply.", param="text.format.schema"
            ) from None

    return {
        "background": False,
        "instructions": written(body.instructions),
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": written({"format": body.text.format, "verbosity": body.text.verbosity}),
        "tool_choice": written("auto" if body.tool_choice is None else body.tool_choice),
        "tools": written(body.tools),
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": body.truncation,
    }


@contextmanager
def _named(paths: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        param, message = error.param, error.message
        if param is not None:
            path = _renamed(param, paths)
            if message.startswith(param):
                message = path + message.removeprefix(param)
            param = path
        message = _NAMED.sub(lambda name: _NAMES[name[0]], message)
        raise type(error)(message, param=param) from None


def _renamed(param: str, paths: dict[str, str]) -> str:
    """`param` with the longest of its beginnings that has another name in `paths` replaced."""
    steps = param.split(".")
    for length in range(len(steps), 0, -1):
        beginning = ".".join(steps[:length])
        if beginning in paths:
            return ".".join([paths[beginning], *steps[length:]])
    return param
