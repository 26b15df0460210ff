"""Names stand for versions, which requests hold while names move."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_runtime.base.demo import locate as locate_model
from reft_runtime.errors import (
    ConfigError,
    NotFound,
    Unavailable,
)
from reft_runtime.interventions import Registry, Version
from tests.interventions.make import (
    BASE,
    ONE,
    TWO,
    digest,
    file_bytes,
    names,
    place,
)


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


@pytest.mark.parametrize("state", [None, "state"])
def test_what_is_closed_takes_no_change(tmp_path: Path, state: str | None) -> None:
    """It would be told as made, and be lost with a temporary folder."""
    registry = Registry(BASE, state_dir=state and tmp_path / state)
    registry.put("kept", file_bytes(1))
    registry.stop()
    registry.put("kept", file_bytes(2))
    registry.close()
    changes: list[Callable[[], object]] = [
        lambda: registry.put("lost", file_bytes(3)),
        lambda: registry.remove("kept"),
        lambda: registry.rollback("kept"),
        lambda: registry.pin("kept"),
    ]
    for change in changes:
        with pytest.raises(Unavailable, match="is stopping"):
            change()
