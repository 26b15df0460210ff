"""Sources at URLs, on fsspec's file system in memory."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from reft_runtime.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from reft_runtime.interventions import Registry
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.registry import registry as registry_module
from reft_runtime.interventions.registry.remote import cache, objects, place, poller
from reft_runtime.interventions.registry.remote.cache import FileCache
from reft_runtime.interventions.registry.urls import is_url, shown
from tests.interventions.make import BASE, file_bytes, ready

ONE, TWO, THREE = file_bytes(1), file_bytes(2), file_bytes(3)
FOREIGN = file_bytes(1, base=BASE.model_copy(update={"vocab_size": 65}))
DAMAGED = TWO[:-1] + bytes([TWO[-1] ^ 1])


def digest(data: bytes) -> str:
    return header_of(data).digest


class Bucket:
    """A folder in memory, at a URL."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.fs = fsspec.filesystem("memory")
        self.path = f"/{name}"
        self.url = f"memory:/{self.path}"
        self.read: list[tuple[str, int, int]] = []
        self.away: Exception | None = None
        self.failing = ""
        """The file that cannot be read, although it is there."""
        for method in ("ls", "info", "cat_file", "open", "rm_file"):
            monkeypatch.setattr(MemoryFileSystem, method, self._watched(method))

    def put(self, name: str, data: bytes) -> None:
        self.fs.store.pop(f"{self.path}/{name}", None)
        # Not by a method: those fail while the bucket is away.
        self.fs.store[f"{self.path}/{name}"] = file = _File(data)
        file.seek(0)

    def remove(self, name: str) -> None:
        del self.fs.store[f"{self.path}/{name}"]

    def names(self) -> list[str]:
        return sorted(key.removeprefix(f"{self.path}/") for key in self.fs.store)

    def _watched(self, method: str) -> Any:
        original = getattr(MemoryFileSystem, method)

        def watched(fs: Any, path: str, *args: Any, **options: Any) -> Any:
            if self.away is not None:
                raise self.away
            if method == "cat_file" and path.rpartition("/")[2] == self.failing:
                raise ValueError("500")
            if method == "cat_file":
                self.read.append((path.rpartition("/")[2], options["start"], options["end"]))
            return original(fs, path, *args, **options)

        return watched


def _File(data: bytes) -> Any:  # noqa: N802
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(data=data)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield Bucket(monkeypatch, "bucket/tasks")
    MemoryFileSystem.store.clear()


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def evicted(registry: Registry, name: str) -> None:
    assert registry.resolve(name).evict()


# What is read, and when


def test_only_headers_are_read_at_the_start_and_data_when_it_is_used(bucket: Bucket) -> None:
    bucket.put("a.safetensors", ONE)
    bucket.put("b.safetensors", TWO)
    registry = Registry(BASE, [bucket.url])
    assert names(registry) == ["a", "b"]
    assert (registry.entry("a").digest, registry.entry("a").origin) == (digest(ONE), "folder")
    assert {start for _, start, _ in bucket.read} == {0}
    assert len(bucket.read) == 2
    assert ready(registry, "a").digest == digest(ONE)
    assert bucket.read[2:] == [("a.safetensors", 0, len(ONE) + 1)]
    evicted(registry, "a")
    ready(registry, "a")  # from the cache
    registry.scan()
    assert len(bucket.read) == 3
    registry.close()


def test_a_long_header_is_read_in_two_parts(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_BYTES", 100)
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    start = header_of(ONE).data_start
    assert bucket.read == [("a.safetensors", 0, 100), ("a.safetensors", 100, start)]
    assert ready(registry, "a").digest == digest(ONE)
    registry.close()


def test_files_that_are_new_replaced_or_gone_are_found_by_the_next_poll(bucket: Bucket) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "a")
    bucket.put("a.safetensors", TWO)
    bucket.put("b.safetensors", THREE)
    assert registry.resolve("a").digest == digest(ONE)
    with pytest.raises(NotFound):
        registry.resolve("b")
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    assert ready(registry, "b").digest == digest(THREE)
    bucket.remove("a.safetensors")
    registry.scan()
    assert names(registry) == ["b"]
    registry.close()


