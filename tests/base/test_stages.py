"""The start: every stage is told with its seconds, and nothing is silent for long."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest

from reft_runtime.base import stages
from reft_runtime.base.stages import stage


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_stage_tells_its_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with stage("Loading"):
        pass
    assert told(caplog) == ["Loading: 0.0 s"]


def test_a_long_stage_says_that_it_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stages, "SILENT_SECONDS", 0.001)
    seen = threading.Event()

    def see(record: logging.LogRecord) -> bool:
        seen.set()
        return True

    caplog.handler.addFilter(see)
    with stage("Loading"):
        assert seen.wait(10)
    first, *_, last = told(caplog)
    assert first.endswith(" s so far")
    assert not last.endswith("so far")


def test_the_lines_of_a_long_stage_come_less_and_less_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    pauses: list[float | None] = []

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return len(pauses) == 7

    monkeypatch.setattr(stages, "threading", SimpleNamespace(Event=Ended, Thread=threading.Thread))
    with stage("Loading"):
        pass
    assert pauses == [3, 6, 12, 24, 48, 60, 60]
    assert len(told(caplog)) == 7


def test_a_stage_that_fails_tells_no_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="broken"), stage("Loading"):
        raise ValueError("broken")
    assert told(caplog) == []


def test_no_thread_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    before = threading.active_count()
    with stage("Loading"):
        assert threading.active_count() == before
