"""Calls whose parameters are texts between tags of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from reft_runtime.errors import InvalidRequest
from server.schemas.tools import NAME
from server.tools.syntax import (
    SAID,
    Call,
    Functions,
    Rules,
    Schema,
    joined,
    kinds_of,
    listed_values,
    others_of,
    properties_of,
    types_of,
    value_of,
)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A function's name, and each parameter's name and value, with tags around them.

    These are what is written: before the parameters, with the function's name for `{}`; before a
    value, with the parameter's name; the end of a value; what stands between all these, in Lark's
    notation; and what ends a call. With `lines` values may stand on lines of their own.
    """

    head: str
    open: tuple[str, ...]
    close: str
    gap: str
    foot: str
    lines: bool = True

    @property
    def closes(self) -> bool:
        """Whether a text shows that its last call has ended, without the end of its tag."""
        return bool(self.foot)

    def parsed(self, text: str, functions: Functions, *, exact: bool) -> list[Call]:
        """The calls that `text` is; none if it is anything else."""
        patterns = _patterns(self, exact=exact)
        calls: list[Call] = []
        at = 0
        while head := patterns.head.match(text, at):
            arguments, at = self._arguments(
                text, head.end(), functions.get(head["name"], {}), exact=exact
            )
            foot = patterns.foot.match(text, at)
            if foot is None:
                return []
            calls.append((head["name"], joined(arguments)))
            at = foot.end()
        return calls if not text[at:].strip() else []

    def _arguments(
        self, text: str, at: int, root: Schema, *, exact: bool
    ) -> tuple[dict[str, str], int]:
        """The arguments from `at` on, each as JSON, and where they end."""
        patterns = _patterns(self, exact=exact)
        schemas, others = properties_of(root), root.get("additionalProperties")
        other = others if isinstance(others, Mapping) else {}
        arguments = dict[str, str]()
        while one := patterns.parameter.match(text, at) or patterns.unclosed.match(text, at):
            key, value, at = one["key"].strip(), one["value"], one.end()
            for lost in () if exact else patterns.key.finditer(value):
                # Another parameter begins within: this one has no end.
                if lost["key"].strip() in schemas.keys() - arguments.keys() - {key}:
                    value, at = value[: lost.start()], one.start("value") + lost.start()
                    break
            arguments[key] = value_of(value, schemas.get(key, other), root)
        return arguments, at

    def rule(self, name: str, parameters: Schema, rules: Rules) -> str:
        """The right side of a Lark rule of calls of one function."""
        properties, required = properties_of(parameters), parameters.get("required")
        steps = [rules.text(self.head.format(name)), self.gap]
        for key, schema in properties.items():
            value = self._value(f"{name}.{key}", schema, parameters, rules)
            step = f"{self._open(json.dumps(key), rules)} {value} {self.gap}"
            rules.spend(len(step))
            must = isinstance(required, list) and key in required
            steps.append(step if must else f"({step})?")
        others = others_of(parameters)
        if others is not None:
            other = rules.other_key(r"/[^<>=\n]+/", properties)
            value = self._value(f"{name}.*", others, parameters, rules)
            steps.append(f"({self._open(other, rules)} {value} {self.gap})*")
        return " ".join([*steps, rules.text(self.foot)])

    def _open(self, key: str, rules: Rules) -> str:
        """What stands before the value of a parameter, whose name is `key` in Lark's notation."""
        first, *more = self.open
        before, behind = map(rules.text, first.split("{}"))
        return f" {self.gap} ".join([f"{before} {key} {behind}", *map(rules.text, more)])

    def _value(self, path: str, schema: Schema, root: Schema, rules: Rules) -> str:
        """A value and the text that closes it. What is not text is JSON on one line."""
        close = rules.text(self.close)
        kinds = kinds_of(schema, root)
        rules.spend(len(kinds))
        values = listed_values(kinds)
        if values is not None:
            texts = [one if isinstance(one, str) else json.dumps(one) for one in values]
            return f"({' | '.join(map(json.dumps, texts))}) {close}"
        types = types_of(kinds)
        if types and "string" not in types:
            return f"{rules.json(schema, root)} {close}"
        keys = {key for one in kinds for key in one.keys() - SAID - {"type"}}
        if rules.strict and (unknown := min(keys, default=None)):
            raise InvalidRequest(
                f"tools: {path}: this model writes texts without quotes, and {unknown!r} of one "
                "cannot be forced; leave it out, or strict.",
                param="tools",
            )
        return self._text(rules)

    def _text(self, rules: Rules) -> str:
        """Any text that does not end the call, and what closes it."""
        tag = self.close.strip()
        close, call = (re.escape(text).replace("/", r"\/") for text in (tag, rules.end))
        if rules.token_id(tag) is not None:
            rules.more["VALUE"] = f"/(?s:.+)/ & ~/(?s:.*)({close}|{call})(?s:.*)/"
            return f"VALUE? {rules.text(self.close)}"
        early = f"(?s:.*){call}(?s:.*)"
        if self.close != tag:  # it stands on a line of its own, and nowhere else
            early += rf"|((?s:.*)[^\n])?{close}(?s:.*)"
            close = rf"\n{close}"
        rules.more["value[lazy]"] = f"/(?s:.*){close}/ & ~/{early}/"
        return "value"


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Regular expressions by which calls are read."""

    head: re.Pattern[str]
    key: re.Pattern[str]
    parameter: re.Pattern[str]
    unclosed: re.Pattern[str]
    """The last parameter of a call, if its value has no end."""

    foot: re.Pattern[str]


@cache
def _patterns(syntax: Tagged, *, exact: bool) -> _Patterns:
    """How calls are read: with `exact` just as they are written."""
    before, behind = syntax.head.strip().split("{}")
    head = rf"\s*{re.escape(before)}(?P<name>{NAME}){re.escape(behind)}"
    another = rf"\s*{re.escape(before)}{NAME}{re.escape(behind)}"
    foot = r"\Z"
    if syntax.foot:
        foot = rf"{re.escape(syntax.foot.strip())}(?={another}|\s*\Z)"
    first, *more = (text.strip() for text in syntax.open)
    before, behind = map(re.escape, first.split("{}"))
    key = rf"(?>{before}(?P<key>[^\n]+?){behind})" + "".join(
        rf"\s*{re.escape(one)}" for one in more
    )
    line = syntax.open[-1].removeprefix(syntax.open[-1].strip())
    close = re.escape(syntax.close)
    if syntax.lines and not exact:
        line, close = r"\n?", rf"\n?{re.escape(syntax.close.strip())}"
    # A value may have the text of an end in it, but not where the call goes on as behind one.
    value = rf"\s*{key}{line}(?P<value>.*?)"
    parameter = rf"{value}{close}(?=\s*({before}|{foot}))"
    unclosed = "(?!)" if exact else rf"{value}{line}(?={foot})"
    patterns = (head, rf"(\A|\n){key}", parameter, unclosed, rf"\s*{foot}")
    return _Patterns(*(re.compile(pattern, re.DOTALL) for pattern in patterns))


QWEN = Tagged(
    head="\n<function={}>",
    open=("<parameter={}>\n",),
    close="\n</parameter>",
    gap='"\\n"',
    foot="</function>\n",
)
"""As Qwen 3 Coder, Qwen 3.5 and later, and Nemotron 3 write them."""

SEED = replace(QWEN, open=("<parameter={}>",), close="</parameter>")
"""As Seed-OSS writes them."""

MINIMAX = replace(
    SEED, head='<invoke name="{}">', open=('<parameter name="{}">',), foot="</invoke>\n"
)
"""As MiniMax M2 writes them."""

GLM = Tagged(
    head="{}",
    open=("<arg_key>{}</arg_key>", "<arg_value>"),
    close="</arg_value>",
    gap='"\\n"?',
    foot="",
    lines=False,
)
"""As GLM 4.5 and later write them."""

HY = replace(GLM, head="<tool_call>{}<tool_sep>", foot="</tool_call>\n")
"""As Hunyuan 3 writes them."""
