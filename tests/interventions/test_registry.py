from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.base.demo import locate as locate_model
from reft_runtime.errors import (
    ConfigError,
    FileTooLarge,
    InvalidFile,
    InvalidRequest,
    NotFound,
    ReftError,
    StoreFull,
    Unavailable,
    WrongBaseModel,
)
from reft_runtime.interventions import Registry, Version
from reft_runtime.interventions.format.canonical import memory_of
from reft_runtime.interventions.format.file import parse, write_atomic
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.registry import sources
from reft_runtime.interventions.registry.sources import look
from reft_runtime.interventions.registry.uploads import HISTORY
from tests.interventions.make import BASE, file_bytes, ready

ONE, TWO, THREE = file_bytes(1), file_bytes(2), file_bytes(3)
FOREIGN = file_bytes(1, base=BASE.model_copy(update={"vocab_size": 65}))


def digest(data: bytes) -> str:
    return header_of(data).digest


def damaged(data: bytes) -> bytes:
    """A sound header, and data that is not what it says."""
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def place(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name}.safetensors"
    write_atomic(path, data)
    return path


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


def only_problem(registry: Registry) -> str:
    (reason,) = registry.problems().values()
    return reason


# Folders


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


# Versions and holding


def test_a_held_version_outlives_its_replacement_and_its_file(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    old = registry.resolve("a")
    registry.hold(old)
    place(folder, "a", TWO)
    registry.scan()
    new = registry.resolve("a")
    assert new.digest == digest(TWO)
    assert registry.resolve(f"a@{old.digest[:8]}") is old
    assert registry.entry("a").versions == (new.digest, old.digest)
    assert registry.entry("a").in_flight == 1
    (folder / "a.safetensors").unlink()
    registry.scan()
    assert names(registry) == []
    assert registry.resolve(f"a@{old.digest}") is old
    assert len(old.edits()) == 1
    registry.release(old)
    with pytest.raises(NotFound):
        registry.resolve(f"a@{old.digest}")


def test_holding_is_counted(folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    version = registry.resolve("a")
    registry.hold(version)
    registry.hold(version)
    assert (registry.entry("a").in_flight, registry.entry("a").requests) == (2, 2)
    assert registry.entry("a").last_used is not None
    registry.release(version)
    registry.release(version)
    assert (registry.entry("a").in_flight, registry.entry("a").requests) == (0, 2)
    with pytest.raises(RuntimeError, match="more often than held"):
        registry.release(version)


@pytest.mark.parametrize(
    "ref", ["b", "", "a@", "a@1234567", "A", "a@ABCDEF01", "@", "a@{}@x", "../a", "a\n"]
)
def test_unknown_references(ref: str) -> None:
    registry = Registry(BASE)
    registry.put("a", ONE)
    ref = ref.replace("{}", digest(ONE))
    with pytest.raises(NotFound, match=r"The model `[^`]*` does not exist") as caught:
        registry.resolve(ref)
    assert caught.value.param == "model"
    with pytest.raises(NotFound):
        registry.resolve(f"a@{digest(TWO)}")


def test_an_ambiguous_prefix_is_not_found() -> None:
    registry = Registry(BASE)
    for data, start in ((ONE, "aaaaaaaa1"), (TWO, "aaaaaaaa2")):
        registry.put("a", data)
        registry.resolve("a").digest = start.ljust(64, "0")
    with pytest.raises(NotFound):
        registry.resolve("a@aaaaaaaa")
    assert registry.resolve("a@aaaaaaaa2").digest.startswith("aaaaaaaa2")


# Uploads


@pytest.fixture(params=["memory", "disk"])
def uploads(request: pytest.FixtureRequest, folder: Path, state: Path) -> Iterator[Registry]:
    registry = Registry(BASE, [folder], state_dir=state if request.param == "disk" else None)
    yield registry
    registry.close()


def test_put_replace_and_address_the_history(uploads: Registry) -> None:
    first = uploads.put("a", ONE)
    assert (first.before, first.after) == (None, digest(ONE))
    assert first.entry.origin == "uploaded"
    second = uploads.put("a", TWO, sha256=hashlib.sha256(TWO).hexdigest())
    assert (second.before, second.after) == (digest(ONE), digest(TWO))
    assert uploads.resolve("a").digest == second.after
    assert uploads.resolve(f"a@{digest(ONE)[:8]}").digest == first.after
    again = uploads.put("a", ONE)
    assert (again.before, again.after) == (digest(TWO), digest(ONE))
    assert uploads.entry("a") == again.entry
    assert again.entry.versions == (digest(ONE), digest(TWO))


def test_an_upload_is_parsed_once(uploads: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str | bytes] = []
    loads = json.loads

    def note(text: str | bytes, **options: Any) -> Any:
        parsed.append(text)
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", note)
    uploads.hold(uploads.resolve(uploads.put("a", ONE).entry.name))
    assert len(parsed) in (1, 2)  # the header, unless its layout is known, and the manifest in it


def test_history_is_bounded(uploads: Registry) -> None:
    files = [file_bytes(seed) for seed in range(HISTORY + 2)]
    for data in files:
        uploads.put("a", data)
    kept = [digest(data) for data in reversed(files[2:])]
    assert list(uploads.entry("a").versions) == kept
    with pytest.raises(NotFound):
        uploads.resolve(f"a@{digest(files[0])}")


def test_an_upload_shadows_the_folder_until_it_is_removed(uploads: Registry, folder: Path) -> None:
    place(folder, "a", ONE)
    uploads.scan()
    assert uploads.put("a", TWO).before == digest(ONE)
    uploads.scan()
    assert (uploads.entry("a").digest, uploads.entry("a").origin) == (digest(TWO), "uploaded")
    change = uploads.remove("a")
    assert (change.before, change.after) == (digest(TWO), digest(ONE))
    assert (uploads.entry("a").digest, uploads.entry("a").origin) == (digest(ONE), "folder")
    with pytest.raises(NotFound):
        uploads.resolve(f"a@{digest(TWO)}")


def test_a_removed_folder_name_stays_away_until_its_file_changes(
    uploads: Registry, folder: Path
) -> None:
    place(folder, "a", ONE)
    uploads.scan()
    uploads.remove("a")
    uploads.scan()
    assert names(uploads) == []
    with pytest.raises(NotFound):
        uploads.remove("a")
    place(folder, "a", ONE)
    uploads.scan()
    assert names(uploads) == ["a"]


def test_a_file_that_is_replaced_during_its_removal_is_served(
    uploads: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "a", ONE)
    uploads.scan()
    displace = uploads._catalog.displace

    def replaced_before(*arguments: Any) -> None:
        place(folder, "a", TWO)
        uploads.scan()
        displace(*arguments)

    monkeypatch.setattr(uploads._catalog, "displace", replaced_before)
    uploads.remove("a", [digest(ONE)])
    assert uploads.resolve("a").digest == digest(TWO)


def test_removing_leaves_requests_in_flight_alone(uploads: Registry) -> None:
    uploads.put("a", ONE)
    version = uploads.resolve("a")
    uploads.hold(version)
    uploads.remove("a")
    assert names(uploads) == []
    assert len(version.edits()) == 1
    uploads.release(version)
    with pytest.raises(NotFound):
        uploads.entry("a")
    uploads.put("a", ONE)
    assert uploads.entry("a").requests == 0  # nothing was kept of the name


@pytest.mark.parametrize(
    ("data", "error", "reason"),
    [
        (b"", InvalidFile, "Cut off"),
        (damaged(TWO), InvalidFile, "damaged file"),
        (FOREIGN, WrongBaseModel, "vocab_size 65 .loaded: 64"),
        (TWO + bytes(4096), FileTooLarge, "at most 4096"),
    ],
)
def test_a_refused_upload_changes_nothing(
    folder: Path, state: Path, data: bytes, error: type[Exception], reason: str
) -> None:
    registry = Registry(BASE, [folder], state_dir=state, max_file_bytes=4096)
    registry.put("a", ONE)
    version = registry.resolve("a")
    with pytest.raises(error, match=reason):
        registry.put("a", data)
    assert registry.resolve("a") is version
    assert [path.stem for path in (state / "blobs").iterdir()] == [version.digest]
    registry.close()


def test_an_upload_that_does_not_match_its_checksum(uploads: Registry) -> None:
    with pytest.raises(InvalidFile, match="SHA-256"):
        uploads.put("a", ONE, sha256=hashlib.sha256(TWO).hexdigest())
    assert names(uploads) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "-a",
        ".a",
        "_a",
        "..",
        "a/b",
        "a\\b",
        "a\0",
        "a\n",
        "a b",
        "x" * 65,
        "é",
        "a@b",
        "%2e",
    ],
)
def test_names(name: str, folder: Path) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    call: Callable[[], object]
    for call in (
        lambda: registry.put(name, ONE),
        lambda: registry.load(name, "a.safetensors"),
    ):
        with pytest.raises(InvalidRequest, match="is not allowed: use 1 to 64") as caught:
            call()
        assert caught.value.param == "name"


