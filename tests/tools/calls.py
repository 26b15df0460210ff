"""Calls as models write them, in every format, and texts that are no calls."""

from __future__ import annotations

from typing import Any

from server.tools import FORMATS, Format

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
    "llama, text behind a call": (LLAMA3, f"{LLAMA}; so I look", "; so I look", [LOOK]),
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
