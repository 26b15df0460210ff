"""Grammars that force a model to write calls in its format, in llguidance's notation of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from reft_runtime.errors import InvalidRequest
from reft_runtime.reasoning import Channels, TokenId
from server.tools.formats import HARMONY, Format, JsonFormat, SyntaxFormat
from server.tools.syntax import MORE_KEYS, Rules, json_rule, term

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
    tag, lines = term(form.tag, token_id), ["%llguidance {}"]
    if free and not form.bare:
        # A text contains no tag, also if it is written in other tokens than the tag's own.
        spelled = re.escape(form.tag).replace("/", r"\/")
        lines.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){spelled}(?s:.*)/")
        if token_id(form.tag) is None:
            tag = "head"
            lines.append(f"head[lazy]: /(?s:.*){spelled}/")
    elif free:
        lines.append(r"TEXT: /\s*[^{\s](?s:.*)/")
    more: dict[str, str] = {}
    turn, between = _turn(form, tag, token_id, many=many)
    some = f"turn ({between} turn)*" if many and between is not None else "turn"
    if free and form.bare:
        lines.append(f"start: TEXT? | {tag}? turn")
    elif free:
        repeat = "*" if many else "?"
        lines.append(f"start: TEXT? (turn TEXT?){repeat}")
    elif answer is not None:
        # Both may begin with a brace: then a tag tells the calls from the answer.
        calls = f"{tag} {some}" if form.bare else some
        lines.append(f"start: {calls} | {json_rule(answer, strict=True)}")
    else:
        lines.append(f"start: {some}")
    written = [_call(form, function, token_id, more) for function in functions]
    lines += [f"turn: {turn}", f"call: {' | '.join(written)}"]
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


def _turn(form: Format, tag: str, token_id: TokenId, *, many: bool) -> tuple[str, str | None]:
    """What a tag brings, and what stands before another tag; None if there is only one tag."""
    end = term(form.end or "", token_id)
    if isinstance(form, SyntaxFormat):
        return f"{tag} call {end}", json.dumps(form.between)
    assert isinstance(form, JsonFormat)
    if form.bare:
        return "call", None
    if form.direct:
        return f"{tag} call", ""
    if form.more is not None:
        more = f'("{form.more} " call)*' if many else ""
        return f'{tag} " "? "[" call {more} "]"', None
    return f'{tag} "\\n" call "\\n" {end}', '"\\n"'


def _call(form: Format, function: Function, token_id: TokenId, more: dict[str, str]) -> str:
    name, parameters, strict = function
    if isinstance(form, SyntaxFormat):
        return form.syntax.rule(name, parameters, Rules(token_id, strict, more))
    assert isinstance(form, JsonFormat)
    schema = json_rule(_arguments(parameters), strict=strict)
    if form.direct:
        return f"{json.dumps(name)} {term('[ARGS]', token_id)} {schema}"
    head = f'{{"name": "{name}", "{form.key}": '
    return f'{json.dumps(head)} {schema} "}}"'


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: an object.

    Properties that it does not list are left out unless it says something of them.
    """
    schema = {"type": "object", "properties": {}} | parameters
    return schema if MORE_KEYS & schema.keys() else {"additionalProperties": False} | schema
