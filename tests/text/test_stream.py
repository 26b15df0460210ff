import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from reft_runtime.text import Detokenizer, StopChecker, TextOffsets, TextStream, Tokenizer
from tests.helpers.tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizer(), max_model_len=1000)
SENTENCEPIECE = Tokenizer(tiny_sentencepiece_tokenizer(), max_model_len=1000)

BYTE_IDS = {BYTE_LEVEL.token_bytes(token)[0]: token for token in range(3, 259)}

TEXTS = [
    "the cat and  you",
    "\u00e9\u00fc\u0301 e\u0301",
    "\u4f60\u597d\uff0c\u4e16\u754c" * 10,
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea" * 8,
    "a\ufffdb\ufffd\ufffd",
    "\ufffd" * 60 + "the \U0001f600" + "\ufffd" * 50,
    "  two  spaces   ",
    "\n\n\t the\r\n",
    "",
]


def pieces(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    stream = Detokenizer(tokenizer)
    parts = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*parts, stream.finish()]


class TestDetokenizer:
    @pytest.mark.parametrize("size", [1, 2, 5, 1000])
    @pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
    @pytest.mark.parametrize("text", TEXTS)
    def test_pieces_join_to_the_text(self, tokenizer: Tokenizer, text: str, size: int) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids) == text

    @pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
    def test_a_character_comes_whole_with_its_last_token(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("the", add_special_tokens=False)
        smile = tokenizer.encode("the\U0001f600", add_special_tokens=False)[len(ids) :]
        assert len(smile) == 4
        stream = Detokenizer(tokenizer)
        assert stream.push(ids) == "the"
        assert [stream.push([token]) for token in smile] == ["", "", "", "\U0001f600"]

    @given(st.text(max_size=40), st.integers(1, 4))
    @settings(deadline=None)
    def test_any_text(self, text: str, size: int) -> None:
        for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids)

    @given(st.lists(st.integers(0, 319), max_size=200), st.integers(1, 7))
    @settings(deadline=None, max_examples=300)
    def test_random_tokens(self, ids: list[int], size: int) -> None:
        """Of a random model: mostly bytes that are no UTF-8, and special tokens."""
        assert "".join(pieces(BYTE_LEVEL, ids, size)) == BYTE_LEVEL.decode(ids)

    @given(
        st.lists(
            st.sampled_from(b"\x80\x90\xa0\xbd\xbf\x9f\xc0\xc3\xe0\xe4\xed\xef\xf0\xf4\xf8\xffa"),
            max_size=120,
        )
    )
    @settings(deadline=None, max_examples=300)
    def test_broken_characters(self, content: list[int]) -> None:
        """Lead bytes and continuations in any order and number."""
        ids = [BYTE_IDS[byte] for byte in content]
        text = bytes(content).decode(errors="replace")
        assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == text

    def test_invalid_bytes_are_shown_at_once_and_forgotten(self) -> None:
        stream = Detokenizer(BYTE_LEVEL)
        assert [stream.push([BYTE_IDS[0x80]]) for _ in range(100)] == ["\ufffd"] * 100
        broken = SENTENCEPIECE.encode("\U0001f600", add_special_tokens=False)[-1:]
        stream = Detokenizer(SENTENCEPIECE)
        assert [stream.push(broken) for _ in range(100)] == ["\ufffd"] * 100
        assert len(stream._ids) < 5

    @pytest.mark.parametrize("inner", [tiny_tokenizer, tiny_sentencepiece_tokenizer])
    def test_some_special_tokens_are_kept(
        self, inner: Callable[[], PreTrainedTokenizerBase]
    ) -> None:
        added = inner()
        added.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[X]"]})
        tokenizer = Tokenizer(added, 100)
        call, other = tokenizer.token_id("[TOOL_CALLS]"), tokenizer.token_id("[X]")
        assert call is not None
        assert other is not None
        assert tokenizer.token_id("the") is None
        the = tokenizer.encode("the", add_special_tokens=False)
        ids = [*the, call, other, *the, other, call, *the]
        for kept, text in (
            ((), "thethethe"),
            (("[TOOL_CALLS]",), "the[TOOL_CALLS]the[TOOL_CALLS]the"),
            (("[TOOL_CALLS]", "[X]"), "the[TOOL_CALLS][X]the[X][TOOL_CALLS]the"),
        ):
            stream = Detokenizer(tokenizer, kept_special_tokens=kept)
            got = "".join(stream.push([token]) for token in ids) + stream.finish()
            assert got.replace(" ", "") == text

    def test_special_tokens_are_left_out_and_cost_no_space(self) -> None:
        (the,) = SENTENCEPIECE.encode(" the", add_special_tokens=False)[-1:]
        assert pieces(SENTENCEPIECE, [the, 1, the, 2]) == ["the", "", " the", "", ""]

    def test_an_unfinished_character_ends_as_one_replacement(self) -> None:
        ids = BYTE_LEVEL.encode("a\U0001f600")[:-1]
        assert pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "\ufffd"]

    def test_ids_outside_the_vocabulary_have_no_text(self) -> None:
        ids = [*BYTE_LEVEL.encode("the"), 5000]
        assert "".join(pieces(BYTE_LEVEL, ids)) == "the"


