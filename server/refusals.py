"""What a client can do instead where the server refuses a feature that it does not have."""

from __future__ import annotations

_LARK = "write the whole form as a grammar in Lark's notation"
_ONE_LINE = "JSON is written on one line; leave it out"
_BESIDE = 'give it beside a name in interventions: [{{"name": ..., "{}": ...}}]'
_NOT_KEPT = (
    "nothing is kept here: send the whole conversation in input; the output of an earlier answer "
    "goes there as it is"
)
_TEXT_FORMAT = "/v1/responses takes JSON of a schema as text.format; other forms are for chats"
_ANSWERS = "use /v1/chat/completions, which every OpenAI client can be told to use"

INSTEAD_OF_FIELDS = {
    "structured_outputs.structural_tag": _LARK,
    "structured_outputs.whitespace_pattern": _ONE_LINE,
    "guided_whitespace_pattern": _ONE_LINE,
    "regex": 'give it in structured_outputs: {"regex": ...}',
    "ebnf": "write it in Lark's notation, as structured_outputs.grammar",
    "json_schema": "give it as response_format",
    "chat_template": "a client's template is never taken; lay the prompt out for /v1/completions",
    "documents": "put their text into a message",
    "truncate_prompt_tokens": "shorten the prompt; /tokenize counts its tokens",
    "use_beam_search": "ask for several choices with n and a temperature",
    "verbosity": "ask for a short or a long answer in a message",
    "stream_options.include_obfuscation": "events are not padded; leave it out",
    "strength": _BESIDE.format("strength"),
    "subspace": _BESIDE.format("subspace"),
    "suffix": "the prompt is continued at its end only; leave it out",
    "store": "answers are not kept; leave it out",
    "previous_response_id": _NOT_KEPT,
    "conversation": _NOT_KEPT,
    "prompt": "no prompts are kept here; write it into messages or input",
    "background": "wait for the answer, or stream it with stream: true",
    "truncation": "shorten the input yourself; /tokenize counts its tokens",
    "include": "the server has nothing of that kind; leave it out",
    "input.type": "items are not kept, and tools are run by you: send the items themselves",
    "response_format": _TEXT_FORMAT,
    "structured_outputs": _TEXT_FORMAT,
    "guided_json": _TEXT_FORMAT,
    "max_tokens": "/v1/responses calls it max_output_tokens",
    "messages": "send them to /v1/chat/completions, or to /v1/responses as input",
    "reasoning.summary": "there is no reasoning to sum up; leave it out, or say auto",
    "input.content.type": "this server reads text only; send parts of type input_text",
    "input.output.type": "this server reads text only; send parts of type input_text",
    "messages.role": "give the result of a function as a turn of the role tool",
    "messages.function_call": "give it as tool_calls",
    "messages.content.type": "this server reads text only; send parts of type text",
    "tools.type": "this server calls functions only, and you run them",
    "tool_choice.type": "this server calls functions only; name one, or say required",
    "function_call": "give tools and tool_choice, which took its place; leave it out, or say none",
    "modalities": "this server reads and writes text only; leave it out",
    "audio": "this server reads and writes text only; leave it out",
}
"""What to do instead, by the field's path without list positions; a field that is not here can only
be left out."""

INSTEAD_OF_ROUTES = {
    "/v1/messages": _ANSWERS,
    "/v1/embeddings": "this server has a language model only; use another for embeddings",
    "/v1/responses/input_tokens": "POST /tokenize counts the tokens of a text or of messages",
    "/v1/responses/compact": "nothing is kept here: shorten the conversation yourself",
}
"""What to do instead, by path, of asking for routes that other servers have."""


def instead(param: str) -> str | None:
    """What to do instead of giving the field `param`; None where nothing is known."""
    return INSTEAD_OF_FIELDS.get(
        ".".join(step for step in param.split(".") if not step.isdecimal())
    )
