"""The state in a folder that several servers share."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from reft_runtime.errors import Changed, ConfigError, NotFound, StoreFull, Unavailable
from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry.registry import check_folders
from reft_runtime.interventions.registry.remote import mounted, store
from tests.interventions.make import BASE, file_bytes, ready
from tests.interventions.test_remote_state import digest

ONE, TWO, THREE = (file_bytes(seed) for seed in (1, 2, 3))

Open = Callable[[], Registry]


@pytest.fixture
def join(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens one server after another on the same state, each on a machine of its own."""
    opened: list[Registry] = []

    def join() -> Registry:
        monkeypatch.setenv("REFT_CACHE", str(tmp_path / f"cache-{len(opened)}"))
        opened.append(Registry(BASE, state_dir=state, shared_state=True))
        return opened[-1]

    yield join
    for registry in opened:
        registry.close()


def test_a_server_catches_up_with_a_name(join: Open) -> None:
    one, two = join(), join()
    changes: list[tuple[Callable[[], object], tuple[bytes, ...], bool]] = [
        (lambda: one.put("a", ONE), (ONE,), False),
        (lambda: two.put("a", TWO), (TWO, ONE), False),
        (lambda: one.rollback("a"), (ONE, TWO), False),
        (lambda: two.pin("a"), (ONE, TWO), True),
        (lambda: one.put("a", THREE), (THREE, ONE, TWO), True),
        (lambda: two.unpin("a"), (THREE, ONE, TWO), False),
    ]
    for change, versions, pinned in changes:
        change()
        for server in (one, two):
            server.catch_up("a")
            entry = server.entry("a")
            assert (entry.versions, entry.pinned) == (tuple(map(digest, versions)), pinned)
            assert ready(server, "a").digest == digest(versions[0])
    late = join()
    assert late.entry("a").versions == tuple(map(digest, (THREE, ONE, TWO)))
    one.remove("a")
    for server in (one, two, late):
        server.catch_up("a")
        with pytest.raises(NotFound):
            server.resolve("a")
        assert server.problems() == {}


def test_a_change_is_made_to_what_another_server_made(join: Open) -> None:
    one, two = join(), join()
    one.put("a", ONE)
    with pytest.raises(Changed):
        two.put("a", TWO, expected=())
    two.put("a", TWO, expected=[digest(ONE)])
    with pytest.raises(Changed):
        one.remove("a", [digest(ONE)])
    assert one.entry("a").versions == (digest(TWO), digest(ONE))


def test_what_a_request_holds_stays(join: Open) -> None:
    one, two = join(), join()
    one.put("a", ONE)
    two.catch_up("a")
    held = two.resolve("a")
    two.hold(held)
    one.put("a", TWO)
    two.catch_up("a")
    assert two.resolve("a").digest == digest(TWO)
    assert held.digest == digest(ONE)
    assert len(held.edits()) == 1
    two.release(held)


