"""Finds the place in a JSON Schema that cannot be compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

MOST_TRIED = 64
"""Most parts of a schema that are tried; each takes about a millisecond."""

MOST_SECONDS = 0.5
"""Longest search."""

_SHARED = ("$defs", "definitions")


def place_of(schema: Any, fails: Callable[[Any], bool]) -> str:
    """Path, such as `.properties.age`, of the smallest part of `schema` that `fails` by itself.

    Parts are tried with the definitions of the whole. Empty where no part fails alone, or where it
    lies too deep.
    """
    shared = {name: schema[name] for name in _SHARED if isinstance(schema, dict) and name in schema}
    place, tried, began = "", 0, time.monotonic()
    found = True
    while found:
        found = False
        for path, part in _parts(schema):
            tried += 1
            if tried > MOST_TRIED or time.monotonic() - began > MOST_SECONDS:
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
