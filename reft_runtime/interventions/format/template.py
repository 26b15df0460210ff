"""What the `template` of a manifest may be: the base model's own, or a text with one field."""

from __future__ import annotations

from typing import TypeGuard

CHAT = "chat"
"""The template of a manifest that stands for the base model's own chat template."""

TEMPLATE_FIELD = "{prompt}"
"""The field of a template that is a text: where the text of the one user message goes."""


def is_text(template: str | None) -> TypeGuard[str]:
    """Whether a template is a text, which takes one message, and not the base model's own."""
    return template not in (None, CHAT)


def laid_out(text: str, behind: str) -> str | None:
    """The text as a whole prompt, if it ends as a template ends its prompts, else None.

    `behind` is what the template writes behind a message. Blanks and line ends at the end of the
    text become the template's.
    """
    ending, text = behind.rstrip(), text.rstrip()
    if not ending.strip() or not text.endswith(ending.lstrip()):
        return None
    return text + behind[len(ending) :]


def around(template: str) -> tuple[str, str]:
    """What a template that is a text writes before the message, and behind it."""
    before, _, behind = template.partition(TEMPLATE_FIELD)
    return before, behind
