"""The orders in which the listing of interventions is paged, and where a page begins."""

from __future__ import annotations

import math
from typing import Literal, get_args

from reft_runtime.errors import InvalidRequest

MAX_PAGE = 1000
"""Most entries of one page."""

DEFAULT_PAGE = 100

MAX_QUERY = 100
"""Most characters of a search."""

MAX_AFTER = 128
"""Most characters of a place, which is a number and a name."""

Sort = Literal[
    "name",
    "size",
    "parameters",
    "modified",
    "requests",
    "in_flight",
    "last_used",
    "-name",
    "-size",
    "-parameters",
    "-modified",
    "-requests",
    "-in_flight",
    "-last_used",
]
"""The orders of a page; a minus reverses the order, also of names with equal values."""

SORTS: tuple[Sort, ...] = get_args(Sort)

Place = tuple[float, str]
"""A place in an order: the value that counts (0 if only names do), and the name."""


def cursor(place: Place, sort: Sort) -> str:
    """The place as text, for the page that begins behind it."""
    value, name = place
    return name if sort.endswith("name") else f"{value!r},{name}"


def place_of(after: str, sort: Sort) -> Place:
    """The place that a `cursor` names. Raises `InvalidRequest` for one of another order."""
    if sort.endswith("name"):
        return 0.0, after
    number, comma, name = after.partition(",")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not comma or math.isnan(value):
        raise InvalidRequest(
            f"after: give what `next` of the page before said, which was sorted by {sort}.",
            param="after",
        )
    return value, name
