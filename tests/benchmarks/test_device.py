"""The script for devices, on the smallest shape and a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import device, device_attention, device_peers
from reft_runtime.kv.page_attention import GatheredAttention


def test_every_case_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    device.main("smallest", "cpu", "float32", "1,3", 100, 1, out)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * 6 + 2 + 6
    assert "TB/s" in printed
    assert printed.count("swap in") == 5
    settings = [entry["setting"] for entry in json.loads(out.read_text())]
    assert [(each.get("n"), each.get("prompt")) for each in settings] == [
        (1, None),
        (3, None),
        (None, 100),
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_that_agree_are_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    ask = ("smallest", "cpu", "float32", "1,3", "5,40", 150, 1, out)
    device_attention.main(*ask)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5 * 2
    assert len(json.loads(out.read_text())) == 5
    real = GatheredAttention.__call__
    monkeypatch.setattr(GatheredAttention, "__call__", lambda *args: real(*args) + 1e-3)
    with pytest.raises(SystemExit, match=r"flex_attention differs from the reference by 0\.001"):
        device_attention.main(*ask)


def test_transformers_beside_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Its continuous batching takes a minute to begin on a CPU.
    ask = ("smallest", "cpu", "float32", "2", device_peers.GENERATE, 1, tmp_path / "f.json")
    device_peers.main(*ask)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