def test_a_poll_in_the_background_serves_a_new_file(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "POLL_SECONDS", 0.01)
    registry = Registry(BASE, [bucket.url])
    served = threading.Event()
    scan = registry._scan

    def watched(*arguments: Any) -> None:
        scan(*arguments)
        if names(registry):
            served.set()

    monkeypatch.setattr(registry, "_scan", watched)
    registry.watch(0.01)
    bucket.put("a.safetensors", ONE)
    assert served.wait(30)
    registry.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (ONE[:-1], "cut off"), (b"x" * 5000, "text file"), (FOREIGN, "vocab")],
)
def test_a_broken_file_is_a_problem_of_its_own(bucket: Bucket, data: bytes, reason: str) -> None:
    bucket.put("a.safetensors", ONE)
    bucket.put("bad.safetensors", data)
    registry = Registry(BASE, [bucket.url])
    assert names(registry) == ["a"]
    assert reason in registry.problems()["memory://bucket/tasks/bad.safetensors"]
    bucket.put("bad.safetensors", TWO)
    registry.scan()
    assert names(registry) == ["a", "bad"]
    assert registry.problems() == {}
    registry.close()


def test_a_file_that_always_fails_is_a_problem_of_its_own(bucket: Bucket) -> None:
    """At the start, when it is replaced, and when its data is read."""
    bucket.put("a.safetensors", ONE)
    bucket.put("b.safetensors", TWO)
    bucket.failing = "a.safetensors"
    registry = Registry(BASE, [bucket.url])
    problem = {f"{bucket.url}/a.safetensors": "Cannot be read: it cannot be reached (ValueError)."}
    assert (names(registry), registry.problems()) == (["b"], problem)
    assert [source.problem for source in registry.sources()] == [None]
    bucket.failing = ""
    registry.scan()
    assert (names(registry), registry.problems()) == (["a", "b"], {})
    bucket.failing = "b.safetensors"
    with pytest.raises(Unavailable):
        ready(registry, "b")
    assert [source.problem for source in registry.sources()] == [None]
    bucket.put("b.safetensors", THREE)
    bucket.put("c.safetensors", THREE)
    registry.scan()
    assert (names(registry), len(registry.problems())) == (["a", "b", "c"], 1)
    assert registry.entry("b").digest == digest(TWO)
    assert ready(registry, "a").digest == digest(ONE)
    registry.close()


def test_odd_names_and_folders_below_are_not_listed(bucket: Bucket) -> None:
    for name in ("UP", "..", "a b", "é", "x" * 65):
        bucket.put(f"{name}.safetensors", ONE)
    bucket.put("below/a.safetensors", ONE)
    bucket.put("README.md", b"no intervention")
    registry = Registry(BASE, [bucket.url])
    assert names(registry) == []
    assert len(registry.problems()) == 5
    assert bucket.read == []
    registry.close()


# Replaced, gone or damaged between the listing and the first use


def test_a_file_that_was_replaced_since_the_poll_is_served_in_its_new_version(
    bucket: Bucket,
) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    bucket.put("a.safetensors", TWO)
    assert ready(registry, "a").digest == digest(TWO)
    registry.close()


def test_a_file_that_is_gone_since_the_poll_is_not_found(bucket: Bucket) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    bucket.remove("a.safetensors")
    with pytest.raises(NotFound):
        ready(registry, "a")
    assert registry.sources()[0].problem is None
    with pytest.raises(NotFound):
        registry.resolve("a")
    registry.close()


def test_damaged_data_is_read_once_and_the_mended_file_is_served(bucket: Bucket) -> None:
    bucket.put("a.safetensors", DAMAGED)
    registry = Registry(BASE, [bucket.url])
    for _ in range(3):
        with pytest.raises(Unavailable, match="damaged file"):
            ready(registry, "a")
    assert [end for _, _, end in bucket.read].count(len(DAMAGED) + 1) == 1
    bucket.put("a.safetensors", TWO)
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    registry.close()


