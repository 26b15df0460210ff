"""Calls are read from a text alike, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools import FORMATS, Format, reader_of, whole
from server.tools.formats import JsonFormat

HERMES, LLAMA3, MISTRAL = FORMATS["hermes"], FORMATS["llama3"], FORMATS["mistral"]
QWEN, GLM, GEMMA = FORMATS["qwen3_coder"], FORMATS["glm45"], FORMATS["gemma4"]
DEEPSEEK, KIMI, MINIMAX = FORMATS["deepseek_v31"], FORMATS["kimi_k2"], FORMATS["minimax_m2"]
LFM2, PHI, PYTHONIC = FORMATS["lfm2"], FORMATS["phi4_mini_json"], FORMATS["pythonic"]
NAMES: dict[str, Any] = {
    "look": {},
    "add": {},
    "see": {"properties": {"a": {}, "b": {}, "c": {}}},
}
TYPED: dict[str, Any] = {
    "f": {
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "flag": {"type": "boolean"},
            "list": {"type": "array"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "kind": {"$ref": "#/$defs/kind"},
            "any": {},
            "named": {"enum": ["null", "1", "b", 1.5, True], "type": ["string", "null", "number"]},
        },
        "$defs": {"kind": {"enum": ["7", "b"]}},
    }
}

LOOK = ("look", '{"city": "Paris }</tool_call>\\" \\u00e9 [x]", "days": [1, {"a": 2}]}')
ADD = ("add", "{}")


def call(name: str = "look", arguments: str = LOOK[1], key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


LOOKED, ADDED = call(), call(*ADD)
LLAMA = call(key="parameters")
QWEN_ADDED = tagged("<function=add>\n</function>")
GLM_ADDED = "<tool_call>add</tool_call>"
GEMMA_ADDED = "<|tool_call>call:add{}<tool_call|>"
BEGIN = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"

Case = tuple[Format, str, str | None, list[tuple[str, str]]]

CALLS: dict[str, Case] = {
    "hermes": (HERMES, tagged(LOOKED), None, [LOOK]),
    "hermes, text around": (
        HERMES,
        f"Let me see.\n\n{tagged(LOOKED)}\n{tagged(ADDED)}\n\nDone. ",
        "Let me see.\n\nDone.",
        [LOOK, ADD],
    ),
    "hermes, without its end": (HERMES, "<tool_call>" + ADDED, None, [ADD]),
    "hermes, blanks": (HERMES, f" \n<tool_call>  {ADDED}</tool_call>\n ", None, [ADD]),
    "hermes, arguments first": (
        HERMES,
        tagged('{"arguments": {"a": 1}, "name": "add"}'),
        None,
        [("add", '{"a": 1}')],
    ),
    "hermes, arguments as text": (
        HERMES,
        tagged('{"name": "add", "arguments": "{\\"a\\": 1}"}'),
        None,
        [("add", '{"a": 1}')],
    ),
    "hermes, no arguments": (HERMES, tagged('{"name": "add"}'), None, [ADD]),
    "hermes, a function that is not there": (
        HERMES,
        tagged(call("who", "{}")),
        None,
        [("who", "{}")],
    ),
    "llama": (LLAMA3, LLAMA, None, [LOOK]),
    "llama, tag": (LLAMA3, f"<|python_tag|>{LLAMA}", None, [LOOK]),
    "llama, other key": (LLAMA3, LOOKED, None, [LOOK]),
    "llama, type first": (
        LLAMA3,
        '{"type": "function", "name": "add", "parameters": {}}',
        None,
        [ADD],
    ),
    "llama, several": (LLAMA3, f"\n{LLAMA}; {ADDED} ;\n{ADDED}", None, [LOOK, ADD, ADD]),
    "llama, text before the tag": (LLAMA3, f"Well: <|python_tag|>{ADDED}", "Well:", [ADD]),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{LOOKED}]", None, [LOOK]),
    "mistral, several": (MISTRAL, f"[TOOL_CALLS][{LOOKED}, {ADDED}]", None, [LOOK, ADD]),
    "mistral, text": (MISTRAL, f"Hm [TOOL_CALLS][{ADDED}] so", "Hm so", [ADD]),
    "mistral, names": (
        MISTRAL,
        f"[TOOL_CALLS]look[ARGS]{LOOK[1]}[TOOL_CALLS]add[CALL_ID]a1[ARGS]{{}}",
        None,
        [LOOK, ADD],
    ),
    "qwen": (
        QWEN,
        "So:\n\n"
        + tagged(
            "<function=look>\n<parameter=city>\nParis\n<x>\n</parameter>\n<parameter=days>\n[1]\n"
            "</parameter>\n</function>"
        )
        + f"\n{QWEN_ADDED}\n",
        "So:",
        [("look", '{"city": "Paris\\n<x>", "days": [1]}'), ADD],
    ),
    "qwen, without line ends": (
        QWEN,
        "<tool_call><function=look><parameter=city>Rome</parameter></function></tool_call>",
        None,
        [("look", '{"city": "Rome"}')],
    ),
    "qwen, without the first tag": (
        QWEN,
        "So: <function=look>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>\n"
        f"<function=add>\n</function>\n</tool_call>\n{QWEN_ADDED}",
        "So:",
        [("look", '{"city": "Rome"}'), ADD, ADD],
    ),
    "qwen, the head in prose before": (
        QWEN,
        f"It begins with <function=add>: {QWEN_ADDED}",
        "It begins with <function=add>:",
        [ADD],
    ),
    "qwen, a value with tags": (
        QWEN,
        tagged(
            "<function=look>\n<parameter=a>\n</parameter> </function>\n</parameter>\n</function>"
        ),
        None,
        [("look", '{"a": "</parameter> </function>"}')],
    ),
    "qwen, a tag in prose before": (
        QWEN,
        f"The <tool_call> tag: {QWEN_ADDED}",
        "The <tool_call> tag:",
        [ADD],
    ),
    "qwen, a tag in a value": (
        QWEN,
        tagged("<function=look>\n<parameter=a>\n<tool_call>\n</parameter>\n</function>"),
        None,
        [("look", '{"a": "<tool_call>"}')],
    ),
    "glm, blanks around a name": (
        GLM,
        "<tool_call>look<arg_key> city </arg_key>\n<arg_value>Rome</arg_value></tool_call>",
        None,
        [("look", '{"city": "Rome"}')],
    ),
    "glm": (
        GLM,
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Paris\n</arg_value>\n"
        "<arg_key>days</arg_key><arg_value>[1]</arg_value>\n</tool_call>" + GLM_ADDED,
        None,
        [("look", '{"city": "Paris\\n", "days": [1]}'), ADD],
    ),
    "gemma": (
        GEMMA,
        f"Well, {GEMMA_ADDED}"
        '<|tool_call>call:look{a:<|"|>x, {"y"}: [\n]<|"|>,b:[1,-2.5,null],c:{d:<|"|><|"|>,e:{}},'
        "f:[]}<tool_call|>\n",
        "Well,",
        [
            ADD,
            (
                "look",
                '{"a": "x, {\\"y\\"}: [\\n]", "b": [1, -2.5, null], "c": {"d": "", "e": {}}, '
                '"f": []}',
            ),
        ],
    ),
    "gemma, blanks, quoted keys, bare words": (
        GEMMA,
        '<|tool_call> call:look { <|"|>a b<|"|> : None , c : [ True , two words ] } <tool_call|>',
        None,
        [("look", '{"a b": null, "c": [true, "two words"]}')],
    ),
    "gemma, other quotes": (
        GEMMA,
        """<|tool_call>call:look{a:["x, \\"]\ny",'b, \\'', "" ],"c d": {'e':"\\d"},"""
        """f:"g" 'h'}<tool_call|>""",
        None,
        [
            (
                "look",
                '{"a": ["x, \\"]\\ny", "b, \'", ""], "c d": {"e": "\\\\d"}, "f": "\\"g\\" \'h\'"}',
            )
        ],
    ),
    "qwen, without the last tag": (
        QWEN,
        "So: <tool_call>\n<function=look>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool",
        "So:",
        [("look", '{"a": 1}')],
    ),
    "qwen, several behind one tag": (
        QWEN,
        tagged(
            "<function=look>\n<parameter=a>\n1\n</parameter>\n</function>\n"
            "<function=add>\n</function>"
        ),
        None,
        [("look", '{"a": 1}'), ADD],
    ),
    "qwen, parameters without their ends": (
        QWEN,
        tagged(
            "<function=see>\n<parameter=a>\nx <parameter=b>\n<parameter=b>\n\n<parameter=z>\n"
            "</parameter>\n<parameter=c>\n1\n</function>"
        ),
        None,
        [("see", '{"a": "x <parameter=b>", "b": "\\n<parameter=z>", "c": 1}')],
    ),
    "deepseek": (
        DEEPSEEK,
        f"So: {BEGIN}look<｜tool▁sep｜>{LOOK[1]}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "So:",
        [LOOK, ADD],
    ),
    "deepseek 3": (
        FORMATS["deepseek_v3"],
        f"{BEGIN}function<｜tool▁sep｜>look\n```json\n{LOOK[1]}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜> ",
        None,
        [LOOK, ADD],
    ),
    "kimi": (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
        f"<|tool_call_argument_begin|> {LOOK[1]} <|tool_call_end|><|tool_call_begin|>add:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        None,
        [LOOK, ADD],
    ),
    "minimax": (
        MINIMAX,
        'So:\n<minimax:tool_call>\n<invoke name="look">\n'
        '<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">[1, 2]</parameter>\n</invoke>\n<invoke name="add">\n</invoke>\n'
        "</minimax:tool_call>",
        "So:",
        [("look", '{"city": "Rome", "days": [1, 2]}'), ADD],
    ),
    "seed": (
        FORMATS["seed_oss"],
        "<seed:tool_call>\n<function=look>\n<parameter=city>Rome</parameter>\n"
        "<parameter=days>[1]</parameter>\n</function>\n</seed:tool_call>",
        None,
        [("look", '{"city": "Rome", "days": [1]}')],
    ),
    "lfm2": (
        LFM2,
        """Hm. <|tool_call_start|>[look(city="Rome, \\"x\\"", days=[1, -2.5e3], a={"b": None},"""
        " c=True), add()]<|tool_call_end|>So.",
        "Hm.So.",
        [
            (
                "look",
                '{"city": "Rome, \\"x\\"", "days": [1, -2.5e3], "a": {"b": null}, "c": true}',
            ),
            ADD,
        ],
    ),
    "lfm2, texts that are no Python": (
        LFM2,
        "<|tool_call_start|>[look(city='it's\n\"x\", (here)', a='\\\\', from='b\\'')]"
        "<|tool_call_end|>",
        None,
        [("look", '{"city": "it\'s\\n\\"x\\", (here)", "a": "\\\\", "from": "b\'"}')],
    ),
    "olmo3": (
        FORMATS["olmo3"],
        "<function_calls>\nlook(city='Rome', a=null)\nadd()\n</function_calls>",
        None,
        [("look", '{"city": "Rome", "a": null}'), ADD],
    ),
    "granite": (
        FORMATS["granite"],
        f"<|tool_call|> [{LOOKED}, {ADDED}]",
        None,
        [LOOK, ADD],
    ),
    "phi": (PHI, f"functools[{LOOKED},{ADDED}]", None, [LOOK, ADD]),
    "hunyuan": (
        FORMATS["hunyuan_a13b"],
        f"a<tool_calls>[{LOOKED}, {ADDED}]\n</tool_calls>b",
        "ab",
        [LOOK, ADD],
    ),
    "hunyuan 3": (
        FORMATS["hy_v3"],
        "<tool_calls>\n<tool_call>look<tool_sep>\n<arg_key>city</arg_key>\n"
        "<arg_value>Rome</arg_value>\n</tool_call>\n<tool_call>add<tool_sep></tool_call>\n"
        "</tool_calls>",
        None,
        [("look", '{"city": "Rome"}'), ADD],
    ),
    "nemotron": (FORMATS["nemotron_json"], f"<TOOLCALL>[{ADDED}]</TOOLCALL>", None, [ADD]),
    "llama 4": (
        FORMATS["llama4_json"],
        f"{LLAMA}; {LLAMA}<|python_end|>",
        None,
        [LOOK, LOOK],
    ),
    "pythonic": (
        PYTHONIC,
        ' [look(city="Rome", days=[1, [2]]), add()]\n',
        None,
        [("look", '{"city": "Rome", "days": [1, [2]]}'), ADD],
    ),
    "llama 4, pythonic, with tags": (
        FORMATS["llama4_pythonic"],
        "So: <|python_start|>[add()]<|python_end|>",
        "So:",
        [ADD],
    ),
    "gemma, less before the name": (
        GEMMA,
        "<|tool_call>:add{}<tool_call|><|tool_call>add{}<tool_call|>",
        None,
        [ADD, ADD],
    ),
}

