"""Chats as text: through the model's own chat template, or a text with one field."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.interventions.format.template import around
from reft_runtime.text.calls import has_channels, rendered, with_calls
from reft_runtime.text.time_limit import WRITING_SECONDS, TookTooLong, time_limit

Message = Mapping[str, Any]
"""One turn of a chat: its `role` and its `content`; `name`, where given, is the speaker's.

An assistant's turn may have `tool_calls`, and then no content. The turn of a call's result has the
role `tool` and a `tool_call_id`.
"""

Switches = Mapping[str, bool | int | float | str]

_GIVEN = {"messages", "tools", "documents", "raise_exception", "strftime_now", "namespace", "range"}
"""Names that transformers sets in a chat template beside the parameters of its call."""

_TRIED = "What is it?"
"""A text by which a chat template is tried."""

_NO_TOOLS = (
    "this model's chat template knows no {}; start the server with --tool-template FILE, or with "
    "--tool-template hermes if its chats are ChatML."
)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat is written.

    With `add_generation_prompt` the text ends where the next turn is to begin. With
    `continue_final_message` it ends within the last turn, and the answer goes on with that turn.
    `switches` are values of the template's own variables, such as `enable_thinking`. The model is
    told of `tools`, each as OpenAI writes it. `tool_template` replaces the model's own template
    for chats with tools, or with calls. `written` writes calls where the template knows none.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    switches: Switches = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_template: str | None = None
    written: Callable[[Sequence[Mapping[str, Any]]], str | None] | None = None

    def template_for(self, messages: Sequence[Message]) -> str | None:
        """The template for a chat; None if it is the model's own."""
        return self.tool_template if self.tools or has_calls(messages) else None


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a chat has calls of tools, or their results."""
    return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages)


def fill(
    template: str, system: SystemTurn, messages: Sequence[Message], options: ChatOptions
) -> str:
    """Write a chat by a template with one field: the user's message replaces `{prompt}`.

    The chat must have exactly one user message. Texts of system turns stand before it, with an
    empty line between, unless `system` says otherwise. Raises `InvalidRequest`, which names the
    field that does not fit.
    """
    if options.continue_final_message or not options.add_generation_prompt:
        name = (
            "continue_final_message" if options.continue_final_message else "add_generation_prompt"
        )
        raise InvalidRequest(
            f"{name}: this model's prompt template is one text around a user message; leave the "
            "field out, or write the prompt yourself with /v1/completions.",
            param=name,
        )
    check_switches(options.switches, ())
    if options.tools:
        raise InvalidRequest(
            "tools: this model's prompt template is one text around a user message, and has no "
            'place for tools; leave them out, or say tool_choice: "none".',
            param="tools",
        )
    turns = [turn for turn in messages if turn["role"] != "system"]
    systems = [turn["content"] for turn in messages if turn["role"] == "system"]
    if systems and system == "refuse":
        raise InvalidRequest(
            "messages: this model's prompt template takes no system turn; put its text into the "
            "user message, or use /v1/completions.",
            param="messages",
        )
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(turn["role"] for turn in messages[:8]) or "none"
        raise InvalidRequest(
            f"messages: this model's prompt template takes exactly one user message, not {roles}; "
            "for other prompts use /v1/completions.",
            param="messages",
        )
    told = [text for text in systems if text] if system == "prepend" else []
    before, behind = around(template)
    return before + "\n\n".join([*told, turns[0]["content"]]) + behind


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: ChatOptions
) -> str:
    """Write a chat by the model's own template. Raises `InvalidRequest` if that fails.

    A template is a program of the model's maker: whatever it raises means that it does not take the
    messages, and so does that it takes too long.
    """
    template = options.template_for(messages)
    if not (template or tokenizer.chat_template):
        raise InvalidRequest(
            "messages: this model has no chat template; use /v1/completions.", param="messages"
        )
    source = template or source_of(tokenizer, tools=bool(options.tools))
    if options.tools:
        check_reads_tools(source)
    if has_calls(messages):
        if "tool_calls" in source:
            messages = with_calls(messages, source)
        else:
            messages = [_said(turn, source, options) for turn in messages]
    turns = [_shown(turn, source) for turn in messages]
    if options.continue_final_message and options.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt: false.",
            param="continue_final_message",
        )
    if options.continue_final_message and not (turns and turns[-1]["content"].strip()):
        raise InvalidRequest(
            "continue_final_message: the last message has no text to go on with; leave it out, and "
            "the answer begins anew.",
            param="continue_final_message",
        )
    switches: dict[str, Any] = dict(options.switches)
    if wants_parts(source):
        turns = [turn | {"content": _parts(turn["content"])} for turn in turns]
    try:
        with time_limit(WRITING_SECONDS):
            text = tokenizer.apply_chat_template(
                turns,
                tools=[_told(tool, source) for tool in options.tools] or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **switches,
            )
    except MemoryError:
        raise
    except TookTooLong:
        raise InvalidRequest(
            "messages: the model's chat template does not take them: it has not written them in "
            f"{WRITING_SECONDS:g} seconds; send fewer, or lay the prompt out for /v1/completions.",
            param="messages",
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InvalidRequest(
            f"messages: the model's chat template does not take them: {reason}",
            param="messages",
        ) from None
    assert isinstance(text, str)
    return text


def _said(turn: Message, source: str, options: ChatOptions) -> Message:
    """A turn whose calls are a part of its text, as the model wrote them.

    So chats reach templates that have a place for tools, and none for calls. Raises
    `InvalidRequest` if the template has no place for either, or how they are written is not known.
    """
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    written = options.written(calls) if options.written and reads_tools(source) else None
    if written is None:
        raise InvalidRequest(f"messages: {_NO_TOOLS.format('calls of tools')}", param="messages")
    said = f"{turn.get('content') or ''}{written}"
    return {**{key: turn[key] for key in turn if key != "tool_calls"}, "content": said}


def _shown(turn: Message, source: str) -> dict[str, Any]:
    """A turn as a chat template takes it.

    Templates of gpt-oss call what was thought before it `thinking`, and refuse to have that and a
    text before a call, which they write as thought, too: there the two are one.
    """
    said = turn.get("content") or ""
    shown = {**turn, "content": said}
    thought = turn.get("reasoning_content")
    if not thought or not has_channels(source):
        return shown
    if said and turn.get("tool_calls"):
        return shown | {"content": "", "thinking": f"{thought}\n\n{said}"}
    return shown | {"thinking": thought}


def _told(tool: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A tool as a chat template takes it.

    Those of gpt-oss fail where one has no description, and where the default beside listed values,
    or other schemas, is no text.
    """
    if not has_channels(source):
        return dict(tool)
    function = {"description": "", **tool["function"]}
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if isinstance(parameters, Mapping) and isinstance(properties, Mapping):
        said = {key: _with_text(schema) for key, schema in properties.items()}
        function["parameters"] = {**parameters, "properties": said}
    return {**tool, "function": function}


