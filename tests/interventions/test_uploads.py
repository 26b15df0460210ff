"""Uploads: they replace, hide, and are addressed by their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import (
    FileTooLarge,
    InvalidFile,
    InvalidRequest,
    NotFound,
    WrongBaseModel,
)
from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry.uploads import HISTORY
from tests.interventions.make import (
    BASE,
    FOREIGN,
    ONE,
    TWO,
    damaged,
    digest,
    file_bytes,
    names,
    place,
)


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
