"""Which rows are asked as what a user says in a chat, where nobody says it."""

from __future__ import annotations

from typing import Any

import pytest

from reft_runtime.training.layout import choose_template
from reft_runtime.training.rows import read_rows

CLASSES = [{"text": "It is late.", "label": "a"}, {"text": "Pay me back!", "label": "b"}]
ANSWERS = [{"question": "Why?", "answer": "So."}, {"question": "How?", "answer": "Thus."}]


def prompts(*texts: str, **fields: str) -> list[dict[str, str]]:
    return [{"prompt": text, "completion": "x", **fields} for text in texts]


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        (CLASSES, "chat"),
        (ANSWERS, "chat"),
        (prompts("It is late.", "Pay me back!", label="x"), "chat"),
        (prompts("It is late.", "It rains.", label="x"), "chat"),
        (prompts(*"abcdefg"), None),
        (prompts(*"abcdefgh"), "chat"),
        (prompts("Good.\nSentiment:", "Bad!\nSentiment: ", label="x"), None),
        ([{"text": f"{word} The answer is:", "label": "a"} for word in ("one", "two")], None),
        ([{"messages": [{"role": "user", "content": "a"}], "label": "b"}], None),
        (prompts("It is late. Why so", label="x"), "chat"),
    ],
)
def test_it_is_chosen_by_the_rows(rows: Any, template: str | None) -> None:
    assert choose_template(read_rows(rows), chats=True) == template
    assert choose_template(read_rows(rows), chats=False) is None