def test_no_reader_sees_an_old_version_once_all_have_caught_up(join: Open) -> None:
    servers = [join(), join()]
    servers[0].put("a", ONE)
    servers[1].catch_up("a")
    lowest, wrong, ended = [0], list[tuple[int, str]](), threading.Event()
    order = [digest(ONE)]

    def read(server: Registry) -> None:
        while not ended.wait(0.002):
            oldest = lowest[0]  # before it is asked
            holding = server.acquire(["a"])
            try:
                holding.ready.result(60)
                seen = holding.versions[0].digest
                if seen not in order[oldest:]:
                    wrong.append((oldest, seen))
                assert holding.versions[0].edits()
            finally:
                holding.release()

    readers = [threading.Thread(target=read, args=[server]) for server in servers]
    for reader in readers:
        reader.start()
    try:
        for number in range(8):
            writer = servers[number % 2]
            if number % 4 == 3:
                order.append(order[-2])
                change = writer.rollback("a")
            else:
                data = file_bytes(description=str(number))
                order.append(digest(data))
                change = writer.put("a", data)
            assert change.after == order[-1]
            for server in servers:
                server.catch_up("a")
            lowest[0] = len(order) - 1
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def test_processes_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.interventions.sharing", str(tmp_path), "8"]
    environment = {**os.environ, "REFT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["killed"]


def test_who_may_have_the_folder(join: Open, state: Path) -> None:
    one = join()
    with pytest.raises(ConfigError, match="start all of them with --shared-state"):
        Registry(BASE, state_dir=state)
    with pytest.raises(ConfigError, match="start all of them with --shared-state"):
        check_folders((), state)
    check_folders((), state, shared_state=True)
    one.put("a", ONE)
    one.close()
    alone = Registry(BASE, state_dir=state)
    assert ready(alone, "a").digest == digest(ONE)
    with pytest.raises(ConfigError, match="does not share it; start all"):
        join()
    with pytest.raises(ConfigError, match="does not share it; start all"):
        check_folders((), state, shared_state=True)
    with pytest.raises(Unavailable, match="its own"):
        alone.catch_up("a")
    alone.close()
    assert join().entry("a").digest == digest(ONE)
    with pytest.raises(ConfigError, match=r"shared_state: .*--state-dir"):
        check_folders((), None, shared_state=True)


def test_a_folder_that_cannot_be_locked_is_refused(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cannot be shared: .*No locks"):
        check_folders((), state, shared_state=True)


def test_a_folder_that_is_unmounted_takes_no_name_away(join: Open, state: Path) -> None:
    one = join()
    one.put("a", ONE)
    away = state.with_name("away")
    state.rename(away)
    for layout in (False, True):  # what lies below a mount point may be another state
        if layout:
            (state / "pointers").mkdir(parents=True)
            (state / "blobs").mkdir()
            (state / "lock").touch()
            (state / "pointers" / "a.json").write_bytes(b"{")
        with pytest.raises(Unavailable, match="unmounted or deleted"):
            one.catch_up("a")
        one.scan()
        assert "unmounted or deleted" in str(one.state_problem())
        with pytest.raises(Unavailable, match="unmounted or deleted"):
            one.put("b", TWO)
        assert ready(one, "a").digest == digest(ONE)
    shutil.rmtree(state)
    away.rename(state)
    one.scan()
    assert one.state_problem() is None
    one.put("a", TWO)


def test_a_version_that_cannot_be_read_is_not_caught_up_with(join: Open, state: Path) -> None:
    one, two = join(), join()
    one.put("a", ONE)
    two.catch_up("a")
    one.put("a", TWO)
    blob = state / "blobs" / f"{digest(TWO)}.safetensors"
    content = blob.read_bytes()
    blob.unlink()
    with pytest.raises(Unavailable, match=digest(TWO)[:12]):
        two.catch_up("a")
    assert ready(two, "a").digest == digest(ONE)
    (state / "pointers" / "a.json").write_bytes(b"{")
    with pytest.raises(Unavailable, match="damaged"):
        two.catch_up("a")
    blob.write_bytes(content)
    one.put("a", TWO)
    two.catch_up("a")
    assert ready(two, "a").digest == digest(TWO)


def test_another_server_that_never_ends_a_change(
    join: Open, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join()
    monkeypatch.setattr(mounted, "CALL_SECONDS", 0.05)
    with (state / "changing").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"other servers have been changing it for 0\.05 s"):
            one.put("a", ONE)
    one.scan()
    one.put("a", ONE)


def test_a_full_disk_is_said(join: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one = join()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mounted, "write_atomic", full)
        with pytest.raises(StoreFull, match="disk of the state is full"):
            one.put("a", ONE)
    one.put("a", ONE)


def test_what_kills_have_left_is_deleted_once_it_is_old(
    join: Open, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join()
    one.put("a", ONE)
    one.put("b", TWO)
    one.remove("b")
    strays = [state / "pointers" / ".a.json.0123.tmp", state / "blobs" / ".x.safetensors.01.tmp"]
    for stray in strays:
        stray.write_bytes(b"{")
    join()
    assert all(stray.exists() for stray in strays)
    assert len(list((state / "blobs").glob("[!.]*"))) == 2
    monkeypatch.setattr(store, "SWEEP_SECONDS", -1.0)
    join()
    assert not any(stray.exists() for stray in strays)
    assert [path.stem for path in (state / "blobs").iterdir()] == [digest(ONE)]


def test_a_pointer_that_grows_while_it_is_read_is_not_damaged(
    join: Open, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = join(), join()
    one.put("a", ONE)
    two.catch_up("a")
    cat_file = mounted._Files.cat_file

    def late(files: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        monkeypatch.setattr(mounted._Files, "cat_file", cat_file)
        one.put("a", TWO)
        return cat_file(files, path, *arguments, **options)

    monkeypatch.setattr(mounted._Files, "cat_file", late)
    two.catch_up("a")
    assert two.entry("a").versions == (digest(TWO), digest(ONE))
    assert two.problems() == {}


def test_a_pointer_that_is_replaced_while_nfs_reads_it_is_read_again(
    join: Open, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = join(), join()
    one.put("a", ONE)
    two.catch_up("a")
    one.put("a", TWO)

    def stale(path: str, mode: str) -> BinaryIO:
        monkeypatch.delattr(mounted, "open")
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(mounted, "open", stale, raising=False)
    two.catch_up("a")
    assert not hasattr(mounted, "open")
    assert two.entry("a").versions == (digest(TWO), digest(ONE))


def test_changes_within_one_second_where_times_are_whole_seconds(join: Open, state: Path) -> None:
    """As some file systems have them, which also give the next file an inode that is free again."""
    one, two = join(), join()
    for data in (ONE, TWO, THREE):
        one.put("a", data)

    def as_at_one_second() -> os.stat_result:
        os.utime(state / "pointers" / "a.json", (1000, 1000))
        two.scan()
        assert two.entry("a").versions == one.entry("a").versions
        return os.stat(state / "pointers" / "a.json")

    before = as_at_one_second()
    sizes = {before.st_size}
    for data in (ONE, TWO):
        one.rollback("a", digest(data))
        sizes.add(os.stat(state / "pointers" / "a.json").st_size)
    as_at_one_second()
    assert len(sizes) == 3
