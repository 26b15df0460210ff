"""The state at a URL: in memory, and in a local S3."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from reft_runtime.errors import Changed, NotFound, StoreFull, Unavailable
from reft_runtime.interventions import Registry
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.registry.remote import place, store
from tests.interventions.make import BASE, file_bytes, ready

ONE, TWO, THREE, FOUR = (file_bytes(seed) for seed in (1, 2, 3, 4))


def digest(data: bytes) -> str:
    return header_of(data).digest


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("tasks")
        yield "s3://tasks"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[str]:
    """An empty folder at a URL."""
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
    yield f"{root}/{uuid.uuid4().hex}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    yield "memory://state"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def broken() -> Iterator[pytest.MonkeyPatch]:
    """What a test breaks, and may mend by `undo`."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def objects(url: str) -> set[str]:
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {found[len(path) + 1 :] for found in fs.find(path)}


def blob(data: bytes) -> str:
    return f"blobs/{digest(data)}.safetensors"


def away(patch: pytest.MonkeyPatch) -> None:
    """Let the file system in memory fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("refused")

    for method in ("ls", "info", "cat_file", "pipe_file", "rm_file"):
        patch.setattr(MemoryFileSystem, method, refuse)


def test_uploads_live_at_the_url_and_outlive_this_machine(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, state_dir=url)
    registry.put("a", ONE)
    registry.put("a", TWO)
    registry.put("gone", THREE)
    registry.remove("gone")
    registry.pin("a")
    assert objects(url) == {blob(ONE), blob(TWO), blob(THREE), "pointers/a.json"}
    assert registry.rollback("a").after == digest(ONE)
    registry.close()
    for cache in ("cache", "another machine's"):
        monkeypatch.setenv("REFT_CACHE", str(tmp_path / cache))
        registry = Registry(BASE, state_dir=url)
        assert [entry.name for entry in registry.entries()] == ["a"]
        assert registry.entry("a").versions == (digest(ONE), digest(TWO))
        assert registry.entry("a").pinned
        assert ready(registry, f"a@{digest(TWO)}").digest == digest(TWO)
        registry.close()


def test_servers_share_a_state(url: str) -> None:
    one, two = Registry(BASE, state_dir=url), Registry(BASE, state_dir=url)
    one.put("a", ONE)
    with pytest.raises(NotFound):
        two.resolve("a")
    two.scan()
    assert ready(two, "a").digest == digest(ONE)
    one.put("a", TWO)
    # A change is made to what the name is by now, not to what was seen last.
    with pytest.raises(Changed, match=digest(TWO)):
        two.put("a", THREE, expected=[digest(ONE)])
    two.put("a", THREE, expected=[digest(TWO)])
    one.scan()
    assert (
        one.entry("a").versions == two.entry("a").versions == tuple(map(digest, (THREE, TWO, ONE)))
    )
    one.remove("a")
    two.scan()
    with pytest.raises(NotFound):
        two.resolve("a")
    one.scan()
    assert one.unserved() == two.unserved() == {}
    one.close()
    two.close()


def test_a_request_keeps_the_version_that_another_server_replaces(url: str) -> None:
    one, two = Registry(BASE, state_dir=url), Registry(BASE, state_dir=url)
    one.put("a", ONE)
    two.scan()
    held = two.resolve("a")
    two.hold(held)
    one.remove("a")
    two.scan()
    assert held.digest == digest(ONE)
    assert len(held.edits()) == 1
    two.release(held)
    one.close()
    two.close()


@pytest.mark.parametrize("method", ["info", "cat_file"])
@pytest.mark.parametrize("first", [True, False])
def test_a_change_of_another_server_that_could_be_read_in_part_is_taken_in_later(
    method: str,
    first: bool,
    memory: str,
    broken: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    one = Registry(BASE, state_dir=memory)
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "another machine's"))
    two = Registry(BASE, state_dir=memory)
    if not first:
        one.put("a", ONE)
        two.scan()
    one.put("a", TWO)
    original = getattr(MemoryFileSystem, method)

    def refuse_blobs(fs: Any, path: str, *args: Any, **options: Any) -> Any:
        if "blobs" in path:
            raise ConnectionError
        return original(fs, path, *args, **options)

    broken.setattr(MemoryFileSystem, method, refuse_blobs)
    two.scan()
    assert "cannot be reached" in two.unserved()["a"]
    broken.undo()
    two.scan()
    assert ready(two, "a").digest == digest(TWO)
    assert two.unserved() == {}
    one.close()
    two.close()


def test_a_blob_that_was_away_and_is_back_is_served_again(memory: str, tmp_path: Path) -> None:
    registry = Registry(BASE, state_dir=memory)
    registry.put("a", ONE)
    assert registry.resolve("a").evict()
    (tmp_path / "cache" / "files" / f"{digest(ONE)}.safetensors").unlink()
    fs = fsspec.filesystem("memory")
    fs.rm_file(f"/state/{blob(ONE)}")
    with pytest.raises(Unavailable, match="gone"):
        ready(registry, "a")
    assert "gone" in registry.problems()["a"]
    fs.pipe_file(f"/state/{blob(ONE)}", ONE)
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.problems() == {}
    registry.close()


def test_a_state_that_is_away_refuses_changes_and_serves_on(
    memory: str, broken: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(BASE, state_dir=memory)
    registry.put("a", ONE)
    registry.put("b", TWO)
    away(broken)
    for _ in range(2):
        registry.scan()
    assert caplog.text.count("the state at memory://state is away") == 1
    assert "cannot be reached (ConnectionError)" in str(registry.state_problem())
    changes: list[Callable[[], object]] = [
        lambda: registry.put("a", THREE),
        lambda: registry.remove("a"),
        lambda: registry.pin("a"),
    ]
    for change in changes:
        with pytest.raises(Unavailable, match="cannot be reached"):
            change()
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.resolve("b").evict()
    assert ready(registry, "b").digest == digest(TWO)  # from the cache
    registry.close()
    registry = Registry(BASE, state_dir=memory)  # a restart finds it as it was seen last
    assert ready(registry, "a").digest == digest(ONE)
    broken.undo()
    registry.scan()
    assert registry.state_problem() is None
    registry.put("a", THREE)
    assert registry.resolve("a").digest == digest(THREE)
    registry.close()


def test_a_write_that_fails_half_way_changes_nothing(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, state_dir=memory)
    registry.put("a", ONE)
    pipe_file = MemoryFileSystem.pipe_file

    def refuse_pointers(fs: Any, path: str, value: bytes, **options: Any) -> None:
        if "pointers" in path:
            raise ConnectionError
        pipe_file(fs, path, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse_pointers)
        with pytest.raises(Unavailable):
            registry.put("a", TWO)
    assert registry.entry("a").versions == (digest(ONE),)
    assert objects(memory) == {blob(ONE), blob(TWO), "pointers/a.json"}
    registry.scan()
    again = Registry(BASE, state_dir=memory)
    assert again.entry("a").versions == (digest(ONE),)
    again.close()
    registry.put("a", TWO)
    assert registry.entry("a").versions == (digest(TWO), digest(ONE))
    registry.close()


def test_only_blobs_that_nothing_has_named_for_a_day_are_deleted(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, state_dir=memory)
    registry.put("a", ONE)
    registry.put("b", TWO)
    registry.remove("b")
    registry.scan()
    assert blob(TWO) in objects(memory)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * store.SWEEP_SECONDS)
    registry.scan()  # takes in its own writes
    registry.scan()
    assert objects(memory) == {blob(ONE), "pointers/a.json"}
    registry.close()


def test_a_blob_that_a_collector_deletes_at_this_moment_is_written_again(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(BASE, state_dir=memory)
    pipe_file = MemoryFileSystem.pipe_file

    def swept(fs: Any, path: str, value: bytes, **options: Any) -> None:
        if "pointers" in path:
            fs.store.pop(f"/state/{blob(ONE)}")
        pipe_file(fs, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", swept)
    registry.put("a", ONE)
    assert blob(ONE) in objects(memory)
    registry.close()


def test_a_poll_reads_only_what_has_changed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(BASE, state_dir=url)
    registry.put("a", ONE)
    registry.scan()

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(place.Place, "read", refuse)
    monkeypatch.setattr(place.Place, "look", refuse)
    registry.scan()
    registry.close()
    Registry(BASE, state_dir=url).close()


@pytest.mark.parametrize("pointer", [b"", b"{", b'{"versions": ["../x"]}'])
def test_a_damaged_pointer_is_a_problem_until_it_is_written_again(
    memory: str, pointer: bytes
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/state/pointers/a.json", pointer)
    fs.pipe_file("/state/pointers/UPPER.json", b"not a name's")
    registry = Registry(BASE, state_dir=memory)
    assert "damaged" in registry.unserved()["a"]
    registry.put("a", ONE)
    assert registry.unserved() == {}
    fs.pipe_file("/state/pointers/a.json", pointer)
    registry.scan()
    assert "damaged" in registry.unserved()["a"]
    assert ready(registry, "a").digest == digest(ONE)  # what was served serves on
    registry.close()


@pytest.mark.parametrize("content", [None, b"", TWO])
def test_a_blob_that_is_gone_or_another_is_a_problem_of_its_name(
    memory: str, content: bytes | None
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/state/pointers/a.json", json.dumps({"versions": [digest(ONE)]}).encode())
    if content is not None:
        fs.pipe_file(f"/state/{blob(ONE)}", content)
    registry = Registry(BASE, state_dir=memory)
    assert f"Version {digest(ONE)[:12]}" in registry.unserved()["a"]
    registry.put("a", ONE)
    assert registry.unserved() == {}
    registry.close()


def test_the_bound_counts_what_pointers_name(memory: str) -> None:
    registry = Registry(BASE, state_dir=memory, state_bytes=2 * len(ONE))
    registry.put("a", ONE)
    registry.put("b", TWO)
    with pytest.raises(StoreFull, match="--state-bytes"):
        registry.put("c", THREE)
    registry.remove("b")
    registry.put("c", THREE)
    registry.close()


def test_what_is_loaded_from_a_path_is_not_written_to_the_url(memory: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(ONE)
    registry = Registry(BASE, [tmp_path], state_dir=memory)
    registry.load("loaded", "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    registry.put("b", TWO)
    assert registry.resolve("loaded").evict()
    assert ready(registry, "loaded").digest == digest(ONE)
    assert objects(memory) == {blob(TWO), "pointers/b.json"}
    registry.close()


def test_sources_and_state_in_s3_away_and_back(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(place, "CALL_SECONDS", 2.0)
    fs = fsspec.filesystem("s3")
    fs.pipe_file("tasks/source/a.safetensors", ONE)
    fs.pipe_file("tasks/source/cold.safetensors", FOUR)
    fs.pipe_file("tasks/source/below/b.safetensors", THREE)
    registry = Registry(BASE, ["s3://tasks/source"], state_dir="s3://tasks/state")
    registry.put("up", THREE)
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.load("b", "s3://tasks/source/below/b.safetensors").after == digest(THREE)
    fs.pipe_file("tasks/source/a.safetensors", TWO)
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    # A bucket that is gone is what a test can take away without another server.
    source, state = registry._folders._remote[0], registry._state._store
    paths = source._place.path, state._place.path  # type: ignore[attr-defined]
    source._place.path, state._place.path = "none/source", "none/state"  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        registry.catch_up("up")
    assert ready(registry, "up").digest == digest(THREE)
    registry.scan()
    assert registry.sources()[0].problem is not None
    assert registry.state_problem() is not None
    assert ready(registry, "a").digest == digest(TWO)
    with pytest.raises(Unavailable):
        ready(registry, "cold")
    with pytest.raises(Unavailable):
        registry.put("up", ONE)
    source._place.path, state._place.path = paths  # type: ignore[attr-defined]
    registry.scan()
    assert registry.sources()[0].problem is registry.state_problem() is None
    assert ready(registry, "cold").digest == digest(FOUR)
    registry.put("up", ONE)
    registry.close()
