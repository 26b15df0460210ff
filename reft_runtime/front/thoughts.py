"""What a model may write before its answer to a chat, and what that changes of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reft_runtime.front.prompt_form import Encoder, PromptForm
from reft_runtime.grammar import GrammarState
from reft_runtime.reasoning import Channels
from reft_runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from reft_runtime.reasoning import Thinking
    from reft_runtime.text import ChatOptions, Message


def thinking(
    tokenizer: Encoder,
    form: PromptForm,
    messages: Sequence[Message],
    options: ChatOptions | None,
    prompt: Sequence[int],
) -> Thinking | None:
    """What may stand before the answer to a chat that was written as `prompt`; None if nothing may.

    A file with a template was trained to answer as its rows do: also where the model's own template
    has begun the thinking, such an answer is one from its first token on.
    """
    if options is not None and options.continue_final_message:
        return tokenizer.thinking(prompt, said=messages[-1]["content"])
    found = tokenizer.thinking(prompt)
    return found and replace(found, open=found.open and not form.templates)


def marked(sampling: SamplingParams, thought: Thinking | None) -> SamplingParams:
    """The settings of an answer whose text keeps the marks around what the model thinks."""
    if thought is None:
        return sampling
    kept = sampling.kept_special_tokens + thought.marks.kept
    return replace(sampling, kept_special_tokens=kept)


def behind(thought: Thinking | None, grammar: GrammarState | None) -> GrammarState | None:
    """The grammar of an answer that what the model thinks may stand before.

    Of a model that writes on channels a grammar says itself what is before (`Grammar.frame`).
    """
    if thought is None or grammar is None or isinstance(thought.marks, Channels):
        return grammar
    marks = thought.marks
    return grammar.behind(marks.begin_id, marks.end_id, thinks=thought.open)