def first_match(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The stop string complete first, the longest of those; and the text before it."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, length, found = min(ends)
    return text[: end + length], found


class TestStopChecker:
    @given(
        st.text("ab", max_size=40),
        st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
        st.lists(st.integers(0, 40), max_size=10),
    )
    @settings(max_examples=500)
    def test_equals_a_search_of_the_whole_text(
        self, text: str, stop: list[str], cuts: list[int]
    ) -> None:
        borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
        checker, shown, found = StopChecker(stop), "", None
        for start, end in itertools.pairwise(borders):
            part, found = checker.push(text[start:end])
            shown += part
            if found:
                break
            # What was shown stays: the stop string may not begin in it.
            assert text[:end].startswith(shown)
        else:
            shown += checker.finish()
        assert (shown, found) == first_match(text, stop)

    def test_holds_back_only_what_may_become_a_stop_string(self) -> None:
        checker = StopChecker(["\n\nUser:", "###"])
        assert checker.push("one\n") == ("one", None)
        assert checker.push("two #") == ("\ntwo ", None)
        assert checker.push("#") == ("", None)
        assert checker.push("\n\nUs") == ("##", None)
        assert checker.push("er: x") == ("", "\n\nUser:")

    def test_releases_at_the_end(self) -> None:
        checker = StopChecker(["END"])
        assert checker.push("the EN") == ("the ", None)
        assert checker.finish() == "EN"

    def test_without_stop_strings_all_is_shown(self) -> None:
        assert StopChecker([]).push("text") == ("text", None)


class TestTextStream:
    def test_stops_across_token_borders(self) -> None:
        stream = TextStream(BYTE_LEVEL, ["e\U0001f600"])
        ids = BYTE_LEVEL.encode("and the\U0001f600 x")
        shown = ""
        for token in ids:
            text, found = stream.push([token])
            shown += text
            if found:
                break
        assert (shown, found) == ("and th", "e\U0001f600")

    def test_finish_releases_both_layers(self) -> None:
        stream = TextStream(BYTE_LEVEL, ["the end"])
        ids = BYTE_LEVEL.encode("the \U0001f600")[:-1]
        assert stream.push(ids) == ("", None)
        assert stream.finish() == ("the \ufffd", None)

    def test_finish_may_complete_a_stop_string(self) -> None:
        stream = TextStream(BYTE_LEVEL, ["\ufffd"])
        assert stream.push(BYTE_LEVEL.encode("a\U0001f600")[:-1]) == ("a", None)
        assert stream.finish() == ("", "\ufffd")

    def test_the_stop_string_is_shown_where_it_is_asked_for(self) -> None:
        stream = TextStream(BYTE_LEVEL, ["nd t"], include_stop=True)
        assert stream.push(BYTE_LEVEL.encode("and the")) == ("and t", "nd t")

    def test_no_stop_string_ends_it_before_min_tokens(self) -> None:
        a = BYTE_LEVEL.encode("a")
        stream = TextStream(BYTE_LEVEL, ["a"], min_tokens=3)
        assert [stream.push(a) for _ in range(3)] == [("a", None), ("a", None), ("", "a")]

    def test_what_the_training_put_before_an_answer_is_not_shown(self) -> None:
        blank, the = BYTE_LEVEL.encode(" "), BYTE_LEVEL.encode(" the")
        for pieces in ([*the, *the], [*blank, *BYTE_LEVEL.encode("the"), *the]):
            stream = TextStream(BYTE_LEVEL, [" t"], completion_prefix=" ")
            shown, found = "", None
            for token in pieces:
                text, found = stream.push([token])
                shown += text
            assert (shown, found) == ("the", " t")  # a stop string is one of what is shown
        assert TextStream(BYTE_LEVEL, completion_prefix=" ").push(BYTE_LEVEL.encode("a the")) == (
            "a the",
            None,
        )
        cut = TextStream(BYTE_LEVEL, completion_prefix=" ")
        assert cut.push(blank) == ("", None)
        assert cut.finish() == ("", None)

    def test_offsets_are_those_of_what_is_shown(self) -> None:
        offsets = TextOffsets(BYTE_LEVEL, completion_prefix=" ")
        assert [offsets.push(token) for token in BYTE_LEVEL.encode(" the the a")] == [0, 3, 7, 8]


def test_tokenizers_differ_in_kind() -> None:
    """The two fixtures stand for byte-level and byte-fallback decoders."""
    tokenizers: list[PreTrainedTokenizerBase] = [tiny_tokenizer(), tiny_sentencepiece_tokenizer()]
    assert ["Ġ" in t.get_vocab() for t in tokenizers] == [True, False]