CONTENT: dict[str, tuple[Format, str]] = {
    "nothing": (HERMES, ""),
    "text": (HERMES, " A text\nwith < and <tool and {braces} "),
    "a tag alone": (HERMES, "<tool_call>"),
    "a beginning of a tag": (HERMES, "so <tool_cal"),
    "a tag in prose": (HERMES, "the <tool_call> tag, and the </tool_call> tag"),
    "a cut call": (HERMES, tagged(LOOKED)[:60]),
    "broken JSON": (HERMES, tagged('{"name": "add", "arguments": {"a": 01}}')),
    "JSON of another shape": (HERMES, tagged('{"name": "add", "arguments": [1]}')),
    "no name": (HERMES, tagged('{"name": 5, "arguments": {}}')),
    "not a number": (HERMES, tagged('{"name": "add", "arguments": {"a": NaN}}')),
    "a key twice": (HERMES, tagged('{"name": "add", "arguments": {"a": 1, "a": 2}}')),
    "deep": (HERMES, tagged('{"name": "add", "arguments": ' + '{"a":' * 3000 + "}" * 3001)),
    "long opening": (HERMES, "<tool_call>" + " " * 300 + ADDED),
    "a JSON answer": (LLAMA3, '{"city": "Paris"}'),
    "a JSON answer with a name": (LLAMA3, '{"name": "Ann", "parameters": {}} and more'),
    "a call within text": (LLAMA3, f"I would say {LLAMA}"),
    "no call behind a tag": (LLAMA3, "<|python_tag|>print(1)"),
    "qwen's cut call": (QWEN, QWEN_ADDED[: QWEN_ADDED.index("</function>") + 5]),
    "qwen, the head in prose": (QWEN, "a <function=add> tag, and the </tool_call> tag"),
    "qwen, JSON": (QWEN, tagged(LOOKED)),
    "qwen, text between": (QWEN, tagged("<function=add>\nHm\n</function>")),
    "glm, no value": (GLM, "<tool_call>add\n<arg_key>a</arg_key>\n</tool_call>"),
    "gemma, no end of a text": (GEMMA, '<|tool_call>call:add{a:<|"|>x}<tool_call|>'),
    "gemma, no value": (GEMMA, "<|tool_call>call:add{a:}<tool_call|>"),
    "gemma, no comma": (GEMMA, "<|tool_call>call:add{a:[1 [2]]}<tool_call|>"),
    "gemma, more": (GEMMA, "<|tool_call>call:add{}}<tool_call|>"),
    "gemma, no key": (GEMMA, "<|tool_call>call:add{1}<tool_call|>"),
    "gemma, no object": (GEMMA, "<|tool_call>call:add(1)<tool_call|>"),
    "gemma, deep": (GEMMA, f"<|tool_call>call:add{'{a:' * 3000}1{'}' * 3000}<tool_call|>"),
    "gemma, cut": (GEMMA, "<|tool_call>call:add{a:1"),
    "glm, cut": (GLM, GLM_ADDED[:-1]),
    "deepseek's cut call": (DEEPSEEK, f"{BEGIN}look<｜tool▁sep｜>{LOOK[1][:-1]}"),
    "kimi, no name": (KIMI, "<|tool_calls_section_begin|>add<|tool_call_end|>"),
    "minimax, text": (MINIMAX, "<minimax:tool_call>\nadd\n</minimax:tool_call>"),
    "lfm2, no list": (LFM2, "<|tool_call_start|>add<|tool_call_end|>"),
    "lfm2, no name of an argument": (LFM2, "<|tool_call_start|>[add(1)]<|tool_call_end|>"),
    "lfm2, cut": (LFM2, "<|tool_call_start|>[add(a=1"),
    "lfm2, deep": (LFM2, f"<|tool_call_start|>[add(a={'[' * 3000}1)]<|tool_call_end|>"),
    "pythonic, a JSON list": (PYTHONIC, "[1, 2]"),
    "pythonic, a link": (PYTHONIC, "[look](x) is (a) link"),
    "pythonic, text behind": (PYTHONIC, "[add()] and more"),
    "pythonic, text before": (PYTHONIC, "So: [add()]"),
    "pythonic, cut": (PYTHONIC, "[add(a=1"),
    "phi, a word": (PHI, "import functools\n\nfunctools[1]"),
    "glm, no name": (GLM, "<tool_call>\n</tool_call>"),
    "mistral's tag": (MISTRAL, "[TOOL_CALLS] none [ARGS]"),
    "mistral's broken list": (MISTRAL, f"[TOOL_CALLS][{ADDED[:-2]}"),
}


