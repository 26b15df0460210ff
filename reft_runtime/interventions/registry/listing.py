"""Lists names and versions, whole or in pages, and searches them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice

from reft_runtime.caller import everything
from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.registry.catalog import Catalog, Name
from reft_runtime.interventions.registry.entry import Entry, Page, Tier, VersionEntry
from reft_runtime.interventions.registry.paging import (
    MAX_PAGE,
    SORTS,
    Place,
    Sort,
    cursor,
    place_of,
)
from reft_runtime.interventions.registry.version import Version

PART, PART_BYTES = 128, 1 << 18
"""Most names of one part of the listing, and the bytes after which a part ends early."""

PAGE_BYTES = 4 << 20
"""Bytes of manifests after which a page ends, even with fewer entries than its limit."""

LOOKED_AT = 500
"""Names that a search or a count looks at before it pauses."""

REST_SECONDS = 0.001
"""Seconds of a pause, in which the engine gets the interpreter and others the lock."""

_VALUES: dict[str, Callable[[Version, Name], float]] = {
    "name": lambda version, known: 0.0,
    "size": lambda version, known: version.size_bytes,
    "parameters": lambda version, known: version.summary.parameters,
    "modified": lambda version, known: version.modified,
    "requests": lambda version, known: known.requests,
    "in_flight": lambda version, known: known.in_flight(),
    "last_used": lambda version, known: known.last_used or 0.0,
}


def pages(catalog: Catalog, sees: Callable[[str], bool]) -> Iterator[list[Entry]]:
    """Yield the listing in parts that are short work, so that nobody waits for the lock."""
    rest = iter(sorted(filter(sees, catalog.names())))
    while names := list(islice(rest, PART)):
        part: list[Entry] = []
        size = 0
        for line in catalog.told(names, _entry):  # most manifests are small, some are large
            part.append(line)
            size += len(line.manifest_json)
            if size > PART_BYTES:
                yield part
                part, size = [], 0
        yield part


def page(
    catalog: Catalog,
    q: str,
    sort: Sort,
    after: str | None,
    limit: int,
    sees: Callable[[str], bool],
) -> Page:
    """The first `limit` entries in an order, or those behind where another page ended.

    The arguments and the errors are those of `Registry.page`.
    """
    if sort not in SORTS:
        raise InvalidRequest(f"sort: give one of {', '.join(SORTS)}.", param="sort")
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit: give 1 to {MAX_PAGE}.", param="limit")
    begin = None if after is None else place_of(after, sort)
    descending = sort.startswith("-")
    best = heapq.nlargest if descending else heapq.nsmallest
    q = q.casefold()
    total = 0
    first: list[Place] = []
    for part in _shown(catalog, _VALUES[sort.lstrip("-")], sees):
        places = [
            (value, name)
            for name, version, value in part
            if not q or q in name or q in version.summary.description.casefold()
        ]
        total += len(places)
        if begin is not None:
            places = [p for p in places if (p < begin if descending else p > begin)]
        first = best(limit + 1, chain(first, places))
    chosen = first[:limit]
    lines: list[Entry] = []
    size = 0
    for number, (_, name) in enumerate(chosen):
        if number % PART == PART - 1:
            time.sleep(REST_SECONDS)
        for line in catalog.told([name], _entry):
            lines.append(line)
            size += len(line.manifest_json)
        if size > PAGE_BYTES:
            chosen = chosen[: number + 1]
            break
    more = len(chosen) < len(first)
    return Page(tuple(lines), total, cursor(chosen[-1], sort) if more else None)


def entry(catalog: Catalog, name: str) -> Entry:
    """One name's line of the listing; raises `UnknownName`."""
    if (line := shown_entry(catalog, name)) is not None:
        return line
    raise catalog.unknown(name)


def shown_entry(catalog: Catalog, name: str) -> Entry | None:
    """One name's line of the listing; None if the name stands for nothing."""
    return next(iter(catalog.told([name], _entry)), None)


def versions_of(catalog: Catalog, name: str) -> list[VersionEntry]:
    """All versions of a name that can be addressed, the current one first; raises `NotFound`."""
    for lines in catalog.told([name], _versions):
        return lines
    raise catalog.unknown(name)


def tiers(catalog: Catalog) -> dict[Tier, int]:
    """How many names' current versions have their tensors on disk, and how many in memory."""
    tiers: dict[Tier, int] = {"disk": 0, "host": 0}
    for part in _shown(catalog, _VALUES["name"], everything):
        for _, version, _ in part:
            tiers["host" if version.loaded else "disk"] += 1
    return tiers


def _shown(
    catalog: Catalog, value: Callable[[Version, Name], float], sees: Callable[[str], bool]
) -> Iterator[list[tuple[str, Version, float]]]:
    """Yield (name, current version, value) of what `sees` lets through, in parts with pauses."""

    def tell(name: str, known: Name) -> tuple[str, Version, float]:
        current = known.shown()[0]
        return name, current, value(current, known)

    names = catalog.names()
    for start in range(0, len(names), LOOKED_AT):
        if start:
            time.sleep(REST_SECONDS)
        yield catalog.told([*filter(sees, names[start : start + LOOKED_AT])], tell)


def _entry(name: str, known: Name) -> Entry:
    current = known.shown()[0]
    return Entry(
        name=name,
        digest=current.digest,
        versions=tuple(known.versions()),
        origin=current.origin,
        tier="host" if current.loaded else "disk",
        pinned=known.pinned,
        in_flight=known.in_flight(),
        requests=known.requests,
        prompt_tokens=known.prompt_tokens,
        generation_tokens=known.generation_tokens,
        last_used=known.last_used,
        size_bytes=current.size_bytes,
        modified=current.modified,
        problem=current.problem or (known.problem if current.origin == "folder" else None),
        hides=tuple(version.origin for version in known.shown()[1:]),
        summary=current.summary,
        manifest_json=current.manifest_json,
    )


def _versions(name: str, known: Name) -> list[VersionEntry]:
    current = known.current()
    kept = {version.digest for version in known.history}
    return [
        VersionEntry(
            digest=digest,
            origin=version.origin,
            size_bytes=version.size_bytes,
            modified=version.modified,
            in_flight=version.in_flight,
            current=version is current,
            kept=digest in kept,
        )
        for digest, version in known.versions().items()
    ]
