"""Memory and disk are bounded; what was deleted is given back."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from reft_runtime.errors import (
    InvalidRequest,
    NotFound,
    StoreFull,
    Unavailable,
)
from reft_runtime.interventions import Registry, Version
from tests.interventions.make import (
    BASE,
    FOREIGN,
    ONE,
    THREE,
    TWO,
    digest,
    edit_bytes,
    file_bytes,
    fixed,
    names,
    place,
    ready,
)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_bytes_of_an_upload_are_not_kept(state: Path, on_disk: bool) -> None:
    registry = Registry(BASE, state_dir=state if on_disk else None)
    data = bytes(bytearray(ONE))
    before = sys.getrefcount(data)
    registry.put("a", data)
    assert sys.getrefcount(data) == before
    version, file = registry.open("a")
    with file:
        assert file.read() == data
    assert registry.held_bytes() == version.listed_bytes + version.tensor_bytes
    registry.close()


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_is_replaced_before_it_is_opened_is_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(ONE)
    registry = Registry(BASE, [folder])
    registry.scan()
    resolve = registry.resolve

    def replaced(ref: str) -> Version:
        found = resolve(ref)
        monkeypatch.setattr(registry, "resolve", resolve)
        path.unlink()
        if not gone:
            path.write_bytes(TWO)
        registry.scan()
        return found

    monkeypatch.setattr(registry, "resolve", replaced)
    if gone:
        with pytest.raises(NotFound):
            registry.open("a")
    else:
        version, file = registry.open("a")
        with file:
            assert file.read() == TWO
        assert version is registry.resolve("a")
    registry.close()


def test_an_upload_that_pauses_holds_no_open_file(state: Path) -> None:
    # A process may have 1024, connections included: some hundred uploads would shut out the rest.
    with ExitStack() as stack:
        registry = stack.enter_context(closing(Registry(BASE, state_dir=state)))
        before = len(os.listdir("/proc/self/fd"))
        files = [stack.enter_context(registry.incoming()) for _ in range(3)]
        for file in files:
            file.write(ONE[:100])
        assert len(os.listdir("/proc/self/fd")) == before
        files[1].write(ONE[100:])
        registry.put("a", files[1])
        files[2].path.unlink()
        with pytest.raises(Unavailable, match="No such file"):
            files[2].write(ONE[100:])
        version, stored = registry.open("a")
        with stored:
            assert stored.read() == ONE
        assert registry.resolve("a") is version


def test_uploads_without_a_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_of_temporary_files = tmp_path / "gone"
    monkeypatch.setattr(tempfile, "tempdir", str(place_of_temporary_files))
    registry = Registry(BASE)
    with pytest.raises(Unavailable, match="No such file or directory") as error:
        registry.put("a", ONE)
    assert str(tmp_path) not in error.value.message  # clients need not know it
    place_of_temporary_files.mkdir()
    registry.put("a", ONE)
    registry.close()


def test_uploads_without_a_state_folder_end_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = [tmp_path / "reft-uploads-killed", tmp_path / "reft-uploads-killed-early"]
    for folder in killed:  # by servers that are no more
        folder.mkdir()
    (killed[0] / "lock").touch()
    for folder in killed:
        os.utime(folder, (0, 0))
    registry, other = Registry(BASE), Registry(BASE)
    assert sorted(tmp_path.iterdir()) == killed
    registry.put("a", ONE)
    assert not {*killed} & {*tmp_path.iterdir()}
    other.put("a", TWO)
    assert len(list(tmp_path.iterdir())) == 2
    for each in (registry, other):
        assert len(ready(each, "a").edits()) == 1
        each.close()
    assert not list(tmp_path.iterdir())


def test_a_link_among_temporary_files_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    for folder in (temporary, elsewhere):
        folder.mkdir()
    os.utime(elsewhere, (0, 0))
    (temporary / "reft-uploads-link").symlink_to(elsewhere)  # anybody may have put it there
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    registry = Registry(BASE)
    registry.put("a", ONE)
    registry.close()
    assert not list(elsewhere.iterdir())


def test_a_temporary_folder_that_another_server_is_about_to_lock_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun = tmp_path / "reft-uploads-begun"
    begun.mkdir()
    (begun / "lock").touch()
    registry = Registry(BASE)
    registry.put("a", ONE)
    registry.close()
    assert list(tmp_path.iterdir()) == [begun]


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_deleted_is_given_back(
    state: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr("reft_runtime.interventions.registry.residency._TRIM_BYTES", 1000)
    monkeypatch.setattr(
        "reft_runtime.interventions.registry.catalog.return_freed_memory", lambda: trimmed.append(1)
    )
    registry = Registry(BASE, state_dir=state if kept else None)
    gone = []
    for seed in range(4):
        registry.put("a", file_bytes(seed))
        version = registry.resolve("a")
        gone.append(weakref.ref(version))
    held = version
    registry.hold(held)
    registry.remove("a")
    del version
    assert [ref() is None for ref in gone] == [True, True, True, False]
    assert registry.held_bytes() == held.fixed_bytes + held.tensor_bytes
    registry.release(held)
    assert registry.held_bytes() == 0
    assert trimmed
    registry.close()


def test_the_listing_of_uploads_is_bounded_and_has_room_when_they_are_deleted(folder: Path) -> None:
    place(folder, "f", ONE)
    registry = Registry(BASE, [folder], memory_bytes=fixed(3) - 1)
    registry.put("a", ONE)
    registry.put("b", TWO)
    call: Callable[[], object]
    for call in (
        lambda: registry.put("c", THREE),
        lambda: registry.put("a", THREE),  # its history counts
        lambda: registry.load("c", "f.safetensors"),
    ):
        with pytest.raises(StoreFull, match=r"bytes of memory, pinned .*, and this one would take"):
            call()
    assert names(registry) == ["a", "b", "f"]
    registry.put("a", ONE)  # the very same again
    registry.remove("b")
    registry.put("c", THREE)
    assert registry.resolve("c").digest == digest(THREE)


def test_uploads_on_disk_are_bounded(state: Path) -> None:
    registry = Registry(BASE, state_dir=state, state_bytes=2 * len(ONE))
    registry.put("a", ONE)
    registry.put("b", ONE)  # the same file is kept once
    registry.put("c", TWO)
    with pytest.raises(StoreFull, match="bytes of the state folder"):
        registry.put("d", THREE)
    registry.remove("c")
    registry.put("d", THREE)
    registry.close()


def test_what_is_on_its_way_to_the_disk_is_bounded(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is kept there: uploads that never end would fill the disk otherwise."""
    monkeypatch.setattr("reft_runtime.interventions.registry.store.MAX_FILE_BYTES", 10)
    registry = Registry(BASE, state_dir=state, state_bytes=2 * len(ONE))
    registry.put("a", ONE)
    with registry.incoming() as slow, registry.incoming() as other:
        slow.write(b"x" * len(ONE))
        other.write(b"x" * 10)
        with pytest.raises(StoreFull, match=r"are left for them\. Try again"):
            other.write(b"x")
        slow.discard()
        other.write(b"x" * (len(ONE) - 10))
    registry.put("b", TWO)
    registry.remove("b")
    with registry.incoming() as again:
        again.write(b"x" * (len(ONE) + 10))
    registry.close()


