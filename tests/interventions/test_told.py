"""What the log says of files: each that is not served, or hidden, once and at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reft_runtime.interventions import Registry
from tests.interventions.make import BASE, file_bytes

ONE, TWO = file_bytes(1), file_bytes(2)


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_every_file_that_is_not_served(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    for path in ("Bad Name", "broken", f"{BASE.model}", "twice"):
        (folder / f"{path}.safetensors").write_bytes(b"x" if path == "broken" else ONE)
    (second / "twice.safetensors").write_bytes(TWO)
    registry = Registry(BASE, sources=[folder, second])
    lines = sorted(told(caplog))
    assert [
        line.rpartition("/")[2].partition(":")[0] for line in lines if "second" not in line
    ] == [
        "Bad Name.safetensors is not served",
        "broken.safetensors is not served",
        f"{BASE.model}.safetensors is not served",
    ]
    assert sum("second/twice.safetensors is not served: Hidden by" in line for line in lines) == 1
    registry.scan()
    registry.scan()
    assert told(caplog) == []
    (folder / "Worse Name.safetensors").write_bytes(ONE)
    registry.scan()
    [line] = told(caplog)
    assert "Worse Name.safetensors is not served: The file's name is no name" in line


def test_an_upload_hides_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "task.safetensors").write_bytes(ONE)
    registry = Registry(BASE, sources=[folder])
    assert registry.entry("task").hides == ()
    registry.put("task", TWO)
    assert told(caplog) == ["task: the folder's file is hidden by what was uploaded"]
    assert registry.entry("task").hides == ("folder",)
    registry.put("task", ONE)
    registry.load("task", "task.safetensors", replace=True)
    assert told(caplog) == []
    assert registry.entry("task").hides == ("uploaded", "folder")
    registry.remove("task")
    registry.remove("task")
    assert registry.entry("task").hides == ()


def test_a_file_that_an_upload_hides(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(BASE, sources=[folder], state_dir=tmp_path / "state")
    registry.put("task", TWO)
    (folder / "task.safetensors").write_bytes(ONE)
    registry.scan()
    registry.scan()
    file = folder.resolve() / "task.safetensors"
    hidden = f"task: {file} is hidden by what was uploaded"
    assert told(caplog) == [hidden]
    registry.close()
    registry = Registry(BASE, sources=[folder], state_dir=tmp_path / "state")
    assert told(caplog) == [hidden]
    registry.close()


def test_an_upload_that_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(BASE, state_dir=tmp_path)
    registry.put("task", ONE)
    registry.close()
    (tmp_path / "pointers" / "task.json").write_text("{")
    Registry(BASE, state_dir=tmp_path).close()
    assert any("the upload task is not served as it was: " in line for line in told(caplog))
