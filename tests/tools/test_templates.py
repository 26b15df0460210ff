"""How tools, calls and results are written by chat templates, and what templates are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.sampling import Grammar
from reft_runtime.text import ChatOptions, Tokenizer
from server.schemas.tools import ToolFields
from server.settings import Settings, load_settings
from server.tools import FORMATS, Tools, whole
from tests.helpers.tokenizer import CHATML, tiny_sentencepiece_tokenizer, tiny_tokenizer
from tests.tools.templates import (
    DEEPSEEK,
    GEMMA,
    GLM,
    HARMONY,
    KIMI,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMES,
    QWEN,
    QWEN_CODER,
)

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def chat(call_id: str = "call12345") -> list[dict[str, Any]]:
    function = {"name": "look", "arguments": {"city": "Rome"}}
    return [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"},
        {"role": "user", "content": "So?"},
    ]


def tokenizer(template: str | None) -> Tokenizer:
    inner = tiny_tokenizer()
    inner.chat_template = template
    return Tokenizer(inner, 10_000)


def written(template: str | None, messages: list[dict[str, Any]], options: ChatOptions) -> str:
    tiny = tokenizer(template)
    return tiny.decode(tiny.encode_chat(messages, options=options), skip_special_tokens=False)


BUILT_IN = Tools(tokenizer(CHATML), Settings(tool_template="hermes"))._given


@pytest.mark.parametrize(
    ("template", "given", "calls"),
    [
        (QWEN, None, '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>'),
        (LLAMA, None, '{"name": "look", "parameters": {"city": "Rome"}}<|eot_id|>'),
        (
            MISTRAL,
            None,
            '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Rome"}, "id": "call',
        ),
        (
            DEEPSEEK,
            None,
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"city": "Rome"}'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (KIMI, None, 'functions.look:0<|tool_call_argument_begin|>{"city": "Rome"}<'),
        (
            CHATML,
            BUILT_IN,
            '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n'
            "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>"
            "<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_tools_calls_and_results(template: str, given: str | None, calls: str) -> None:
    told = ChatOptions(tools=[LOOK], tool_template=given)
    untold = ChatOptions(tool_template=given)
    text = written(template, chat(), told)
    assert '"Looks."' in text
    assert calls in text
    assert "sunny" in text
    text = written(template, chat(), untold)
    assert "Looks" not in text
    assert calls in text


def test_what_was_thought_before_a_call_is_one_with_the_text_where_templates_want_it() -> None:
    call = {"name": "look", "arguments": {"city": "Rome"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "a", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]
    said = "<|start|>assistant<|channel|>analysis<|message|>{}<|end|><|start|>assistant to="
    assert said.format("Hm.\n\nLet me see.") in written(HARMONY, turns, ChatOptions())
    turns[1] = {**turns[1], "content": None}
    assert said.format("Hm.") in written(HARMONY, turns, ChatOptions())
    answered = {"role": "assistant", "content": "Sunny.", "reasoning_content": "So."}
    text = written(HARMONY, [*turns, answered, turns[0]], ChatOptions())
    assert text.endswith(
        "final<|message|>Sunny.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
    )


def test_defaults_that_a_template_adds_to_a_text() -> None:
    template = HARMONY.replace(
        "{%- set last =",
        "{%- for tool in tools or [] %}"
        "{%- for name, one in tool.function.parameters.properties.items() %}"
        "{{- name + ' ' + (one.default if one.enum or one.oneOf else one.default | tojson) + ';' }}"
        "{%- endfor %}{%- endfor %}{%- set last =",
    )
    properties = {
        "a": {"enum": [1, 2], "default": 1},
        "b": {"oneOf": [{"type": "null"}, {"type": "string"}], "default": None},
        "c": {"enum": ["x"], "default": "x"},
        "d": {"type": "integer", "default": 5},
    }
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    options = ChatOptions(tools=[{"type": "function", "function": function}])
    text = written(template, [{"role": "user", "content": "Hi"}], options)
    assert "a 1;b null;c x;d 5;" in text


@pytest.mark.parametrize("template", [HARMONY, LLAMA])
def test_several_calls_of_a_turn_where_a_template_takes_one(template: str) -> None:
    calls: list[dict[str, Any]] = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": {}}}
        for name in ("look", "add", "more")
    ]
    results = [{"role": "tool", "tool_call_id": one, "content": f"{one}ed"} for one in ("add", "x")]
    results.append({"role": "tool", "tool_call_id": "look", "content": "seen"})
    asked = [{"role": "user", "content": "Hi"}]
    said: dict[str, Any] = {"role": "assistant", "content": "Well."}
    first, second, third = ({**said, "tool_calls": [call]} for call in calls)
    text = written(template, [*asked, {**said, "tool_calls": calls}, *results, said], ChatOptions())
    one_each = [
        *(*asked, first, results[2], {**second, "content": ""}, results[0]),
        *({**third, "content": ""}, results[1], said),
    ]
    assert text == written(template, one_each, ChatOptions())
    assert text.index("look") < text.index("seen") < text.index("added") < text.index("more")


@pytest.mark.parametrize(
    ("mark", "calls"),
    [
        (
            "<|tool_call|>",
            '<|tool_call|>[{"name": "look", "arguments": {"city": "Rome"}}, '
            '{"name": "add", "arguments": {}}]',
        ),
        ("<|tool_list_start|>", '<|tool_call_start|>[look(city="Rome"), add()]<|tool_call_end|>'),
        ("<minimax:tool_call>", None),
    ],
)
def test_calls_are_a_turn_s_text_where_a_template_knows_none(mark: str, calls: str | None) -> None:
    template = f"{{% if tools %}}{mark}{{% endif %}}" + CHATML.replace(
        "'user', ", "'user', 'tool', "
    )
    turns = chat()
    add = {"id": "b", "type": "function", "function": {"name": "add", "arguments": {}}}
    turns[1] = {**turns[1], "content": "So: ", "tool_calls": [*turns[1]["tool_calls"], add]}
    options = Tools(tokenizer(template), Settings()).options(ChatOptions(), [])
    if calls is not None:
        assert f"assistant\nSo: {calls}<|im_end|>" in written(template, turns, options)
        options = replace(options, written=None)
    with pytest.raises(InvalidRequest, match="--tool-template") as error:
        written(template, turns, options)
    assert error.value.param == "messages"


def test_calls_that_a_template_names_by_their_number() -> None:
    first, second = chat("a")[1:3], chat("b")[1:3]
    text = written(KIMI, [*first, *second, {**second[1], "tool_call_id": "c"}], ChatOptions())
    names = [line.partition("<|im")[0] for line in text.split("## Return of ")[1:]]
    assert names == ["functions.look:0", "functions.look:1", "c"]
    assert "begin|>functions.look:1<" in text


def test_the_built_in_template() -> None:
    assert BUILT_IN is not None
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        *chat()[1:3],
        {"role": "tool", "tool_call_id": "b", "content": "rainy"},
    ]
    turns[2] = turns[2] | {"content": "Let me see."}
    text = written(CHATML, turns, ChatOptions(tools=[LOOK], tool_template=BUILT_IN))
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions")
    assert text.count("system\n") == 1
    assert "</tools>\n\nTo call a function" in text
    assert text.endswith(
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\nLet me see.\n<tool_call>\n{"name": "look", "arguments": '
        '{"city": "Rome"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n'
        "</tool_response>\n<tool_response>\nrainy\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = [{"role": "user", "content": "Hi"}]
    assert written(CHATML, plain, ChatOptions(tool_template=BUILT_IN)) == written(
        CHATML, plain, ChatOptions()
    )
    alone = written(CHATML, plain, ChatOptions(tools=[LOOK], tool_template=BUILT_IN))
    assert alone.startswith("<|im_start|>system\nYou may call functions")


def test_a_template_that_knows_no_tools() -> None:
    plain = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidRequest, match="--tool-template hermes") as error:
        written(CHATML, plain, ChatOptions(tools=[LOOK]))
    assert error.value.param == "tools"
    with pytest.raises(InvalidRequest, match="--tool-template") as error:
        written(CHATML, chat(), ChatOptions())
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequest, match="no chat template"):
        written(None, plain, ChatOptions(tools=[LOOK]))


def test_a_text_template_takes_no_tools() -> None:
    tiny = tokenizer(QWEN)
    for options in (ChatOptions(tools=[LOOK]), ChatOptions()):
        plain = [{"role": "user", "content": "Hi"}]
        messages = plain if options.tools else chat()
        with pytest.raises(InvalidRequest) as error:
            tiny.encode_chat(messages, "Q: {prompt}", options=options)
        assert error.value.param == ("tools" if options.tools else "messages")


def test_switches_are_those_of_the_template_that_writes_the_chat() -> None:
    template = QWEN + "{{ mood }}"
    options = ChatOptions(switches={"mood": "good"}, tool_template=template)
    plain = [{"role": "user", "content": "Hi"}]
    assert written(CHATML, plain, replace(options, tools=[LOOK])).endswith("good")
    with pytest.raises(InvalidRequest, match="no switch 'mood'"):
        written(CHATML, plain, options)


def asked(tools: Tools, **fields: Any) -> Any:
    return tools.plan(ToolFields.model_validate({"tools": [LOOK], **fields}))


@pytest.mark.parametrize(
    ("template", "name", "direct"),
    [
        (QWEN, "hermes", False),
        (BUILT_IN, "hermes", False),
        (LLAMA, "llama3", False),
        (MISTRAL, "mistral", False),
        (MISTRAL_NAMES, "mistral", True),
        (QWEN_CODER, "qwen3_coder", False),
        (GLM, "glm45", False),
        (GEMMA, "gemma4", False),
        (HARMONY, "harmony", True),
        (DEEPSEEK, "deepseek_v31", True),
        (DEEPSEEK + "```json", "deepseek_v3", True),
        (KIMI, "kimi_k2", True),
        *(
            (f"{{{{ tools }}}} {text}", name, False)
            for text, name in (
                ('<minimax:tool_call>\n<invoke name="x">', "minimax_m2"),
                ("<seed:tool_call>\n<function=f>", "seed_oss"),
                ("<|tool_list_start|>[", "lfm2"),
                ("<|tool_call_start|>[", "lfm2"),
                ("<function_calls>", "olmo3"),
                ("respond only with <|tool_call|> followed by a JSON list", "granite"),
                ("<|tool_call|>{}<|/tool_call|>", "phi4_mini_json"),
                ("functools[{", "phi4_mini_json"),
                ("<tool_calls>[{", "hunyuan_a13b"),
                ("<tool_calls><tool_call>f<tool_sep><arg_key>", "hy_v3"),
                ("<TOOLCALL>[", "nemotron_json"),
                ("<|start_header_id|>ipython [func_name1(", "pythonic"),
                ("<|header_start|>ipython [func_name1(", "llama4_pythonic"),
                ("<|header_start|>ipython<|header_end|>", "llama4_json"),
            )
        ),
    ],
)
def test_the_format_is_found(template: str, name: str, direct: bool) -> None:
    form = asked(Tools(tokenizer(template), Settings())).form
    assert form.name == name
    assert bool(getattr(form, "direct", None)) == direct
    chosen = Tools(tokenizer(template), Settings(tool_parser=name)).plan  # type: ignore[arg-type]
    assert chosen(ToolFields.model_validate({"tools": [LOOK]})).form == form  # type: ignore[union-attr]
    other = Settings(tool_parser="llama3" if name == "hermes" else "hermes")
    assert asked(Tools(tokenizer(template), other)).form == FORMATS[other.tool_parser]  # type: ignore[index]


def test_an_answer_of_a_form_beside_tools() -> None:
    person = '{"type": "object", "properties": {"name": {}, "parameters": {}}}'
    answer = Grammar("json_schema", person)
    body = ToolFields.model_validate({"tools": [LOOK]})
    for template in (QWEN, LLAMA):
        tools = Tools(tokenizer(template), Settings())
        plan = tools.plan(body, answer)
        assert plan is not None
        assert plan.grammar is not None
        assert person[1:-1] in plan.grammar.source
        text = '{"name": "look", "parameters": {}}'
        assert whole(plan.reader(), text) == (text, [])
        forced = body.model_copy(update={"tool_choice": "required"})
        plan = tools.plan(forced, answer)
        assert plan is not None
        assert plan == tools.plan(forced)
        with pytest.raises(InvalidRequest) as error:
            tools.plan(body, Grammar("choice", '["a"]', "guided_choice"))
        assert error.value.param == "guided_choice"
        for source in ("{", "5"):
            with pytest.raises(InvalidRequest) as error:
                tools.plan(body, Grammar("json_schema", source, "guided_json"))
            assert error.value.param == "guided_json"
    assert tools.plan(ToolFields.model_validate({}), answer) is None


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        (CHATML, "--tool-template"),
        (None, "--tool-template"),
        ("{{ tools }}", f"--tool-parser {'|'.join(FORMATS)}"),
    ],
)
def test_tools_that_cannot_be_asked_for(template: str | None, advice: str) -> None:
    tools = Tools(tokenizer(template), Settings())
    assert asked(tools, tool_choice="none") is None
    with pytest.raises(InvalidRequest) as error:
        asked(tools)
    assert advice in error.value.message
    assert error.value.param == "tools"


def test_a_tool_template_that_cannot_be_used(tmp_path: Path) -> None:
    tiny = tokenizer(CHATML)
    with pytest.raises(ConfigError, match="give a file that exists, or hermes"):
        load_settings({"tool_template": str(tmp_path / "none")})
    for content, problem in (
        (b"{{ messages }}", "reads `tools`"),
        (b"{% if tools %}", "reads `tools`"),
        (b"\xff", "cannot be read"),
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ConfigError, match=problem):
            Tools(tiny, Settings(tool_template=str(tmp_path / "x")))
    (tmp_path / "x").write_text(QWEN)
    assert asked(Tools(tiny, Settings(tool_template=str(tmp_path / "x")))).form.name == "hermes"
    llama = Tokenizer(tiny_sentencepiece_tokenizer(), 100)
    with pytest.raises(ConfigError, match="tokenizer has no"):
        Tools(llama, Settings(tool_template="hermes"))
