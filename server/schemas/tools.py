"""Tools in request bodies: what may be called, what was called, and whether to call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from reft_runtime.errors import InvalidRequest
from server.schemas.base import RequestBody

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_SCHEMA_BYTES = 256 * 2**10
MAX_SCHEMA_VALUES = 16_384
MAX_SCHEMA_DEPTH = 64

NAME = r"[a-zA-Z0-9_-]{1,64}"
"""Regular expression of a function's name, as OpenAI has it."""

FunctionName = Annotated[str, Field(pattern=rf"^{NAME}$")]


class Function(RequestBody):
    """A function that the model may call; `parameters` is a JSON Schema of its arguments."""

    name: FunctionName = Field(description="What the model calls it.")
    description: str = Field(default="", description="What it does, for the model.")
    parameters: dict[str, Any] = Field(
        default={}, description="A JSON Schema of its arguments, which are an object."
    )
    strict: bool = Field(default=False, description="Hold calls to `parameters`, or refuse them.")

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type", "object") != "object":
            raise ValueError('arguments are an object; give a schema of type "object"')
        return schema


class Tool(RequestBody):
    """Something that the model may use: always a function."""

    type: Literal["function"]
    function: Function = Field(description="The function.")

    def as_dict(self) -> dict[str, Any]:
        """The tool as chat templates show it."""
        function = self.function
        said = {"description": function.description} if function.description else {}
        parameters = {"type": "object", "properties": {}} | function.parameters
        return {
            "type": "function",
            "function": {"name": function.name, **said, "parameters": parameters},
        }


class NamedFunction(RequestBody):
    """The name of a function."""

    name: FunctionName = Field(description="One of `tools`.")


class NamedTool(RequestBody):
    """The function that the model has to call."""

    type: Literal["function"]
    function: NamedFunction = Field(description="The function.")


def _word_or_object(value: Any) -> str | None:
    if isinstance(value, str):
        return "word"
    return "object" if isinstance(value, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("object")],
    Discriminator(
        _word_or_object,
        custom_error_type="tool_choice_type",
        custom_error_message='Give "none", "auto", "required", or {"type": "function", '
        '"function": {"name": ...}}',
    ),
]

ToolList = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class ToolFields(RequestBody):
    """What the model may call, and whether it has to."""

    tools: ToolList = Field(default=[], description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`auto` (the default with tools), `none`, `required`, or the function to call.",
    )
    parallel_tool_calls: bool = Field(default=True, description="False allows at most one call.")

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Tool]) -> list[Tool]:
        return checked(tools)

    @model_validator(mode="after")
    def _check_choice(self) -> ToolFields:
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in self.tools]
            if choice.function.name not in names:
                raise InvalidRequest(
                    f"tool_choice: there is no tool {choice.function.name!r}; tools has "
                    f"{', '.join(names[:8]) or 'none'}.",
                    param="tool_choice",
                )
        return self

    @property
    def usable(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


class FunctionCall(RequestBody):
    """A function's name, and its arguments as the text of a JSON object."""

    name: FunctionName = Field(description="The function.")
    arguments: str = Field(default="", description="Its arguments, as JSON text.")
    parsed_arguments: Any = Field(
        default=None, description="What OpenAI's client makes of the arguments; not used."
    )


class ToolCall(RequestBody):
    """A call in an earlier answer. `index` is what streams have; it is taken and not used."""

    id: str = Field(max_length=256, description="What the result's `tool_call_id` names.")
    type: Literal["function"] = Field(default="function", description="Always `function`.")
    function: FunctionCall = Field(description="The call.")
    index: int | None = Field(default=None, description="As streams have it; not used.")

    def as_dict(self) -> dict[str, Any]:
        """The call as chat templates take it: with its arguments as an object, if they are one."""
        said: Any = self.function.arguments
        try:
            parsed = json.loads(said or "{}")
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else said
        return {
            "id": self.id,
            "type": self.type,
            "function": {"name": self.function.name, "arguments": arguments},
        }


def checked(tools: list[Tool]) -> list[Tool]:
    """The tools, after checks of their names and of the size of their schemas, all together."""
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the name {name!r} is there twice")
    schemas = [tool.function.parameters for tool in tools]
    values = depth = 0
    level: list[Any] = schemas
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_SCHEMA_DEPTH + 1 or values > MAX_SCHEMA_VALUES:
            raise ValueError(
                f"their parameters have more than {MAX_SCHEMA_VALUES} values, or are nested deeper "
                f"than {MAX_SCHEMA_DEPTH}"
            )
        level = [inner for value in level for inner in _inside(value)]
    if len(json.dumps(schemas)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"their parameters are more than {MAX_SCHEMA_BYTES} bytes")
    return tools


def _inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
