"""What the grammars of calls allow, asked of llguidance; and that readers read what they allow."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from reft_runtime.errors import InvalidRequest
from reft_runtime.grammar.source import fault_of, matcher_of, read_tokenizer
from reft_runtime.reasoning import Channels
from reft_runtime.sampling import Grammar
from reft_runtime.text import Tokenizer
from server.tools import FORMATS, Format, reader_of, whole
from server.tools.families import find_format
from server.tools.grammar import tool_grammar
from tests.helpers.tokenizer import tiny_tokenizer

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["city"],
}
FUNCTIONS = [("look", LOOK, False), ("add", {}, False)]

SCHEMAS: dict[str, Any] = {name: schema for name, schema, _ in FUNCTIONS}

HERMES, LLAMA3, MISTRAL = FORMATS["hermes"], FORMATS["llama3"], FORMATS["mistral"]
HARMONY, CHANNELS = FORMATS["harmony"], Channels(1, 2, 3, 4, 5)
QWEN, GLM, GEMMA = FORMATS["qwen3_coder"], FORMATS["glm45"], FORMATS["gemma4"]
MISTRAL_NAMES = find_format("[TOOL_CALLS][ARGS]")
assert MISTRAL_NAMES is not None
ALL = [*(form for form in FORMATS.values() if form is not HARMONY), MISTRAL_NAMES]
OWN = [QWEN, GLM, GEMMA, FORMATS["minimax_m2"], FORMATS["lfm2"]]
"""Formats with a syntax of their own."""


@cache
def tokenizer(added: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose tags are letters or, with `added`, tokens of their own."""
    tiny = tiny_tokenizer()
    tags = [*(text for form in ALL for text in form.tokens), *CHANNELS.kept]
    if added:
        special = [text for text in tags if not text.startswith("<") or "|" in text]
        tiny.add_tokens([AddedToken(text, special=text in special) for text in dict.fromkeys(tags)])
    return tiny


@cache
def compiled(added: bool) -> LLTokenizer:
    tiny = Tokenizer(tokenizer(added), 100)
    return read_tokenizer(tiny.definition(), tiny.vocab_size, tiny.eos_ids)


def token_id(added: bool) -> Any:
    known = {token.content: i for i, token in tokenizer(added).added_tokens_decoder.items()}
    return known.get


def allows(grammar: str, text: str, *, added: bool) -> bool:
    matcher = matcher_of(compiled(added), Grammar("lark", grammar))
    assert not fault_of(matcher)
    ids = tokenizer(added).encode(text, add_special_tokens=False)
    return (
        matcher.validate_tokens(ids) == len(ids)
        and matcher.consume_tokens(ids)
        and (matcher.is_accepting())
    )


CLOSES = ("\n</parameter>\n", "</parameter>\n", "</arg_value>", '<|"|>')
CITY = '{"city": "Rome"}'
WRITTEN = {
    "hermes": (
        f'<tool_call>\n{{"name": "look", "arguments": {CITY}}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
        "\n",
    ),
    "mistral": (
        f'[TOOL_CALLS][{{"name": "look", "arguments": {CITY}}}',
        '{"name": "add", "arguments": {}}]',
        ", ",
    ),
    "qwen": (
        "<tool_call>\n<function=look>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=add>\n</function>\n</tool_call>",
        "\n",
    ),
    "glm": (
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key><arg_value>[1, 2]</arg_value></tool_call>",
        "<tool_call>add\n</tool_call>",
        "\n",
    ),
    "gemma": (
        '<|tool_call>call:look{city:<|"|>Rome, {x}<|"|>,days:[1,2]}<tool_call|>',
        "<|tool_call>call:add{}<tool_call|>",
        "",
    ),
    "names": (f"[TOOL_CALLS]look[ARGS]{CITY}", "[TOOL_CALLS]add[ARGS]{}", ""),
    "hunyuan": (
        f'<tool_calls>[{{"name": "look", "arguments": {CITY}}}',
        '{"name": "add", "arguments": {}}]</tool_calls>',
        ", ",
    ),
    "deepseek": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
    ),
    "deepseek 3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n"
        f"```json\n{CITY}\n```<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "\n",
    ),
    "kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
        f"<|tool_call_argument_begin|>{CITY}<|tool_call_end|>",
        "<|tool_call_begin|>functions.add:12<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
    ),
    "minimax": (
        '<minimax:tool_call>\n<invoke name="look">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">[1, 2]</parameter>\n</invoke>\n',
        '<invoke name="add">\n</invoke>\n</minimax:tool_call>',
        "",
    ),
    "seed": (
        "<seed:tool_call>\n<function=look>\n<parameter=city>Rome</parameter>\n</function>\n"
        "</seed:tool_call>",
        "<seed:tool_call>\n<function=add>\n</function>\n</seed:tool_call>",
        "\n",
    ),
    "lfm2": (
        '<|tool_call_start|>[look(city="Rome", days=[1, 2])',
        "add()]<|tool_call_end|>",
        ", ",
    ),
    "olmo3": ('<function_calls>look(city="Rome")', "add()</function_calls>", "\n"),
}


