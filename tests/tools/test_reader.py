"""Calls are read from a text alike, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools import Format, reader_of, whole
from server.tools.formats import JsonFormat
from tests.tools.calls import (
    ADDED,
    BEGIN,
    CALLS,
    CONTENT,
    DEEPSEEK,
    GEMMA,
    GEMMA_ADDED,
    GLM,
    GLM_ADDED,
    HERMES,
    LFM2,
    LLAMA,
    LLAMA3,
    LOOK,
    LOOKED,
    MINIMAX,
    MISTRAL,
    NAMES,
    PYTHONIC,
    QWEN,
    QWEN_ADDED,
    TYPED,
    Case,
    call,
    tagged,
)


def read(
    form: Format, pieces: list[str], **options: Any
) -> tuple[str | None, list[dict[str, Any]], list[dict[str, Any]]]:
    """Content, calls, and all deltas."""
    reader = reader_of(form, NAMES, **options)
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    content, calls = "", list[dict[str, Any]]()
    for delta in deltas:
        assert len(delta) == 1
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert piece["type"] == "function"
                assert piece["function"]["arguments"] == ""
                calls.append({"id": piece["id"], **piece["function"]})
            else:
                assert piece.keys() == {"index", "function"}
                assert piece["index"] == len(calls) - 1
                calls[-1]["arguments"] += piece["function"]["arguments"]
    return content or None, calls, deltas


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


PLACES = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls(case: Case) -> None:
    form, text, content, expected = case
    for pieces in ([text], list(text)):
        said, calls, _ = read(form, pieces)
        assert [(one["name"], one["arguments"]) for one in calls] == expected
        assert said == content
    for one in calls:
        assert isinstance(json.loads(one["arguments"]), dict)


@pytest.mark.parametrize("case", CONTENT.values(), ids=CONTENT)
def test_what_is_no_call_stays_content(case: tuple[Format, str]) -> None:
    form, text = case
    for pieces in ([text], list(text)):
        said, calls, _ = read(form, pieces)
        assert (said or "", calls) == (text, [])


@given(st.sampled_from([*CALLS.values()]), PLACES)
def test_calls_are_the_same_in_pieces(case: Case, places: list[int]) -> None:
    form, text, content, expected = case
    said, calls, _ = read(form, cut(text, places))
    assert [(one["name"], one["arguments"]) for one in calls] == expected
    assert said == content


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", '"5"'),
        ("text", ' {"a"}\n\u00e9 </p> ', '" {\\"a\\"}\\n\u00e9 </p> "'),
        ("text", "", '""'),
        ("count", "5", "5"),
        ("count", " 12345678901234567890 ", "12345678901234567890"),
        ("count", "five", '"five"'),
        ("count", "007", '"007"'),
        ("share", "1e999", "1e999"),
        ("share", "2", "2"),
        ("share", "NaN", '"NaN"'),
        ("flag", "True", "true"),
        ("flag", "false", "false"),
        ("list", '[1, {"a": null}]', '[1, {"a": null}]'),
        ("list", '[{"a": 1, "a": 2}]', '"[{\\"a\\": 1, \\"a\\": 2}]"'),
        ("maybe", "None", "null"),
        ("maybe", "null", "null"),
        ("maybe", "5", '"5"'),
        ("kind", "7", '"7"'),
        ("named", "null", '"null"'),
        ("named", "1", '"1"'),
        ("named", "1.5", "1.5"),
        ("named", "2", "2"),
        ("any", "5", "5"),
        ("any", "word", '"word"'),
        ("any", '"word"', '"\\"word\\""'),
        ("unknown", '{"a": 1}', '{"a": 1}'),
    ],
)
def test_values_without_quotes_are_of_the_types_of_their_parameters(
    key: str, text: str, value: str
) -> None:
    written = {
        QWEN: f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n"
        "</tool_call>",
        GLM: f"<tool_call>f\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
    }
    for form, said in written.items():
        content, [found] = whole(reader_of(form, TYPED), said)
        assert content is None
        assert found["function"] == {"name": "f", "arguments": f'{{"{key}": {value}}}'}
        json.loads(found["function"]["arguments"])


PIECES = (
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        ";",
        ",",
        "[",
        "]",
    ),
    *(GEMMA_ADDED, "<|tool_call>", "call:add{", '<|"|>', "a:", "<tool_call|>"),
    *(QWEN_ADDED, GLM_ADDED, "<function=add>", "<parameter=a>", "</parameter>", "</function>"),
    *(BEGIN, "<｜tool▁sep｜>{}", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<minimax:tool_call>", '<invoke name="add">', "</invoke>", "</minimax:tool_call>"),
    *("<|tool_call_start|>", "add(", "a=", ")", "'", "<|tool_call_end|>"),
    *(LOOKED, ADDED, LLAMA, "{", "}", '"', "\\", " ", "\n", "x", '{"name": "add"', "add"),
)


@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL, QWEN, GLM, GEMMA, DEEPSEEK, MINIMAX, LFM2, PYTHONIC]),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    PLACES,
    st.booleans(),
)
def test_any_text_is_read_alike_in_pieces(
    form: Format, text: str, places: list[int], parallel: bool
) -> None:
    said, calls, _ = read(form, [text], parallel=parallel)
    for pieces in (cut(text, places), list(text)):
        again = read(form, pieces, parallel=parallel)
        assert again[0] == said
        assert [one["arguments"] for one in again[1]] == [one["arguments"] for one in calls]
    if not calls:
        assert (said or "") == text
    for one in calls:
        assert isinstance(json.loads(one["arguments"]), dict)


EXACT = ("hermes, text around", "llama", "mistral, several", "mistral, names", "llama, several")


@pytest.mark.parametrize("name", EXACT)
def test_arguments_come_as_they_are_written_if_a_grammar_forces_calls(name: str) -> None:
    form, text, content, expected = CALLS[name]
    assert isinstance(form, JsonFormat)
    text = text.replace('"arguments"', f'"{form.key}"')
    said, calls, deltas = read(form, list(text), exact=True)
    assert [(one["name"], one["arguments"]) for one in calls] == expected
    assert said == content
    pieces = [d for d in deltas if "tool_calls" in d]
    assert len(pieces) == len(expected) + sum(len(arguments) for _, arguments in expected)


def test_a_forced_call_that_is_cut_off_has_a_part_of_its_arguments() -> None:
    reader = reader_of(HERMES, NAMES, exact=True)
    content, calls = whole(reader, tagged(LOOKED)[:55])
    assert content is None
    assert calls[0]["function"]["name"] == "look"
    assert LOOK[1].startswith(calls[0]["function"]["arguments"])
    assert reader.finish_reason("length") == "length"


def test_a_text_alone_may_contain_tags() -> None:
    answer = f'{{"a": "<tool_call>", "b": "{{}}"}}{tagged(ADDED)}'
    calls = f" {tagged(ADDED)}\n{tagged(LOOKED)}\n"
    for text, content, names in ((answer, answer, []), (calls, None, ["add", "look"])):
        for pieces in ([text], list(text)):
            said, found, _ = read(HERMES, pieces, exact=True, alone=True)
            assert said == content
            assert [one["name"] for one in found] == names


def test_a_forced_call_that_has_no_name_yet_is_left_out() -> None:
    text = f"{tagged(ADDED)}\n{tagged(LOOKED)}"
    for end in range(len(tagged(ADDED)) + len("\n<tool_call>"), text.index('"look"') + 6):
        content, calls = whole(reader_of(HERMES, NAMES, exact=True), text[:end])
        assert content is None
        assert len(calls) == 1


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_forced_call_that_is_cut_before_its_name_leaves_no_tag(cut: int) -> None:
    content, calls = whole(reader_of(HERMES, NAMES, exact=True), tagged(ADDED)[:cut])
    assert not content
    assert not calls


def test_a_forced_call_that_a_stop_string_cuts_is_no_call_to_make() -> None:
    reader = reader_of(HERMES, NAMES, exact=True)
    _, [call] = whole(reader, tagged(ADDED)[: tagged(ADDED).index("arguments") + 13])
    assert not call["function"]["arguments"].endswith("}")
    assert reader.finish_reason("stop") == "stop"


def test_reasons() -> None:
    for text, named, reason in (
        (tagged(ADDED), False, "tool_calls"),
        (tagged(ADDED), True, "stop"),
        ("x", False, "stop"),
    ):
        reader = reader_of(HERMES, NAMES, named=named)
        assert reader.finish_reason(None) is None
        whole(reader, text)
        assert reader.finish_reason("stop") == reason
        assert reader.finish_reason("length") == "length"


def test_only_the_first_call_if_they_are_not_to_be_parallel() -> None:
    text = f"a {tagged(ADDED)} b {tagged(LOOKED)} c"
    for exact in (False, True):
        said, calls, _ = read(HERMES, list(text), parallel=False, exact=exact)
        assert [one["name"] for one in calls] == ["add"]
        assert said == "a b c"


def test_a_text_in_brackets_that_is_no_call_comes_as_it_is_written() -> None:
    reader = reader_of(PYTHONIC, NAMES)
    assert reader.push("[lo") == []
    assert reader.push("ok](x)") == [{"content": "[look](x)"}]
    assert reader.push(" [add()]") == [{"content": " [add()]"}]


@pytest.mark.parametrize(("form", "length"), [(HERMES, 29), (LLAMA3, 29), (MISTRAL, 9)])
def test_ids(form: Format, length: int) -> None:
    text = form.tag + ADDED + (form.end or "")
    ids = {read(form, [text])[1][0]["id"] for _ in range(3)}
    assert len(ids) == 3
    assert {len(one) for one in ids} == {length}
    assert all(one.replace("_", "").isalnum() for one in ids)


def test_a_long_text_of_tags_stays_content() -> None:
    text = "<tool_call>{" * 1_000
    assert read(HERMES, [text])[0] == text
    text = f"<tool_call>{call('add', '[]')}" * 1_000
    assert read(HERMES, [text[i : i + 7] for i in range(0, len(text), 7)])[0] == text
