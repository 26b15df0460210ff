"""Templates that are a text: the field `{prompt}` in it takes what a user says."""

from __future__ import annotations

TEMPLATE_FIELD = "{prompt}"


def check_template(template: str) -> None:
    """Raise `ValueError` unless the text holds the field exactly once."""
    count = template.count(TEMPLATE_FIELD)
    if count != 1:
        raise ValueError(
            f"write `chat`, or a text that holds {TEMPLATE_FIELD} exactly once (it holds it"
            f" {count} times)"
        )


def around(template: str) -> tuple[str, str]:
    """What the text says before the field, and behind it."""
    before, _, behind = template.partition(TEMPLATE_FIELD)
    return before, behind
