"""Calls of tools in chats, as chat templates take them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from reft_runtime.reasoning import CHANNEL, THOUGHTS
from reft_runtime.text.time_limit import WRITING_SECONDS, time_limit

Turn = Mapping[str, Any]

_ONE_CALL = re.compile(r"tool_calls\s*\|\s*length\s*==\s*1")
"""What chat templates ask, as Llama 3's do, that take one call a turn only."""

_NAMED_BY_NUMBER = "<|tool_calls_section_begin|>"
"""What chat templates have that write a call's id as it, Kimi's: its function, and its number."""


def has_channels(source: str) -> bool:
    """Whether a chat template writes thoughts on a channel, as gpt-oss's do."""
    return f"{CHANNEL}{THOUGHTS}" in source


def takes_one_call(source: str) -> bool:
    """Whether a chat template takes one call a turn only."""
    return has_channels(source) or _ONE_CALL.search(source) is not None


def with_calls(messages: Sequence[Turn], source: str) -> Sequence[Turn]:
    """A chat whose calls, and their results, are as the template takes them."""
    if takes_one_call(source):
        messages = _one_call_each(messages)
    if _NAMED_BY_NUMBER in source:
        messages = _named_by_number(messages)
    return [_with_texts(turn) for turn in messages] if _wants_texts(source) else messages


def _one_call_each(messages: Sequence[Turn]) -> list[Turn]:
    """A chat in which no turn has several calls: each stands in one of its own, with its results.

    Templates that expect one call a turn refuse more, or leave them out and take all results for
    those of the first.
    """
    turns: list[Turn] = []
    waiting = deque(messages)
    while waiting:
        turn = waiting.popleft()
        calls = turn.get("tool_calls") or []
        if len(calls) < 2:
            turns.append(turn)
            continue
        results = []
        while waiting and waiting[0]["role"] == "tool":
            results.append(waiting.popleft())
        for place, call in enumerate(calls):
            bare = turn if place == 0 else {"role": turn["role"], "content": ""}
            own = [one for one in results if one.get("tool_call_id") == call["id"]]
            results = [one for one in results if one.get("tool_call_id") != call["id"]]
            turns += [{**bare, "tool_calls": [call]}, *own]
        turns += results
    return turns


def _named_by_number(messages: Sequence[Turn]) -> list[Turn]:
    """A chat whose calls have ids of their function's name and their number in the chat."""
    named: dict[str, str] = {}
    turns: list[Turn] = []
    count = 0
    for turn in messages:
        calls = []
        for call in turn.get("tool_calls") or []:
            named[call["id"]] = f"functions.{call['function']['name']}:{count}"
            calls.append({**call, "id": named[call["id"]]})
            count += 1
        given = turn.get("tool_call_id")
        result = {"tool_call_id": named[given]} if given in named else {}
        turns.append({**turn, **({"tool_calls": calls} if calls else {}), **result})
    return turns


def _with_texts(turn: Turn) -> Turn:
    """A turn the arguments of whose calls are JSON."""
    calls = []
    for call in turn.get("tool_calls") or []:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**turn, "tool_calls": calls} if calls else turn


@lru_cache(maxsize=8)
def _wants_texts(source: str) -> bool:
    """Whether a chat template writes a call's arguments as the JSON that it takes them for.

    DeepSeek's do: an object they cannot write, or only as Python does. It is tried.
    """
    tried = {"tried": 1}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": tried}}
    asked = {"role": "user", "content": "Do it."}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    shown = rendered(source, [asked, turn])
    if shown is not None and str(tried) not in shown:
        return False
    return json.dumps(tried) in (rendered(source, [asked, _with_texts(turn)]) or "")


def rendered(source: str, chat: list[Any]) -> str | None:
    """What a template makes of a chat, without a tokenizer's tokens; None if it fails."""
    try:
        with time_limit(WRITING_SECONDS):
            rendered: Any = render_jinja_template(
                [chat], chat_template=source, bos_token="", eos_token=""
            )
    except MemoryError:
        raise
    except Exception:
        return None
    texts, _ = rendered
    written: str = texts[0]
    return written
