"""The listing in pages: orders, searches, places that change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions import Edit, Entry, Intervention, Registry, serialise
from reft_runtime.interventions.registry.paging import SORTS, Sort
from tests.interventions.make import BASE, digest, file_bytes, loreft_tensors


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr("reft_runtime.interventions.registry.listing.LOOKED_AT", 2)  # and pauses
    registry = Registry(BASE)
    for number, name in enumerate(("delta", "alpha", "echo", "bravo", "charlie")):
        registry.put(name, made(name, number))
    for name, times in (("echo", 3), ("alpha", 1), ("delta", 1)):
        for _ in range(times):
            version = registry.resolve(name)
            registry.hold(version)
            registry.release(version)
    yield registry
    registry.close()


@cache
def made(name: str, number: int) -> bytes:
    """A file with 1 to 3 edits, and a description."""
    edits = [Edit(layer, "l1", loreft_tensors(number)) for layer in range(1 + number % 3)]
    description = f"Speaks like {name.upper()} Straße"
    return serialise(Intervention.build(BASE, edits, description=description))


def walk(registry: Registry, sort: Sort, limit: int, q: str = "") -> list[str]:
    """The names of all pages."""
    names: list[str] = []
    after: str | None = None
    while True:
        page = registry.page(q, sort, after, limit)
        assert len(page.entries) <= limit
        names += [entry.name for entry in page.entries]
        if page.next is None:
            return names
        assert len(page.entries) == limit
        after = page.next


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_pages_are_the_whole_listing_in_order(registry: Registry, sort: Sort, limit: int) -> None:
    values: dict[str, Callable[[Entry], float]] = {
        "name": lambda entry: 0,
        "size": lambda entry: entry.size_bytes,
        "parameters": lambda entry: entry.summary.parameters,
        "modified": lambda entry: entry.modified,
        "requests": lambda entry: entry.requests,
        "in_flight": lambda entry: entry.in_flight,
        "last_used": lambda entry: entry.last_used or 0,
    }
    value = values[sort.lstrip("-")]
    entries = sorted(registry.entries(), key=lambda entry: (value(entry), entry.name))
    expected = [entry.name for entry in entries]
    assert walk(registry, sort, limit) == (expected[::-1] if sort.startswith("-") else expected)


def test_what_a_page_says(registry: Registry) -> None:
    page = registry.page(limit=2)
    assert ([entry.name for entry in page.entries], page.total) == (["alpha", "bravo"], 5)
    assert page.next == "bravo"
    assert page.entries[0] == registry.entry("alpha")
    summary = page.entries[0].summary
    assert (summary.kinds, summary.positions, summary.layers) == (("loreft",), ("l1",), (0, 1))
    assert summary.parameters == 2 * (16 * 3 * 2 + 3)
    assert summary.directions == 3
    page = registry.page(sort="-requests", limit=2)
    assert [(entry.name, entry.requests) for entry in page.entries] == [("echo", 3), ("delta", 1)]
    assert registry.page(sort="-requests", after=page.next).entries[0].name == "alpha"


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("", 5),
        ("LPH", 1),
        ("speaks LIKE e", 1),
        ("STRASSE", 5),
        ("a", 5),
        ("nobody", 0),
    ],
)
def test_search_in_names_and_descriptions(registry: Registry, q: str, found: int) -> None:
    page = registry.page(q, limit=1)
    assert page.total == found == len(walk(registry, "name", 2, q))
    assert len(page.entries) == min(found, 1)


def test_a_page_goes_on_where_names_have_gone(registry: Registry) -> None:
    for sort in ("name", "-size"):
        page = registry.page(sort=sort, limit=2)
        before = walk(registry, sort, 100)
        gone = page.entries[-1].name
        registry.remove(gone)
        rest = registry.page(sort=sort, after=page.next)
        assert [entry.name for entry in rest.entries] == before[2:]


def test_large_manifests_make_short_pages(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.interventions.registry.listing.PAGE_BYTES", 1)
    page = registry.page(limit=3)
    assert ([entry.name for entry in page.entries], page.next) == (["alpha"], "alpha")


def test_values_that_are_none(registry: Registry) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"sort": "age"}, "sort"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"sort": "size", "after": "alpha"}, "after"),
        ({"sort": "size", "after": "nan,alpha"}, "after"),
    ]
    for arguments, param in asked:
        with pytest.raises(InvalidRequest) as error:
            registry.page(**arguments)
        assert error.value.param == param


def test_modified_is_the_files_time(tmp_path: Path) -> None:
    registry = Registry(BASE, state_dir=tmp_path / "state")
    registry.put("a", file_bytes(1))
    blob = tmp_path / "state" / "blobs" / f"{digest(file_bytes(1))}.safetensors"
    assert registry.entry("a").modified == blob.stat().st_mtime_ns / 1e9
    registry.close()
    os.utime(blob, (1e9, 1e9))
    registry = Registry(BASE, state_dir=tmp_path / "state")
    assert registry.entry("a").modified == 1e9
    registry.close()
