"""Files of the sources that are loaded by their paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reft_runtime.errors import (
    InvalidFile,
    InvalidRequest,
    NotFound,
)
from reft_runtime.interventions import Registry
from tests.interventions.make import (
    BASE,
    ONE,
    THREE,
    TWO,
    digest,
    names,
    place,
)


def test_load_by_relative_and_absolute_path(folder: Path, tmp_path: Path) -> None:
    (folder / "deep").mkdir()
    place(folder / "deep", "x", ONE)
    other = tmp_path / "other"
    other.mkdir()
    absolute = place(other, "y", TWO)
    registry = Registry(BASE, [folder, other])
    assert registry.load("a", "deep/x.safetensors").after == digest(ONE)
    assert registry.load("b", str(absolute)).after == digest(TWO)
    assert registry.load("c", "y.safetensors").entry.origin == "loaded"
    assert registry.load("d", "deep/../deep/x.safetensors").after == digest(ONE)


def test_a_path_that_no_file_can_have_is_the_callers_mistake(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        Registry(BASE, [folder]).load("a", "\ud800.safetensors")


def test_load_a_taken_name_needs_replace(folder: Path) -> None:
    place(folder, "a", ONE)
    place(folder, "b", TWO)
    registry = Registry(BASE, [folder])
    with pytest.raises(InvalidRequest, match="`a` is loaded already"):
        registry.load("a", "b.safetensors")
    registry.load("a", "b.safetensors", replace=True)
    assert registry.resolve("a").digest == digest(TWO)
    place(folder, "b", THREE)
    registry.scan()
    assert registry.resolve("a").digest == digest(TWO)  # what was loaded stays as it was
    registry.put("a", THREE)
    assert registry.resolve("a").digest == digest(THREE)  # the newest word counts
    registry.load("a", "a.safetensors", replace=True)
    assert [registry.entry("a").origin, registry.resolve("a").digest] == ["loaded", digest(ONE)]
    for origin in ("uploaded", "folder"):
        registry.remove("a")
        assert registry.entry("a").origin == origin


def test_load_stays_inside_the_sources(folder: Path, tmp_path: Path) -> None:
    outside = place(tmp_path, "outside", ONE)
    (tmp_path / "source-2").mkdir()
    sibling = place(tmp_path / "source-2", "x", ONE)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    registry = Registry(BASE, [folder])
    for path in (
        "../outside.safetensors",
        str(outside),
        str(sibling),
        "../source-2/x.safetensors",
        "link.safetensors",
        "up/outside.safetensors",
        "/etc/passwd",
        "../no-such-file",
        "",
        "a\0b",
    ):
        with pytest.raises(InvalidRequest) as caught:
            registry.load("a", path)
        assert caught.value.param == "path"
    assert names(registry) == []


def test_load_what_is_no_file(folder: Path) -> None:
    (folder / "dir").mkdir()
    os.mkfifo(folder / "fifo")
    place(folder, "bad", ONE[:-1])
    registry = Registry(BASE, [folder])
    for path in ("missing.safetensors", "fifo", "x" * 256, "x/" * 3000):
        with pytest.raises(NotFound, match="no such file"):
            registry.load("a", path)
    with pytest.raises(InvalidRequest, match="is a folder"):
        registry.load("a", "dir")
    with pytest.raises(InvalidFile, match="cut off"):
        registry.load("a", "bad.safetensors")
    with pytest.raises(InvalidRequest, match="outside"):
        Registry(BASE).load("a", "x")