def test_names_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_runtime.interventions.registry.uploads.MAX_ADDED_NAMES", 2)
    place(folder, "f", ONE)
    registry = Registry(BASE, [folder])
    registry.put("a", ONE)
    registry.load("b", "f.safetensors")
    call: Callable[[], object]
    for call in (lambda: registry.put("c", ONE), lambda: registry.load("c", "f.safetensors")):
        with pytest.raises(InvalidRequest, match="as many as there may be; delete one first"):
            call()
    registry.put("a", TWO)
    registry.remove("b")
    registry.put("c", ONE)


@pytest.mark.parametrize("uploaded", [False, True])
def test_tensors_used_least_recently_give_way(folder: Path, state: Path, uploaded: bool) -> None:
    one = edit_bytes(ONE)
    room = 2 * one + (fixed(4) if uploaded else 0)
    registry = Registry(BASE, [folder], state_dir=state, memory_bytes=room)
    for name, seed in zip("abcd", range(4), strict=True):
        if uploaded:
            registry.put(name, file_bytes(seed))
        else:
            place(folder, name, file_bytes(seed))
    registry.scan()

    def loaded() -> list[str]:
        return [entry.name for entry in registry.entries() if entry.tier == "host"]

    ready(registry, "a")
    held = registry.resolve("b")
    registry.hold(held)
    ready(registry, "a")
    assert loaded() == ["a", "b"]
    ready(registry, "c")  # b came before a, and is in use
    assert loaded() == ["b", "c"]
    assert registry.tiers() == {"disk": 2, "host": 2}
    other = registry.resolve("d")
    registry.hold(other)
    assert loaded() == ["b", "d"]
    waiting = registry.acquire(["a"])
    assert (waiting.granted, registry.waiting()) == (False, 1)
    assert loaded() == ["b", "d"]
    registry.hold(held)  # what is held can be used by more
    for version in (held, held, other):
        registry.release(version)
    waiting.ready.result(60)
    assert waiting.versions[0].edits()
    waiting.release()
    assert registry.waiting() == 0
    assert registry.held_bytes() <= room
    registry.close()


def test_the_only_copy_does_not_give_way(folder: Path) -> None:
    place(folder, "a", ONE)
    place(folder, "b", TWO)
    registry = Registry(BASE, [folder], memory_bytes=edit_bytes(ONE))
    ready(registry, "a")
    place(folder, "a", b"")
    registry.scan()
    with pytest.raises(Unavailable, match="without their file"):
        ready(registry, "b")
    assert ready(registry, "a").digest == digest(ONE)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [(None, "No such file"), (b"", "Cut off"), (TWO, "not the one"), (FOREIGN, "made for")],
)
def test_a_damaged_blob_is_a_problem_and_the_folder_shows(
    folder: Path, state: Path, blob: bytes | None, reason: str
) -> None:
    place(folder, "a", THREE)
    registry = Registry(BASE, [folder], state_dir=state)
    registry.put("a", ONE)
    registry.close()
    path = state / "blobs" / f"{digest(ONE)}.safetensors"
    if blob is None:
        path.unlink()
    else:
        path.write_bytes(blob)
    registry = Registry(BASE, [folder], state_dir=state)
    assert reason in registry.problems()["a"]
    assert registry.resolve("a").digest == digest(THREE)
    registry.put("a", ONE)
    assert registry.problems() == {}
    assert len(registry.resolve("a").edits()) == 1
    registry.close()


def test_a_full_disk_leaves_the_old_version(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    old = registry.resolve("a")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StoreFull, match="disk of the state folder is full"):
            registry.put("a", TWO)
        with pytest.raises(StoreFull, match="disk of the state folder is full"):
            registry.put("b", TWO)
    assert registry.resolve("a") is old
    assert names(registry) == ["a"]
    assert len(list((state / "blobs").iterdir())) == 1
    registry.close()
    registry = Registry(BASE, state_dir=state)
    assert registry.resolve("a").digest == digest(ONE)
    registry.close()
