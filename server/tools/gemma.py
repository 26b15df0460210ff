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
    Functions,
    Rules,
    Schema,
    bare_value,
    joined,
    kinds_of,
    listed_values,
    properties_of,
    quoted,
    types_of,
)

QUOTE = '<|"|>'
"""What stands before and behind a text."""

_CALL = re.compile(rf"\s*((call)?:)?(?P<name>{NAME})\s*(?=\{{)")
"""A call's beginning, of which models leave a part out at times."""

_OTHER_QUOTES = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')(?=\s*[,:\]}])""", re.DOTALL)
"""A text in quotes of JSON or Python, as models write some within lists and objects."""

_KEY = re.compile(r"\s*([^:,{}\[\]<]*[^:,{}\[\]<\s])\s*:")
_BARE = re.compile(r"[^,{}\[\]<]+")
_BLANKS = re.compile(r"\s*")

_KNOWN = frozenset(
    {
        *("type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
    }
)
"""Keys of a schema to which a grammar holds."""


class Gemma:
    """The syntax of Gemma 4's calls."""

    def parsed(self, text: str, functions: Functions) -> tuple[str, str] | None:
        """Name, and arguments as JSON, of the call that `text` is; None if it is none."""
        found = _CALL.match(text)
        if found is None:
            return None
        reader = _Values(text, found.end())
        try:
            arguments = reader.value()
        except (ValueError, RecursionError):
            return None
        return (found["name"], arguments) if not text[reader.at :].strip() else None

    def rule(self, name: str, parameters: Schema, rules: Rules) -> str:
        """The right side of a Lark rule of calls of one function."""
        writer = _Writer(parameters, rules)
        closed = parameters if MORE_KEYS & parameters.keys() else _closed(parameters)
        return f"{rules.text(f'call:{name}')} {writer.written(name, closed)}"


class _Values:
    """Reads values from `at` on; what it reads comes as JSON. Raises `ValueError` if it cannot."""

    def __init__(self, text: str, at: int) -> None:
        self._text = text
        self.at = at

    def value(self) -> str:
        """Read a value."""
        if self._takes(QUOTE):
            return self._quoted()
        if self._takes("{"):
            fields: dict[str, str] = {}
            while not self._takes("}"):
                key = self._key()
                fields[key] = self.value()
                self._separator("}")
            return joined(fields)
        if self._takes("["):
            items: list[str] = []
            while not self._takes("]"):
                items.append(self.value())
                self._separator("]")
            return f"[{', '.join(items)}]"
        if _OTHER_QUOTES.match(self._text, self.at):
            return self._otherwise_quoted()
        return bare_value(self._match(_BARE)[0].strip())

    def _key(self) -> str:
        ours = self._takes(QUOTE)
        if ours or _OTHER_QUOTES.match(self._text, self.at):
            key: str = json.loads(self._quoted() if ours else self._otherwise_quoted())
            self._blanks()
            if not self._takes(":"):
                raise ValueError("no value behind a key")
            return key
        return self._match(_KEY)[1]

    def _quoted(self) -> str:
        end = self._text.index(QUOTE, self.at)
        said, self.at = self._text[self.at : end], end + len(QUOTE)
        return quoted(said)

    def _otherwise_quoted(self) -> str:
        said = self._match(_OTHER_QUOTES)[1]
        if said.startswith("'"):
            return quoted(said[1:-1].replace("\\'", "'"))
        try:
            return quoted(json.loads(said, strict=False))
        except ValueError:
            return quoted(said[1:-1])

    def _separator(self, end: str) -> None:
        self._blanks()
        if not self._takes(",") and not self._text.startswith(end, self.at):
            raise ValueError("no separator")

    def _takes(self, text: str) -> bool:
        self._blanks()
        found = self._text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def _blanks(self) -> None:
        self._match(_BLANKS)

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self._text, self.at)
        if found is None:
            raise ValueError("no value")
        self.at = found.end()
        return found


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
        first, rest = "", ""
        if more is not False:
            value = self._value(path, more if isinstance(more, dict) else {})
            first = self._rule(f'{self._other_key(properties)} ":" {value}')
            rest = self._rule(f'("," {first})*')
            first = self._rule(f"{first} {rest}")
        for key in sorted(properties, key=lambda key: (key.lower(), key), reverse=True):
            value = self._value(f"{path}.{key}", properties[key])
            field = self._rule(f"{json.dumps(f'{key}:')} {value}")
            # The first one that is there has no comma before it.
            if key in required:
                first = self._rule(f"{field} {rest}")
                rest = self._rule(f'"," {field} {rest}')
            else:
                first = self._rule(f"{field} {rest}" + (f" | {first}" if first else ""))
                rest = self._rule(f'("," {field})? {rest}')
        must = any(key in required for key in properties)
        return f'"{{" {first}{"" if must or not first else "?"} "}}"'

    def _other_key(self, properties: Mapping[str, Schema]) -> str:
        """The name of a rule of keys that are none of these."""
        self._any("any")
        names = " | ".join(map(json.dumps, properties))
        return self._rule(f"FIELD & ~({names})", "KEY") if names else "FIELD"

    def _rule(self, right: str, kind: str = "part") -> str:
        """The name of a new rule."""
        name = f"{kind}{len(self._rules.more)}"
        self._rules.spend(len(right))
        self._rules.more[name] = right
        return name

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
            name = self._referred[id(schema)] = self._rule("")
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
        one = self._rule(self._value(path, items if isinstance(items, dict) else {}))
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
