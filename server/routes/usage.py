"""GET /v1/usage: what tenants have used, by day, tenant and intervention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from reft_runtime.errors import InvalidRequest, Overloaded
from server.context import Context, Current
from server.openapi import answers
from server.schemas.answers.operations import UsageReport, UsageRow, UsageTotal
from server.streaming import json_bytes
from server.tenants import usage
from server.tenants.access import usage_seen
from server.tenants.usage import GROUPS, Counts, Found, Group

router = APIRouter(tags=["operations"])

DEFAULT_DAYS = 31
"""Number of days that are told of where the first is not given."""

MAX_ROWS = 100_000
"""Most rows of an answer; a bill is never cut off silently."""


_DAY: dict[str, Any] = {"format": "date", "minLength": 10}
_GROUP = "|".join(GROUPS)
_GROUP_BY: dict[str, Any] = {"pattern": f"^({_GROUP})(,({_GROUP}))*$"}
"""What a client that follows the schema does not send otherwise; the handler says what is wrong."""


@router.get("/v1/usage", summary="Get what was used", responses=answers(UsageReport))
async def get_usage(
    request: Request,
    context: Current,
    first: Annotated[
        str | None,
        Query(
            alias="from",
            max_length=10,
            description="First UTC day, YYYY-MM-DD.",
            json_schema_extra=_DAY,
        ),
    ] = None,
    last: Annotated[
        str | None,
        Query(
            alias="to",
            max_length=10,
            description="Last UTC day; by default today.",
            json_schema_extra=_DAY,
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        Query(max_length=256, description="One tenant; by default all that the key may know of."),
    ] = None,
    intervention: Annotated[
        str | None, Query(max_length=4096, description="Name, names with +, or (base).")
    ] = None,
    group_by: Annotated[
        str | None,
        Query(
            max_length=64,
            description="Of day, tenant, intervention; with commas.",
            json_schema_extra=_GROUP_BY,
        ),
    ] = None,
) -> Response:
    """What was used, from the first to the last day, both included: by default the last 31.

    A row counts the requests and tokens of one day, tenant and intervention, or what `group_by`
    leaves of these. `total` is the sum of the rows. A tenant gets its own rows, and an admin that
    sees every intervention those of all tenants.
    """
    whose = usage_seen(context.tenant, tenant)
    until = _day(last, "to") or datetime.now(UTC).date()
    earliest = date.fromordinal(max(1, until.toordinal() - DEFAULT_DAYS + 1))
    since = _day(first, "from") or earliest
    if since > until:
        raise InvalidRequest(f"from: {since} is after the last day, {until}.", param="from")
    query = usage.Query(since, until, _groups(group_by), whose, intervention, MAX_ROWS + 1)
    if context.replicas is not None:
        found = await context.replicas.usage(query)
    else:
        found = await context.administer(context.usage.find, query)
    content = await context.administer(_written, context, query, found)
    if not context.bodies.take(request.scope, len(content)):
        raise Overloaded("Too many large answers are under way; try again later.")
    return Response(content, media_type="application/json")


def _day(text: str | None, param: str) -> date | None:
    if text is None:
        return None
    with suppress(ValueError):
        day = date.fromisoformat(text)
        if text == day.isoformat():  # there are more forms: 2026-W05-6
            return day
    raise InvalidRequest(f"{param}: write a day as YYYY-MM-DD, such as 2026-01-31.", param=param)


def _groups(text: str | None) -> Sequence[Group]:
    """The groups that are named, in the order of `GROUPS`; all of them without a text."""
    if text is None:
        return GROUPS
    named = text.split(",")
    if not set(named) <= set(GROUPS):
        raise InvalidRequest(
            "group_by: name one of day, tenant and intervention, or several with commas.",
            param="group_by",
        )
    return [group for group in GROUPS if group in named]


def _written(context: Context, query: usage.Query, found: Found) -> bytes:
    if len(found.rows) > MAX_ROWS:
        raise InvalidRequest(
            f"group_by: there are more than {MAX_ROWS} rows; group by fewer columns, or ask for"
            " fewer days, one tenant or one intervention.",
            param="group_by",
        )
    return json_bytes(_answer(context, query, found))


def _answer(context: Context, query: usage.Query, found: Found) -> UsageReport:
    total = Counts()
    if found.rows:
        total = Counts(*map(sum, zip(*(counts for _, counts in found.rows), strict=True)))
    return {
        "object": "usage",
        "from": query.first.isoformat(),
        "to": query.last.isoformat(),
        "since": found.since,
        "kept": context.settings.state_dir is not None,
        "problem": found.problem or context.usage.problem,
        "data": [_row(query.groups, groups, counts) for groups, counts in found.rows],
        "total": _total(total),
    }


def _row(groups: Sequence[Group], values: Sequence[str], counts: Counts) -> UsageRow:
    return cast(UsageRow, {**dict(zip(groups, values, strict=True)), **_total(counts)})


def _total(counts: Counts) -> UsageTotal:
    return {
        "requests": counts.requests,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.completion_tokens,
    }
