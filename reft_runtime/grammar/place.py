"""Finds the place in a JSON Schema that cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

MOST_TRIED = 64
"""Parts of a schema that are tried; each takes about a millisecond."""

_SHARED = ("$defs", "definitions")


def place_of(schema: Any, fails: Callable[[Any], bool]) -> str:
    """Path, such as `.properties.age`, of the smallest part of `schema` that `fails` by itself.

    Parts are tried with the definitions of the whole. Empty where no part fails alone, or where it
    lies too deep.
    """
    shared = {name: schema[name] for name in _SHARED if isinstance(schema, dict) and name in schema}
    place, tried = "", 0
    found = True
    while found:
        found = False
        for path, part in _parts(schema):
            tried += 1
            if tried > MOST_TRIED:
                return place
            if fails(shared | part):
                place, schema, found = place + path, part, True
                break
    return place


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    for name in ("properties", "patternProperties", *_SHARED):
        parts = schema.get(name)
        if isinstance(parts, dict):
            yield from ((f".{name}.{key}", p) for key, p in parts.items() if isinstance(p, dict))
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield f".{name}", schema[name]
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        parts = schema.get(name)
        if isinstance(parts, list):
            yield from ((f".{name}.{i}", p) for i, p in enumerate(parts) if isinstance(p, dict))
