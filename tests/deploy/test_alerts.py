"""The rules of deploy/alerts.yml, as Prometheus' own promtool evaluates them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("alerts.yml")


def test_alerts_fire_when_they_say() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Prometheus, is not installed")
    done = subprocess.run(
        [promtool, "test", "rules", CASES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
