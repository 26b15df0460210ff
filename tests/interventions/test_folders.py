"""Sources that are folders: what lies in them is listed, served and followed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    ReftError,
    Unavailable,
)
from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry import sources
from reft_runtime.interventions.registry.sources import look
from tests.interventions.make import (
    BASE,
    FOREIGN,
    ONE,
    THREE,
    TWO,
    damaged,
    digest,
    names,
    only_problem,
    place,
    ready,
)


def test_lists_a_folder_by_headers_and_loads_at_first_use(folder: Path) -> None:
    place(folder, "a", ONE)
    place(folder, "b.2_x-y", TWO)
    (folder / "README.md").write_text("no intervention")
    registry = Registry(BASE, [folder])
    assert names(registry) == ["a", "b.2_x-y"]
    entry = registry.entry("a")
    assert (entry.digest, entry.origin, entry.tier) == (digest(ONE), "folder", "disk")
    assert (entry.versions, entry.in_flight, entry.requests) == ((digest(ONE),), 0, 0)
    assert entry.last_used is None
    assert entry.size_bytes == len(ONE)
    version = registry.resolve("a")
    assert version.edits() is version.edits()
    assert registry.entry("a").tier == "host"


def test_scan_follows_the_folder(folder: Path) -> None:
    registry = Registry(BASE, [folder])
    assert names(registry) == []
    place(folder, "a", ONE)
    registry.scan()
    assert registry.resolve("a").digest == digest(ONE)
    place(folder, "a", TWO)
    registry.scan()
    assert registry.resolve("a").digest == digest(TWO)
    (folder / "a.safetensors").unlink()
    registry.scan()
    with pytest.raises(NotFound):
        registry.resolve("a")


def test_scan_reads_nothing_that_has_not_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "a", ONE)
    place(folder, "broken", b"")
    registry = Registry(BASE, [folder])
    before = registry.resolve("a")
    problems = registry.problems()

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("reft_runtime.interventions.format.file.read_header", refuse)
    registry.scan()
    assert registry.resolve("a") is before
    assert registry.problems() == problems


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "Cut off"),
        (ONE[:-1], "cut off"),
        (FOREIGN, "vocab_size 65"),
        (damaged(TWO), "damaged file"),
    ],
)
def test_a_broken_replacement_leaves_the_version_in_use(
    folder: Path, bad: bytes, reason: str
) -> None:
    path = place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    version = registry.resolve("a")
    version.edits()
    place(folder, "a", bad)
    registry.scan()
    assert registry.resolve("a") is version
    assert reason in registry.problems()[str(path)]
    registry.scan()
    assert reason in registry.problems()[str(path)]
    place(folder, "a", TWO)
    registry.scan()
    assert registry.resolve("a").digest == digest(TWO)
    assert registry.problems() == {}


def test_a_broken_replacement_of_what_was_never_read_is_not_served(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    place(folder, "a", b"")
    registry.scan()
    with pytest.raises(Unavailable, match="`a` cannot be served: Cut off"):
        registry.resolve("a")
    assert "Cut off" in only_problem(registry)
    assert names(registry) == []


def test_what_changes_is_served_without_waiting_for_a_scan(folder: Path) -> None:
    registry = Registry(BASE, [folder])
    path = place(folder, "a", ONE)  # new
    assert ready(registry, "a").digest == digest(ONE)
    place(folder, "a", TWO)  # replaced and in memory
    assert ready(registry, "a").digest == digest(TWO)
    place(folder, "a", b"")  # broken: the one before it
    assert ready(registry, "a").digest == digest(TWO)
    place(folder, "a", THREE)  # mended
    assert registry.resolve("a").digest == digest(THREE)
    place(folder, "a", ONE)  # replaced and never read
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.problems() == {}
    path.unlink()
    for ref in ("a", f"a@{digest(ONE)}"):
        with pytest.raises(NotFound):
            registry.resolve(ref)


def test_a_version_whose_file_changes_under_its_request(folder: Path) -> None:
    path = place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    version = registry.resolve("a")
    place(folder, "a", TWO)
    with pytest.raises(Unavailable, match="`a` cannot be used now: Its file has changed"):
        registry.hold(version)
    path.unlink()
    with pytest.raises(NotFound, match="`a` cannot be read any more"):
        registry.hold(version)
    assert registry.entry("a").in_flight == 0


def test_a_file_that_changes_while_it_is_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    files = iter([TWO, THREE])

    def read_late(path: Path, size: int) -> bytes:
        for data in files:
            place(folder, "a", data)
            break
        return path.read_bytes()

    monkeypatch.setattr("reft_runtime.interventions.registry.version.read", read_late)
    assert ready(registry, "a").digest == digest(THREE)


def test_a_change_that_the_disks_clock_does_not_show(folder: Path) -> None:
    path = place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    registry._folders._found["a"] = look(path)
    path.write_bytes(TWO)
    registry._folders._found["a"] = look(path)  # as if both had been written within one tick
    assert ready(registry, "a").digest == digest(TWO)


def test_damaged_data_is_not_the_askers_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "a", damaged(ONE))
    registry = Registry(BASE, [folder])
    assert registry.entry("a").problem is None  # only its header was read
    with pytest.raises(Unavailable, match="`a` cannot be used now: The data does not match"):
        ready(registry, "a")
    assert "damaged file" in str(registry.entry("a").problem)
    assert "damaged file" in registry.problems()["a"]
    monkeypatch.setattr("reft_runtime.interventions.registry.version.read", None)  # not read again
    with pytest.raises(Unavailable, match="damaged file"):
        ready(registry, "a")
    monkeypatch.undo()
    place(folder, "a", ONE)
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.problems() == {}


def test_an_old_version_that_serves_on_says_why(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    ready(registry, "a")
    place(folder, "a", damaged(TWO))
    assert ready(registry, "a").digest == digest(ONE)
    assert "new file is not served: " in str(registry.entry("a").problem)
    assert "damaged file" in str(registry.entry("a").problem)
    place(folder, "a", TWO)
    assert ready(registry, "a").digest == digest(TWO)
    assert registry.entry("a").problem is None


def test_a_disk_that_fails_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])

    def fail(path: Path, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("reft_runtime.interventions.registry.version.read", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            ready(registry, "a")
    assert ready(registry, "a").digest == digest(ONE)


@pytest.mark.parametrize("kept", [False, True])
def test_the_base_models_id_is_no_name(folder: Path, state: Path, kept: bool) -> None:
    place(folder, "tiny", ONE)
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder], state_dir=state if kept else None)
    assert names(registry) == ["a"]
    assert "the base model's own id" in only_problem(registry)
    with pytest.raises(NotFound):
        registry.resolve("tiny")
    call: Callable[[], object]
    for call in (
        lambda: registry.put("tiny", ONE),
        lambda: registry.load("tiny", "a.safetensors"),
    ):
        with pytest.raises(InvalidRequest, match="`tiny` is the base model's own id") as caught:
            call()
        assert caught.value.param == "name"
    registry.close()


def test_an_upload_named_as_another_servers_base_can_be_deleted(state: Path) -> None:
    registry = Registry(BASE.model_copy(update={"model": "other"}), state_dir=state)
    registry.put("tiny", ONE)
    registry.close()
    registry = Registry(BASE, state_dir=state)
    assert names(registry) == []
    assert "the base model's own id" in registry.problems()["tiny"]
    registry.remove("tiny")
    assert registry.problems() == {}
    assert list((state / "blobs").iterdir()) == list((state / "pointers").iterdir()) == []
    registry.close()


def test_problems_of_a_folder(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    place(folder, "a", ONE)
    place(other, "a", TWO)
    place(folder, "Upper", ONE)
    place(folder, "x" * 65, ONE)
    place(tmp_path, "outside", ONE)
    place(folder, "foreign", FOREIGN)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nothing")
    (folder / "inside.safetensors").symlink_to(folder / "a.safetensors")
    (folder / "dir.safetensors").mkdir()
    os.mkfifo(folder / "fifo.safetensors")
    registry = Registry(BASE, [folder, other])
    assert names(registry) == ["a", "inside"]
    assert registry.resolve("a").digest == digest(ONE)
    found = {Path(path).name.split(".")[0]: why for path, why in registry.problems().items()}
    expected = {
        "a": "Hidden by",
        "Upper": "no name",
        "x" * 65: "no name",
        "foreign": "made for",
        "link": "leads out",
        "dangling": "Cannot be read",
        "dir": "Not a regular file",
        "fifo": "Not a regular file",
    }
    assert found.keys() == expected.keys()
    for name, why in expected.items():
        assert why in found[name]


def test_a_folder_that_goes_away_for_a_moment_is_served_on(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    aside = folder.rename(folder.with_name("aside"))
    registry.scan()
    assert names(registry) == ["a"]
    assert "folder cannot be read" in registry.problems()[str(folder)]
    aside.rename(folder)
    registry.scan()
    assert registry.problems() == {}


def test_what_was_not_read_yet_is_not_unknown_while_its_folder_is_away(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    aside = folder.rename(folder.with_name("aside"))
    with pytest.raises(Unavailable, match="its folder is away"):
        ready(registry, "a")
    aside.rename(folder)
    assert ready(registry, "a").digest == digest(ONE)


def test_a_file_that_is_gone_when_it_is_used_and_was_away_before_is_listed_no_longer(
    folder: Path,
) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    aside = folder.rename(folder.with_name("aside"))
    with pytest.raises(ReftError):
        ready(registry, "a")
    aside.rename(folder)
    (folder / "a.safetensors").unlink()
    registry.scan()
    assert names(registry) == []


def test_a_missing_folder_at_the_start_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Registry(BASE, [tmp_path / "missing"])


def test_nobody_waits_for_a_scan_of_many_changes(folder: Path) -> None:
    files = [f"f{number}" for number in range(9)]
    registry = Registry(BASE, [folder])
    for name in files:
        place(folder, name, ONE)
    worked: list[float] = []

    def rest(seconds: float) -> bool:
        if not worked:  # between two files everything else goes on
            registry.put("u", TWO)
            assert ready(registry, "f8").digest == digest(ONE)
            registry.remove("f8")
            assert registry.tiers() == {"disk": 1, "host": 1}
        worked.append(seconds)
        return len(worked) == 5

    registry.scan(rest)
    assert names(registry) == [*files[:5], "u"]
    registry.scan(rest)
    assert names(registry) == [*files[:8], "u"]


def test_looking_at_many_files_is_done_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LOOKS_AT_ONCE", 4)
    for number in range(9):
        place(folder, f"f{number}", ONE)
    registry = Registry(BASE, [folder])
    looked: list[float] = []
    registry.scan(between=looked.append)
    assert len(looked) == 2
    assert all(seconds >= 0 for seconds in looked)
    assert len(names(registry)) == 9


def test_watch_picks_up_a_file_and_survives_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, [folder])
    scanned = threading.Event()
    scan = registry._scan
    faults = iter([RuntimeError("once")])

    def watched_scan(*rest: Any) -> None:
        for fault in faults:
            raise fault
        scan(*rest)
        if names(registry):
            scanned.set()

    monkeypatch.setattr(registry, "_scan", watched_scan)
    before = set(threading.enumerate())
    registry.watch(0.005)
    with pytest.raises(RuntimeError, match="already"):
        registry.watch(1)
    place(folder, "a", ONE)
    assert scanned.wait(30)
    registry.close()
    assert set(threading.enumerate()) <= before
    assert names(registry) == ["a"]
