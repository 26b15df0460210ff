"""Grammars against what Python's own readers of regular expressions and JSON say."""

from __future__ import annotations

import ctypes
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jsonschema
import pytest
import regex

from reft_runtime.errors import EngineDead, InvalidRequest, Overloaded, Unavailable
from reft_runtime.grammar import GrammarCompiler, GrammarState
from reft_runtime.grammar.compiler import KEPT, MOST_WAITING
from reft_runtime.grammar.source import MAX_BYTES
from reft_runtime.grammar.state import allow_each
from reft_runtime.grammar.trial import Refusal
from reft_runtime.sampling import Grammar
from reft_runtime.text import Tokenizer
from tests.helpers.tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer

EOS = 2


TOKENIZER = Tokenizer(tiny_tokenizer(), 512)
SENTENCEPIECE = Tokenizer(tiny_sentencepiece_tokenizer(), 512)


def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    vocabulary = tokenizer.vocab_size + 5  # as models that pad theirs
    return GrammarCompiler(tokenizer.definition, vocabulary, {EOS})


COMPILER = compiler_of(TOKENIZER)


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    COMPILER.close()


def allowed(state: GrammarState, vocabulary: int = 325) -> set[int]:
    words = (ctypes.c_uint32 * -(-vocabulary // 32))()
    allow_each([state], ctypes.addressof(words), ctypes.sizeof(words), threads=1)
    return {i for i in range(vocabulary) if words[i // 32] >> i % 32 & 1}


def walked(grammar: Grammar, seed: int, most: int = 300) -> bytes | None:
    """A random answer of the grammar; None if it has not ended after `most` tokens."""
    state, text, rng = COMPILER.start(grammar), b"", random.Random(seed)
    for _ in range(most):
        token = rng.choice(sorted(allowed(state)))
        if token == EOS:
            return text
        state.advance(token)
        assert not state.fault
        text += TOKENIZER.token_bytes(token)
        if state.complete:
            return text
    return None


@pytest.mark.parametrize(
    "pattern",
    ["(the|then|them) end", "[a-f]{2,5}=[0-9]+;?", "(ab*)+c", "the( the)*\\.", "(é)|(è)+"],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE], ids=["bytes", "pieces"])
def test_tokens_are_those_that_a_match_can_go_on_with(pattern: str, tokenizer: Tokenizer) -> None:
    compiler = COMPILER if tokenizer is TOKENIZER else compiler_of(tokenizer)
    rng = random.Random(3)
    texts = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    for special in tokenizer.special_ids:
        del texts[special]
    # Of bytes, because a token may be part of a character.
    wanted = regex.compile(pattern.encode())
    for _ in range(5):
        state, text = compiler.start(Grammar("regex", pattern)), b""
        while not state.complete:
            found = allowed(state, tokenizer.vocab_size + 5)
            going_on = {
                i
                for i, piece in texts.items()
                if piece and wanted.fullmatch(text + piece, partial=True)
            }
            ends = {EOS} if wanted.fullmatch(text) else set()
            if forced := state.forced():  # the same text in other tokens is not allowed
                assert found == {forced[0]}
                assert {texts[i][:1] for i in going_on} == {texts[forced[0]][:1]}
            else:
                assert found == going_on | ends
            token = rng.choice(sorted(found))
            if token == EOS:
                break
            state.advance(token)
            text += texts[token]
            if len(text) > 30:
                break
        else:
            assert wanted.fullmatch(text)
    if compiler is not COMPILER:
        compiler.close()


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "null"}, {"type": "number", "exclusiveMinimum": 2.5, "maximum": 7}]},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/tree"}},
                "required": ["leaf"],
                "additionalProperties": False,
            }
        },
    },
    {
        "$id": "Output Format",  # no URI, so nothing can refer to it; griptape sends this one
        "$ref": "#/$defs/digits",
        "$defs": {"digits": {"type": "string", "pattern": "^\\d{3}$"}},
    },
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_random_answers_are_valid(schema: dict[str, Any]) -> None:
    grammar = Grammar("json_schema", json.dumps(schema))
    found = [text for seed in range(30) if (text := walked(grammar, seed)) is not None]
    assert len(found) > 10
    assert len(set(found)) > 3
    for text in found:
        jsonschema.validate(json.loads(text), schema)