@pytest.mark.parametrize("added", [False, True])
class TestForced:
    def test_hermes(self, added: bool) -> None:
        first, second, between = WRITTEN["hermes"]
        many = tool_grammar(HERMES, FUNCTIONS, token_id(added), many=True)
        one = tool_grammar(HERMES, FUNCTIONS, token_id(added), many=False)
        for text in (first, second):
            assert allows(many, text, added=added)
            assert allows(one, text, added=added)
        assert allows(many, first + between + second, added=added)
        assert not allows(one, first + between + second, added=added)
        for text in ("", "Hi", first[:-5], first.replace("look", "who"), "a" + first):
            assert not allows(many, text, added=added)
        for arguments in ("{}", '{"city": 5}', '{"city": "Rome", "x": 1}', '{ "city": "Rome"}'):
            assert not allows(many, first.replace(CITY, arguments), added=added)

    def test_llama3(self, added: bool) -> None:
        text = f'{{"name": "look", "parameters": {CITY}}}'
        grammar = tool_grammar(LLAMA3, FUNCTIONS, token_id(added), many=False)
        assert allows(grammar, text, added=added)
        for wrong in ("", "Hi", text + "; " + text, text.replace("look", "who")):
            assert not allows(grammar, wrong, added=added)

    @pytest.mark.parametrize(("form", "key"), [(MISTRAL, "mistral"), (MISTRAL_NAMES, "names")])
    def test_mistral(self, added: bool, form: Format, key: str) -> None:
        first, second, between = WRITTEN[key]
        ends = "]" if key == "mistral" else ""
        many = tool_grammar(form, FUNCTIONS, token_id(added), many=True)
        one = tool_grammar(form, FUNCTIONS, token_id(added), many=False)
        assert allows(many, first + between + second, added=added)
        assert allows(many, first + ends, added=added)
        assert allows(one, first + ends, added=added)
        assert not allows(one, first + between + second, added=added)
        assert not allows(many, "Hi", added=added)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("form", "key"),
    [
        (HERMES, "hermes"),
        (MISTRAL, "mistral"),
        (MISTRAL_NAMES, "names"),
        (QWEN, "qwen"),
        (GLM, "glm"),
        (GEMMA, "gemma"),
        (FORMATS["hunyuan_a13b"], "hunyuan"),
        (FORMATS["deepseek_v31"], "deepseek"),
        (FORMATS["deepseek_v3"], "deepseek 3"),
        (FORMATS["kimi_k2"], "kimi"),
        (FORMATS["minimax_m2"], "minimax"),
        (FORMATS["seed_oss"], "seed"),
        (FORMATS["lfm2"], "lfm2"),
        (FORMATS["olmo3"], "olmo3"),
    ],
)
def test_text_is_free_but_for_what_a_tag_begins(added: bool, form: Format, key: str) -> None:
    first, second, between = WRITTEN[key]
    both = first + between + second
    many = tool_grammar(form, FUNCTIONS, token_id(added), many=True, free=True)
    one = tool_grammar(form, FUNCTIONS, token_id(added), many=False, free=True)
    for text in ("", "Hi\n{there} <tool", f"Hi {both}", f"{both} and so on", both):
        assert allows(many, text, added=added), text
    assert not allows(one, both, added=added)
    for text in (f"Hi {form.tag}", f"{form.tag} Hi", both.replace("look", "who"), first[:-2]):
        assert not allows(many, text, added=added), text


