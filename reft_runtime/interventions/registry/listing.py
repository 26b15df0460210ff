"""What is told of names and versions: the listing, whole or in pages, and a search in it."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.registry.catalog import Catalog, Name
from reft_runtime.interventions.registry.entry import Entry, Page, Tier, VersionEntry
from reft_runtime.interventions.registry.paging import (
    DEFAULT_PAGE,
    MAX_PAGE,
    SORTS,
    Place,
    Sort,
    cursor,
    place_of,
)
from reft_runtime.interventions.registry.version import Version

PART, PART_BYTES = 128, 1 << 18
"""Names of one part of the listing, and what their manifests may take."""

PAGE_BYTES = 4 << 20
"""What the manifests of one page may take; then it has fewer entries than it may."""

LOOKED_AT = 500
"""Names that a search or a count looks at without a pause."""

REST_SECONDS = 0.001
"""The pause: the engine's thread needs the interpreter, and others the lock."""

_VALUES: dict[str, Callable[[Version, Name], float]] = {
    "name": lambda version, known: 0.0,
    "size": lambda version, known: version.size_bytes,
    "parameters": lambda version, known: version.summary.parameters,
    "modified": lambda version, known: version.modified,
    "requests": lambda version, known: known.requests,
    "in_flight": lambda version, known: known.in_flight(),
    "last_used": lambda version, known: known.last_used or 0.0,
}


class Listing(Catalog):
    """A catalog that tells what it has."""

    def entries(self) -> list[Entry]:
        """The listing, sorted by name."""
        return list(chain.from_iterable(self.pages()))

    def pages(self) -> Iterator[list[Entry]]:
        """The listing in parts that are short work each, so that nobody else waits for the lock."""
        with self._lock:
            names = list(self._names)
        names.sort()
        rest = iter(names)
        while page := list(islice(rest, PART)):
            with self._lock:
                found = [(name, self._names.get(name)) for name in page]
                entries = [_entry(name, known) for name, known in found if known and known.layers]
            part: list[Entry] = []
            size = 0
            for entry in entries:  # manifests are small as a rule, and may be large
                part.append(entry)
                size += len(entry.manifest_json)
                if size > PART_BYTES:
                    yield part
                    part, size = [], 0
            yield part

    def page(
        self,
        q: str = "",
        sort: Sort = "name",
        after: str | None = None,
        limit: int = DEFAULT_PAGE,
    ) -> Page:
        """The first `limit` entries in an order, or those behind where another page ended.

        `q` is looked for in names and descriptions, in any case; `after` is the `next` of the page
        before. Rests now and then: not for an event loop. Raises `InvalidRequest`.
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
        for part in self._shown(_VALUES[sort.lstrip("-")]):
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
        entries: list[Entry] = []
        size = 0
        for number, (_, name) in enumerate(chosen):
            if number % PART == PART - 1:
                time.sleep(REST_SECONDS)
            with self._lock:
                known = self._names.get(name)
                entry = _entry(name, known) if known is not None and known.layers else None
            if entry is not None:
                entries.append(entry)
                size += len(entry.manifest_json)
            if size > PAGE_BYTES:
                chosen = chosen[: number + 1]
                break
        more = len(chosen) < len(first)
        return Page(tuple(entries), total, cursor(chosen[-1], sort) if more else None)

    def entry(self, name: str) -> Entry:
        """One name's line of the listing; raises `NotFound`."""
        with self._lock:
            known = self._names.get(name)
            if known is not None and known.layers:
                return _entry(name, known)
        raise self._unknown(name)

    def versions_of(self, name: str) -> list[VersionEntry]:
        """All versions of a name that can be addressed, the current one first.

        Uploads come in the order in which they were served last. Raises `NotFound`.
        """
        with self._lock:
            known = self._names.get(name)
            if known is not None and known.layers:
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
        raise self._unknown(name)

    def tiers(self) -> dict[Tier, int]:
        """How many names' current versions are still on disk, and how many in memory."""
        tiers: dict[Tier, int] = {"disk": 0, "host": 0}
        for part in self._shown(_VALUES["name"]):
            for _, version, _ in part:
                tiers["host" if version.loaded else "disk"] += 1
        return tiers

    def held_bytes(self) -> int:
        """Memory that interventions take now, in bytes."""
        with self._lock:
            return self._memory.used

    def _shown(
        self, value: Callable[[Version, Name], float]
    ) -> Iterator[list[tuple[str, Version, float]]]:
        """All names, what they stand for and a value, in parts with pauses in between."""
        with self._lock:
            names = list(self._names)
        for start in range(0, len(names), LOOKED_AT):
            if start:
                time.sleep(REST_SECONDS)
            part: list[tuple[str, Version, float]] = []
            with self._lock:
                for name in names[start : start + LOOKED_AT]:
                    known = self._names.get(name)
                    current = None if known is None else known.current()
                    if known is not None and current is not None:
                        part.append((name, current, value(current, known)))
            yield part


def _entry(name: str, known: Name) -> Entry:
    current = known.shown()[0]
    return Entry(
        name=name,
        digest=current.digest,
        versions=tuple(known.versions()),
        origin=current.origin,
        tier="host" if current.loaded else "disk",
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
