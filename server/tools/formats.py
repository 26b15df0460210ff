"""What a format is in which models write tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.schemas.tools import NAME
from server.settings import ToolParser
from server.tools.pythonic import Pythonic
from server.tools.syntax import Syntax

_MARK = re.compile(r"<[^<>]*>|[^\s<]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How one family of models writes calls: a tag, calls behind it, and an end.

    `tokens` are the texts, the tag first, that a model may have as single tokens.
    """

    name: ToolParser
    tag: str
    open: str = ""
    """Text between a tag and its first call."""

    more: str | None = None
    """Text between two calls behind one tag; None if each has its own tag."""

    end: str = ""
    """Text behind the last call of a tag."""

    between: str = ""
    """Text between an end and the next tag."""

    tokens: tuple[str, ...]
    bare: str = ""
    """What a call begins with where an answer may begin with one that has no tag."""

    id_length: int | None = None
    """Length of a call's id if the chat templates want a certain one."""

    @property
    def ends(self) -> tuple[str, ...]:
        """The marks that `end` has, one behind the other."""
        return marks_of(self.end)

    @property
    def closing(self) -> str:
        """The tag behind the calls; empty if there is none."""
        return self.ends[-1] if self.end.endswith(">") else ""

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str | None:
        """Calls as a model writes them, each as OpenAI's with its arguments as an object.

        None for a format whose chat templates all write calls themselves.
        """
        functions = [call["function"] for call in calls]
        each = [self._call(one["name"], one["arguments"]) for one in functions]
        known = [one for one in each if one is not None]
        if len(known) < len(each):
            return None
        if self.more is None:
            return self.between.join(f"{self.tag}{self.open}{one}{self.end}" for one in known)
        return f"{self.tag}{self.open}{self.more.join(known)}{self.end}"

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat(Format):
    """Calls whose arguments are a JSON object.

    Each is an object, with a `name` and the arguments, or a name and behind it the arguments alone.
    """

    key: str = "arguments"
    """Key of the arguments in a call's object."""

    lead: str | None = r"\s*"
    """Regular expression of what may stand between the tag and the first object, if any may."""

    named: str | None = None
    """Regular expression of what stands before arguments alone, with the group `direct`: the name.
    """

    direct: tuple[str, str, str] | None = None
    """What is written before a name without an object, behind it, and behind the arguments; `#` is
    any number. None if the chat templates write objects."""

    def opening(self, *, exact: bool) -> re.Pattern[str]:
        """What stands between a tag, or `more`, and the JSON that is read next.

        With `exact` it is all before the arguments, with the group `name`; else it is all before
        the call's object. In both cases a group `direct` holds the name where there is no object.
        """
        either = []
        if self.lead is not None:
            key = rf'"name"\s*:\s*"(?P<name>{NAME})"\s*,\s*"{self.key}"\s*:\s*'
            first = rf'(?=\{{\s*"(name|id|type|{self.key})")'
            either.append(self.lead + (rf"\{{\s*{key}(?=\{{)" if exact else first))
        if self.named is not None:
            either.append(rf"\s*{self.named}\s*(?=\{{)")
        return re.compile("|".join(either))

    def around(self, name: str) -> tuple[str, str]:
        """What is written before the arguments of a call, and behind them; `#` is any number."""
        if self.direct is None:
            return f'{{"name": "{name}", "{self.key}": ', "}"
        before, behind, foot = self.direct
        return f"{before}{name}{behind}", foot

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        before, behind = self.around(name)
        return f"{before.replace('#', '0')}{json.dumps(arguments, ensure_ascii=False)}{behind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntaxFormat(Format):
    """Calls in a syntax of their own between a tag and its end."""

    syntax: Syntax
    head: str | None = None
    """What a call begins with of which models leave the tag out at times, but not the end."""

    begin: re.Pattern[str] | None = None
    """How calls begin, as far as they are there, that no tag ends; None if one does."""

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        return self.syntax.written(name, arguments) if isinstance(self.syntax, Pythonic) else None


def marks_of(text: str) -> tuple[str, ...]:
    """The marks that stand in a text, without the blanks between them."""
    return tuple(_MARK.findall(text))
