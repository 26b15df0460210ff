"""The formats in which models write tool calls."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from server.schemas.tools import NAME
from server.settings import ToolParser


@dataclass(frozen=True, slots=True)
class Format:
    """How one family of models writes calls: a tag, and behind it JSON objects.

    A call's object has a `name` and its arguments. Where `bare` is true the tag may be missing if
    an answer begins with a call. `tokens` are the texts, the tag first, that a model may have as
    single tokens.
    """

    name: ToolParser
    tag: str
    key: str
    """Key of the arguments in a call's object."""

    lead: str
    """Regular expression of what may stand between the tag and the first object."""

    more: str | None
    """Text between two objects behind one tag; None if each has its own tag."""

    end: str | None
    """Text behind the last object of a tag."""

    tokens: tuple[str, ...]
    bare: bool = False
    direct: bool = False
    """Whether the chat templates write a name and `[ARGS]` before arguments, without an object."""

    one: bool = False
    """Whether the chat templates take one call a turn only."""

    id_length: int | None = None
    """Length of a call's id if the chat templates want a certain one."""

    def opening(self, *, exact: bool) -> re.Pattern[str]:
        """What stands between a tag, or `more`, and the JSON that is read next.

        With `exact` it is all before the arguments, with the group `name`; else it is all before
        the call's object. In both cases a group `direct` holds the name where there is no object.
        """
        key = rf'"name"\s*:\s*"(?P<name>{NAME})"\s*,\s*"{self.key}"\s*:\s*'
        first = rf'(?=\{{\s*"(name|id|type|{self.key})")'
        listed = self.lead + (rf"\{{\s*{key}(?=\{{)" if exact else first)
        if "[ARGS]" not in self.tokens:
            return re.compile(listed)
        return re.compile(rf"{listed}|\s*(?P<direct>{NAME})(\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{{)")


HERMES = Format(
    "hermes",
    tag="<tool_call>",
    key="arguments",
    lead=r"\s*",
    more=None,
    end="</tool_call>",
    tokens=("<tool_call>", "</tool_call>"),
)
LLAMA3 = Format(
    "llama3",
    tag="<|python_tag|>",
    key="parameters",
    lead=r"\s*",
    more=";",
    end=None,
    tokens=("<|python_tag|>",),
    bare=True,
    one=True,
)
MISTRAL = Format(
    "mistral",
    tag="[TOOL_CALLS]",
    key="arguments",
    lead=r"\s*(\[\s*)?",
    more=",",
    end="]",
    tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    id_length=9,
)

FORMATS: dict[ToolParser, Format] = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}

_OTHERS = ("<function=", "<arg_key>", "<parameter=")
"""What templates say whose models write calls with the tag of Hermes, but not as JSON."""


def find_format(template: str) -> Format | None:
    """The format in which a chat template writes calls; None if it is not one of these."""
    if MISTRAL.tag in template:
        return replace(MISTRAL, direct="[ARGS]" in template)
    if HERMES.tag in template and not any(mark in template for mark in _OTHERS):
        return HERMES
    if LLAMA3.tag in template or "<|start_header_id|>ipython" in template:
        return LLAMA3
    return None