def read(
    form: Format, pieces: list[str], **options: Any
) -> tuple[str | None, list[dict[str, Any]], list[dict[str, Any]]]:
    """Content, calls, and all deltas."""
    reader = reader_of(form, NAMES, **options)
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    content, calls = "", list[dict[str, Any]]()
    for delta in deltas:
        assert len(delta) == 1
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert piece["type"] == "function"
                assert piece["function"]["arguments"] == ""
                calls.append({"id": piece["id"], **piece["function"]})
            else:
                assert piece.keys() == {"index", "function"}
                assert piece["index"] == len(calls) - 1
                calls[-1]["arguments"] += piece["function"]["arguments"]
    return content or None, calls, deltas


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


PLACES = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls(case: Case) -> None:
    form, text, content, expected = case
    for pieces in ([text], list(text)):
        said, calls, _ = read(form, pieces)
        assert [(one["name"], one["arguments"]) for one in calls] == expected
        assert said == content
    for one in calls:
        assert isinstance(json.loads(one["arguments"]), dict)


@pytest.mark.parametrize("case", CONTENT.values(), ids=CONTENT)
def test_what_is_no_call_stays_content(case: tuple[Format, str]) -> None:
    form, text = case
    for pieces in ([text], list(text)):
        said, calls, _ = read(form, pieces)
        assert (said or "", calls) == (text, [])


