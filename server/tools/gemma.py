"""Calls as Gemma 4 writes them: a name, and arguments that are like JSON with quotes of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from reft_runtime.errors import InvalidRequest
from server.schemas.tools import NAME
from server.tools.syntax import (
    MORE_KEYS,
    SAID,
    Call,
    Functions,
    Rules,
    Schema,
    kinds_of,
    listed_values,
    properties_of,
    types_of,
)
from server.tools.values import Values

QUOTE = '<|"|>'
"""What stands before and behind a text."""

_CALL = re.compile(rf"\s*((call)?:)?(?P<name>{NAME})\s*(?=\{{)")
"""A call's beginning, of which models leave a part out at times."""

_COMMA = '","'

_KNOWN = frozenset(
    {
        *("type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
    }
)
"""Keys of a schema to which a grammar holds."""


class Gemma:
    """The syntax of Gemma 4's calls."""

    closes = True

    def parsed(self, text: str, functions: Functions, *, exact: bool) -> list[Call]:
        """The calls that `text` is; none if it is anything else."""
        found = _CALL.match(text)
        if found is None:
            return []
        reader = Values(text, found.end(), mark=QUOTE)
        try:
            arguments = reader.value()
        except (ValueError, RecursionError):
            return []
        return [(found["name"], arguments)] if not text[reader.at :].strip() else []

    def rule(self, name: str, parameters: Schema, rules: Rules) -> str:
        """The right side of a Lark rule of calls of one function."""
        writer = _Writer(parameters, rules)
        closed = parameters if MORE_KEYS & parameters.keys() else _closed(parameters)
        return f"{rules.text(f'call:{name}')} {writer.written(name, closed)}"


class _Writer:
    """Writes what a schema allows in Lark's notation; `root` has what it may refer to."""

    def __init__(self, root: Schema, rules: Rules) -> None:
        self._root = root
        self._rules = rules
        self._quote = rules.text(QUOTE)
        self._referred: dict[int, str] = {}
        """Names of the rules of schemas that stand elsewhere, by their identity."""
        self._waiting: list[tuple[str, str, Schema]] = []
        """Those of them that are to be written: names of their rules, and paths."""

    def written(self, name: str, schema: Schema) -> str:
        """The arguments of a function; the rules that they need are added."""
        fields = self.fields(name, schema)
        for rule, path, one in self._waiting:  # more are added meanwhile
            right = self._own(path, one)
            self._rules.spend(len(right))
            self._rules.more[rule] = right
        return fields

    def fields(self, path: str, schema: Schema) -> str:
        """An object; its keys stand in the order of letters, as the chat template writes them."""
        properties = properties_of(schema)
        more = schema.get("additionalProperties", not properties)
        if not properties and more in (True, {}):
            return self._any("fields")
        said = schema.get("required")
        required = said if isinstance(said, list) else []
        other = ""
        if more is not False:
            value = self._value(path, more if isinstance(more, dict) else {})
            other = self._rules.rule(f'{self._other_key(properties)} ":" {value}')
        keys = sorted(properties, key=lambda key: (key.lower(), key))
        parts = [
            (
                self._rules.rule(
                    f"{json.dumps(f'{key}:')} {self._value(f'{path}.{key}', properties[key])}"
                ),
                key in required,
            )
            for key in keys
        ]
        return f'"{{" {self._rules.listed(parts, other, _COMMA)} "}}"'

    def _other_key(self, properties: Mapping[str, Schema]) -> str:
        """The name of a rule of keys that are none of these."""
        self._any("any")
        return self._rules.other_key("FIELD", properties) if properties else "FIELD"

    def _value(self, path: str, schema: Schema) -> str:
        kinds = kinds_of(schema, self._root)
        values = listed_values(kinds)
        if values is not None and not any(isinstance(one, list | dict) for one in values):
            return f"({' | '.join(map(self._literal, values))})"
        self._rules.spend(len(kinds))
        if len(kinds) == 1 and kinds[0] is schema:
            return self._own(path, schema)
        written = [self._reference(path, one) for one in kinds]
        return f"({' | '.join(written)})" if written else self._any("any")

    def _reference(self, path: str, schema: Schema) -> str:
        """The name of a rule for a schema, which may lead to itself."""
        if id(schema) not in self._referred:
            name = self._referred[id(schema)] = self._rules.rule("")
            self._waiting.append((name, path, schema))  # which also keeps it
        return self._referred[id(schema)]

    def _own(self, path: str, schema: Schema) -> str:
        """What a schema allows, of which nothing stands elsewhere."""
        unknown = min(schema.keys() - _KNOWN - SAID, default=None)
        if self._rules.strict and unknown is not None:
            raise InvalidRequest(
                f"tools: {path}: {unknown!r} cannot be forced in the syntax of this model's calls; "
                "leave it out, or strict.",
                param="tools",
            )
        written = [self._of_type(kind, path, schema) for kind in sorted(types_of([schema]))]
        return f"({' | '.join(written)})" if written else self._any("any")

    def _of_type(self, kind: str, path: str, schema: Schema) -> str:
        match kind:
            case "object":
                return self.fields(path, schema)
            case "array":
                return self._array(path, schema)
            case "string":
                return self._any("text")
            case "integer" | "number" | "boolean" | "null":
                return self._any(kind)
        return self._any("any")

    def _array(self, path: str, schema: Schema) -> str:
        items = schema.get("items")
        one = self._rules.rule(self._value(path, items if isinstance(items, dict) else {}))
        least, most = _count(schema.get("minItems")) or 0, _count(schema.get("maxItems"))
        if most == 0:
            return '"[" "]"'
        more = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        listed = f'{one} ("," {one}){{{more}}}'
        return f'"[" {listed} "]"' if least else f'"[" ({listed})? "]"'

    def _literal(self, value: object) -> str:
        if isinstance(value, str):
            return f"({self._quote} {json.dumps(value)} {self._quote})"
        return json.dumps(json.dumps(value))

    def _any(self, kind: str) -> str:
        """The name of a rule of all values of a kind."""
        letters = r'<\|"\|>'
        rules = {
            "text": f"{self._quote} quoted",
            "quoted[lazy]": f"/(?s:.*){letters}/",
            "integer": "/-?(0|[1-9][0-9]*)/",
            "number": r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
            "boolean": '"true" | "false"',
            "null": '"null"',
            "any": "text | number | boolean | null | list | fields",
            "list": '"[" (any ("," any)*)? "]"',
            "fields": '"{" (field ("," field)*)? "}"',
            "field": 'FIELD ":" any',
            "FIELD": r"/[^:,{}\[\]\s<]+/",
        }
        if self._rules.token_id(QUOTE) is not None:
            del rules["quoted[lazy]"]
            rules |= {
                "quoted": f"TEXT_IN_QUOTES? {self._quote}",
                "TEXT_IN_QUOTES": f"/(?s:.+)/ & ~/(?s:.*){letters}(?s:.*)/",
            }
        self._rules.more.update(rules)
        return kind


def _closed(parameters: Schema) -> Schema:
    """The schema with no other properties than those it lists, unless it says so itself."""
    return {"additionalProperties": False, **parameters}


def _count(said: object) -> int | None:
    return said if isinstance(said, int) and said >= 0 else None