# The state folder


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


# A state folder that goes away


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
    assert len([line for line in caplog.messages if "it is read-only" in line]) == 1


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


# Memory


def edit_bytes(data: bytes) -> int:
    return memory_of(parse(data).canonical())


def fixed(count: int) -> int:
    """Memory of so many uploads, their tensors aside."""
    registry = Registry(BASE)
    registry.put("a", ONE)
    found = count * registry.resolve("a").fixed_bytes
    registry.close()
    return found


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


# Loading by path


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


# Threads


def test_requests_keep_their_version_while_names_move(folder: Path, state: Path) -> None:
    files = [file_bytes(seed) for seed in range(4)]
    registry = Registry(BASE, [folder], state_dir=state)
    registry.put("a", files[0])
    stop = threading.Event()
    faults: list[BaseException] = []

    def guard(body: object) -> threading.Thread:
        def run() -> None:
            try:
                assert callable(body)
                body()
            except BaseException as error:
                faults.append(error)
                stop.set()

        return threading.Thread(target=run)

    def serve() -> None:
        while not stop.is_set():
            version = registry.resolve("a")
            registry.hold(version)
            assert version.in_flight > 0
            assert registry.resolve(f"a@{version.digest}").digest == version.digest
            assert len(version.edits()) == 1
            registry.release(version)

    def change() -> None:
        for turn in range(12):
            registry.put("a", files[turn % 4])
            place(folder, "b", files[turn % 4])
            registry.scan()
            registry.entries()
        stop.set()

    threads = [guard(serve) for _ in range(4)] + [guard(change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert all(entry.in_flight == 0 for entry in registry.entries())
    registry.close()


def test_a_first_use_by_many_reads_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(folder, "a", ONE)
    registry = Registry(BASE, [folder])
    version = registry.resolve("a")
    loads: list[int] = []
    load = Version._load

    def counted(self: Version) -> object:
        loads.append(1)
        return load(self)

    monkeypatch.setattr(Version, "_load", counted)
    barrier = threading.Barrier(4)

    def use() -> None:
        barrier.wait()
        registry.hold(version)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loads) == 1
    assert registry.entry("a").in_flight == 4


@pytest.mark.parametrize("length", [255, 256, 4096])
def test_names_that_are_too_long(tmp_path: Path, length: int) -> None:
    registry = Registry(BASE, [tmp_path])
    for path in ("x" * length, f"sub/{'x' * length}", f"{tmp_path}/{'x' * length}"):
        with pytest.raises(NotFound, match="no such file"):
            registry.load("x", path)
    if length > 255:
        with pytest.raises(ConfigError, match="does not exist"):
            Registry(BASE, [tmp_path / ("x" * length)])
        assert locate_model("x" * length) == ("x" * length,) * 2