@given(st.sampled_from([*CALLS.values()]), PLACES)
def test_calls_are_the_same_in_pieces(case: Case, places: list[int]) -> None:
    form, text, content, expected = case
    said, calls, _ = read(form, cut(text, places))
    assert [(one["name"], one["arguments"]) for one in calls] == expected
    assert said == content


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", '"5"'),
        ("text", ' {"a"}\n\u00e9 </p> ', '" {\\"a\\"}\\n\u00e9 </p> "'),
        ("text", "", '""'),
        ("count", "5", "5"),
        ("count", " 12345678901234567890 ", "12345678901234567890"),
        ("count", "five", '"five"'),
        ("count", "007", '"007"'),
        ("share", "1e999", "1e999"),
        ("share", "2", "2"),
        ("share", "NaN", '"NaN"'),
        ("flag", "True", "true"),
        ("flag", "false", "false"),
        ("list", '[1, {"a": null}]', '[1, {"a": null}]'),
        ("list", '[{"a": 1, "a": 2}]', '"[{\\"a\\": 1, \\"a\\": 2}]"'),
        ("maybe", "None", "null"),
        ("maybe", "null", "null"),
        ("maybe", "5", '"5"'),
        ("kind", "7", '"7"'),
        ("named", "null", '"null"'),
        ("named", "1", '"1"'),
        ("named", "1.5", "1.5"),
        ("named", "2", "2"),
        ("any", "5", "5"),
        ("any", "word", '"word"'),
        ("any", '"word"', '"\\"word\\""'),
        ("unknown", '{"a": 1}', '{"a": 1}'),
    ],
)
def test_values_without_quotes_are_of_the_types_of_their_parameters(
    key: str, text: str, value: str
) -> None:
    written = {
        QWEN: f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n"
        "</tool_call>",
        GLM: f"<tool_call>f\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
    }
    for form, call in written.items():
        content, [found] = whole(reader_of(form, TYPED), call)
        assert content is None
        assert found["function"] == {"name": "f", "arguments": f'{{"{key}": {value}}}'}
        json.loads(found["function"]["arguments"])