@pytest.mark.parametrize("bad", [b"", FOREIGN, DAMAGED])
def test_a_broken_replacement_leaves_the_version_in_the_cache(bucket: Bucket, bad: bytes) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "a")
    evicted(registry, "a")
    bucket.put("a.safetensors", bad)
    registry.scan()
    assert ready(registry, "a").digest == digest(ONE)
    assert "Its new file is not served" in str(registry.entry("a").problem)
    assert list(registry.problems()) == ["memory://bucket/tasks/a.safetensors"]
    bucket.put("a.safetensors", TWO)
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    assert registry.problems() == {}
    registry.close()


# Away


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("to secret.example"), "it cannot be reached (ConnectionError)"),
        (PermissionError("secret"), "access is denied"),
        (FileNotFoundError("secret"), "there is no such file or folder"),
    ],
)
def test_a_source_that_is_away_leaves_what_is_served(
    bucket: Bucket, error: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.put("hot.safetensors", ONE)
    bucket.put("kept.safetensors", TWO)
    bucket.put("cold.safetensors", THREE)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "hot")
    ready(registry, "kept")
    evicted(registry, "kept")
    bucket.away = error
    with caplog.at_level(logging.INFO):
        registry.scan()
        registry.scan()
    assert [message for message in caplog.messages if "is away" in message] == [
        f"the source memory://bucket/tasks is away: {told}; what it served is served on"
        f" ({type(error).__name__}: {error})"
    ]
    [source] = registry.sources()
    assert (source.number, source.kind, source.label) == (1, "memory", "memory://bucket/tasks")
    assert source.problem == f"The source is away: {told}."
    assert names(registry) == ["cold", "hot", "kept"]
    assert ready(registry, "hot").digest == digest(ONE)
    assert ready(registry, "kept").digest == digest(TWO)
    with pytest.raises(Unavailable, match="its source is away"):
        ready(registry, "cold")
    bucket.away = None
    caplog.clear()
    with caplog.at_level(logging.INFO):
        registry.scan()
    assert "the source memory://bucket/tasks is back" in caplog.messages
    assert registry.sources()[0].problem is None
    assert registry.problems() == {}
    assert ready(registry, "cold").digest == digest(THREE)
    registry.close()


def test_a_restart_while_it_is_away_serves_what_was_listed_and_used(bucket: Bucket) -> None:
    bucket.put("a.safetensors", ONE)
    bucket.put("b.safetensors", TWO)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "a")
    registry.close()
    bucket.away = ConnectionError()
    registry = Registry(BASE, [bucket.url])
    assert names(registry) == ["a", "b"]
    assert ready(registry, "a").digest == digest(ONE)
    with pytest.raises(Unavailable, match="away"):
        ready(registry, "b")
    registry.close()
    bucket.away = None
    bucket.read.clear()
    registry = Registry(BASE, [bucket.url])
    assert ready(registry, "a").digest == digest(ONE)
    assert bucket.read == []
    registry.close()


def test_a_start_while_it_is_away_and_nothing_is_known(bucket: Bucket) -> None:
    bucket.away = ConnectionError()
    registry = Registry(BASE, [bucket.url])
    assert names(registry) == []
    assert "away" in registry.problems()["memory://bucket/tasks"]
    bucket.away = None
    bucket.put("a.safetensors", ONE)
    registry.scan()
    assert names(registry) == ["a"]
    registry.close()


def test_a_fetch_that_fails_marks_the_source_as_away(bucket: Bucket) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    bucket.away = ConnectionError()
    with pytest.raises(Unavailable):
        ready(registry, "a")
    assert registry.sources()[0].problem is not None
    registry.close()


def test_no_call_takes_longer_than_its_limit(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(place, "CALL_SECONDS", 0.05)
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: released.wait())
    registry = Registry(BASE, [bucket.url])
    assert "no answer within 0.05 s" in str(registry.sources()[0].problem)
    released.set()
    registry.close()


