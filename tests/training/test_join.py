"""Blanks at the border of prompt and completion: the tokenizer's business, not the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.interventions.format.manifest import CompletionPrefix
from reft_runtime.text import Tokenizer
from reft_runtime.text.join import join
from reft_runtime.training.join import choose_prefix
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Example, Formatter
from reft_runtime.training.rows import Row, read_rows
from tests.helpers.tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer
from tests.training.make import EOS

WORDS = Tokenizer(tiny_tokenizer(), 256)


def made(
    rows: Sequence[Row], template: str | None = None
) -> tuple[CompletionPrefix, list[Example]]:
    layout = Layout(template, rows[0])
    prefix = choose_prefix(rows, layout, WORDS)
    formatter = Formatter(layout, WORDS, EOS, completion_prefix=prefix)
    return prefix, [formatter.example(row) for row in rows]


def of(*pairs: tuple[str, str]) -> Sequence[Row]:
    return read_rows([{"prompt": a, "completion": b} for a, b in pairs]).rows


def test_all_ways_to_write_a_border_are_one(tmp_path: Path) -> None:
    wanted = WORDS.encode("Is it: the")
    tables = tmp_path / "x.csv", tmp_path / "y.csv"
    for path, end in zip(tables, ("", " "), strict=True):
        path.write_text(f"text,label\nIs it:{end},the\n")
    ways: list[tuple[Sequence[Row], str | None]] = [
        (of(("Is it:", " the")), None),
        (of(("Is it:", "the")), None),
        (of(("Is it: ", "the")), None),
        (of(("Is it: ", " the")), None),
        (read_rows([{"a": "it", "completion": "the"}]).rows, "Is {a}:"),
        (read_rows([{"a": "it", "completion": " the"}]).rows, "Is {a}: "),
        (read_rows(tables[0]).rows, None),
        (read_rows(tables[1]).rows, None),
    ]
    for rows, template in ways:
        prefix, [example] = made(rows, template)
        assert prefix == " "
        assert list(example.tokens) == [*wanted, 2]
        assert example.prompt_length == len(wanted) - 1


def test_an_answer_to_a_chat_begins_with_itself() -> None:
    def chat(answer: str) -> Any:
        turns = [{"role": "user", "content": "Is it:"}, {"role": "assistant", "content": answer}]
        return read_rows([{"messages": turns}]).rows

    (prefix, [one]), (_, [other]) = made(chat("the")), made(chat(" the"))
    assert (prefix, one.tokens) == ("", other.tokens)
    assert WORDS.decode(one.completion[:-1]) == "the"
    assert made(of(("Is it:", " the")), "chat")[1][0].tokens == one.tokens


@pytest.mark.parametrize(
    ("pairs", "prefix"),
    [
        ([("Is it:\n", "the")], ""),  # behind a line's end a word stands without a blank
        ([("Is it:", "\nthe")], ""),
        ([("Is it:", "\u672c")], ""),  # for this tokenizer the blank would be a token of its own
        ([("", "the")], ""),
        ([("a", "the"), ("b", " and"), ("c", "\u672c")], " "),  # most of them decide
        ([("\ud800", "the")], ""),
    ],
)
def test_the_tokenizer_decides(pairs: list[tuple[str, str]], prefix: str) -> None:
    rows = of(*pairs)
    assert choose_prefix(rows, Layout(None, rows[0]), WORDS) == prefix


def test_where_words_begin_with_a_mark() -> None:
    words = Tokenizer(tiny_sentencepiece_tokenizer(), 256)
    rows = of(("the", "the"))
    layout = Layout(None, rows[0])
    assert choose_prefix(rows, layout, words) == " "
    formatter = Formatter(layout, words, frozenset({2}), completion_prefix=" ")
    assert list(formatter.example(rows[0]).tokens[:-1]) == words.encode("the the")


@pytest.mark.parametrize(
    ("completion", "prefix", "joined"),
    [
        ("the", " ", " the"),
        (" the", " ", " the"),
        (" the", "", "the"),
        ("    return", "", "    return"),  # an indent is no border
        ("    return", " ", "     return"),  # of which the server takes one off
        ("\nthe", " ", "\nthe"),
        (" the", None, " the"),  # files made before
        ("the", None, "the"),
    ],
)
def test_join(completion: str, prefix: CompletionPrefix | None, joined: str) -> None:
    assert join(completion, prefix) == joined