PIECES = (
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        ";",
        ",",
        "[",
        "]",
    ),
    *(GEMMA_ADDED, "<|tool_call>", "call:add{", '<|"|>', "a:", "<tool_call|>"),
    *(QWEN_ADDED, GLM_ADDED, "<function=add>", "<parameter=a>", "</parameter>", "</function>"),
    *(BEGIN, "<｜tool▁sep｜>{}", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<minimax:tool_call>", '<invoke name="add">', "</invoke>", "</minimax:tool_call>"),
    *("<|tool_call_start|>", "add(", "a=", ")", "'", "<|tool_call_end|>"),
    *(LOOKED, ADDED, LLAMA, "{", "}", '"', "\\", " ", "\n", "x", '{"name": "add"', "add"),
)


@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL, QWEN, GLM, GEMMA, DEEPSEEK, MINIMAX, LFM2, PYTHONIC]),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    PLACES,
    st.booleans(),
)
def test_any_text_is_read_alike_in_pieces(
    form: Format, text: str, places: list[int], parallel: bool
) -> None:
    said, calls, _ = read(form, [text], parallel=parallel)
    for pieces in (cut(text, places), list(text)):
        again = read(form, pieces, parallel=parallel)
        assert again[0] == said
        assert [one["arguments"] for one in again[1]] == [one["arguments"] for one in calls]
    if not calls:
        assert (said or "") == text
    for one in calls:
        assert isinstance(json.loads(one["arguments"]), dict)


