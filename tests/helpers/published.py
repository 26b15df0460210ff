"""Answers held to what `openapi.json` says: status, headers, type of content, and every field."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import jsonschema
from jsonschema.validators import Draft202012Validator

from server.app import create_app
from server.openapi import describe
from server.settings import Settings
from tests.http.fake_engine import FakeEngine

MOST_BYTES = 200_000
"""Larger bodies are not looked into: it would take too long."""

_UNTOLD = {"content-type", "content-length", "cache-control", "content-disposition", "vary"}
"""Headers that nobody needs to be told of."""


class Published:
    """The description of an API, in which fields that are not described are refused."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = copy.deepcopy(document)
        self.schemas: dict[str, Any] = self.document["components"]["schemas"]
        for schema in self.schemas.values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
        self._paths = [
            (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), operations)
            for path, operations in document["paths"].items()
        ]
        self._validators: dict[str, Any] = {}

    def check(self, answer: httpx.Response) -> None:
        """Hold one whole answer to the description; one of a path that has none passes."""
        for path, operations in self._paths:
            operation = operations.get(answer.request.method.lower())
            if operation and path.fullmatch(answer.request.url.path):
                told = operation["responses"].get(str(answer.status_code))
                assert told is not None, f"{answer.status_code} of {answer.request.url.path}"
                self._check(answer, told)

    def _check(self, answer: httpx.Response, told: dict[str, Any]) -> None:
        own = {name for name in answer.headers if not name.startswith("access-control-")}
        untold = own - told["headers"].keys() - _UNTOLD
        assert not untold, f"{untold} of {answer.request.url.path}"
        content = told.get("content", {})
        if not content:
            assert not answer.content
            return
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in content, f"{kind} of {answer.request.url.path}"
        if len(answer.content) > MOST_BYTES or kind not in ("application/json", STREAM):
            return
        for value in [answer.json()] if kind != STREAM else events(answer.text):
            self.check_value(content[kind]["schema"], value)

    def check_value(self, schema: dict[str, Any], value: Any) -> None:
        """Raise `jsonschema.ValidationError`, which says what fits worst, for what does not fit."""
        error = jsonschema.exceptions.best_match(self._validator(schema).iter_errors(value))
        if error is not None:
            raise error

    def fields(self, schema: dict[str, Any], value: Any) -> Iterator[str]:
        """Described fields that a value has, as `SCHEMA.FIELD`."""
        for one in schema.get("oneOf", schema.get("anyOf", [schema])):
            if one is not schema and self._validator(one).is_valid(value):
                yield from self.fields(one, value)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            for field, inner in self.schemas[name].get("properties", {}).items():
                if field in value:
                    yield f"{name}.{field}"
                    yield from self.fields(inner, value[field])
        elif isinstance(value, list):
            for one in value:
                yield from self.fields(schema.get("items", {}), one)
        elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
            for one in value.values():
                yield from self.fields(schema["additionalProperties"], one)

    def _validator(self, schema: dict[str, Any]) -> Any:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": {"schemas": self.schemas}}
            self._validators[key] = Draft202012Validator(whole)
        return self._validators[key]


STREAM = "text/event-stream"


def events(text: str) -> Iterator[Any]:
    """Data of the whole events of a stream, but for `[DONE]`."""
    for event in text.split("\n\n")[:-1]:
        data = event[event.index("data: ") + 6 :]
        if data != "[DONE]":
            yield json.loads(data)


@cache
def published() -> Published:
    """What the server publishes."""
    return Published(describe(create_app(FakeEngine(), Settings())))


async def check_published(answer: httpx.Response) -> None:
    """A hook of httpx's: every answer is as `openapi.json` says."""
    await answer.aread()
    published().check(answer)