@pytest.mark.parametrize("added", [False, True])
def test_text_of_llama_is_free_unless_it_begins_as_a_call(added: bool) -> None:
    text = f'{{"name": "look", "parameters": {CITY}}}'
    grammar = tool_grammar(LLAMA3, FUNCTIONS, token_id(added), many=False, free=True)
    for fine in ("", "Hi {x}", "\n Hi", text, f"<|python_tag|>{text}"):
        assert allows(grammar, fine, added=added), fine
    for wrong in ("{x}", text.replace("look", "who"), f"{text} Hi"):
        assert not allows(grammar, wrong, added=added), wrong


@pytest.mark.parametrize("added", [False, True])
def test_a_list_of_python_is_forced_without_a_tag(added: bool) -> None:
    text = '[look(city="Rome", days=[1]), add()]'
    form = FORMATS["pythonic"]
    forced = tool_grammar(form, FUNCTIONS, token_id(added), many=True)
    free = tool_grammar(form, FUNCTIONS, token_id(added), many=True, free=True)
    for fine in (text, text.replace(", days=[1]", "")):
        assert allows(forced, fine, added=added), fine
        assert allows(free, fine, added=added), fine
    for wrong in (text[:-1], "[1]", text + "x", text.replace("city", "x"), "[]"):
        assert not allows(forced, wrong, added=added), wrong
        assert not allows(free, wrong, added=added), wrong
    assert not allows(forced, "Hi [x]", added=added)
    assert allows(free, "Hi [x]", added=added)


@pytest.mark.parametrize("added", [False, True])
def test_numbers_of_calls_are_as_short_as_they_are_read(added: bool) -> None:
    grammar = tool_grammar(FORMATS["kimi_k2"], FUNCTIONS, token_id(added), many=True)
    call = "".join(WRITTEN["kimi"][:2])
    for number, fine in (("12", True), ("1234", True), ("1" * 300, False)):
        assert allows(grammar, call.replace("add:12", f"add:{number}"), added=added) == fine


@pytest.mark.parametrize("form", ALL)
def test_calls_or_an_answer_of_a_form(form: Format) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "integer"}}, "required": ["name"]}
    grammar = tool_grammar(form, FUNCTIONS, token_id(True), many=False, answer=schema)
    assert allows(grammar, '{"name": 5}', added=True)
    assert not allows(grammar, '{"name": "x"}', added=True)
    assert not allows(grammar, "Hi", added=True)
    if form.bare:
        call = '{"name": "add", "parameters": {}}' if form.bare == "{" else "[add()"
        call = f"{form.tag}{call}{form.end}"
        assert allows(grammar, call, added=True)


def test_what_a_schema_leaves_open() -> None:
    def allowed(parameters: dict[str, Any], arguments: str, *, strict: bool = False) -> bool:
        grammar = tool_grammar(LLAMA3, [("f", parameters, strict)], token_id(False), many=False)
        return allows(grammar, f'{{"name": "f", "parameters": {arguments}}}', added=False)

    assert allowed({}, "{}")
    assert not allowed({}, '{"x": 1}')
    assert allowed({"additionalProperties": True}, '{"x": 1}')
    assert not allowed({"properties": {"x": {}}}, '{"y": 1}')
    assert allowed({"properties": {"x": {}}, "additionalProperties": True}, '{"y": 1}')
    referred = {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"x": {"type": "null"}}}}}
    assert allowed(referred, '{"x": null}')
    # Of a schema that is not strict, what cannot be forced is left to the model.
    assert allowed({"properties": {"x": {"type": "string", "format": "odd"}}}, '{"x": "a"}')