EXACT = ("hermes, text around", "llama", "mistral, several", "mistral, names", "llama, several")


@pytest.mark.parametrize("name", EXACT)
def test_arguments_come_as_they_are_written_if_a_grammar_forces_calls(name: str) -> None:
    form, text, content, expected = CALLS[name]
    assert isinstance(form, JsonFormat)
    text = text.replace('"arguments"', f'"{form.key}"')
    said, calls, deltas = read(form, list(text), exact=True)
    assert [(one["name"], one["arguments"]) for one in calls] == expected
    assert said == content
    pieces = [d for d in deltas if "tool_calls" in d]
    assert len(pieces) == len(expected) + sum(len(arguments) for _, arguments in expected)


def test_a_forced_call_that_is_cut_off_has_a_part_of_its_arguments() -> None:
    reader = reader_of(HERMES, NAMES, exact=True)
    content, calls = whole(reader, tagged(LOOKED)[:55])
    assert content is None
    assert calls[0]["function"]["name"] == "look"
    assert LOOK[1].startswith(calls[0]["function"]["arguments"])
    assert reader.finish_reason("length") == "length"


def test_a_text_alone_may_contain_tags() -> None:
    answer = f'{{"a": "<tool_call>", "b": "{{}}"}}{tagged(ADDED)}'
    calls = f" {tagged(ADDED)}\n{tagged(LOOKED)}\n"
    for text, content, names in ((answer, answer, []), (calls, None, ["add", "look"])):
        for pieces in ([text], list(text)):
            said, found, _ = read(HERMES, pieces, exact=True, alone=True)
            assert said == content
            assert [one["name"] for one in found] == names


