"""The state folder: uploads come back from it, and what is wrong with it is told."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from reft_runtime.errors import (
    ConfigError,
    NotFound,
    Unavailable,
)
from reft_runtime.interventions import Registry
from tests.interventions.make import (
    BASE,
    ONE,
    THREE,
    TWO,
    digest,
    names,
    only_problem,
    place,
    ready,
)


def test_uploads_come_back_after_a_restart(folder: Path, state: Path) -> None:
    place(folder, "a", THREE)
    registry = Registry(BASE, [folder], state_dir=state)
    registry.put("a", ONE)
    registry.put("a", TWO)
    registry.put("gone", ONE)
    registry.remove("gone")
    with pytest.raises(ConfigError, match="in use by another server"):
        Registry(BASE, state_dir=state)
    registry.close()

    registry = Registry(BASE, [folder], state_dir=state)
    entry = registry.entry("a")
    assert names(registry) == ["a"]
    assert (entry.origin, entry.tier) == ("uploaded", "disk")
    assert entry.versions == (digest(TWO), digest(THREE), digest(ONE))
    for ref in ("a", f"a@{digest(ONE)}"):
        assert len(registry.resolve(ref).edits()) == 1
    registry.close()


def test_blobs_are_kept_as_long_as_they_are_needed(state: Path) -> None:
    def blobs() -> set[str]:
        return {path.stem for path in (state / "blobs").iterdir()}

    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.put("b", ONE)
    registry.remove("a")
    assert blobs() == {digest(ONE)}
    held = registry.resolve("b")
    registry.hold(held)
    registry.remove("b")
    assert blobs() == {digest(ONE)}
    registry.release(held)
    registry.put("c", TWO)
    assert blobs() == {digest(TWO)}
    registry.close()


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_later_version_keeps_in_a_pointer_stays(state: Path, shared: bool) -> None:
    """Such as a draft: neither the field nor the blob that only it names is dropped."""
    with closing(Registry(BASE, state_dir=state, shared_state=shared)) as registry:
        registry.put("a", ONE)
    pointer, draft = state / "pointers" / "a.json", state / "blobs" / f"{digest(THREE)}.safetensors"
    pointer.write_text(json.dumps({"versions": [digest(ONE)], "draft": digest(THREE)}))
    draft.write_bytes(THREE)
    os.utime(draft, (0, 0))
    with closing(Registry(BASE, state_dir=state, shared_state=shared)) as registry:
        registry.pin("a")
        registry.put("a", TWO)
        registry.scan()
    versions = [digest(TWO), digest(ONE)]
    said = {"versions": versions, "pinned": True, "draft": digest(THREE)}
    assert json.loads(pointer.read_text()) == said
    assert draft.exists()


def test_what_a_crash_leaves_behind_is_cleaned_and_not_listed(state: Path) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.close()
    (state / "incoming" / "0123.part").write_bytes(TWO[:50])
    (state / "blobs" / f"{digest(TWO)}.safetensors").write_bytes(TWO)  # no pointer yet
    (state / "pointers" / ".b.json.0123.tmp").write_bytes(b"{")
    registry = Registry(BASE, state_dir=state)
    assert names(registry) == ["a"]
    assert registry.problems() == {}
    assert len(list((state / "blobs").iterdir())) == len(list((state / "pointers").iterdir())) == 1
    assert not list((state / "incoming").iterdir())
    registry.close()


@pytest.mark.parametrize(
    "pointer",
    [b"", b"{", b"[]", b"{}", b'{"versions": []}', b'{"versions": ["../x"]}', b"[" * 9999],
)
def test_a_damaged_pointer_is_a_problem_and_deletes_nothing(state: Path, pointer: bytes) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.put("b", TWO)
    registry.close()
    (state / "pointers" / "a.json").write_bytes(pointer)
    registry = Registry(BASE, state_dir=state)
    assert names(registry) == ["b"]
    assert "damaged" in registry.problems()["a"]
    registry.put("c", THREE)
    assert len(list((state / "blobs").iterdir())) == 3
    registry.put("a", ONE)
    assert registry.problems() == {}
    registry.close()


@pytest.mark.parametrize("shown", [False, True])
def test_deleting_mends_a_damaged_pointer(folder: Path, state: Path, shown: bool) -> None:
    if shown:
        place(folder, "a", TWO)
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.close()
    (state / "pointers" / "a.json").write_bytes(b"{")
    (state / "pointers" / "No Name.json").write_bytes(b"{")
    registry = Registry(BASE, [folder], state_dir=state)
    for name in ("a", "No Name"):
        registry.remove(name)
    assert registry.problems() == {}
    assert list((state / "pointers").iterdir()) == list((state / "blobs").iterdir()) == []
    assert names(registry) == (["a"] if shown else [])
    if not shown:
        with pytest.raises(NotFound):
            registry.remove("a")
    registry.close()


def test_deleting_takes_an_upload_that_could_not_be_restored(folder: Path, state: Path) -> None:
    place(folder, "a", THREE)
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.close()
    (state / "blobs" / f"{digest(ONE)}.safetensors").unlink()
    registry = Registry(BASE, [folder], state_dir=state)
    registry.remove("a")
    assert registry.problems() == {}
    assert registry.entry("a").origin == "folder"
    assert list((state / "pointers").iterdir()) == []
    registry.close()


@pytest.mark.parametrize("gone", [".", "pointers", "blobs"])
def test_a_deleted_state_folder_is_made_again(state: Path, gone: str) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.put("b", TWO)
    shutil.rmtree(state / gone)
    registry.put("c", THREE)
    assert ready(registry, "a").digest == digest(ONE)  # serves on from memory
    assert "no longer kept" in registry.problems()["a"]
    assert registry.entry("c").problem is None
    with pytest.raises(ConfigError, match="in use by another server"):
        Registry(BASE, state_dir=state)
    registry.put("a", TWO)
    registry.remove("b")
    assert registry.problems() == {}
    registry.close()
    registry = Registry(BASE, state_dir=state)
    assert {entry.name: entry.versions for entry in registry.entries()} == {
        "a": (digest(TWO),),
        "c": (digest(THREE),),
    }
    registry.close()


def test_the_watch_takes_a_deleted_state_folder_again(state: Path) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.watch(0.005)
    state.rename(state.with_name("aside"))
    for _ in range(2000):
        if registry.problems():
            break
        time.sleep(0.005)
    assert "no longer kept" in registry.problems()["a"]
    with pytest.raises(ConfigError, match="in use by another server"):
        Registry(BASE, state_dir=state)
    registry.close()


def test_a_state_folder_that_another_server_has_taken(state: Path) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    shutil.rmtree(state)
    other = Registry(BASE, state_dir=state)
    call: Callable[[], object]
    for call in (lambda: registry.put("a", TWO), lambda: registry.remove("a")):
        with pytest.raises(Unavailable, match="another server has it now"):
            call()
    assert ready(registry, "a").digest == digest(ONE)
    assert "another server has it" in only_problem(registry)
    assert names(other) == []
    registry.close()
    other.close()


def test_a_state_folder_that_turns_read_only_is_told_before_anybody_uploads(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Registry(BASE, state_dir=state)) as registry:
        registry.put("a", ONE)
        assert registry.state_problem() is None
        with monkeypatch.context() as patch:  # as access(2) says of a read-only file system
            patch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
            registry.watch(0.005)
            wait_for(lambda: registry.state_problem() is not None)
            assert "cannot be written: it is read-only" in str(registry.state_problem())
            assert ready(registry, "a").digest == digest(ONE)
            assert registry.remove("a").left is None  # what can be done is done
            time.sleep(0.05)
        wait_for(lambda: registry.state_problem() is None)
    # Not at each of some ten looks: once, and again if the removal was taken for a sign of health.
    assert len([line for line in caplog.messages if "it is read-only" in line]) in (1, 2)


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_state_folder_that_cannot_be_written(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)

    def refuse(descriptor: int) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        call: Callable[[], object]
        for call in (lambda: registry.put("a", TWO), lambda: registry.remove("a")):
            with pytest.raises(Unavailable, match="cannot be written: Read-only file system"):
                call()
    assert ready(registry, "a").digest == digest(ONE)
    registry.close()
    shutil.rmtree(state)
    state.write_bytes(b"")  # a file where the folder was
    registry = Registry(BASE)
    registry.close()