def test_random_objects_are_json_objects() -> None:
    found = [text for seed in range(30) if (text := walked(Grammar("json_object"), seed))]
    assert found
    assert all(isinstance(json.loads(text), dict) for text in found)


def test_choices_with_quotes_and_line_ends() -> None:
    texts = ['say "yes"', "no\nway", "back\\slash", "é", "the end"]
    grammar = Grammar("choice", json.dumps(texts))
    found = {walked(grammar, seed) for seed in range(60)}
    assert found == {text.encode() for text in texts}


def test_json_is_written_on_one_line_and_its_keys_are_forced() -> None:
    state = COMPILER.start(Grammar("json_schema", json.dumps(SCHEMAS[0])))
    assert TOKENIZER.decode(state.forced()) == '{"name": "'
    free = COMPILER.start(Grammar("json_object"))
    assert TOKENIZER.decode(free.forced()) == "{"


def test_a_copy_goes_its_own_way() -> None:
    state = COMPILER.start(Grammar("regex", "[ab]{2}"))
    other = state.copy()
    a, b = TOKENIZER.encode("ab")
    state.advance(a)
    state.advance(b)
    assert state.complete
    assert not other.complete
    assert {a, b} <= allowed(other)


def test_a_token_that_is_not_allowed_is_a_fault() -> None:
    state = COMPILER.start(Grammar("regex", "[ab]{2}"))
    state.advance(TOKENIZER.encode("c")[0])
    assert state.fault
    assert state.complete