# Several sources


def test_the_first_of_several_sources_counts(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(ONE)
    (folder / "only.safetensors").write_bytes(THREE)
    bucket.put("a.safetensors", TWO)
    bucket.put("b.safetensors", TWO)
    registry = Registry(BASE, [folder, bucket.url])
    assert names(registry) == ["a", "b", "only"]
    assert ready(registry, "a").digest == digest(ONE)
    assert registry.problems() == {
        "memory://bucket/tasks/a.safetensors": f"Hidden by {folder}/a.safetensors."
    }
    (folder / "a.safetensors").unlink()
    assert ready(registry, "a").digest == digest(TWO)
    registry.close()
    registry = Registry(BASE, [bucket.url, f"file://{folder}"])
    assert names(registry) == ["a", "b", "only"]
    assert registry.sources()[1].kind == "folder"
    (folder / "new.safetensors").write_bytes(ONE)
    assert ready(registry, "new").digest == digest(ONE)  # at once, as in a folder
    registry.close()


def test_load_takes_files_inside_any_source(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "local.safetensors").write_bytes(ONE)
    bucket.put("below/far.safetensors", TWO)
    bucket.fs.store["/bucket/outside.safetensors"] = _File(THREE)
    registry = Registry(BASE, [folder, bucket.url])
    for number, (path, data) in enumerate(
        [
            ("local.safetensors", ONE),
            (f"file://{folder}/local.safetensors", ONE),
            ("below/far.safetensors", TWO),
            ("memory://bucket/tasks/below/far.safetensors", TWO),
        ]
    ):
        assert registry.load(f"n{number}", path).after == digest(data)
    for path in (
        "../outside.safetensors",
        "below/../../outside.safetensors",
        "memory://bucket/outside.safetensors",
        "memory://bucket/tasks/../outside.safetensors",
        "memory://bucket/tasksoutside.safetensors",
        "s3://bucket/tasks/below/far.safetensors",
        "/etc/passwd",
    ):
        with pytest.raises(InvalidRequest, match="outside the configured sources") as caught:
            registry.load("x", path)
        assert caught.value.param == "path"
    with pytest.raises(NotFound, match="no such file"):
        registry.load("x", "below/none.safetensors")
    with pytest.raises(InvalidRequest, match="is a folder"):
        registry.load("x", "below")
    bucket.away = ConnectionError()
    with pytest.raises(Unavailable, match="cannot be reached"):
        registry.load("x", "below/far.safetensors")
    assert registry.load("n0", "local.safetensors", replace=True).after == digest(ONE)
    registry.close()


# The cache


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, max_bytes=3 * len(ONE))
    files = [file_bytes(seed) for seed in range(4)]
    for age, data in enumerate(files[:3]):
        path = cache.add(digest(data), data)
        os.utime(path, (age, age))
    assert cache.get(digest(files[0]), len(ONE)) is not None
    cache.add(digest(files[3]), files[3])
    kept = [cache.holds(digest(data)) for data in files]
    assert kept == [True, False, False, True]


def test_a_damaged_file_in_the_cache_is_read_anew(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "a")
    evicted(registry, "a")
    cached = tmp_path / "cache" / "files" / f"{digest(ONE)}.safetensors"
    cached.write_bytes(ONE[:-1] + b"x")
    assert ready(registry, "a").digest == digest(ONE)
    assert cached.read_bytes() == ONE
    registry.close()