def test_calls_on_channels() -> None:
    """Thoughts may stand before a call, and a message to the user if calls are not forced."""
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    preamble = thought.replace("analysis", "commentary")
    call = f"<|channel|>commentary to=functions.look <|constrain|>json<|message|>{CITY}"
    plain = call.replace(" <|constrain|>json", "")
    final = "<|channel|>final<|message|>"
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    forced = tool_grammar(HARMONY, FUNCTIONS, token_id(True), many=False)
    free = tool_grammar(HARMONY, FUNCTIONS, token_id(True), many=False, free=True)
    either = tool_grammar(HARMONY, FUNCTIONS, token_id(True), many=False, answer=answer)
    for text, fits in (
        (call, "forced free either"),
        (plain, "forced free either"),
        (thought + call, "forced free either"),
        (thought + thought + call, "forced free either"),
        (thought + preamble + call, "free"),
        (final + "Hi", "free"),
        (thought + final, "free"),
        (thought + final + '{"a": 5}', "free either"),
        (thought, ""),
        (call.replace("look", "who"), ""),
        (call.replace("Rome", "Rome-on-Sea"), ""),
        (call + call, ""),
        ("Hi", ""),
        (CITY, ""),
    ):
        for name, grammar in (("forced", forced), ("free", free), ("either", either)):
            assert allows(grammar, text, added=True) == (name in fits.split()), (name, text)
    with pytest.raises(InvalidRequest, match="no tokens for channels") as error:
        tool_grammar(HARMONY, FUNCTIONS, token_id(False), many=False)
    assert error.value.param == "tools"


TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "node": {"$ref": "#/$defs/node"},
        "mode": {"anyOf": [{"enum": ["a", 5]}, {"type": "null"}]},
        "free": {},
        "flag": {"type": ["boolean", "null"]},
        "list": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["mode"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                "text": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/node"}]},
            },
        }
    },
}


@pytest.mark.parametrize("added", [False, True])
def test_the_schema_of_values_with_quotes_of_their_own(added: bool) -> None:
    grammar = tool_grammar(GEMMA, [("f", TREE, True)], token_id(added), many=False)
    for arguments, fits in (
        ("mode:null", True),
        ('mode:<|"|>a<|"|>', True),
        ("mode:5", True),
        ("", False),
        ("flag:true,mode:5", True),
        ("mode:5,flag:true", False),  # in the order of letters
        ("mode:6", False),
        ('mode:<|"|>b<|"|>', False),
        ("list:[1,2.5],mode:5", True),
        ("list:[1],mode:5", False),
        ("list:[1,2,3,4],mode:5", False),
        ('free:{a:[1,<|"|>b<|"|>]},mode:5', True),
        ("mode:5,node:{}", True),
        ('mode:5,node:{children:[{text:<|"|><|"|>},{text:{children:[]}}],text:{}}', True),
        ("mode:5,node:{text:1}", False),
        ("mode:5,other:1", False),
    ):
        text = f"<|tool_call>call:f{{{arguments}}}<tool_call|>"
        assert allows(grammar, text, added=added) == fits, arguments


@pytest.mark.parametrize("added", [False, True])
def test_the_schema_of_values_without_quotes(added: bool) -> None:
    grammar = tool_grammar(QWEN, [("f", TREE, False)], token_id(added), many=False)
    mode = "<parameter=mode>\n5\n</parameter>\n"
    for values, fits in (
        (mode, True),
        (mode.replace("5", "null"), True),
        (mode.replace("5", "a"), True),
        (mode.replace("5", "b"), False),
        ("", False),
        (mode + "<parameter=free>\nany {text}\n</parameter>\n", True),
        (mode + "<parameter=list>\n[1, 2.5]\n</parameter>\n", True),
        (mode + "<parameter=list>\n[1]\n</parameter>\n", False),
        ('<parameter=node>\n{"text": {"children": []}}\n</parameter>\n' + mode, True),
        ('<parameter=node>\n{"text": 5}\n</parameter>\n' + mode, False),
        ("<parameter=other>\n5\n</parameter>\n" + mode, False),
    ):
        text = f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>"
        assert allows(grammar, text, added=added) == fits, values


