"""Calls whose parameters are texts between tags of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from reft_runtime.errors import InvalidRequest
from server.schemas.tools import NAME
from server.tools.syntax import (
    MORE_KEYS,
    SAID,
    Functions,
    Rules,
    Schema,
    joined,
    json_rule,
    kinds_of,
    listed_values,
    properties_of,
    types_of,
    value_of,
)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A function's name, and each parameter's name and value, with tags around them.

    `call` matches a whole call, with the groups `name` and `body`; `parameter` one of the body's
    parameters, with the groups `key` and `value`. The others are what is written: before the
    parameters, with the function's name for `{}`; before a value, with the parameter's name; the
    end of a value; what stands between all these, in Lark's notation; and what ends a call.
    """

    call: re.Pattern[str]
    parameter: re.Pattern[str]
    head: str
    open: tuple[str, ...]
    close: str
    gap: str
    foot: str

    def parsed(self, text: str, functions: Functions) -> tuple[str, str] | None:
        """Name, and arguments as JSON, of the call that `text` is; None if it is none."""
        found = self.call.fullmatch(text)
        if found is None:
            return None
        root = functions.get(found["name"], {})
        schemas, others = properties_of(root), root.get("additionalProperties")
        other = others if isinstance(others, Mapping) else {}
        arguments = dict[str, str]()
        body, at = found["body"], 0
        while one := self.parameter.match(body, at):
            key, at = one["key"].strip(), one.end()
            arguments[key] = value_of(one["value"], schemas.get(key, other), root)
        return None if body[at:].strip() else (found["name"], joined(arguments))

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
        others = parameters.get("additionalProperties", bool(MORE_KEYS & parameters.keys()))
        if others is not False:
            names = " | ".join(map(json.dumps, properties))
            other = f"KEY{len(rules.more)}"
            rules.more[other] = r"/[^<>=\n]+/" + (f" & ~({names})" if names else "")
            schema = others if isinstance(others, Mapping) else {}
            value = self._value(f"{name}.*", schema, parameters, rules)
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
            definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
            return f"{json_rule({**definitions, **schema}, strict=rules.strict)} {close}"
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
        close, call = (text.replace("/", r"\/") for text in (tag, "</tool_call>"))
        if rules.token_id(tag) is not None:
            rules.more["VALUE"] = f"/(?s:.+)/ & ~/(?s:.*)({close}|{call})(?s:.*)/"
            return f"VALUE? {rules.text(self.close)}"
        early = f"(?s:.*){call}(?s:.*)"
        if self.close != tag:  # it stands on a line of its own, and nowhere else
            early += rf"|((?s:.*)[^\n])?{close}(?s:.*)"
            close = rf"\n{close}"
        rules.more["value[lazy]"] = f"/(?s:.*){close}/ & ~/{early}/"
        return "value"


QWEN = Tagged(
    call=re.compile(rf"\s*<function=(?P<name>{NAME})>(?P<body>.*)</function>\s*", re.DOTALL),
    parameter=re.compile(
        r"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>(?=\s*(<parameter=|\Z))",
        re.DOTALL,
    ),
    head="\n<function={}>",
    open=("<parameter={}>\n",),
    close="\n</parameter>",
    gap='"\\n"',
    foot="</function>\n",
)
"""As Qwen 3 Coder, Qwen 3.5 and later, and Nemotron 3 write them."""

GLM = Tagged(
    call=re.compile(rf"\s*(?P<name>{NAME})\s*(?P<body>(<arg_key>.*)?)", re.DOTALL),
    parameter=re.compile(
        r"\s*<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
        r"(?=\s*(<arg_key>|\Z))",
        re.DOTALL,
    ),
    head="{}",
    open=("<arg_key>{}</arg_key>", "<arg_value>"),
    close="</arg_value>",
    gap='"\\n"?',
    foot="",
)
"""As GLM 4.5 and later write them."""