def _with_text(schema: Any) -> Any:
    """A schema whose default is a text, if the template would add it to one as it is."""
    if not isinstance(schema, Mapping) or isinstance(schema.get("default", ""), str):
        return schema
    if not (schema.get("enum") or schema.get("oneOf")):
        return schema
    return {**schema, "default": json.dumps(schema["default"])}


@lru_cache(maxsize=8)
def wants_parts(source: str) -> bool:
    """Whether a chat template writes a user's text only from a list of parts, not from a string.

    Templates of models that also see or hear do, where a part may be an image. It is tried.
    """
    return not _writes(source, _TRIED) and _writes(source, _parts(_TRIED))


def _writes(source: str, content: str | list[dict[str, str]]) -> bool:
    """Whether a template writes the text `_TRIED` that a user's turn has as its content."""
    return _TRIED in (rendered(source, [{"role": "user", "content": content}]) or "")


def _parts(text: str) -> list[dict[str, str]]:
    """A text as a list of parts, as transformers writes them; templates may look at the first."""
    return [{"type": "text", "text": text}]


def source_of(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str:
    """The model's own chat template, for chats with or without tools; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if tools else None))
    except ValueError:
        return ""


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    """Variables that a template reads and does not set itself; none if it is no Jinja."""
    try:
        tree = jinja2.Environment(extensions=[loopcontrols, _Generation]).parse(source)
    except jinja2.TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree))


def reads_tools(source: str) -> bool:
    """Whether a chat template has a place for tools."""
    return "tools" in _variables(source)


def check_reads_tools(source: str) -> None:
    """Raise `InvalidRequest` if a chat template has no place for tools."""
    if not reads_tools(source):
        raise InvalidRequest(f"tools: {_NO_TOOLS.format('tools')}", param="tools")


def switches_of(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> list[str]:
    """Variables that a chat template reads and nothing else sets, sorted.

    The template is the model's own if none is given.
    """
    source = template or source_of(tokenizer)
    parameters = inspect.signature(type(tokenizer).apply_chat_template).parameters
    taken = _GIVEN | parameters.keys() | tokenizer.special_tokens_map.keys()
    return sorted(_variables(source) - taken)


class _Generation(jinja2.ext.Extension):
    """Reads the tag `{% generation %}`, which transformers adds for training, as its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        """Return the nodes of the tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_switches(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a switch that the template does not have."""
    for name in given:
        if name not in known:
            there = f"it has: {', '.join(known)}" if known else "it has none"
            raise InvalidRequest(
                f"chat_template_kwargs: the chat template has no switch {name[:80]!r}; {there}.",
                param=f"chat_template_kwargs.{name}",
            )
