"""Numbers and lists as people say them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: float, noun: str) -> str:
    """A number with its noun: `1 step`, `1,200 steps`, `2.5 passes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun if count == 1 else plural}"


def duration(seconds: float) -> str:
    """A rough time, in the unit that is read most easily."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    if seconds < 5400:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def listed(items: Sequence[str], most: int) -> str:
    """Items with commas between them; of more than `most` the others are counted."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more:,} more" if more > 0 else "")
