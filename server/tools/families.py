"""The families of models whose calls are known, and what their chat templates are known by."""

from __future__ import annotations

import re
from dataclasses import replace

from reft_runtime.reasoning import CHANNEL, MESSAGE
from server.channels import CALL
from server.schemas.tools import NAME
from server.settings import ToolParser
from server.tools.formats import Format, JsonFormat, SyntaxFormat
from server.tools.gemma import QUOTE, Gemma
from server.tools.pythonic import BEGIN, Pythonic
from server.tools.tagged import GLM, HY, MINIMAX, QWEN, SEED


def _listed(
    name: ToolParser, tag: str, end: str = "", *, open: str = "[", tokens: tuple[str, ...] = ()
) -> JsonFormat:
    """Calls that are objects in a JSON list."""
    return JsonFormat(
        name=name,
        tag=tag,
        open=open,
        more=", ",
        end=f"]{end}",
        tokens=tokens or tuple(filter(None, (tag, end))),
        lead=r"\s*(\[\s*)?",
    )


HERMES = JsonFormat(
    name="hermes",
    tag="<tool_call>",
    open="\n",
    end="\n</tool_call>",
    between="\n",
    tokens=("<tool_call>", "</tool_call>"),
)
LLAMA3 = JsonFormat(
    name="llama3",
    tag="<|python_tag|>",
    key="parameters",
    more="; ",
    tokens=("<|python_tag|>",),
    bare="{",
)
LLAMA4_JSON = replace(
    LLAMA3,
    name="llama4_json",
    tag="<|python_start|>",
    end="<|python_end|>",
    tokens=("<|python_start|>", "<|python_end|>"),
)
MISTRAL = replace(
    _listed("mistral", "[TOOL_CALLS]", tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    named=rf"(?P<direct>{NAME})(\[CALL_ID\]\w+)?\[ARGS\]",
    id_length=9,
)
MISTRAL_NAMES = replace(MISTRAL, open="", more=None, end="", direct=("", "[ARGS]", ""))
GRANITE = _listed("granite", "<|tool_call|>")
PHI4_MINI = _listed("phi4_mini_json", "functools[", open="")
PHI4_MINI_TAGS = _listed("phi4_mini_json", "<|tool_call|>", "<|/tool_call|>")
HUNYUAN = _listed("hunyuan_a13b", "<tool_calls>", "</tool_calls>")
NEMOTRON = _listed("nemotron_json", "<TOOLCALL>", "</TOOLCALL>")
HARMONY = JsonFormat(
    name="harmony",
    tag=CALL,
    lead=None,
    tokens=(),  # those of channels are kept anyway
    named=rf"(?P<direct>{NAME}){re.escape(MESSAGE)}",
    direct=("", MESSAGE, ""),
)

_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DEEPSEEK_V31 = JsonFormat(
    name="deepseek_v31",
    tag="<｜tool▁calls▁begin｜>",
    open=_BEGIN,
    more=_BEGIN,
    end="<｜tool▁calls▁end｜>",
    tokens=("<｜tool▁calls▁begin｜>", _BEGIN, _SEP, _END, "<｜tool▁calls▁end｜>"),
    lead=None,
    named=rf"({_BEGIN}\s*)?(function\s*{_SEP}\s*)?(?P<direct>{NAME})\s*({_SEP})?\s*(```(json)?)?",
    direct=("", _SEP, _END),
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V31,
    name="deepseek_v3",
    more=f"\n{_BEGIN}",
    direct=(f"function{_SEP}", "\n```json\n", f"\n```{_END}"),
)
_CALL, _ARGUMENTS = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
KIMI_K2 = JsonFormat(
    name="kimi_k2",
    tag="<|tool_calls_section_begin|>",
    open=_CALL,
    more=_CALL,
    end="<|tool_calls_section_end|>",
    tokens=(
        "<|tool_calls_section_begin|>",
        _CALL,
        _ARGUMENTS,
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    lead=None,
    named=rf"({re.escape(_CALL)}\s*)?(functions\.)?(?P<direct>{NAME})(:\d+)?\s*{re.escape(_ARGUMENTS)}",
    direct=("functions.", f":#{_ARGUMENTS}", "<|tool_call_end|>"),
)
QWEN3_CODER = SyntaxFormat(
    name="qwen3_coder",
    tag="<tool_call>",
    end="</tool_call>",
    between="\n",
    tokens=("<tool_call>", "</tool_call>"),
    syntax=QWEN,
    head="<function=",
)
SEED_OSS = SyntaxFormat(
    name="seed_oss",
    tag="<seed:tool_call>",
    end="</seed:tool_call>",
    between="\n",
    tokens=("<seed:tool_call>", "</seed:tool_call>"),
    syntax=SEED,
)
MINIMAX_M2 = SyntaxFormat(
    name="minimax_m2",
    tag="<minimax:tool_call>",
    open="\n",
    more="",
    end="</minimax:tool_call>",
    tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
    syntax=MINIMAX,
)
GLM45 = SyntaxFormat(
    name="glm45",
    tag="<tool_call>",
    end="</tool_call>",
    between="\n",
    tokens=(
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    syntax=GLM,
)
HY_V3 = SyntaxFormat(
    name="hy_v3",
    tag="<tool_calls>",
    open="\n",
    more="",
    end="</tool_calls>",
    tokens=("<tool_calls>", "</tool_calls>", "<tool_sep>", *GLM45.tokens),
    syntax=HY,
)
GEMMA4 = SyntaxFormat(
    name="gemma4",
    tag="<|tool_call>",
    end="<tool_call|>",
    tokens=("<|tool_call>", "<tool_call|>", QUOTE),
    syntax=Gemma(),
)
LFM2 = SyntaxFormat(
    name="lfm2",
    tag="<|tool_call_start|>",
    open="[",
    more=", ",
    end="]<|tool_call_end|>",
    tokens=("<|tool_call_start|>", "<|tool_call_end|>"),
    syntax=Pythonic(),
)
OLMO3 = SyntaxFormat(
    name="olmo3",
    tag="<function_calls>",
    more="\n",
    end="</function_calls>",
    tokens=("<function_calls>", "</function_calls>"),
    syntax=Pythonic(),
)
PYTHONIC = replace(
    LFM2,
    name="pythonic",
    tag="<|python_tag|>",
    end="]",
    tokens=("<|python_tag|>",),
    bare="[",
    begin=BEGIN,
)
LLAMA4_PYTHONIC = replace(
    PYTHONIC,
    name="llama4_pythonic",
    tag="<|python_start|>",
    tokens=("<|python_start|>", "<|python_end|>"),
)

_FOUND: tuple[tuple[tuple[str, ...], Format], ...] = (
    ((f"{CHANNEL}commentary",), HARMONY),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_NAMES),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<tool_calls>", "<tool_sep>"), HY_V3),
    (("<tool_call>", "<arg_key>"), GLM45),
    (("<tool_call>", "<function="), QWEN3_CODER),
    (("<tool_call>",), HERMES),
    (("<|tool_call>",), GEMMA4),
    ((DEEPSEEK_V3.tag, "```json"), DEEPSEEK_V3),
    ((DEEPSEEK_V3.tag,), DEEPSEEK_V31),
    (("<minimax:tool_call>",), MINIMAX_M2),
    ((KIMI_K2.tag,), KIMI_K2),
    (("<seed:tool_call>",), SEED_OSS),
    (("<|tool_call_start|>",), LFM2),
    (("<|tool_list_start|>",), LFM2),
    (("<function_calls>",), OLMO3),
    (("<|tool_call|>", "<|/tool_call|>"), PHI4_MINI_TAGS),
    (("<|tool_call|>",), GRANITE),
    (("functools[",), PHI4_MINI),
    (("<tool_calls>",), HUNYUAN),
    (("<TOOLCALL>",), NEMOTRON),
    (("[func_name1(", "<|header_start|>"), LLAMA4_PYTHONIC),
    (("[func_name1(",), PYTHONIC),
    (("<|python_tag|>",), LLAMA3),
    (("<|start_header_id|>ipython",), LLAMA3),
    (("<|header_start|>ipython",), LLAMA4_JSON),
)
"""Texts that a chat template has all of, and the format that it then writes, the first that fits.

Of formats that share a name, that which is meant by the name alone stands last.
"""

FORMATS: dict[ToolParser, Format] = {form.name: form for _, form in _FOUND}


def find_format(template: str) -> Format | None:
    """The format in which a chat template writes calls; None if it is not one of these."""
    fitting = (form for texts, form in _FOUND if all(text in template for text in texts))
    return next(fitting, None)
