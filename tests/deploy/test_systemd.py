"""The unit of deploy/systemd, as systemd reads it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings, load_settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "reft-server.service"


def values(name: str) -> list[str]:
    """What the unit says under a name, once for each line."""
    lines = (line.partition("=") for line in UNIT.read_text().splitlines())
    return [value for key, _, value in lines if key == name]


def test_systemd_takes_every_line(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / UNIT.name
    # The paths of an installation, which this machine does not have.
    text = UNIT.read_text().replace("/opt/reft-server/bin/reft", sys.executable)
    unit.write_text(text.replace("file:/opt/reft-server/README.md", "https://reft.example"))
    done = subprocess.run(
        [analyze, "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert UNIT.stem not in done.stderr, done.stderr  # an unknown name is a warning


def test_the_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(one.split("=", 1) for one in values("Environment"))
    assert given["REFT_STATE_DIR"] == f"%S/{values('StateDirectory')[0]}"
    assert given["REFT_CACHE"] == f"%C/{values('CacheDirectory')[0]}"
    for name, value in given.items():
        if name.startswith("REFT_"):
            assert name.removeprefix("REFT_").lower() in {*Settings.model_fields, "cache"}
            monkeypatch.setenv(name, value)
    load_settings({})


def test_it_waits_for_requests_and_does_not_repeat_a_wrong_option() -> None:
    [patience] = values("TimeoutStopSec")
    assert int(patience) > load_settings({}).drain_seconds + 30
    assert values("RestartPreventExitStatus") == ["2"]


def test_it_hides_no_accelerator() -> None:
    # ProtectClock allows the devices of clocks, and thereby no others.
    for name in "PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow":
        assert not values(name)
