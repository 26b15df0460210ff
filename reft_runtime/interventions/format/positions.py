"""Which tokens an edit touches, in pyreft's notation with additions: `f3+l3`, `[1:]`, `all`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from reft_runtime.errors import InvalidFile

MAX_SPAN = 65_535
MAX_LISTED = 4_096
MAX_SLICES = 8

Bounds = tuple[int, int | None]
"""Of a slice: where it starts and stops, as Python's own; None is the end."""

EVERY: Bounds = (0, None)
"""The slice that holds all: `prompt` of the prompt, `decode` of the answer."""

_SPAN = re.compile(r"([fl])([0-9]{1,6})")
_LIST = re.compile(r"\[\s*-?[0-9]{1,6}(\s*,\s*-?[0-9]{1,6})*\s*\]")
_SLICE = re.compile(r"(decode)?\[\s*(-?[0-9]{1,6})?\s*:\s*(-?[0-9]{1,6})?\s*\]")
_SYNTAX = (
    "write fN, lN, [0,3,-1], [1:], prompt, decode, decode[:8] or a union such as `f3+l3`; or all"
)


@dataclass(frozen=True, slots=True)
class Positions:
    """The first `first` and the last `last` prompt tokens, listed ones, slices, and generated ones.

    With n prompt tokens, of which the last `suffix_offset` do not count (some of pyreft's data sets
    leave one out), m = n - suffix_offset: `first` is the tokens [0, min(m // 2, first)), `last` is
    [m - min(m // 2, last), m), as pyreft clamps them, so that the two never overlap and a prompt of
    one token is edited by neither. `listed` are indices into the prompt, negative ones from the end
    of the m tokens; those outside the prompt are dropped. `slices` are Python's of the m tokens,
    `EVERY` all of them. `decode` are slices of the generated tokens, counted from 0 at the first
    one and never from the end, which nobody knows yet. `everything` is the whole prompt and every
    generated token.
    """

    first: int = 0
    last: int = 0
    listed: tuple[int, ...] = ()
    slices: tuple[Bounds, ...] = ()
    decode: tuple[Bounds, ...] = ()
    everything: bool = False
    suffix_offset: int = 0

    def __post_init__(self) -> None:
        for name, span in (("f", self.first), ("l", self.last)):
            if not 0 <= span <= MAX_SPAN:
                raise InvalidFile(
                    f"positions: {name}{span} is out of range; {name}N takes 1 to {MAX_SPAN}."
                )
        if len(self.listed) > MAX_LISTED:
            raise InvalidFile(f"positions: a list may have at most {MAX_LISTED} indices.")
        slices: list[tuple[Literal["", "decode"], Bounds]] = [
            *(("", pair) for pair in self.slices),
            *(("decode", pair) for pair in self.decode),
        ]
        if len(slices) > MAX_SLICES:
            raise InvalidFile(f"positions: there may be at most {MAX_SLICES} slices.")
        for index in (*self.listed, *(bound for _, pair in slices for bound in pair)):
            if index is not None and abs(index) > MAX_SPAN:
                raise InvalidFile(f"positions: index {index} is out of range; use ±{MAX_SPAN}.")
        for of, (start, stop) in slices:
            written = f"`{_written(of, (start, stop))}`"
            if of and min(start, stop or 0) < 0:
                raise InvalidFile(
                    f"positions: {written} counts from the end of an answer, which nobody knows"
                    " while it is generated; count from its first token, as decode[:8] does."
                )
            if stop is not None and (not stop or ((start < 0) == (stop < 0) and start >= stop)):
                raise InvalidFile(f"positions: {written} is always empty.")
        if not 0 <= self.suffix_offset <= MAX_SPAN:
            raise InvalidFile(f"suffix_offset: {self.suffix_offset}; it takes 0 to {MAX_SPAN}.")
        prompt = self.first or self.last or self.listed or self.slices
        if not (prompt or self.decode or self.everything):
            raise InvalidFile(f"positions: nothing to edit; {_SYNTAX}.")

    @classmethod
    def parse(cls, text: str, suffix_offset: int = 0) -> Positions:
        """Read terms joined by `+`; an unknown term raises `InvalidFile` with the fix."""
        spans: dict[str, int] = {}
        listed: tuple[int, ...] = ()
        slices: set[Bounds] = set()
        decode: set[Bounds] = set()
        words: set[str] = set()
        for term in (part.strip() for part in text.split("+")):
            if term in ("all", "decode", "prompt") and term not in words:
                words.add(term)
            elif term.isascii() and (match := _SLICE.fullmatch(term)):
                (decode if match[1] else slices).add(
                    (int(match[2] or 0), None if match[3] is None else int(match[3]))
                )
            elif term.isascii() and (match := _SPAN.fullmatch(term)):
                side, count = match[1], int(match[2])
                if side in spans:
                    raise InvalidFile(f"positions: {text[:80]!r} has `{side}` twice; once will do.")
                if count == 0:
                    raise InvalidFile(f"positions: `{side}0` edits nothing; leave it out.")
                spans[side] = count
            elif term.isascii() and not listed and _LIST.fullmatch(term):
                listed = tuple(int(index) for index in term[1:-1].split(","))
            else:
                raise InvalidFile(f"positions: {text[:80]!r} is not understood; {_SYNTAX}.")
        if "all" in words:
            return cls(everything=True, suffix_offset=suffix_offset)
        if "prompt" in words:
            slices.add(EVERY)
        if "decode" in words:
            decode.add(EVERY)
        return cls(
            first=spans.get("f", 0),
            last=spans.get("l", 0),
            listed=tuple(sorted(set(listed), key=lambda index: (index < 0, index))),
            slices=_in_order(slices),
            decode=_in_order(decode),
            suffix_offset=suffix_offset,
        )

    def __str__(self) -> str:
        if self.everything:
            return "all"
        terms = [f"{side}{span}" for side, span in (("f", self.first), ("l", self.last)) if span]
        if self.listed:
            terms.append(f"[{','.join(map(str, self.listed))}]")
        terms += [_written("", pair) for pair in dict.fromkeys(self.slices)]
        terms += [_written("decode", pair) for pair in dict.fromkeys(self.decode)]
        return "+".join(terms)

    @property
    def edits_decode(self) -> bool:
        """Whether generated tokens are edited, all or some."""
        return bool(self.decode) or self.everything

    @property
    def turns(self) -> set[int]:
        """Indices of the generated tokens from which on others may be edited than before."""
        return {bound for pair in self.decode for bound in pair if bound}

    def count(self, n: int) -> int:
        """How many tokens of a prompt of `n` tokens are edited."""
        return n if self.everything else len(self.offsets(n, 0, n))

    def generated(self, start: int, stop: int) -> Sequence[int]:
        """Indices of the edited generated tokens in [start, stop), 0 the first one, ascending."""
        ranges = [
            range(max(start, first), stop if end is None else min(stop, end))
            for first, end in ((EVERY,) if self.everything else self.decode)
        ]
        if len(ranges) == 1:
            return ranges[0]
        return sorted(set().union(*ranges))

    def offsets(self, n: int, start: int, stop: int) -> list[int]:
        """Absolute indices of the edited tokens in [start, stop), ascending.

        n is the number of prompt tokens; indices from n on are generated tokens, whether they are
        computed one by one or, after a preemption, in chunks.
        """
        if self.everything:
            return list(range(start, stop))
        m = max(n - self.suffix_offset, 0)
        half = m // 2
        head = range(start, min(stop, half, self.first))
        tail = range(max(start, m - min(half, self.last)), min(stop, m))
        generated: list[int] = []
        if self.decode:
            generated = [n + index for index in self.generated(max(start - n, 0), stop - n)]
        if not (self.listed or self.slices):
            return [*head, *tail, *generated]
        found = {*head, *tail}
        for pair in self.slices:
            first, behind, _ = slice(*pair).indices(m)
            found.update(range(max(start, first), min(stop, behind)))
        listed = (index if index >= 0 else m + index for index in self.listed)
        found.update(index for index in listed if start <= index < min(stop, n) and index >= 0)
        return [*sorted(found), *generated]


def _in_order(slices: Iterable[Bounds]) -> tuple[Bounds, ...]:
    return tuple(sorted(slices, key=lambda pair: (pair[0], pair[1] is None, pair[1] or 0)))


def _written(of: Literal["", "decode"], bounds: Bounds) -> str:
    if bounds == EVERY:
        return of or "prompt"
    start, stop = bounds
    return f"{of}[{start or ''}:{'' if stop is None else stop}]"
