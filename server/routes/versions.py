"""/v1/interventions/{name}/versions and /rollback, and /pin, /unpin and /warm.

The kept versions and the way back to one, and whether tensors are in memory.
"""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.body import json_body
from server.context import Current
from server.entries import change_answer, entry_answer, version_fields
from server.openapi import OF_CHANGES, answers, refuses, takes
from server.routes.interventions import expected_digests
from server.schemas.answers.interventions import InterventionEntry, InterventionVersions
from server.schemas.interventions import RollbackRequest
from server.streaming import json_answer

router = APIRouter(prefix="/v1/interventions", tags=["interventions"])

Rollback = Annotated[RollbackRequest, Depends(json_body(RollbackRequest, required=False))]


@router.get(
    "/{name}/versions",
    summary="List an intervention's versions",
    responses=answers(InterventionVersions),
)
async def list_versions(context: Current, name: str) -> Response:
    """All versions of a name that requests can use, the current one first."""
    versions = await context.administer(context.registry.versions_of, name)
    lines = [version_fields(version) for version in versions]
    listed: InterventionVersions = {"object": "list", "data": lines}
    return json_answer(listed)


@router.post(
    "/{name}/rollback",
    summary="Roll an intervention back",
    openapi_extra=takes(
        RollbackRequest, {"digest": "0a1b2c3d"}, required=False, headers=["If-Match"]
    ),
    responses=answers(InterventionEntry, headers=OF_CHANGES) | refuses(412, 507),
)
async def roll_back(request: Request, context: Current, name: str, body: Rollback) -> Response:
    """Serve a kept version of an upload again: that of `digest`, by default the previous one.

    Requests in flight finish with the version that they began with. With `If-Match: "DIGEST"` the
    version is served only if the name stands for that digest; else the answer is 412.
    """
    expected = expected_digests(request)
    begun = time.monotonic()
    made = await context.make(context.registry.rollback, name, body.digest, expected)
    context.metrics.loaded(name, time.monotonic() - begun)
    return change_answer(context, made)


@router.post(
    "/{name}/pin",
    summary="Pin an intervention",
    responses=answers(InterventionEntry, headers=OF_CHANGES) | refuses(507),
)
async def pin(context: Current, name: str) -> Response:
    """Read the tensors of this name, and keep them in memory until it is unpinned.

    It stays pinned when it is replaced, and with a state folder over restarts.
    """
    return change_answer(context, await context.make(context.registry.pin, name))


@router.post(
    "/{name}/unpin",
    summary="Unpin an intervention",
    responses=answers(InterventionEntry, headers=OF_CHANGES) | refuses(507),
)
async def unpin(context: Current, name: str) -> Response:
    """Let the tensors of this name be evicted again; they stay in memory while there is room."""
    return change_answer(context, await context.make(context.registry.unpin, name))


@router.post(
    "/{name}/warm",
    summary="Read an intervention's tensors",
    responses=answers(InterventionEntry, headers=["etag"]),
)
async def warm(context: Current, name: str) -> Response:
    """Read the tensors of this name now, so that no request has to wait for them."""
    return entry_answer(context, await context.change(context.registry.warm, name))
