"""What `reft --help` shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server.cli.main import GROUPS, app, main

DOCUMENT = Path(__file__).parents[2] / "docs/cli.md"


def test_every_command_is_in_one_group_in_the_order_of_the_document() -> None:
    commands = [name for names in GROUPS.values() for name in names]
    assert sorted(commands) == sorted(typer.main.get_group(app).commands)
    table = DOCUMENT.read_text().partition("| command | |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| \*\*(.+)\*\* \|", table, re.MULTILINE) == list(GROUPS)
    told = re.findall(r"`reft (\w+)", table)
    assert list(dict.fromkeys(told)) == commands


def test_a_command_has_one_whole_line_on_eighty_columns() -> None:
    lines = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout.splitlines()
    for title, names in GROUPS.items():
        first = lines.index(f"{title}:") + 1
        below = lines[first : first + len(names)]
        assert [line.split()[0] for line in below] == list(names)
        assert all(line.endswith(".") and not line.endswith("...") for line in below)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["serve", "demo"], ". A model is given by --model demo. --help"),
        (["serve", "a/b", "c"], ". A model is given by --model a/b. --help"),
        (["ls", "a", "b"], " (a b). --help"),
        (["train", "a.jsonl", "b.jsonl"], " (b.jsonl). --help"),
    ],
)
def test_a_model_that_is_no_option_is_told_to_be_one(
    given: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["reft", *given])
    monkeypatch.setattr("server.cli.main._leave", sys.exit)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert told in capsys.readouterr().err
