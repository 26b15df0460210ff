"""How a grammar is given to llguidance, and within which bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, assert_never

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from reft_runtime.sampling import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_BYTES = {
    "json_schema": 2**18,
    "json_object": 0,
    "regex": 2**16,
    "choice": 2**18,
    "lark": 2**16,
}
"""Longest source, in bytes of UTF-8, by kind."""

STACK_BYTES = 2**10 * max(MAX_BYTES.values()) + 2**23
"""Stack of a thread that compiles: chains of references take up to half a KiB a byte of source."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_items_in_row=500,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""Bounds of one step: the worst grammar known takes 17 ms for one, where the defaults allow 0.7 s.

`max_lexer_states` bounds what a grammar in use takes to some 40 MB.
"""

ONE_LINE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""JSON on one line, as Python writes it: known separators need no sampling. Nothing is ignored."""

_SHOWN = re.compile(r"\s*(\d+ \||\^\s*$)")
"""A line of an error that shows the source, or points into it."""

_NO_URI = re.compile(r"[^A-Za-z0-9\-._~:/?#@!$&'()*+,;=%]")
"""A character that stands in no URI that could name a schema."""

MOST_SAID = 500
"""Most characters of an error of the library that are passed on."""


def read_tokenizer(
    definition: str | None, vocab_size: int, eos_ids: Collection[int]
) -> LLTokenizer:
    """The library's form of a tokenizer, of the content of its `tokenizer.json`.

    Takes some tenths of a second. Raises `ValueError` for one that cannot be read.
    """
    if definition is None:
        raise ValueError("it has no tokenizer.json")
    return LLTokenizer(definition, n_vocab=vocab_size, eos_token=sorted(eos_ids) or None)


def matcher_of(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Compile a grammar; what is wrong with it says `fault_of`.

    Raises `ValueError` if the source is no JSON where it has to be.
    """
    written = _written(grammar)
    if grammar.frame:
        is_json = written.lstrip().startswith("{")
        [answer] = json.loads(written)["grammars"] if is_json else [{"lark_grammar": written}]
        framed = [{"lark_grammar": grammar.frame}, {**answer, "name": "answer"}]
        written = json.dumps({"grammars": framed})
    return LLMatcher(tokenizer, written, log_level=0, limits=LIMITS)


def fault_of(matcher: LLMatcher) -> str:
    """What is wrong with a grammar, in one line; empty if nothing is."""
    said = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    if said == ["NoExtensionBias"]:
        return "no token can begin an answer of this form"
    words = " ".join(line for line in said if not _SHOWN.match(line)).split()
    return " ".join(words)[:MOST_SAID]


def schema_of(grammar: Grammar) -> dict[str, Any]:
    """The JSON Schema of a grammar that is one, or of any JSON object.

    Raises `ValueError` if its source is no JSON, or no schema.
    """
    if grammar.kind == "json_object":
        return {"type": "object"}
    schema = json.loads(grammar.source)
    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object, true or false")
    return schema


def _written(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema" | "json_object":
            schema = dict(schema_of(grammar))
            # The library's own key would change separators, and what is refused.
            schema.pop("x-guidance", None)
            if _NO_URI.search(str(schema.get("$id", ""))):
                # A title, which no reference can name; the library would refuse it.
                del schema["$id"]
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=ONE_LINE)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            texts = " | ".join(json.dumps(text) for text in json.loads(grammar.source))
            # One terminal: as many rules would be many places at once.
            return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {texts}")
        case "lark":
            if grammar.source.lstrip().startswith("{"):  # would be read as the library's own JSON
                raise ValueError("a grammar in Lark's notation does not begin with a brace")
            return LLMatcher.grammar_from_lark(grammar.source)
    assert_never(grammar.kind)
