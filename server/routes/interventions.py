"""/v1/interventions: list, upload, replace and remove interventions."""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from collections.abc import Collection
from functools import partial
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from reft_runtime.errors import InvalidRequest
from reft_runtime.front.hop import unless_left
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from reft_runtime.interventions.registry.paging import (
    DEFAULT_PAGE,
    MAX_AFTER,
    MAX_PAGE,
    MAX_QUERY,
    Sort,
)
from server.body import receive_file
from server.context import Context, Current
from server.entries import change_answer, entry_answer, entry_fields, etag, removal_answer
from server.listing import listing, page
from server.openapi import (
    CONDITIONS,
    FILE_ERRORS,
    OF_CHANGES,
    UNLESS_SERVED,
    answers,
    empty,
    refuses,
    takes_file,
    takes_headers,
)
from server.schemas.answers.interventions import (
    InterventionEntry,
    InterventionList,
    RemovedIntervention,
)

router = APIRouter(prefix="/v1/interventions", tags=["interventions"])


_TAG = re.compile(r'\*|"[0-9a-f]{64}"')

MAX_PROBLEMS = 100
"""Most files for which a listing says why they are not served; the log names all of them."""


@router.get("", summary="List interventions", responses=answers(InterventionList))
async def list_interventions(
    request: Request,
    context: Current,
    limit: Annotated[
        int | None, Query(ge=1, le=MAX_PAGE, description="Entries of a page; by default 100.")
    ] = None,
    after: Annotated[
        str | None, Query(max_length=MAX_AFTER, description="The `next` of the page before.")
    ] = None,
    q: Annotated[
        str | None,
        Query(max_length=MAX_QUERY, description="Text to find in names and descriptions."),
    ] = None,
    sort: Annotated[Sort | None, Query(description="Order; by default by name.")] = None,
) -> Response:
    """List the interventions, and the reasons why files of the sources are not served.

    Without parameters all are listed, by name. With any parameter the answer is one page, of at
    most `limit` (by default 100) of those whose name or description contains `q`. `after` is the
    `next` of the page before.
    """
    line, more = partial(entry_fields, context), partial(_problems, context)
    if all(given is None for given in (limit, after, q, sort)):
        return listing(context, line, more=more)
    asked = partial(context.registry.page, q or "", sort or "name", after, limit or DEFAULT_PAGE)
    return await page(request, context, asked, line, more)


@router.get(
    "/{name}",
    summary="Get an intervention",
    openapi_extra=takes_headers(UNLESS_SERVED),
    responses=answers(InterventionEntry, headers=["etag"])
    | empty(304, "The version in If-None-Match is still served.", ["etag"]),
)
async def get_intervention(request: Request, context: Current, name: str) -> Response:
    """One intervention; 304 without a body if `If-None-Match` names the version that is served."""
    tags = _tags(request, "if-none-match", weak=True)
    entry = await context.administer(context.registry.entry, name)
    if {entry.digest, "*"} & set(tags or ()):
        return Response(status_code=304, headers=etag(entry))
    answer = entry_answer(context, entry)
    # A cache would ask by the version alone, and pins and counts change without it.
    answer.headers["cache-control"] = "no-store"
    return answer


@router.put(
    "/{name}",
    summary="Upload an intervention",
    openapi_extra=takes_file(),
    responses=answers(InterventionEntry, "The name's file is replaced.", headers=OF_CHANGES)
    | answers(InterventionEntry, "The name is new.", status=201, headers=OF_CHANGES)
    | refuses(*FILE_ERRORS, 412),
)
async def put_intervention(request: Request, context: Current, name: str) -> Response:
    """Serve the file in the body under this name: 201 for a new name, 200 for a replaced one.

    Requests in flight finish with the version that they began with. With `If-None-Match: *` or
    `If-Match: "DIGEST"` the file is served only if that condition holds; else the answer is 412.
    """
    sha256, expected = _declared_sha256(request), expected_digests(request)
    registry = context.registry
    file = await unless_left(context.change(registry.incoming), lambda file: file.discard())
    try:
        await receive_file(request, file, MAX_FILE_BYTES)
        begun = time.monotonic()
        made = await context.make(registry.put, name, file, sha256, expected)
    finally:
        file.discard()
    context.metrics.loaded(name, time.monotonic() - begun)
    return change_answer(context, made, 201 if made.change.before is None else 200)


@router.delete(
    "/{name}",
    summary="Remove an intervention",
    openapi_extra=takes_headers({"If-Match": CONDITIONS["If-Match"]}),
    responses=answers(RemovedIntervention, headers=["x-replicas-behind"]) | refuses(412, 507),
)
async def delete_intervention(request: Request, context: Current, name: str) -> Response:
    """Stop serving this name. Requests in flight finish with the version that they began with.

    With `If-Match: "DIGEST"` the name is removed only if it stands for that version; else the
    answer is 412.
    """
    made = await context.make(context.registry.remove, name, expected_digests(request))
    return removal_answer(name, made)


def _problems(context: Context) -> dict[str, Any]:
    found = sorted(context.registry.unserved().items())
    # A client need not know where on this machine a file lies.
    return {"problems": {os.path.basename(file): why for file, why in islice(found, MAX_PROBLEMS)}}


def expected_digests(request: Request) -> Collection[str] | None:
    """Digests of which the name must stand for one, from If-Match and If-None-Match.

    `*` among them means any version, () that the name must be new, and None that there is no
    condition. Raises `InvalidRequest` for a condition that is not supported.
    """
    match, none_match = _tags(request, "if-match"), _tags(request, "if-none-match")
    if none_match is not None:
        if none_match != ["*"] or match is not None or request.method != "PUT":
            raise InvalidRequest(
                "If-None-Match is taken with PUT, as *, and without If-Match.",
                param="if-none-match",
            )
        return ()
    return match


def _tags(request: Request, name: str, *, weak: bool = False) -> list[str] | None:
    """The digests, or `*`, that a condition's header names; None without the header.

    `weak` accepts W/"DIGEST" too, which suffices for reading: a proxy that compresses writes tags
    so. Raises `InvalidRequest` for any other tag.
    """
    given = ", ".join(request.headers.getlist(name))
    if not given:
        return None
    tags = [tag.strip().removeprefix("W/" if weak else "") for tag in given.split(",")]
    if not all(_TAG.fullmatch(tag) for tag in tags):
        raise InvalidRequest(
            f'{name.title()} must be "DIGEST", the 64 digits of a version in quotes, or *.',
            param=name,
        )
    return [tag.strip('"') for tag in tags]


def _declared_sha256(request: Request) -> str | None:
    """SHA-256 of the body in hex, from `x-sha256` (hex) or `Digest: sha-256=` (base64), or None."""
    declared = request.headers.get("x-sha256")
    if declared is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", declared):
            raise InvalidRequest("x-sha256 must be 64 hexadecimal digits.", param="x-sha256")
        return declared.lower()
    digest = request.headers.get("digest")
    if digest is None:
        return None
    algorithm, _, value = digest.partition("=")
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if algorithm.lower() != "sha-256" or len(raw) != 32:
        raise InvalidRequest("Digest must be sha-256=<base64 of 32 bytes>.", param="digest")
    return raw.hex()