@pytest.mark.parametrize(
    ("grammar", "place", "said"),
    [
        (Grammar("regex", "(a"), "grammar", "unclosed group"),
        (Grammar("lark", "start: other"), "grammar", "unknown name"),
        (Grammar("json_schema", "false"), "grammar", "Unsatisfiable"),
        (Grammar("json_schema", '{"type": "strnig"}'), "grammar", "strnig"),
        (Grammar("json_schema", '{"$ref": "http://x/y"}'), "grammar", "http://x/y"),
        (Grammar("json_schema", '{"enum": []}'), "grammar", "empty"),
        (
            Grammar(
                "json_schema",
                '{"properties": {"ok": {}, "a": {"items": {"anyOf": [{}, {"not": {}}]}}}}',
                "response_format.json_schema.schema",
            ),
            "response_format.json_schema.schema.properties.a.items.anyOf.1",
            'Unimplemented keys: ["not"]',
        ),
        (
            Grammar("json_schema", '{"$ref": "#/$defs/x", "$defs": {"x": {"minimum": "1"}}}'),
            "grammar.$defs.x",
            "minimum",
        ),
    ],
)
def test_errors_name_the_place(grammar: Grammar, place: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.start(grammar)
    assert caught.value.param == place
    assert caught.value.message.startswith(place + ":")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_too_large() -> None:
    with pytest.raises(InvalidRequest, match=r"grammar: 65537 bytes, and at most 65536"):
        COMPILER.start(Grammar("regex", "a" * (MAX_BYTES["regex"] + 1)))


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("json_schema", '{"type": "integer", "multipleOf": 999983}'), "more than a second"),
        (Grammar("json_schema", "[]"), "it cannot be read"),
        (Grammar("json_schema", "{"), "it cannot be read"),
        (Grammar("lark", '{"grammars": [{"json_schema": {}}]}'), "a brace"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no token can begin"),
    ],
)
def test_what_would_harm_is_refused(grammar: Grammar, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.start(grammar)
    assert said in caught.value.message
    assert walked(Grammar("regex", "[ab]"), 0)  # compiled as ever


def test_many_choices() -> None:
    texts = [f"text {i}" for i in range(3000)]
    found = walked(Grammar("choice", json.dumps(texts)), 0)
    assert found is not None
    assert found.decode() in texts


def test_a_process_that_somebody_ends_refuses_nothing() -> None:
    compiler = compiler_of(TOKENIZER)
    compiler.start(Grammar("regex", "a"))
    slow = Grammar("json_schema", '{"type": "integer", "multipleOf": 999983}')
    waiting = compiler.compiling(slow)
    assert compiler._trial is not None
    assert compiler._trial._process is not None
    time.sleep(0.1)
    compiler._trial._process.kill()
    with pytest.raises(Unavailable, match="was ended; send it again"):
        waiting.result()
    assert compiler.compiling(slow) is not waiting  # it is tried again
    compiler.close()


def test_nothing_is_begun_once_it_is_closed_and_who_waits_is_told() -> None:
    compiler = compiler_of(TOKENIZER)
    kept = Grammar("regex", "a+")
    compiler.start(kept)
    waiting = [compiler.compiling(Grammar("regex", f"{n}+")) for n in range(20)]
    closing = [threading.Thread(target=compiler.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    compiler.close()
    told = [each.exception(60) for each in waiting]
    assert {type(error) for error in told} <= {EngineDead, type(None)}
    assert isinstance(told[-1], EngineDead)
    with pytest.raises(EngineDead, match="closed"):
        compiler.start(Grammar("regex", "b+"))
    assert allowed(compiler.start(kept))


def test_a_tenant_waits_for_one_grammar_of_another_not_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler, begin, order = compiler_of(TOKENIZER), threading.Event(), list[str]()

    def compile_(_: GrammarCompiler, grammar: Grammar) -> Refusal:
        assert begin.wait(60)
        order.append(grammar.source)
        return Refusal("no", "")

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_)

    def ask(numbers: Iterable[int]) -> list[Any]:
        return [compiler.compiling(Grammar("regex", f"a{n}"), "a") for n in numbers]

    flood = ask(range(MOST_WAITING))
    with pytest.raises(Overloaded, match="grammars wait"):
        ask(range(MOST_WAITING, MOST_WAITING + 2))  # one is being compiled
    own = [compiler.compiling(Grammar("regex", source), "b") for source in ("b", "a40", "b")]
    assert own[0] is own[2]
    assert own[1] is flood[40]
    begin.set()
    for each in (*own, *flood):
        each.result(60)
    compiler.close()
    assert order.index("b") <= 2
    assert order.index("a40") <= 4
    assert len(set(order)) == len(order)


def test_chains_that_need_a_deep_stack() -> None:
    links = {f"r{i}": {"properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(1000)}
    schema = {"$ref": "#/$defs/r0", "$defs": links | {"r1000": {"type": "null"}}}
    assert walked(Grammar("json_schema", json.dumps(schema)), 0, 20000) is not None


def test_a_tokenizer_without_a_definition() -> None:
    none = GrammarCompiler(lambda: None, 320, {2})
    with pytest.raises(InvalidRequest, match="response_format: this model's tokenizer"):
        none.start(Grammar("regex", "a", "response_format"))
    none.close()


def test_a_tokenizer_larger_than_the_model() -> None:
    small = GrammarCompiler(TOKENIZER.definition, 10, {2})
    with pytest.raises(InvalidRequest, match="this model's tokenizer"):
        small.start(Grammar("regex", "a"))
    small.close()


def test_those_used_last_are_kept() -> None:
    compiler = compiler_of(TOKENIZER)
    for i in range(KEPT + 3):
        compiler.start(Grammar("choice", json.dumps(["a", str(i)])))
        compiler.start(Grammar("regex", "same"))
    compiler.close()
    assert len(compiler._kept) == KEPT
    assert Grammar("regex", "same", "another field") in compiler._kept


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="grammar: it cannot be read"):
        COMPILER.start(Grammar("regex", "a\ud800"))
