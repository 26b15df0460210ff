"""Ways back: which versions are kept, which of them is served again, and that a restart knows."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_runtime.errors import Changed, InvalidRequest, NotFound, StoreFull, Unavailable
from reft_runtime.interventions import Registry
from reft_runtime.interventions.format.file import parse
from reft_runtime.interventions.registry.uploads import HISTORY
from tests.interventions.make import BASE, damaged, digest, file_bytes, place, ready

ONE, TWO, THREE = (file_bytes(seed) for seed in (1, 2, 3))


@pytest.fixture(params=["disk", "memory"])
def registry(request: pytest.FixtureRequest, folder: Path, state: Path) -> Iterator[Registry]:
    registry = Registry(BASE, [folder], state_dir=state if request.param == "disk" else None)
    for data in (ONE, TWO, THREE):
        registry.put("a", data)
    yield registry
    registry.close()


def served(registry: Registry, name: str = "a") -> list[str]:
    """The kept versions, the one that is served first."""
    versions = registry.versions_of(name)
    assert versions[0].current
    assert not any(version.current for version in versions[1:])
    return [version.digest for version in versions if version.kept]


def test_back_to_the_one_before_and_forth_again(registry: Registry) -> None:
    assert registry.rollback("a").after == digest(TWO)
    assert served(registry) == [digest(TWO), digest(THREE), digest(ONE)]
    assert ready(registry, "a").digest == digest(TWO)
    assert registry.rollback("a").after == digest(THREE)


@pytest.mark.parametrize("digits", [8, 64])
def test_back_to_a_digest(registry: Registry, digits: int) -> None:
    assert registry.rollback("a", digest(ONE)[:digits]).after == digest(ONE)
    assert served(registry) == [digest(ONE), digest(THREE), digest(TWO)]
    again = registry.resolve("a")
    assert registry.rollback("a", digest(ONE)).entry == registry.entry("a")  # it is served already
    assert registry.resolve("a") is again
    assert served(registry) == [digest(ONE), digest(THREE), digest(TWO)]


def test_requests_in_flight_keep_their_version(registry: Registry) -> None:
    held = registry.resolve("a")
    registry.hold(held)
    edits = held.edits()
    registry.rollback("a", digest(ONE))
    assert held.edits() is edits
    assert registry.entry("a").in_flight == 1
    assert registry.resolve(f"a@{digest(THREE)}") is held
    registry.release(held)
    assert registry.entry("a").requests == 1  # a roll-back is none


def test_nothing_falls_out_of_the_history(registry: Registry) -> None:
    files = [file_bytes(seed) for seed in range(10, 10 + HISTORY)]
    for data in files:
        registry.put("a", data)
    registry.rollback("a", digest(files[0]))
    assert sorted(served(registry)) == sorted(map(digest, files))
    with pytest.raises(NotFound):
        registry.rollback("a", digest(ONE))


def test_what_is_expected(registry: Registry) -> None:
    with pytest.raises(Changed):
        registry.rollback("a", expected=[digest(TWO)])
    assert registry.rollback("a", expected=[digest(THREE)]).after == digest(TWO)


def test_errors_say_what_there_is(registry: Registry, folder: Path) -> None:
    place(folder, "f", ONE)
    registry.scan()
    with pytest.raises(NotFound, match=f"kept version {'0' * 8}; kept are {digest(THREE)[:12]}, "):
        registry.rollback("a", "0" * 8)
    with pytest.raises(NotFound, match="The intervention `b` does not exist"):
        registry.rollback("b")
    registry.put("b", ONE)
    with pytest.raises(NotFound, match=f"before the current one, {digest(ONE)[:12]}"):
        registry.rollback("b")
    with pytest.raises(InvalidRequest, match="`f` is a file of the served folder"):
        registry.rollback("f")
    registry.load("a", "f.safetensors", replace=True)
    with pytest.raises(InvalidRequest, match="`a` was loaded from a path"):
        registry.rollback("a")
    assert registry.resolve("a").origin == "loaded"


def test_an_upload_hides_the_folder_also_when_rolled_back(registry: Registry, folder: Path) -> None:
    place(folder, "a", file_bytes(9))
    registry.scan()
    registry.rollback("a")
    entry = registry.entry("a")
    assert (entry.digest, entry.origin, entry.hides) == (digest(TWO), "uploaded", ("folder",))
    (shown,) = [version for version in registry.versions_of("a") if not version.kept]
    assert (shown.origin, shown.digest) == ("folder", digest(file_bytes(9)))


def test_many_at_once_end_on_one_of_the_versions(registry: Registry) -> None:
    targets = [digest(ONE), digest(TWO), None] * 4
    threads = [threading.Thread(target=registry.rollback, args=("a", target)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(served(registry)) == sorted(map(digest, (ONE, TWO, THREE)))


# With a state folder


@pytest.fixture
def kept(state: Path) -> Iterator[Registry]:
    registry = Registry(BASE, state_dir=state)
    registry.put("a", ONE)
    registry.put("a", TWO)
    yield registry
    registry.close()


def test_a_restart_knows(kept: Registry, state: Path) -> None:
    kept.put("a", THREE)
    kept.rollback("a", digest(ONE))
    before = kept.versions_of("a")
    kept.close()
    again = Registry(BASE, state_dir=state)
    assert again.versions_of("a") == before
    assert ready(again, "a").digest == digest(ONE)
    assert again.rollback("a").after == digest(THREE)
    assert again.rollback("a", digest(TWO)).after == digest(TWO)
    again.close()


def test_a_disk_that_is_full_changes_nothing(
    kept: Registry, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreFull):
            kept.rollback("a")
    assert served(kept) == [digest(TWO), digest(ONE)]
    assert kept.entry("a").in_flight == 0
    kept.close()
    again = Registry(BASE, state_dir=state)
    assert served(again) == [digest(TWO), digest(ONE)]
    again.close()


@pytest.mark.parametrize("content", [damaged(ONE), None])
def test_a_damaged_version_is_not_served(
    kept: Registry, state: Path, content: bytes | None
) -> None:
    kept.close()
    again = Registry(BASE, state_dir=state)  # the tensors are read anew
    blob = state / "blobs" / f"{digest(ONE)}.safetensors"
    blob.unlink()
    if content is not None:
        blob.write_bytes(content)
    with pytest.raises(Unavailable, match="damaged file" if content else "gone; upload it again"):
        again.rollback("a")
    assert ready(again, "a").digest == digest(TWO)
    again.close()


def test_after_the_state_folder_was_deleted(kept: Registry, state: Path) -> None:
    shutil.rmtree(state)
    with pytest.raises(Unavailable, match="upload its file again"):
        kept.rollback("a")
    assert ready(kept, "a").digest == digest(TWO)


# Files that are handed out


def test_the_file_of_every_version(registry: Registry, folder: Path) -> None:
    place(folder, "f", ONE)
    for ref, data in (
        ("a", THREE),
        (f"a@{digest(ONE)}", ONE),
        (f"a@{digest(TWO)[:8]}", TWO),
        ("f", ONE),
    ):
        version, file = registry.open(ref)
        with file:
            assert file.read() == data
        assert version.digest == digest(data)
    for ref, words in (
        ("b", "The intervention `b` does not exist"),
        ("a@00000000", f"no version 00000000 of `a`; there are {digest(THREE)[:12]}, "),
    ):
        with pytest.raises(NotFound, match=words):
            registry.open(ref)


def test_what_is_open_stays_whole_when_it_is_removed(registry: Registry) -> None:
    _, file = registry.open("a")
    registry.remove("a")
    with file:
        assert parse(file.read()).manifest.base == BASE


def test_a_damaged_file_is_not_handed_out(folder: Path) -> None:
    path = place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    version = registry.resolve("a")
    for data, words in ((damaged(ONE), "damaged file"), (TWO, "has changed since")):
        path.write_bytes(data)
        with pytest.raises(Unavailable, match=words):
            version.open()
    path.unlink()
    with pytest.raises(NotFound):
        version.open()
