"""Where things are kept between runs."""

from pathlib import Path

import pytest

from reft_runtime.machine.cache import cache_folder


def test_cache_folder_without_reft_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "reft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "reft"


def test_reft_cache_may_name_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
