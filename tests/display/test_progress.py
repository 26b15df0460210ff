"""What long work shows: a bar in a terminal, lines now and then in a file."""

from __future__ import annotations

import io
import sys

import pytest

from reft_runtime import progress
from reft_runtime.progress import bar


def written(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """What standard error has after twenty steps, with another piece of work within."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    with bar(total=20, desc="Training", unit="step") as shown:
        for _ in range(20):
            shown.update()
            shown.set_postfix({"loss": "1.5"}, refresh=False)
        list(bar(range(3), desc="Evaluating", leave=False))
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\rTraining: 100%|" in written(monkeypatch, terminal=True)


def test_a_file_gets_whole_lines_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, terminal=False) == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    lines = written(monkeypatch, terminal=False)
    assert all(line.isprintable() for line in lines.splitlines())
    assert "Training: 20 of 20 in 00:00, " in lines
    assert "step/s, loss=1.5\n" in lines
    assert "Evaluating: 2 of 3 in 00:00, " in lines


def test_a_process_without_standard_error_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", None)
    assert list(bar(range(3), desc="Answers")) == [0, 1, 2]
