"""Compiles grammars for one tokenizer, within bounds, and keeps those used last."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, assert_never

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from reft_runtime.errors import InvalidRequest
from reft_runtime.grammar.place import place_of
from reft_runtime.grammar.state import GrammarState, fault_of
from reft_runtime.sampling import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_BYTES = 2**18
"""Longest grammar, in bytes of UTF-8."""

KEPT = 256
"""Compiled grammars that are kept; one takes up to some megabytes."""

_JSON: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""JSON on one line, as Python writes it: so separators are known, and cost no choice of a token."""


class GrammarCompiler:
    """Makes the first state of a grammar; safe to use from many threads.

    `tokenizer` returns the content of the tokenizer's `tokenizer.json`, None if it has none; it is
    called at the first use, which takes some tenths of a second.
    """

    def __init__(
        self, tokenizer: Callable[[], str | None], vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self._definition = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._limits = LLParserLimits(verbose_errors=False)
        self._reading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def start(self, grammar: Grammar) -> GrammarState:
        """The state before the first token of an answer.

        Raises `InvalidRequest`, which names the grammar's field and the place in it.
        """
        with self._lock:
            matcher = self._kept.get(grammar)
            if matcher is not None:
                self._kept.move_to_end(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
            with self._lock:
                self._kept[grammar] = matcher
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return GrammarState(matcher.deep_copy(), grammar.param)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        size = len(grammar.source.encode())
        if size > MAX_BYTES:
            raise InvalidRequest(
                f"{grammar.param}: {size} bytes are more than the {MAX_BYTES} that are compiled; "
                "make it smaller.",
                param=grammar.param,
            )
        tokenizer = self._read_tokenizer(grammar)
        matcher = self._match(tokenizer, _written(grammar))
        if fault := fault_of(matcher):
            place = ""
            if grammar.kind == "json_schema":
                place = place_of(
                    json.loads(grammar.source),
                    lambda part: bool(self._match(tokenizer, _of_schema(part)).get_error()),
                )
            where = f"{grammar.param}{place}"
            raise InvalidRequest(f"{where}: {fault}", param=where)
        return matcher

    def _match(self, tokenizer: LLTokenizer, written: str) -> LLMatcher:
        return LLMatcher(tokenizer, written, log_level=0, limits=self._limits)

    def _read_tokenizer(self, grammar: Grammar) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                definition = self._definition()
                try:
                    if definition is None:
                        raise ValueError("it has no tokenizer.json")
                    self._tokenizer = LLTokenizer(
                        definition, n_vocab=self._vocab_size, eos_token=self._eos_ids or None
                    )
                except ValueError as error:
                    raise InvalidRequest(
                        f"{grammar.param}: this model's tokenizer cannot be held to a form: "
                        f"{error}. Leave it out.",
                        param=grammar.param,
                    ) from None
            return self._tokenizer


def _written(grammar: Grammar) -> str:
    """A grammar as llguidance takes it."""
    match grammar.kind:
        case "json_schema":
            return _of_schema(json.loads(grammar.source))
        case "json_object":
            return _of_schema({"type": "object"})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            texts = " | ".join(json.dumps(text) for text in json.loads(grammar.source))
            return LLMatcher.grammar_from_lark(f"start: {texts}")
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)
    assert_never(grammar.kind)


def _of_schema(schema: Any) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