def test_the_cache_may_be_deleted_at_any_time(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a.safetensors", ONE)
    bucket.put("b.safetensors", TWO)
    registry = Registry(BASE, [bucket.url])
    assert ready(registry, "a").evict()
    shutil.rmtree(tmp_path / "cache")
    assert ready(registry, "a").digest == digest(ONE)
    bucket.put("b.safetensors", THREE)
    registry.scan()
    assert ready(registry, "b").digest == digest(THREE)
    registry.close()


def test_a_cache_that_is_full_is_no_source_that_is_away(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    ready(registry, "a")
    full = OSError(errno.ENOSPC, "No space left on device")
    bucket.put("a.safetensors", TWO)
    bucket.put("b.safetensors", THREE)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_atomic", _raising(full))
        registry.scan()
        with pytest.raises(Unavailable, match="the cache on this machine cannot be written: No"):
            ready(registry, "b")
        assert ready(registry, "a").digest == digest(ONE)
        assert registry.sources()[0].problem is None
    assert ready(registry, "b").digest == digest(THREE)
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    registry.close()


def test_a_listing_that_is_damaged_while_it_is_used(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    for file in (tmp_path / "cache" / "listings").iterdir():
        file.write_bytes(b"no database" * 1000)
    bucket.put("b.safetensors", TWO)
    registry.scan()
    assert [ready(registry, name).digest for name in "ab"] == [digest(ONE), digest(TWO)]
    registry.close()


def test_a_fetch_that_ends_after_the_registry_was_closed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.safetensors", ONE)
    registry = Registry(BASE, [bucket.url])
    reading, go_on = threading.Event(), threading.Event()

    def fail(*_: Any) -> bytes:
        reading.set()
        go_on.wait(60)
        raise OSError(errno.EIO, "it cannot be reached")

    monkeypatch.setattr(place.Place, "read", fail)
    holding = registry.acquire(["a"])
    assert reading.wait(60)
    registry.close()
    go_on.set()
    with pytest.raises(Unavailable, match="cannot be reached"):
        holding.ready.result(60)


def test_a_listing_that_cannot_be_read_is_made_anew(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a.safetensors", ONE)
    Registry(BASE, [bucket.url]).close()
    [listing] = (tmp_path / "cache" / "listings").glob("*.sqlite")
    listing.write_bytes(b"no database" * 1000)
    registry = Registry(BASE, [bucket.url])
    assert ready(registry, "a").digest == digest(ONE)
    registry.close()


# URLs


def test_what_is_a_url_and_how_it_is_shown() -> None:
    assert is_url("s3://bucket/x")
    assert not is_url("file:///folder")
    assert not is_url(Path("folder"))
    assert shown("https://me:pw@host/x/?sig=abc#d") == "https://host/x"
    assert shown("hf://owner/name@main/x") == "hf://owner/name@main/x"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nothing://user:secret@host/x", "nothing://host/x cannot be used"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("https://user:secret@host/x", "https://host/x: a web server does not list"),
        ("file://host/folder", "three slashes"),
    ],
)
def test_a_url_that_nothing_reads_is_refused_at_the_start(url: str, told: str) -> None:
    for sources, state in (([url], None), ([], url)):
        with pytest.raises(ConfigError, match=told) as caught:
            registry_module.check_folders(sources, state)
        assert "secret" not in str(caught.value)


def test_the_hub_is_read_by_its_own_file_system(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfFileSystem

    files = {"owner/tasks/x/a.safetensors": ONE, "owner/tasks/x/notes.md": b"-"}

    def ls(fs: Any, path: str, detail: bool, **_: Any) -> list[dict[str, Any]]:
        assert (path, detail) == ("owner/tasks/x", True)
        return [
            {"name": name, "size": len(data), "type": "file", "blob_id": digest_of(data)}
            for name, data in files.items()
        ]

    def cat_file(fs: Any, path: str, start: int, end: int, **_: Any) -> bytes:
        return files[path][start:end]

    def digest_of(data: bytes) -> str:
        return f"{hash(data):x}"

    monkeypatch.setattr(HfFileSystem, "ls", ls)
    monkeypatch.setattr(HfFileSystem, "cat_file", cat_file)
    registry = Registry(BASE, ["hf://owner/tasks/x"])
    assert ready(registry, "a").digest == digest(ONE)
    files["owner/tasks/x/a.safetensors"] = TWO
    registry.scan()
    assert ready(registry, "a").digest == digest(TWO)
    registry.close()
