"""The commands, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import latency, scaling
from benchmarks.measuring import SECONDS, Round
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tiny("llama", max_position_embeddings=2200).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tables_and_plots(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    every = ",".join(scaling.SECTIONS)
    scaling.main(model, "float32", "cpu", "1,4", 4, "10,12", "512,600", "1,2", every, 2, out)
    printed = capsys.readouterr().out
    assert (out / "scaling.md").read_text().strip() == printed.strip()
    for row in ("|         4 |", "|         12 |", "|     2 |", "|                64 |"):
        assert row in printed
    for name in scaling.SECTIONS:
        assert "<svg" in (out / f"{name}.svg").read_text()


def test_change_of_speed_is_that_from_the_first_count_to_the_last() -> None:
    rounds: list[Round] = [
        {str(k): {SECONDS: scale * k**0.1} for k in (1, 4, 16)} for scale in (1.0, 2.0, 3.0)
    ]
    change = scaling.change_of_speed(rounds, [1, 4, 16])
    assert change.median == pytest.approx(100 * (16**-0.1 - 1))
    assert change.low == pytest.approx(change.high)


def test_latency(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "STREAMS", 2)
    monkeypatch.setattr(latency, "LONG_PROMPT_TOKENS", 200)
    latency.main(model, "float32", 1, None)
    assert "| float32 |" in capsys.readouterr().out
