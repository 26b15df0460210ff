"""What a syntax of calls, other than JSON, has to do; and how texts in it become values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from reft_runtime.errors import InvalidRequest
from reft_runtime.grammar.source import MAX_BYTES, ONE_LINE
from reft_runtime.interventions.format.strict_json import load_strict
from reft_runtime.reasoning import TokenId

Schema = Mapping[str, Any]
"""JSON Schema of a function's parameters, or of one of them."""

Functions = Mapping[str, Schema]
"""The functions that a request offers, by name, with the schemas of their parameters."""

MORE_KEYS = frozenset({"patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"})
"""Keys of a schema that may allow properties beside those of `properties`."""

_TAG = re.compile(r"(</?[^<>]*>|\[[A-Z_]+\])")

_NAMES = {"True": "true", "False": "false", "None": "null"}
"""What chat templates that write values as Python does make of JSON's names."""

SAID = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$comment", "discriminator"}
)
"""Keys of a schema that ask for nothing."""


Call = tuple[str, str]
"""A call: the function's name, and the arguments as JSON."""


class Syntax(Protocol):
    """How calls stand in a text."""

    @property
    def closes(self) -> bool:
        """Whether a text shows that its last call has ended, without the end of its tag."""

    def parsed(self, text: str, functions: Functions, *, exact: bool) -> list[Call]:
        """The calls that `text` is; none if it is anything else.

        With `exact` a grammar forced it; else what models are known to write amiss is read, too.
        """

    def rule(self, name: str, parameters: Schema, rules: Rules) -> str:
        """The right side of a Lark rule of calls of one function.

        Raises `InvalidRequest` for a strict schema that cannot be forced.
        """


@dataclass(slots=True)
class Rules:
    """What rules of one function's calls need: tokens, and further rules, which they add."""

    token_id: TokenId
    strict: bool
    more: dict[str, str] = field(default_factory=dict)
    """Right sides of Lark rules, by name."""

    end: str = ""
    """The mark that ends the calls, which no text may contain."""

    size: int = 0
    """About how much was written, or looked at, so far."""

    def text(self, text: str) -> str:
        """A text, in Lark's notation; of its tags those that are tokens are written as such."""
        return spelled(text, self.token_id)

    def rule(self, right: str, kind: str = "part") -> str:
        """The name of a new rule."""
        name = f"{kind}{len(self.more)}"
        self.spend(len(right))
        self.more[name] = right
        return name

    def json(self, schema: Schema, root: Schema) -> str:
        """JSON by a part of a schema, which may refer to definitions of the whole, `root`."""
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return json_rule({**definitions, **schema}, strict=self.strict)

    def other_key(self, pattern: str, properties: Mapping[str, Schema]) -> str:
        """The name of a rule of what a pattern, in Lark's notation, fits but for these names."""
        names = " | ".join(map(json.dumps, properties))
        return self.rule(pattern + (f" & ~({names})" if names else ""), "KEY")

    def listed(self, parts: Sequence[tuple[str, bool]], other: str, comma: str) -> str:
        """Parts with `comma` between two, each of which says whether it must be there.

        Any number of `other` may stand behind them, if it is not empty.
        """
        first, rest = "", ""
        if other:
            rest = self.rule(f"({comma} {other})*")
            first = self.rule(f"{other} {rest}")
        for part, must in reversed(parts):
            # The first one that is there has no comma before it.
            if must:
                first = self.rule(f"{part} {rest}")
                rest = self.rule(f"{comma} {part} {rest}")
            else:
                first = self.rule(f"{part} {rest}" + (f" | {first}" if first else ""))
                rest = self.rule(f"({comma} {part})? {rest}")
        optional = first and not any(must for _, must in parts)
        return f"{first}?" if optional else first

    def spend(self, size: int) -> None:
        """Count what a part of a schema takes: where parts refer to others, a short one is long.

        Raises `InvalidRequest` if all together are more than is compiled.
        """
        self.size += size
        if self.size > MAX_BYTES["lark"]:
            raise InvalidRequest(
                f"tools: the parameters of one take more than the {MAX_BYTES['lark']} bytes of a "
                "grammar that are compiled; make them smaller.",
                param="tools",
            )


def spelled(text: str, token_id: TokenId) -> str:
    """A text in Lark's notation: tags that are tokens are written as such, for their letters would
    not fit them."""
    terms = []
    for chunk in filter(None, _TAG.split(text)):
        token = token_id(chunk)
        terms.append(json.dumps(chunk) if token is None else f"<[{token}]>")
    return " ".join(terms) or '""'


