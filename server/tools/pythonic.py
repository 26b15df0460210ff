"""Calls as in Python: `name(key="text", other=[1, 2])`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from server.schemas.tools import NAME
from server.tools.syntax import Call, Functions, Rules, Schema, others_of, properties_of
from server.tools.values import Values

_CALL = re.compile(rf"\s*(?P<name>{NAME})\s*\(")
BEGIN = re.compile(rf"\s*(\[\s*({NAME}\s*(\(|\Z)|\Z)|\Z)")
"""How a list of calls begins, as far as it is there."""

_BETWEEN = re.compile(r"\s*[,;]?")

_PLAIN = re.compile(r"[^\s=,:(){}\[\]<>'\"]+")
"""A name of a parameter that needs no quotes."""


class Pythonic:
    """Calls of functions with their arguments by name; values are JSON, or Python's."""

    closes = True

    def parsed(self, text: str, functions: Functions, *, exact: bool) -> list[Call]:
        """The calls that `text` is, in a list or without; none if it is anything else."""
        said = text.strip()
        if said.startswith("[") and said.endswith("]"):
            said = said[1:-1].strip()
        calls: list[Call] = []
        reader = _Values(said)
        try:
            while reader.at < len(said):
                name = reader.match(_CALL)["name"]
                calls.append((name, reader.fields(")", "=")))
                reader.match(_BETWEEN)
        except (ValueError, RecursionError):
            return []
        return calls

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as a model writes it."""
        each = (f"{_key(k)}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
        return f"{name}({', '.join(each)})"

    def rule(self, name: str, parameters: Schema, rules: Rules) -> str:
        """The right side of a Lark rule of calls of one function."""
        properties, required = properties_of(parameters), parameters.get("required")
        parts = []
        for key, schema in properties.items():
            value = rules.json(schema, parameters)
            part = rules.rule(f"{json.dumps(f'{_key(key)}=')} {value}")
            parts.append((part, isinstance(required, list) and key in required))
        others, other = others_of(parameters), ""
        if others is not None:
            key = rules.other_key("/[A-Za-z_][A-Za-z0-9_]*/", properties)
            other = rules.rule(f'{key} "=" {rules.json(others, parameters)}')
        return f'{json.dumps(f"{name}(")} {rules.listed(parts, other, _COMMA)} ")"'


def _key(key: str) -> str:
    """The name of a parameter as it is written."""
    return key if _PLAIN.fullmatch(key) else json.dumps(key)


_COMMA = '", "'


class _Values(Values):
    """Values as Python writes them, where quotes end a text only before what may follow one."""

    QUOTES = re.compile(
        r"""("(?:[^\\]|\\.)*?"|'(?:[^\\]|\\.)*?')(?=\s*[,:=\]})]|\s*\Z)""", re.DOTALL
    )
    BARE = re.compile(r"(?!['\"])[^,{}\[\]()<]+")  # a quote without another is no value
    KEY = re.compile(rf"\s*({_PLAIN.pattern})\s*[=:]")
