"""The fenced blocks of a document, and the commands of a transcript with what they printed."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it stands, the word behind its fence, and its text."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = (ROOT / document).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in found
    ]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, which may go over several lines, and the text under it."""

    text: str
    printed: str


def commands(transcript: str) -> list[Command]:
    """The commands behind `$ ` of a transcript, each with what it printed."""
    found: list[Command] = []
    for line in transcript.splitlines():
        if found and _goes_on(found[-1]):
            found[-1] = Command(f"{found[-1].text}\n{line}", "")
        elif line.startswith("$ "):
            found.append(Command(line.removeprefix("$ "), ""))
        else:
            found[-1] = Command(found[-1].text, f"{found[-1].printed}{line}\n")
    return found


def _goes_on(command: Command) -> bool:
    """Whether the next line still belongs to the command, after a backslash or an open quote."""
    if command.printed:
        return False
    try:
        shlex.split(command.text, comments=True)
    except ValueError:
        return True
    return command.text.endswith("\\")


def is_shown(shown: str, printed: str) -> bool:
    """Whether a document shows what was printed: numbers aside.

    A line `...` is any lines, and `...` in a line any text.
    """
    wanted = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in _without_numbers(shown).splitlines()
    )
    return re.fullmatch(wanted, _without_numbers(printed)) is not None


def _without_numbers(text: str) -> str:
    lines = (re.sub(r"\d+(?:[.,:]\d+)*", "0", line).rstrip() for line in text.strip().splitlines())
    return "".join(f"{re.sub(r' {2,}', '  ', line)}\n" for line in lines if line)
