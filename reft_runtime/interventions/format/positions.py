"""Which tokens an edit touches, in pyreft's notation with additions: `l1`, `f3+l3`, `all`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reft_runtime.errors import InvalidFile

MAX_SPAN = 65_535
MAX_LISTED = 4_096

_SPAN = re.compile(r"([fl])([0-9]{1,6})")
_LIST = re.compile(r"\[\s*-?[0-9]{1,6}(\s*,\s*-?[0-9]{1,6})*\s*\]")
_SYNTAX = "write fN, lN, [0,3,-1], decode or a union such as `f3+l3`; or all"


@dataclass(frozen=True, slots=True)
class Positions:
    """The first `first` and the last `last` prompt tokens, the `listed` ones, and generated ones.

    With n prompt tokens, of which the last `suffix_offset` do not count (some of pyreft's data sets
    leave one out), m = n - suffix_offset: `first` is the tokens [0, min(m // 2, first)), `last` is
    [m - min(m // 2, last), m), as pyreft clamps them, so that the two never overlap and a prompt of
    one token is edited by neither. `listed` are indices into the prompt, negative ones from the end
    of the m tokens; those outside the prompt are dropped. `decode` is every generated token, and
    `everything` the whole prompt and every generated token.
    """

    first: int = 0
    last: int = 0
    listed: tuple[int, ...] = ()
    decode: bool = False
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
        for index in self.listed:
            if abs(index) > MAX_SPAN:
                raise InvalidFile(f"positions: index {index} is out of range; use ±{MAX_SPAN}.")
        if not 0 <= self.suffix_offset <= MAX_SPAN:
            raise InvalidFile(f"suffix_offset: {self.suffix_offset}; it takes 0 to {MAX_SPAN}.")
        if not (self.first or self.last or self.listed or self.decode or self.everything):
            raise InvalidFile(f"positions: nothing to edit; {_SYNTAX}.")

    @classmethod
    def parse(cls, text: str, suffix_offset: int = 0) -> Positions:
        """Read terms joined by `+`; an unknown term raises `InvalidFile` with the fix."""
        spans: dict[str, int] = {}
        listed: tuple[int, ...] = ()
        words: set[str] = set()
        for term in (part.strip() for part in text.split("+")):
            if term in ("all", "decode") and term not in words:
                words.add(term)
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
        return cls(
            first=spans.get("f", 0),
            last=spans.get("l", 0),
            listed=tuple(sorted(set(listed), key=lambda index: (index < 0, index))),
            decode="decode" in words,
            suffix_offset=suffix_offset,
        )

    def __str__(self) -> str:
        if self.everything:
            return "all"
        terms = [f"{side}{span}" for side, span in (("f", self.first), ("l", self.last)) if span]
        if self.listed:
            terms.append(f"[{','.join(map(str, self.listed))}]")
        if self.decode:
            terms.append("decode")
        return "+".join(terms)

    @property
    def edits_decode(self) -> bool:
        """Whether generated tokens are edited."""
        return self.decode or self.everything

    def count(self, n: int) -> int:
        """How many tokens of a prompt of `n` tokens are edited."""
        return n if self.everything else len(self.offsets(n, 0, n))

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
        generated = range(max(start, n), stop) if self.decode else ()
        if not self.listed:
            return [*head, *tail, *generated]
        listed = (index if index >= 0 else m + index for index in self.listed)
        inside = (index for index in listed if start <= index < min(stop, n) and index >= 0)
        return [*sorted({*head, *tail, *inside}), *generated]