OTHERS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b.c": {"type": "null"}},
    "required": ["a"],
    "additionalProperties": {"type": "boolean"},
}
HELD = (
    ({"a": "5"}, True),
    ({"a": "5", "aa": "true", "c": "false"}, True),
    ({"a": "5", "b.c": "null", "c": "true"}, True),
    ({"c": "true"}, False),
    ({"a": "5", "c": "5"}, False),
    ({"a": "5", "b.c": "true"}, False),
    ({"a": "true"}, False),
)


@pytest.mark.parametrize("added", [False, True])
def test_properties_of_any_name_have_their_type(added: bool) -> None:
    inner = {"properties": {"x": OTHERS}, "required": ["x"]}
    gemma = tool_grammar(GEMMA, [("f", inner, True)], token_id(added), many=False)
    qwen = tool_grammar(QWEN, [("f", OTHERS, True)], token_id(added), many=False)
    for values, fits in HELD:
        said = ",".join(f"{key}:{value}" for key, value in values.items())
        assert allows(gemma, f"<|tool_call>call:f{{x:{{{said}}}}}<tool_call|>", added=added) == fits
        said = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        text = f"<tool_call>\n<function=f>\n{said}</function>\n</tool_call>"
        assert allows(qwen, text, added=added) == fits, said


@pytest.mark.parametrize("form", [QWEN, GLM, GEMMA])
def test_an_empty_schema_of_other_properties_allows_any(form: Format) -> None:
    parameters = {"properties": {"x": {"additionalProperties": {}, "type": "object"}}}
    grammar = tool_grammar(form, [("f", parameters, True)], token_id(True), many=False)
    text = {
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n"
        "</function>\n</tool_call>",
        "glm45": "<tool_call>f<arg_key>x</arg_key><arg_value>{}</arg_value></tool_call>",
        "gemma4": "<|tool_call>call:f{{x:{}}}<tool_call|>",
    }[form.name]
    value = "{y:5}" if form is GEMMA else '{"y": 5}'
    assert allows(grammar, text.format(value), added=True)


@pytest.mark.parametrize("strict", [False, True])
def test_references_as_pydantic_wraps_them(strict: bool) -> None:
    kinds = {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for name in ("a", "b")
    }
    refs = [{"$ref": f"#/$defs/{name}"} for name in kinds]
    either = {"oneOf": refs, "discriminator": {"propertyName": "kind"}}
    for schema, fits in (({"allOf": refs[:1], "default": None}, "a"), (either, "ab")):
        parameters = {"properties": {"x": schema}, "required": ["x"], "$defs": kinds}
        for form, texts in (
            (
                QWEN,
                (
                    "<tool_call>\n<function=f>\n<parameter=x>\n",
                    '{{"kind": "{}"}}',
                    "\n</parameter>\n</function>\n</tool_call>",
                ),
            ),
            (GEMMA, ("<|tool_call>call:f{x:", '{{kind:<|"|>{}<|"|>}}', "}<tool_call|>")),
        ):
            grammar = tool_grammar(form, [("f", parameters, strict)], token_id(True), many=False)
            begin, value, end = texts
            for name in "abc":
                text = begin + value.format(name) + end
                assert allows(grammar, text, added=True) == (name in fits), text
            assert not allows(grammar, begin + "a" + end, added=True)


@pytest.mark.parametrize("form", [QWEN, GLM, GEMMA])
def test_what_cannot_be_forced_is_refused_of_a_strict_tool(form: Format) -> None:
    for schema in ({"type": "string", "pattern": "a+"}, {"anyOf": [{"format": "uri"}, {}]}):
        parameters = {"properties": {"x": schema}}
        with pytest.raises(InvalidRequest, match=r"tools: f\.x: .*(pattern|format)") as error:
            tool_grammar(form, [("f", parameters, True)], token_id(True), many=False)
        assert error.value.param == "tools"
        assert tool_grammar(form, [("f", parameters, False)], token_id(True), many=False)


