"""What somebody may have meant who wrote a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MOST_COMPARED = 1000
"""Names that are compared letter by letter, which takes some milliseconds."""

MOST_SEEN = 100_000

LENGTHS = 3
"""Letters by which a name that was meant may be longer or shorter."""

LIKE = 0.7
"""How alike two names are at least, from 0 to 1 (`difflib.SequenceMatcher.ratio`)."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Up to `most` of the known names that are like this one, the most like it first.

    Of very many names some are compared: an error need not cost more than an answer.
    """
    seen = islice(known, MOST_SEEN)
    near = islice((k for k in seen if abs(len(k) - len(name)) <= LENGTHS), MOST_COMPARED)
    return get_close_matches(name, near, most, LIKE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind an error, with a blank before it; empty where nothing is alike."""
    found = [f"`{like}`" for like in nearest(name, known)]
    if not found:
        return ""
    *others, last = found
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
