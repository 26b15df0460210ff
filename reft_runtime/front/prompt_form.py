"""How prompts are written for the interventions that a request applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reft_runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from reft_runtime.interventions import Version
    from reft_runtime.interventions.format.manifest import SystemTurn
    from reft_runtime.reasoning import Thinking
    from reft_runtime.text import ChatOptions, Message


class Encoder(Protocol):
    """The part of a `Tokenizer` that writes prompts; the methods are documented there."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, completion_prefix: str = ""
    ) -> list[int]:
        """Token ids of a text."""

    def encode_chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        *,
        system: SystemTurn = "prepend",
        completion_prefix: str = "",
        options: ChatOptions | None = None,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        """Token ids of a prompt that asks for the next turn of a chat."""

    def laid_out(self, text: str, template: str) -> str | None:
        """The text as a whole prompt if it ends as the template ends prompts, else None."""

    def thinking(self, prompt: Sequence[int], said: str | None = None) -> Thinking | None:
        """What the model may write before its answer to a chat; None if it answers at once."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How the files of a request want prompts to be written.

    `templates` are those of the files, each with what it does with a system turn and the name of an
    intervention that brings it; without any, the base model's own template writes chats. `texts` is
    True if a text is what a user says in a chat. `completion_prefix` is a text that answers begin
    with: it is not shown, and prompts do not end with it.
    """

    templates: tuple[tuple[str, SystemTurn, str], ...] = ()
    texts: bool = False
    completion_prefix: str = ""

    @classmethod
    def of(cls, applied: Sequence[tuple[Version, float]]) -> PromptForm:
        """The form for versions, each with its strength."""
        found = {
            (version.template, version.system_turn): version.name
            for version, _ in applied
            if version.template is not None
        }
        templates = tuple((*key, name) for key, name in found.items())
        alike = len({template for template, _, _ in templates}) == 1
        texts = alike and any(version.texts for version, _ in applied)
        return cls(templates, texts, _completion_prefix(applied))

    def chat(
        self,
        tokenizer: Encoder,
        messages: Sequence[Message],
        options: ChatOptions | None = None,
        *,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        """Token ids of a chat. Raises `InvalidRequest` if the files' templates differ.

        Templates may differ in what they do with a system turn if the chat has none.
        """
        alike = len({template for template, _, _ in self.templates}) <= 1
        systems = any(message["role"] == "system" for message in messages)
        if len(self.templates) > 1 and (systems or not alike):
            names = " and ".join(name for _, _, name in self.templates)
            raise InvalidRequest(
                f"The chat templates differ, or what they do with a system turn: those of {names}."
                " Lay the prompt out yourself, and give it as text (/v1/completions).",
                param="interventions",
            )
        none: tuple[str | None, SystemTurn, str] = (None, "prepend", "")
        template, system, _ = next(iter(self.templates), none)
        return tokenizer.encode_chat(
            messages,
            template,
            system=system,
            completion_prefix=self.completion_prefix,
            options=options,
            add_special_tokens=add_special_tokens,
        )

    def text(
        self, tokenizer: Encoder, text: str, *, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Token ids of a text: as the one message of a chat if the files say so, else as it is.

        A text that already ends as the template ends its prompts is not laid out again.
        """
        if self.texts:
            written = tokenizer.laid_out(text, self.templates[0][0])
            if written is None:
                message = {"role": "user", "content": text}
                return self.chat(tokenizer, [message], add_special_tokens=add_special_tokens)
            text = written
        return tokenizer.encode(
            text,
            add_special_tokens=add_special_tokens is not False,
            completion_prefix=self.completion_prefix,
        )


def _completion_prefix(applied: Sequence[tuple[Version, float]]) -> str:
    """The prefix that answers of these versions, at these strengths, begin with; may be empty.

    A version at strength 0 is the base model and has no prefix. If the versions' prefixes differ,
    the result is empty.
    """
    said = {version.completion_prefix for version, strength in applied if strength}
    found = said - {None}
    return (found.pop() or "") if len(found) == 1 else ""