@pytest.mark.parametrize("form", OWN[:-1])  # as JSON it is refused
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/a"},
        {"$ref": "#/nothing"},
        {"$ref": 5},
        {"anyOf": 5},
        {"anyOf": [True, 5]},
        {"enum": []},
        {"type": 5},
        {"type": ["string", 5]},
        {"type": "array", "items": True},
        True,
    ],
)
def test_an_odd_schema_leaves_the_value_open(form: Format, schema: Any) -> None:
    loop = {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 20}}
    parameters = {"properties": {"x": schema}, "required": 5, "$defs": loop}
    grammar = tool_grammar(form, [("f", parameters, False)], token_id(True), many=False)
    assert not fault_of(matcher_of(compiled(True), Grammar("lark", grammar)))


@pytest.mark.parametrize("form", OWN)
def test_deep_schemas_have_small_grammars(form: Format) -> None:
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(24):
        nested = {"type": "array", "items": nested}
    chain = {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(300)}
    first = {"type": "array", "items": {"$ref": "#/$defs/d0"}}
    for parameters in (
        {"properties": {"x": nested}},
        {"properties": {"x": first}, "$defs": chain | {"d300": {"type": "null"}}},
    ):
        grammar = tool_grammar(form, [("f", parameters, False)], token_id(True), many=False)
        assert len(grammar) < 60_000
        assert not fault_of(matcher_of(compiled(True), Grammar("lark", grammar)))


@pytest.mark.parametrize("form", OWN)
@pytest.mark.parametrize(
    "referred",
    [
        {"enum": [f"v{i}" for i in range(2_000)]},
        {"type": "object", "properties": {f"v{i}": {"type": "null"} for i in range(2_000)}},
        {"anyOf": [{"type": "object", "title": str(i)} for i in range(2_000)]},
    ],
)
def test_a_schema_that_many_refer_to_is_refused_before_it_is_written_often(
    form: Format, referred: Any
) -> None:
    properties = {f"p{i}": {"$ref": "#/$defs/a"} for i in range(2_000)}
    parameters = {"properties": properties, "$defs": {"a": referred}}
    with pytest.raises(InvalidRequest, match=r"tools: .* make them smaller") as error:
        tool_grammar(form, [("f", parameters, False)], token_id(True), many=False)
    assert error.value.param == "tools"


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("added", [False, True])
def test_whatever_a_grammar_allows_is_read_as_calls(form: Format, added: bool) -> None:
    """Random walks under the masks end in texts whose calls all parse."""
    choose = random.Random(0)
    tiny = tokenizer(added)
    grammar = tool_grammar(form, FUNCTIONS, token_id(added), many=True)
    checked = copy.deepcopy(LOOK)
    if form in OWN[:-1] or form.name in ("seed_oss", "hy_v3"):
        del checked["properties"]["city"]["maxLength"]  # of texts without quotes it is not forced
    for _ in range(8):
        matcher = matcher_of(compiled(added), Grammar("lark", grammar))
        ids: list[int] = []
        while len(ids) < 400 and not matcher.is_stopped():
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(len(tiny)) if mask[i // 8] >> i % 8 & 1]
            tokens = [choose.choice(allowed)]
            for close in CLOSES:  # a free text would hardly end by chance
                end = tiny.encode(close, add_special_tokens=False)
                if choose.random() < 0.2 and matcher.validate_tokens(end) == len(end):
                    tokens = end
            matcher.consume_tokens(tokens)
            ids += tokens
        ended = matcher.is_stopped()
        text = str(tiny.decode([i for i in ids if i != tiny.eos_token_id])).rstrip("\ufffd")
        content, calls = whole(reader_of(form, SCHEMAS, exact=True), text)
        assert calls or not ended
        assert not content
        assert {call["function"]["name"] for call in calls} <= {"look", "add"}
        for call in calls if ended else calls[:-1]:
            if call["function"]["name"] == "look":
                jsonschema.validate(json.loads(call["function"]["arguments"]), checked)
