"""The `template` of a manifest: the base model's own, or a text with one field."""

from __future__ import annotations

from typing import TypeGuard

CHAT = "chat"
"""The template that stands for the base model's own chat template."""

TEMPLATE_FIELD = "{prompt}"
"""The field of a text template, which the text of the one user message replaces."""


def is_text(template: str | None) -> TypeGuard[str]:
    """Whether a template is a text that takes one message, not the base model's own."""
    return template not in (None, CHAT)


def laid_out(text: str, behind: str) -> str | None:
    """The text as a whole prompt if it ends as a template ends its prompts, else None.

    `behind` is what the template writes after a message. Spaces and line ends at the end of the
    text are replaced by the template's.
    """
    ending, text = behind.rstrip(), text.rstrip()
    if not ending.strip() or not text.endswith(ending.lstrip()):
        return None
    return text + behind[len(ending) :]


def around(template: str) -> tuple[str, str]:
    """The parts of a text template before and after the message."""
    before, _, behind = template.partition(TEMPLATE_FIELD)
    return before, behind
