"""The script for devices, on the smallest shape and a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import device


def test_every_case_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    device.main("smallest", "cpu", "float32", "1,3", 1, out)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * 4
    assert "TB/s" in printed
    assert printed.count("swap in") == 3
    assert [entry["setting"]["n"] for entry in json.loads(out.read_text())] == [1, 3]
