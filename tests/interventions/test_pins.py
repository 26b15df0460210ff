"""Pins and warming: what stays in memory, over replacements and restarts, and what it may take."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reft_runtime.errors import NotFound, Overloaded, StoreFull, Unavailable
from reft_runtime.interventions import Registry
from tests.interventions.make import (
    BASE,
    damaged,
    digest,
    edit_bytes,
    file_bytes,
    fixed,
    place,
    ready,
)

FILES = {name: file_bytes(seed) for seed, name in enumerate("abcd")}
ONE = edit_bytes(FILES["a"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    for name, data in FILES.items():
        place(tmp_path / "source", name, data)
    return tmp_path / "source"


def in_memory(registry: Registry) -> str:
    return "".join(entry.name for entry in registry.entries() if entry.tier == "host")


def pinned(registry: Registry) -> str:
    return "".join(entry.name for entry in registry.entries() if entry.pinned)


def test_a_pinned_name_stays_and_an_unpinned_one_goes(folder: Path) -> None:
    registry = Registry(BASE, [folder], memory_bytes=2 * ONE)
    entry = registry.pin("a").entry
    assert (entry.pinned, entry.tier) == (True, "host")
    assert registry.pin("a").entry == entry  # again
    for name in "bcd":
        ready(registry, name)
    assert in_memory(registry) == "ad"
    assert not registry.unpin("a").entry.pinned
    registry.unpin("a")
    for name in "bc":
        ready(registry, name)
    assert in_memory(registry) == "bc"
    for change in (registry.pin, registry.unpin, registry.warm):
        with pytest.raises(NotFound, match="`x` does not exist"):
            change("x")
    registry.close()


def test_warming_reads_now(folder: Path) -> None:
    registry = Registry(BASE, [folder], memory_bytes=ONE)
    assert registry.warm("a").tier == "host"
    assert (registry.warm("b").tier, in_memory(registry)) == ("host", "b")
    assert registry.entry("b").requests == 0
    registry.hold(registry.resolve("b"))
    with pytest.raises(Overloaded, match="interventions in use fill the memory"):
        registry.warm("a")
    registry.release(registry.resolve("b"))
    place(folder, "c", damaged(FILES["c"]))
    for change in (registry.warm, registry.pin):
        with pytest.raises(Unavailable, match="damaged file"):
            change("c")
    assert pinned(registry) == ""
    registry.close()


def test_what_is_pinned_fits_into_memory(folder: Path) -> None:
    registry = Registry(BASE, [folder], memory_bytes=2 * ONE)
    registry.hold(registry.resolve("a"))
    registry.hold(registry.resolve("b"))
    with pytest.raises(Overloaded):  # for now
        registry.pin("c")
    registry.pin("a")  # is in use already
    registry.release(registry.resolve("b"))
    registry.pin("c")
    with pytest.raises(StoreFull, match="Pinned interventions take"):
        registry.pin("b")
    assert pinned(registry) == "ac"
    with pytest.raises(Unavailable, match="pinned"):  # whoever leaves, there is no room
        registry.acquire(["b"])
    registry.unpin("c")
    assert ready(registry, "b")
    registry.close()


def test_a_pin_moves_with_its_name(folder: Path, state: Path) -> None:
    registry = Registry(BASE, [folder], state_dir=state, memory_bytes=fixed(2) + 2 * ONE)
    registry.pin("a")
    registry.put("a", FILES["b"])
    registry.put("a", FILES["c"])
    for name in "bcd":
        ready(registry, name)
    assert registry.entry("a").tier == "host"
    registry.pin("b")
    current = registry.resolve("a")
    registry.hold(current)
    with pytest.raises(Overloaded):  # for now
        registry.rollback("a")
    registry.release(current)
    assert registry.rollback("a").entry.pinned  # what was there before leaves
    registry.unpin("b")
    ready(registry, "b")
    ready(registry, "c")
    assert (registry.entry("a").tier, registry.entry("a").digest) == ("host", digest(FILES["b"]))
    registry.remove("a")  # the upload and its pin
    assert (registry.entry("a").origin, registry.entry("a").pinned) == ("folder", False)
    registry.close()


def test_a_replaced_file_of_a_pinned_name_is_read(folder: Path) -> None:
    registry = Registry(BASE, [folder])
    registry.pin("a")
    place(folder, "a", FILES["b"])
    registry.scan()
    assert (registry.entry("a").tier, registry.entry("a").pinned) == ("host", True)
    (folder / "a.safetensors").unlink()
    registry.scan()
    assert registry.held_bytes() == 0
    place(folder, "a", FILES["c"])  # comes back
    registry.scan()
    assert (registry.entry("a").tier, registry.entry("a").pinned) == ("host", True)
    registry.close()


def test_pins_outlive_a_restart(folder: Path, state: Path) -> None:
    registry = Registry(BASE, [folder], state_dir=state)
    registry.put("u", FILES["a"])
    registry.put("v", FILES["b"])
    for name in "auv":
        registry.pin(name)
    registry.unpin("v")
    registry.close()
    registry = Registry(BASE, [folder], state_dir=state)
    assert (pinned(registry), in_memory(registry)) == ("au", "au")
    assert registry.problems() == {}
    registry.unpin("a")
    registry.close()
    assert [path.stem for path in sorted((state / "pointers").iterdir())] == ["u", "v"]
    (folder / "b.safetensors").unlink()
    registry = Registry(BASE, [folder], state_dir=state)
    assert (pinned(registry), in_memory(registry)) == ("u", "u")
    registry.close()


def test_a_pinned_name_that_cannot_be_read_does_not_stop_the_start(
    folder: Path, state: Path
) -> None:
    registry = Registry(BASE, [folder], state_dir=state)
    registry.pin("a")
    registry.pin("b")
    registry.close()
    place(folder, "a", damaged(FILES["a"]))
    (folder / "b.safetensors").unlink()
    registry = Registry(BASE, [folder], state_dir=state)
    assert (pinned(registry), in_memory(registry)) == ("a", "")
    place(folder, "a", FILES["a"])
    registry.scan()
    assert in_memory(registry) == "a"
    registry.close()


def test_a_pin_without_a_place_to_keep_it(folder: Path, state: Path) -> None:
    registry, other = Registry(BASE, [folder], state_dir=state), None
    try:
        shutil.rmtree(state)
        other = Registry(BASE, state_dir=state)
        with pytest.raises(Unavailable, match="another server has it now"):
            registry.pin("a")
        assert pinned(registry) == ""
    finally:
        registry.close()
        if other is not None:
            other.close()


def test_uploads_leave_pinned_tensors_their_room(folder: Path) -> None:
    registry = Registry(BASE, [folder], memory_bytes=fixed(2) + ONE - 1)
    registry.pin("a")
    registry.put("u", FILES["b"])
    with pytest.raises(StoreFull, match="pinned interventions"):
        registry.put("v", FILES["c"])
    assert registry.entry("a").pinned
    registry.unpin("a")
    registry.put("v", FILES["c"])
    registry.close()