def test_a_forced_call_that_has_no_name_yet_is_left_out() -> None:
    text = f"{tagged(ADDED)}\n{tagged(LOOKED)}"
    for end in range(len(tagged(ADDED)) + len("\n<tool_call>"), text.index('"look"') + 6):
        content, calls = whole(reader_of(HERMES, NAMES, exact=True), text[:end])
        assert content is None
        assert len(calls) == 1


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_forced_call_that_is_cut_before_its_name_leaves_no_tag(cut: int) -> None:
    content, calls = whole(reader_of(HERMES, NAMES, exact=True), tagged(ADDED)[:cut])
    assert not content
    assert not calls


def test_a_forced_call_that_a_stop_string_cuts_is_no_call_to_make() -> None:
    reader = reader_of(HERMES, NAMES, exact=True)
    _, [call] = whole(reader, tagged(ADDED)[: tagged(ADDED).index("arguments") + 13])
    assert not call["function"]["arguments"].endswith("}")
    assert reader.finish_reason("stop") == "stop"


def test_reasons() -> None:
    for text, named, reason in (
        (tagged(ADDED), False, "tool_calls"),
        (tagged(ADDED), True, "stop"),
        ("x", False, "stop"),
    ):
        reader = reader_of(HERMES, NAMES, named=named)
        assert reader.finish_reason(None) is None
        whole(reader, text)
        assert reader.finish_reason("stop") == reason
        assert reader.finish_reason("length") == "length"


def test_only_the_first_call_if_they_are_not_to_be_parallel() -> None:
    text = f"a {tagged(ADDED)} b {tagged(LOOKED)} c"
    for exact in (False, True):
        said, calls, _ = read(HERMES, list(text), parallel=False, exact=exact)
        assert [one["name"] for one in calls] == ["add"]
        assert said == "a b c"


def test_a_text_in_brackets_that_is_no_call_comes_as_it_is_written() -> None:
    reader = reader_of(PYTHONIC, NAMES)
    assert reader.push("[lo") == []
    assert reader.push("ok](x)") == [{"content": "[look](x)"}]
    assert reader.push(" [add()]") == [{"content": " [add()]"}]


@pytest.mark.parametrize(("form", "length"), [(HERMES, 29), (LLAMA3, 29), (MISTRAL, 9)])
def test_ids(form: Format, length: int) -> None:
    text = form.tag + ADDED + (form.end or "")
    ids = {read(form, [text])[1][0]["id"] for _ in range(3)}
    assert len(ids) == 3
    assert {len(one) for one in ids} == {length}
    assert all(one.replace("_", "").isalnum() for one in ids)


def test_a_long_text_of_tags_stays_content() -> None:
    text = "<tool_call>{" * 1_000
    assert read(HERMES, [text])[0] == text
    text = f"<tool_call>{call('add', '[]')}" * 1_000
    assert read(HERMES, [text[i : i + 7] for i in range(0, len(text), 7)])[0] == text