def json_rule(schema: Mapping[str, Any], *, strict: bool) -> str:
    """JSON by a schema in Lark's notation, written as any answer that has to be JSON.

    What llguidance does not know of a schema that is not strict is not forced.
    """
    options = {**ONE_LINE, "lenient": not strict}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def properties_of(parameters: Schema) -> dict[str, Schema]:
    """The schemas of a function's parameters by their names; that of any value is empty."""
    found = parameters.get("properties")
    each = found.items() if isinstance(found, Mapping) else ()
    return {key: schema if isinstance(schema, Mapping) else {} for key, schema in each}


def others_of(parameters: Schema) -> Schema | None:
    """The schema of parameters that are not named; None if there may be none."""
    others = parameters.get("additionalProperties", bool(MORE_KEYS & parameters.keys()))
    if others is False:
        return None
    return others if isinstance(others, Mapping) else {}


def kinds_of(schema: Schema, root: Schema) -> list[Schema]:
    """The schemas of which a value must fit one, behind `anyOf`, `oneOf` and references.

    An `allOf` of one schema, in which pydantic 1 wraps references, is that. `root` has the
    definitions that are referred to. Where more is said beside such a key, the schema is returned
    as it is.
    """
    found: list[Schema] = []
    waiting, seen = [schema], set[str]()
    while waiting:
        one = waiting.pop()
        keys = one.keys() - SAID
        reference = one.get("$ref")
        parts = one.get("anyOf", one.get("oneOf"))
        every = one.get("allOf")
        if keys == {"allOf"} and isinstance(every, list) and len(every) == 1:
            parts = every
        if keys == {"$ref"} and isinstance(reference, str):
            referred = _referred(reference, root)
            if reference not in seen:
                waiting.append(referred if isinstance(referred, Mapping) else {})
            seen.add(reference)
        elif len(keys) == 1 and isinstance(parts, list) and parts:
            waiting += [part if isinstance(part, Mapping) else {} for part in reversed(parts)]
        else:
            found.append(one)
    return found


def types_of(kinds: Sequence[Schema]) -> frozenset[str]:
    """The types that one of `kinds_of` allows, as JSON Schema names them; none if not all say."""
    types = [_own_types(one) for one in kinds]
    return frozenset().union(*types) if all(types) else frozenset()


def _own_types(schema: Schema) -> frozenset[str]:
    said = schema.get("type")
    if isinstance(said, str | list):
        return frozenset([said] if isinstance(said, str) else map(str, said))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(map(type_of, values)) if isinstance(values, list) else frozenset()


def listed_values(kinds: Sequence[Schema]) -> list[Any] | None:
    """All values that `kinds_of` allow; None if they are not listed."""
    listed = [_own_values(one) for one in kinds]
    known = [values for values in listed if values]
    return [*chain(*known)] if known and len(known) == len(listed) else None


def _own_values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    if isinstance(values, list):
        return values
    return [None] if schema.get("type") == "null" else None


def _referred(reference: Any, root: Schema) -> Any:
    """What a reference within a schema leads to; None if that is nothing."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for step in reference[2:].split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any) -> str:
    """The type of a value, as JSON Schema names it."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case list():
            return "array"
    return "object"


def value_of(text: str, schema: Schema, root: Schema) -> str:
    """The value, as JSON, that a text without quotes stands for, by the schema of its parameter.

    It is the text itself if that may be text and is no value of another type that it may have, and
    if it is no value at all.
    """
    kinds = kinds_of(schema, root)
    types, (said, value) = types_of(kinds), _read(text)
    if types == {"string"} or isinstance(value, str):
        return quoted(text)
    found, listed = type_of(value), listed_values(kinds) or ()
    if text in listed and not any(type_of(one) == found and one == value for one in listed):
        return quoted(text)
    fits = not types or found in types or (found == "integer" and "number" in types)
    return said if fits or "string" not in types else quoted(text)


def bare_value(text: str) -> str:
    """A text without quotes as JSON: that of the value that it is, or else of the text."""
    said, value = _read(text)
    return quoted(text) if isinstance(value, str) else said


def _read(text: str) -> tuple[str, Any]:
    """The JSON in a text and its value; if it has none, it is its own value."""
    said = _NAMES.get(text.strip(), text.strip())
    try:
        return said, load_strict(said)
    except ValueError:
        return said, text


def quoted(text: str) -> str:
    """A text as JSON."""
    return json.dumps(text, ensure_ascii=False)


def joined(arguments: Mapping[str, str]) -> str:
    """Arguments as JSON, of the JSON of their values."""
    return "{" + ", ".join(f"{quoted(key)}: {value}" for key, value in arguments.items()) + "}"
