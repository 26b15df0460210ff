"""How the tests read transcripts."""

from __future__ import annotations

from tests.helpers.documents import Command, commands, is_shown


def test_commands_go_over_lines() -> None:
    text = "$ one \\\n  two\nprinted\n\n$ three '{\n  $ four}' # it's\n$ five\n5\n"
    assert commands(text) == [
        Command("one \\\n  two", "printed\n\n"),
        Command("three '{\n  $ four}' # it's", ""),
        Command("five", "5\n"),
    ]


def test_what_is_shown() -> None:
    shown = "in 105 s\n...\nloss 0.5, done\n"
    assert is_shown(shown, "in 7.5 s\nloss 12,000, done\n")
    assert is_shown(shown, "in 1 s\n\nmore\nand more\nloss 1, done")
    assert not is_shown(shown, "in 1 s\nmore\nloss 1, done, nearly\n")
    assert not is_shown(shown, "in 1 s\nmore\n")
    assert is_shown("It is ... far.", "It is not so far.\n")
    assert not is_shown("It is ... far.", "It is not so far away.\n")
    assert not is_shown("", "something\n")
