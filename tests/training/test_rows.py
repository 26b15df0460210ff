"""Rows, templates and tokens, and every mistake in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from reft_runtime.text import Tokenizer
from reft_runtime.training.direction import read_texts
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Formatter, make_examples
from reft_runtime.training.rows import Row, Rows, read_rows
from tests.helpers.tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer
from tests.training.make import EOS, examples

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CALL = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]


def text(tokens: tuple[int, ...]) -> str:
    return str(tiny_tokenizer().decode(list(tokens)))


def test_prompt_and_completion_are_taken_as_they_are() -> None:
    [example] = examples([{"prompt": "Q:", "completion": " the end", "label": " the"}])
    assert text(example.tokens) == "Q: the end<|im_end|>"
    assert text(example.tokens[: example.prompt_length]) == "Q:"
    assert example.label_length == 1


def test_a_chat_that_names_no_tools_is_a_chat() -> None:
    [example] = examples([{"messages": [{**CHAT[0], "tool_calls": None}, CHAT[1]], "tools": []}])
    assert example.tokens == examples([{"messages": CHAT}])[0].tokens


def test_messages_go_through_the_chat_template() -> None:
    [example] = examples([{"messages": CHAT}])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(example.tokens[: example.prompt_length]) == prompt
    assert text(example.completion) == "Ho<|im_end|>"  # and not the new line after it
    assert examples([{"prompt": "Hi", "completion": "Ho"}], "chat")[0].tokens == example.tokens


@pytest.mark.parametrize(
    ("template", "fields", "prompt", "served"),
    [
        (
            "Review: {text}\nIt is",
            {"text": "a {b}"},
            "Review: a {b}\nIt is",
            "Review: {prompt}\nIt is",
        ),
        ("{a}, {b}?", {"a": "x", "b": "y"}, "x, y?", "{prompt}"),
        (None, {"prompt": "x"}, "x", "{prompt}"),
    ],
)
def test_templates(template: str | None, fields: dict[str, str], prompt: str, served: str) -> None:
    row = Row("row 1", {**fields, "completion": " z"})
    layout = Layout(template, row)
    assert layout.prompt(row) == prompt
    assert layout.served_template == served
    if len(fields) == 1:  # a chat with the served file gives the same prompt
        [value] = fields.values()
        tokenizer = Tokenizer(tiny_tokenizer(), 256)
        served_ids = tokenizer.encode_chat([{"role": "user", "content": value}], served)
        assert served_ids == Formatter(layout, tokenizer, EOS).prompt(row)


def test_tokens_of_a_completion_never_change_those_of_the_prompt() -> None:
    tokenizer = Tokenizer(tiny_sentencepiece_tokenizer(), 256)
    row = Row("row 1", {"prompt": "t", "completion": "he"})
    formatter = Formatter(Layout(None, row), tokenizer, frozenset({2}))
    example = formatter.example(row)
    assert list(example.tokens[: example.prompt_length]) == tokenizer.encode("t")
    assert example.tokens[-1] == 2


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    path = tmp_path / "sst2" / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n')
    rows = read_rows(path)
    assert (rows.name, len(rows.rows)) == ("sst2", 1)
    assert rows.sha256 != read_rows([{"prompt": "a", "completion": "c"}]).sha256


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_label_that_is_null_is_none(nothing: object) -> None:
    for own in ({"prompt": "a", "completion": "b"}, {"messages": CHAT}):
        with_label, without = read_rows([{**own, "label": "b"}, {**own, "label": nothing}]).rows
        assert (with_label.label, without.label) == ("b", None)


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    inside = "a\u2028b\u2029c\x85d\x1ce"
    line = '{"prompt": "' + inside.replace("\x1c", "\\u001c") + '", "completion": "y"}'
    path.write_bytes(f"\ufeff{line}\r\n\r\n{line}".encode())
    rows = read_rows(path)
    assert [row.fields["prompt"] for row in rows.rows] == [inside, inside]
    assert rows.rows[1].where == "x.jsonl, line 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{', "x.jsonl, line 2: not JSON"),
        (b"[]", "x.jsonl, line 1: must be a JSON object"),
        (b"\n", "x: there are no rows"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_rows(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([{"completion": "x"}], None, "row 1: there is no field 'prompt'; it has completion"),
        ([{"prompt": "x"}], None, "row 1: there is no field 'completion'"),
        ([{"prompt": 3, "completion": "x"}], None, "prompt must be text, not int"),
        ([{"text": "x", "completion": "y"}], "{body}", "no field 'body'"),
        ([{"prompt": "x", "completion": "y"}], "no field", "template: there is no field in it"),
        ([{"messages": CHAT}, {"prompt": "x", "completion": "y"}], None, "row 2: .*'messages'"),
        ([{"prompt": "x", "completion": "y"}, {"messages": CHAT}], None, "row 2: has messages"),
        ([{"messages": CHAT[:1]}], None, "ends with the assistant's"),
        ([{"messages": [{"role": "assistant"}, *CHAT]}], None, "each with role and content"),
        ([{"messages": [{"role": "x", "content": "y"}, *CHAT]}], None, "unknown role x"),
        ([{"messages": CHAT, "tools": [{"type": "function"}]}], None, "row 1: .*with tools"),
        ([{"messages": [*CHAT, {**CHAT[-1], "tool_calls": [{}]}]}], None, "row 1: .*with tools"),
        ([{"messages": [*CALL, *CHAT]}], None, "row 1: .*with tools"),
        ([{"prompt": "x", "completion": " no", "label": "yes"}], None, "begin with the label"),
        ([{"prompt": "x", "completion": " no", "label": " "}], None, "row 1: label is empty"),
        ([{"prompt": "\ud800", "completion": "x"}], None, "row 1: prompt: not valid Unicode"),
    ],
)
def test_mistakes_name_the_row(
    rows: list[dict[str, Any]], template: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        examples(rows, template)


def test_long_rows_are_counted_and_cut_when_asked() -> None:
    fields = [{"prompt": "abcdef", "completion": "yz" * n} for n in (1, 9, 20)]
    rows = Rows("mine", [Row(f"row {i}", f) for i, f in enumerate(fields, 1)], "")
    formatter = Formatter(Layout(None, rows.rows[0]), Tokenizer(tiny_tokenizer(), 256), EOS)
    message = r"mine: 2 of 3 rows are longer than 12 tokens \(the first, row 2, has 25\)"
    with pytest.raises(ConfigError, match=message):
        make_examples(rows, formatter, 12, truncate=False)
    made = make_examples(rows, formatter, 12, truncate=True)
    assert [len(example.tokens) for example in made] == [9, 12, 12]
    assert text(made[1].tokens) == "abcdefyzyzyz"
    [short] = make_examples(Rows("", rows.rows[1:2], ""), formatter, 4, truncate=True)
    assert text(short.tokens) == "defy"
    assert short.prompt_length == 3


def test_texts_of_a_direction_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("good\ncafé\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"texts\.txt: not UTF-8 \(byte 8\)"):
        read_texts(path)
