"""Which prompt tokens an edit touches, in pyreft's notation: `f3`, `l1`, `f3+l3`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reft_runtime.errors import InvalidFile

MAX_SPAN = 65_535

_TERM = re.compile(r"([fl])([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Positions:
    """The first `first` and the last `last` prompt tokens.

    With n prompt tokens each side reaches at most n // 2 tokens (pyreft's clamp), so the two never
    overlap, and a prompt of a single token is not edited. Generated tokens are never edited.
    """

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for name, span in (("f", self.first), ("l", self.last)):
            if not 0 <= span <= MAX_SPAN:
                raise InvalidFile(
                    f"positions: {name}{span} is out of range; {name}N takes 1 to {MAX_SPAN}."
                )
        if not (self.first or self.last):
            raise InvalidFile("positions: nothing to edit; name fN, lN or fN+lM, such as `l1`.")

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read `fN`, `lN` or `fN+lM`; anything else raises `InvalidFile` with the fix."""
        spans: dict[str, int] = {}
        for term in text.split("+"):
            match = _TERM.fullmatch(term.strip())
            if match is None or not term.isascii():
                raise InvalidFile(
                    f"positions: {text[:80]!r} is not understood; write fN, lN or fN+lM,"
                    " such as `f3+l3`."
                )
            side, count = match[1], int(match[2])
            if side in spans:
                raise InvalidFile(f"positions: {text[:80]!r} names `{side}` twice; name it once.")
            if count == 0:
                raise InvalidFile(f"positions: `{side}0` edits nothing; leave it out.")
            spans[side] = count
        return cls(first=spans.get("f", 0), last=spans.get("l", 0))

    def __str__(self) -> str:
        terms = [f"{side}{span}" for side, span in (("f", self.first), ("l", self.last)) if span]
        return "+".join(terms)

    def offsets(self, n: int, start: int, stop: int) -> list[int]:
        """Absolute indices of the edited tokens in [start, stop), ascending; n prompt tokens."""
        half = n // 2
        head = range(start, min(stop, half, self.first))
        tail = range(max(start, n - min(half, self.last)), min(stop, n))
        return [*head, *tail]
