"""Health for orchestrators (no key needed), version, metrics, and the API's description."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from reft_runtime.version import VERSION
from server.context import Current
from server.metrics import CONTENT_TYPE
from server.openapi import describe

public = APIRouter(tags=["health"])
router = APIRouter(tags=["operations"])

UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not healthy: `status` says why."}
}


@public.get("/livez", responses=UNHEALTHY)
@public.head("/livez", include_in_schema=False)  # as `wget --spider` and some monitors ask
async def livez(context: Current) -> JSONResponse:
    """Answers 200 while the engine's loop turns; otherwise the process should be restarted."""
    return _health("ok" if context.health.live else "engine not running")


@public.get("/readyz", responses=UNHEALTHY)
@public.get("/health", responses=UNHEALTHY)
@public.head("/readyz", include_in_schema=False)
@public.head("/health", include_in_schema=False)
async def readyz(context: Current) -> JSONResponse:
    """Answers 200 while the server is loaded, proven by a first generation, and not draining.

    `sources` and `state` say why sources of interventions, and the state, cannot be reached; what
    they held is served all the same. `problems` are others that do not keep it from answering.
    """
    registry = context.registry
    # Anybody may ask: the number of a source tells no bucket or folder.
    away = [
        {"source": source.number, "kind": source.kind, "problem": source.problem}
        for source in registry.sources()
        if source.problem is not None
    ]
    problems = context.problems()
    more: dict[str, Any] = {"sources": away} if away else {}
    if problems:
        more["problems"] = problems
    if (problem := registry.state_problem()) is not None:
        more["state"] = problem
    return _health(context.health.status, more)


@router.get("/version")
async def version() -> dict[str, str]:
    """Version of the server."""
    return {"version": VERSION}


@router.get("/metrics", response_class=Response)
async def metrics(context: Current) -> Response:
    """Metrics in Prometheus' text format."""
    if context.replicas is not None:
        text = await context.replicas.metrics()
    else:
        text = await context.administer(context.metrics.text)
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    """This API as an OpenAPI document."""
    return describe(request.app)


def _health(status: str, more: Mapping[str, Any] = MappingProxyType({})) -> JSONResponse:
    return JSONResponse({"status": status, **more}, 200 if status == "ok" else 503)
