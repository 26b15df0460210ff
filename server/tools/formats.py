"""The formats in which models write tool calls."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from reft_runtime.reasoning import CHANNEL, MESSAGE
from server.channels import CALL
from server.schemas.tools import NAME
from server.settings import ToolParser
from server.tools.gemma import QUOTE, Gemma
from server.tools.syntax import Syntax
from server.tools.tagged import GLM, QWEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How one family of models writes calls: a tag, calls behind it, and an end.

    Where `bare` is true the tag may be missing if an answer begins with a call. `tokens` are the
    texts, the tag first, that a model may have as single tokens.
    """

    name: ToolParser
    tag: str
    end: str | None
    """Text behind the last call of a tag."""

    tokens: tuple[str, ...]
    bare: bool = False
    one: bool = False
    """Whether the chat templates take one call a turn only."""

    id_length: int | None = None
    """Length of a call's id if the chat templates want a certain one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat(Format):
    """Calls that are JSON objects, each with a `name` and its arguments."""

    key: str
    """Key of the arguments in a call's object."""

    lead: str | None
    """Regular expression of what may stand between the tag and the first object, if any may."""

    more: str | None
    """Text between two objects behind one tag; None if each has its own tag."""

    named: str | None = None
    """Regular expression of what stands between a name without an object, and its arguments."""

    direct: bool = False
    """Whether the chat templates write names without an object."""

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
            either.append(rf"\s*(?P<direct>{NAME}){self.named}\s*(?=\{{)")
        return re.compile("|".join(either))


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntaxFormat(Format):
    """Calls in a syntax of their own, one between each tag and its end."""

    end: str
    syntax: Syntax
    between: str = "\n"
    """Text between a call and the next one's tag."""

    head: str | None = None
    """What a call begins with of which models leave the tag out at times, but not the end."""


HERMES = JsonFormat(
    name="hermes",
    tag="<tool_call>",
    key="arguments",
    lead=r"\s*",
    more=None,
    end="</tool_call>",
    tokens=("<tool_call>", "</tool_call>"),
)
LLAMA3 = JsonFormat(
    name="llama3",
    tag="<|python_tag|>",
    key="parameters",
    lead=r"\s*",
    more=";",
    end=None,
    tokens=("<|python_tag|>",),
    bare=True,
    one=True,
)
MISTRAL = JsonFormat(
    name="mistral",
    tag="[TOOL_CALLS]",
    key="arguments",
    lead=r"\s*(\[\s*)?",
    more=",",
    end="]",
    tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    named=r"(\[CALL_ID\]\w+)?\[ARGS\]",
    id_length=9,
)
HARMONY = JsonFormat(
    name="harmony",
    tag=CALL,
    key="arguments",
    lead=None,
    more=None,
    end=None,
    tokens=(),  # those of channels are kept anyway
    named=re.escape(MESSAGE),
    direct=True,
    one=True,
)
QWEN3_CODER = SyntaxFormat(
    name="qwen3_coder",
    tag="<tool_call>",
    end="</tool_call>",
    tokens=("<tool_call>", "</tool_call>"),
    syntax=QWEN,
    head="<function=",
)
GLM45 = SyntaxFormat(
    name="glm45",
    tag="<tool_call>",
    end="</tool_call>",
    tokens=(
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    syntax=GLM,
)

GEMMA4 = SyntaxFormat(
    name="gemma4",
    tag="<|tool_call>",
    end="<tool_call|>",
    tokens=("<|tool_call>", "<tool_call|>", QUOTE),
    syntax=Gemma(),
    between="",
)

_ALL: tuple[Format, ...] = (HERMES, LLAMA3, MISTRAL, HARMONY, QWEN3_CODER, GLM45, GEMMA4)

FORMATS: dict[ToolParser, Format] = {form.name: form for form in _ALL}


def find_format(template: str) -> Format | None:
    """The format in which a chat template writes calls; None if it is not one of these."""
    if f"{CHANNEL}commentary" in template:
        return HARMONY
    if MISTRAL.tag in template:
        return replace(MISTRAL, direct="[ARGS]" in template)
    if HERMES.tag in template:
        if "<arg_key>" in template:
            return GLM45
        return QWEN3_CODER if "<function=" in template else HERMES
    if GEMMA4.tag in template:
        return GEMMA4
    if LLAMA3.tag in template or "<|start_header_id|>ipython" in template:
        return LLAMA3
    return None
