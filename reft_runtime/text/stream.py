"""Turns generated token ids into text: whole characters, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a `Tokenizer` that decodes answers; the methods are documented there."""

    @property
    def byte_level(self) -> bool:
        """Whether the text of ids is that of their bytes, joined."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out of the text."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to a text."""


class Detokenizer:
    """Text of one growing answer; special tokens are left out, but for those that are kept.

    All pieces joined are `decode` of all ids, and no piece ends within a character: U+FFFD is
    emitted for bytes that can no longer become one. (Where a byte-fallback tokenizer meets an
    invalid byte, `decode` also drops the valid characters beside it; those were emitted.)
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        skip_special_tokens: bool = True,
        kept_special_tokens: Collection[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._kept = {text.encode() for text in kept_special_tokens}
        self._byte_level = tokenizer.byte_level  # then `decode` is not needed, which is slower
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The last tokens: `_shown` of them as context, since a decoder may drop a space at the
        # start of what it sees, then those whose text has not been returned.
        self._ids: list[int] = []
        self._shown = 0
        self._emitted = 0
        """Characters of these tokens' text that have been returned."""

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that they complete, often empty."""
        return "".join(map(self._push, ids))

    def finish(self) -> str:
        """Return what was held back: a character still incomplete becomes U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._byte_level else self._emit()

    def _emit(self) -> str:
        text = self._decode()
        piece = text[self._emitted :]
        if piece:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._emitted = len(self._decode())
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def _left_out(self, token: int, content: bytes) -> bool:
        special = self._skip and token in self._tokenizer.special_ids
        return special and content not in self._kept

    def _push(self, token: int) -> str:
        content = self._tokenizer.token_bytes(token)
        # A token that adds no text gives no context either.
        if not content or self._left_out(token, content):
            return ""
        if self._byte_level:
            return self._utf8.decode(content)
        self._ids.append(token)
        self._utf8.decode(content)
        incomplete, _ = self._utf8.getstate()
        return "" if incomplete else self._emit()


class StopChecker:
    """Finds the first complete stop string, however the text is cut into pieces.

    Of two that end at the same character the longer one counts. Time is linear in the text (Knuth,
    Morris and Pratt 1977).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        self._borders = [_borders(pattern) for pattern in self._stop]
        self._firsts = {pattern[0] for pattern in stop}
        self._matched = [0] * len(stop)
        """For each stop string, the length of its longest prefix that the text so far ends with."""
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next text; return what may be shown, and the stop string once it is complete.

        Text that may be the beginning of a stop string is held back. Neither the stop string nor
        what follows it is ever returned; after it, push nothing more.
        """
        if not self._stop:
            return text, None
        buffer = self._held + text
        begun = bool(self._held)
        for end, char in enumerate(text, start=len(self._held) + 1):
            if not begun and char not in self._firsts:
                continue  # most characters are in no stop string
            for i, (pattern, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
                length = self._matched[i]
                while length and pattern[length] != char:
                    length = borders[length]
                self._matched[i] = length + (pattern[length] == char)
                if self._matched[i] == len(pattern):
                    self._held = ""
                    return buffer[: end - len(pattern)], pattern
            begun = any(self._matched)
        shown = len(buffer) - max(self._matched, default=0)
        self._held = buffer[shown:]
        return buffer[:shown], None

    def finish(self) -> str:
        """Return the text that was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class Beginning:
    """Removes `prefix` from the beginning of a text that comes in pieces.

    A prefix is at most one character, so that a piece has it whole or not at all.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __call__(self, text: str) -> str:
        """Take the next piece; return what is shown of it."""
        if text and self._prefix:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text


class TextStream:
    """Text of one choice, up to its stop string, if one comes after `min_tokens` tokens.

    The stop string itself is left out of the text, unless `include_stop` asks for it. A
    `completion_prefix` at the beginning of the text is left out too, before stop strings are looked
    for.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
        kept_special_tokens: Collection[str] = (),
        include_stop: bool = False,
        completion_prefix: str = "",
    ) -> None:
        self._shown = Beginning(completion_prefix)
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=skip_special_tokens,
            kept_special_tokens=kept_special_tokens,
        )
        self._stop = StopChecker(stop)
        self._required = min_tokens
        self._include_stop = include_stop

    def push(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """Take the next tokens; return the text to show, and the stop string if it has come."""
        self._required -= len(ids)
        text = self._shown(self._detokenizer.push(ids))
        return (text, None) if self._required > 0 else self._found(*self._stop.push(text))

    def finish(self) -> tuple[str, str | None]:
        """Return the text held back at the end of the tokens, which may complete a stop string."""
        text, matched = self._stop.push(self._shown(self._detokenizer.finish()))
        return self._found(text, matched) if matched else (text + self._stop.finish(), None)

    def _found(self, text: str, matched: str | None) -> tuple[str, str | None]:
        return (text + matched if matched and self._include_stop else text), matched


class TextOffsets:
    """Where each token of a text begins, in characters of the text that is shown.

    A token that begins within a character begins where that character does. A token that adds no
    text, such as a special token that is left out, begins where the next one does.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        skip_special_tokens: bool = True,
        completion_prefix: str = "",
    ) -> None:
        self._shown = Beginning(completion_prefix)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self.end = 0
        """Number of characters so far, without an incomplete one."""

    def push(self, token: int) -> int:
        """Take the next token; return where it begins, in characters."""
        begin = self.end
        self.end += len(self._shown(self._detokenizer.push((token,))))
        return begin


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper border."""
    borders = [0, 0]
    for char in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != char:
            length = borders[length]
        borders.append(length + (pattern[length] == char))
    return borders
