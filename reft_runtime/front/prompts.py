"""Prompts as callers give them: written as token ids, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from reft_runtime.errors import InvalidRequest
from reft_runtime.front.prompt_form import Encoder, PromptForm

if TYPE_CHECKING:
    from reft_runtime.text import ChatOptions, Message

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A prompt: a text, token ids, or the messages of a chat.

A text is tokenised as it is, or counts as a user's message if a file of the request says so.
"""


def is_chat(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is meant as the messages of a chat; they may have mistakes."""
    return bool(prompt) and isinstance(prompt[0], Mapping)


def field_of(prompt: Prompt) -> str:
    """The field of a request that an error about this prompt names."""
    return "messages" if is_chat(prompt) else "prompt"


class PromptWriter:
    """Writes prompts for a model whose token ids are below `vocab_size`.

    What is wrong with a prompt raises `InvalidRequest`.
    """

    def __init__(self, tokenizer: Encoder, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def written(
        self,
        form: PromptForm,
        prompt: Prompt,
        options: ChatOptions | None,
        *,
        add_special_tokens: bool | None = None,
    ) -> Sequence[int]:
        """Token ids of a prompt in the form that the files of its request ask for.

        `options` say how a chat is written. Ids that were given are taken as they are.
        """
        if isinstance(prompt, str):
            return form.text(self._tokenizer, prompt, add_special_tokens=add_special_tokens)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequest(
                "prompt: give text, a list of token ids, or a list of messages, not "
                f"{type(prompt).__name__}.",
                param="prompt",
            )
        if is_chat(prompt):
            if not all(_is_message(turn) for turn in prompt):
                raise InvalidRequest(
                    "messages: each needs a role and its content, both text, such as "
                    '{"role": "user", "content": "Hi"}.',
                    param="messages",
                )
            return form.chat(
                self._tokenizer, prompt, options, add_special_tokens=add_special_tokens
            )
        if any(type(token) is not int for token in prompt):
            raise InvalidRequest("prompt: token ids are whole numbers (int).", param="prompt")
        return cast("Sequence[int]", prompt)

    def checked(
        self, form: PromptForm, prompt: Prompt, options: ChatOptions | None
    ) -> Sequence[int]:
        """Token ids as `written` returns them, which the model can compute: at least one."""
        tokens = self.written(form, prompt, options)
        if not tokens:
            raise InvalidRequest("prompt: it has no tokens; give at least one.", param="prompt")
        self.check_ids("prompt", tokens)
        return tokens

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raise unless all token ids, which a request's `field` names, are in the vocabulary."""
        if any(not 0 <= token < self._vocab_size for token in ids):
            raise InvalidRequest(
                f"{field}: token ids must be from 0 to {self._vocab_size - 1}.", param=field
            )


def _is_message(turn: object) -> bool:
    """Whether a turn has a role and a content; a turn that calls tools needs no content."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return isinstance(content, str) or (content is None and bool(turn.get("tool_calls")))
