"""Fields that hold an answer to a form: OpenAI's `response_format`, vLLM's names for the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from reft_runtime.errors import InvalidRequest
from reft_runtime.sampling import Grammar
from server.schemas.base import OnlyFalse, RequestBody

MAX_CHOICES = 10_000
MAX_TEXT = 2**18
OLDER = "vLLM's older name of `structured_outputs."

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


def _schema_or_text(value: Any) -> str | None:
    if isinstance(value, dict):
        return "schema"
    return "text" if isinstance(value, str) else None


Schema = Annotated[
    Annotated[dict[str, Any], Tag("schema")] | Annotated[Text, Tag("text")],
    Discriminator(
        _schema_or_text,
        custom_error_type="schema_type",
        custom_error_message="Give a JSON Schema, as an object or as its JSON text",
    ),
]


class TextFormat(RequestBody):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    """Any JSON object, or, if a schema is given, JSON of it."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="A JSON Schema, as llama.cpp's server takes it."
    )
    value: dict[str, Any] | None = Field(
        default=None, description="The same, as huggingface_hub's client sends it."
    )

    @model_validator(mode="after")
    def _check_one(self) -> JsonObjectFormat:
        if self.schema_ is not None and self.value is not None:
            raise ValueError("give the schema once; value is another name of it")
        return self


class NamedSchema(RequestBody):
    """A JSON Schema; answers always keep to it, whatever `strict` says."""

    name: str = Field(max_length=256, description="Any name; the model does not see it.")
    description: str = Field(default="", description="The model does not see it.")
    schema_: dict[str, Any] = Field(default={}, alias="schema", description="The JSON Schema.")
    strict: bool = Field(default=True, description="Changes nothing.")


class JsonSchemaFormat(RequestBody):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema = Field(description="The schema, and its name.")


def _format_type(value: Any) -> str | None:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return name if isinstance(name, str) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[JsonObjectFormat, Tag("json_object")]
    | Annotated[JsonSchemaFormat, Tag("json_schema")],
    Discriminator(
        _format_type,
        custom_error_type="format_type",
        custom_error_message='Give {"type": "text"}, {"type": "json_object"}, or {"type": '
        '"json_schema", "json_schema": {"name": ..., "schema": ...}}',
    ),
]


class StructuredOutputs(RequestBody):
    """vLLM's fields; exactly one of the first five is given.

    JSON is always written on one line, and every grammar is compiled by the same library.
    """

    json_: Schema | None = Field(
        default=None, alias="json", description="JSON of this schema, an object or its text."
    )
    regex: Text | None = Field(default=None, description="A text that this expression matches.")
    choice: Texts | None = Field(default=None, description="One of these texts.")
    grammar: Text | None = Field(default=None, description="A grammar in Lark's notation.")
    json_object: bool = Field(default=False, description="Any JSON object.")
    disable_fallback: bool = Field(default=False, description="Changes nothing.")
    disable_any_whitespace: bool = Field(default=False, description="Changes nothing.")
    disable_additional_properties: OnlyFalse = Field(default=False, description="Only false.")

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if len(list(self.grammars())) != 1:
            raise InvalidRequest(
                "structured_outputs: give one of json, regex, choice, grammar and json_object.",
                param="structured_outputs",
            )
        return self

    def grammars(self) -> Iterator[Grammar]:
        """What is given."""
        before = "structured_outputs."
        yield from _given(before, self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            yield Grammar("json_object", param=f"{before}json_object")


class FormFields(RequestBody):
    """Fields of a body, at most one of which holds the answer to a form."""

    response_format: ResponseFormat = Field(
        default=TextFormat(type="text"), description="Hold the answer to JSON, or to a JSON Schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="Hold the answer to a form, in vLLM's words."
    )
    guided_json: Schema | None = Field(default=None, description=f"{OLDER}json`.")
    guided_regex: Text | None = Field(default=None, description=f"{OLDER}regex`.")
    guided_choice: Texts | None = Field(default=None, description=f"{OLDER}choice`.")
    guided_grammar: Text | None = Field(default=None, description=f"{OLDER}grammar`.")
    guided_decoding_backend: str = Field(default="", max_length=64, description="Changes nothing.")

    @cached_property
    def forms(self) -> list[Grammar]:
        """The forms that answers must have: one, or none if they are free."""
        return list(self._forms())

    @property
    def grammar(self) -> Grammar | None:
        """The form that answers must have; None if they are free."""
        return self.forms[0] if self.forms else None

    @model_validator(mode="after")
    def _check_forms(self) -> FormFields:
        # A large body is validated in a worker thread, where the grammar is written, too.
        for other in self.forms[1:]:
            raise InvalidRequest(
                f"{other.param}: the answer's form is given already; give one of response_format, "
                "structured_outputs and the guided_ fields.",
                param=other.param,
            )
        return self

    def _forms(self) -> Iterator[Grammar]:
        match self.response_format:
            case JsonObjectFormat(schema_=dict(schema)):
                yield _of_schema(schema, "response_format.schema")
            case JsonObjectFormat(value=dict(schema)):
                yield _of_schema(schema, "response_format.value")
            case JsonObjectFormat():
                yield Grammar("json_object", param="response_format")
            case JsonSchemaFormat(json_schema=named):
                yield _of_schema(named.schema_, "response_format.json_schema.schema")
        if self.structured_outputs is not None:
            yield from self.structured_outputs.grammars()
        yield from _given(
            "guided_",
            self.guided_json,
            self.guided_regex,
            self.guided_choice,
            self.guided_grammar,
        )


def _given(
    before: str,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    lark: str | None,
) -> Iterator[Grammar]:
    """The grammars of vLLM's fields that are given; `before` begins the names of the fields."""
    if schema is not None:
        yield _of_schema(schema, f"{before}json")
    if regex is not None:
        yield Grammar("regex", regex, f"{before}regex")
    if choice is not None:
        yield Grammar("choice", json.dumps(choice), f"{before}choice")
    if lark is not None:
        yield Grammar("lark", lark, f"{before}grammar")


def _of_schema(schema: dict[str, Any] | str, param: str) -> Grammar:
    return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema), param)
