"""Grammars that force a model to write calls in its format, in llguidance's notation of Lark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reft_runtime.errors import InvalidRequest
from reft_runtime.reasoning import Channels, TokenId
from server.tools.families import HARMONY
from server.tools.formats import Format, JsonFormat, SyntaxFormat
from server.tools.syntax import MORE_KEYS, Rules, json_rule, spelled

Function = tuple[str, dict[str, Any], bool]
"""A function: its name, the JSON Schema of its parameters, and whether that is strict."""


def tool_grammar(
    form: Format,
    functions: Sequence[Function],
    token_id: TokenId,
    *,
    many: bool,
    free: bool = False,
    answer: dict[str, Any] | None = None,
) -> str:
    """A grammar whose every answer has calls of `functions` only: one, or with `many` any number.

    A `free` answer may be text, have calls, or both; otherwise it is calls alone. With `answer`, a
    JSON Schema, it is calls or a JSON value by that. The arguments are by the functions' schemas;
    what llguidance does not know of one that is not strict is not forced.
    """
    if form is HARMONY:
        return _on_channels(functions, token_id, free=free, answer=answer)

    def text(written: str) -> str:
        return spelled(written, token_id)

    tag, lines = text(form.tag), ["%llguidance {}"]
    if free and not form.bare:
        # A text contains no tag, also if it is written in other tokens than the tag's own.
        letters = re.escape(form.tag).replace("/", r"\/")
        lines.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){letters}(?s:.*)/")
        if token_id(form.tag) is None:
            tag = "head"
            lines.append(f"head[lazy]: /(?s:.*){letters}/")
    elif free:
        lines.append(rf"TEXT: /\s*[^{re.escape(form.bare)}\s](?s:.*)/")
    more: dict[str, str] = {}
    written = [_call(form, function, token_id, more) for function in functions]
    # Some templates write a blank before a list.
    opened = '" "? "["' if form.open == "[" else text(form.open)
    each = f"call ({text(form.more)} call)*" if many and form.more is not None else "call"
    turn = f"{opened} {each} {text(form.end)}"
    turns = f"turn ({text(form.between)} turn)*" if many and form.more is None else "turn"
    if form.bare:
        # Both calls and an answer may begin alike: then a tag tells the calls from the answer.
        start = f"{tag} turn" if answer is not None else f"TEXT? | {tag}? turn" if free else "turn"
    else:
        turn = f"{tag} {turn}"
        start = f"TEXT? (turn TEXT?){'*' if many else '?'}" if free else turns
    if answer is not None:
        start += f" | {json_rule(answer, strict=True)}"
    lines += [f"start: {start}", f"turn: {turn}", f"call: {' | '.join(written)}"]
    return "\n".join([*lines, *(f"{name}: {rule}" for name, rule in more.items())]) + "\n"


def _on_channels(
    functions: Sequence[Function],
    token_id: TokenId,
    *,
    free: bool,
    answer: dict[str, Any] | None,
) -> str:
    """The same for a model that writes on channels: thoughts may stand before all else."""
    channels = Channels.of(token_id)
    if channels is None:
        raise InvalidRequest(
            "tools: this model's tokenizer has no tokens for channels; start the server without "
            "--tool-parser harmony.",
            param="tools",
        )
    calls = [
        f"{channels.called(name)} {json_rule(_arguments(parameters), strict=strict)}"
        for name, parameters, strict in functions
    ]
    last = ["call"]
    if free:
        last.append(f"{channels.final} /(?s:.+)/?")
    elif answer is not None:
        last.append(f"{channels.final} {json_rule(answer, strict=True)}")
    before = "(thought | preamble)*" if free else "thought*"
    rules = [
        f"start: {before} ({' | '.join(last)})",
        f"thought: {channels.thought}",
        f"call: {' | '.join(calls)}",
    ]
    if free:
        rules.append(f"preamble: {channels.preamble}")
    return "\n".join(["%llguidance {}", *rules]) + "\n"


def _call(form: Format, function: Function, token_id: TokenId, more: dict[str, str]) -> str:
    name, parameters, strict = function
    if isinstance(form, SyntaxFormat):
        rules = Rules(token_id, strict, more, end=form.closing)
        return form.syntax.rule(name, parameters, rules)
    assert isinstance(form, JsonFormat)
    head, foot = form.around(name)
    began = " /[0-9]{1,4}/ ".join(spelled(part, token_id) for part in head.split("#"))
    return f"{began} {json_rule(_arguments(parameters), strict=strict)} {spelled(foot, token_id)}"


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: an object.

    Properties that it does not list are left out unless it says something of them.
    """
    schema = {"type": "object", "properties": {}} | parameters
    return schema if MORE_KEYS & schema.keys() else {"additionalProperties": False} | schema
