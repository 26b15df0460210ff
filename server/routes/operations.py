"""Health for orchestrators (no key needed), version, metrics, and the API's description."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from reft_runtime.version import VERSION
from server.context import Current
from server.metrics import CONTENT_TYPE
from server.openapi import answers, answers_text, described
from server.schemas.answers.base import Error
from server.schemas.answers.operations import HealthReport, ServerVersion, SourceProblem
from server.streaming import json_answer

public = APIRouter(tags=["health"])
router = APIRouter(tags=["operations"])

HEALTH = answers(HealthReport, "The server is well.") | answers(
    (HealthReport, Error), "It is not: `status` says why.", status=503
)


@public.get("/livez", summary="Ask whether the server is alive", responses=HEALTH)
async def livez(context: Current) -> Response:
    """Answers 200 while the engine's loop turns; otherwise the process should be restarted."""
    return _answer({"status": "ok" if context.health.live else "engine not running"})


@public.get("/readyz", summary="Ask whether the server is ready", responses=HEALTH)
@public.get(
    "/health",
    summary="Ask whether the server is ready, as vLLM's route",
    operation_id="health",
    responses=HEALTH,
)
async def readyz(context: Current) -> Response:
    """Answers 200 while the server is loaded, proven by a first generation, and not draining.

    `sources` and `state` say why sources of interventions, and the state, cannot be reached; what
    they held is served all the same. `problems` are others that do not keep it from answering.
    """
    registry = context.registry
    # Anybody may ask: the number of a source tells no bucket or folder.
    away: list[SourceProblem] = [
        {"source": source.number, "kind": source.kind, "problem": source.problem}
        for source in registry.sources()
        if source.problem is not None
    ]
    report: HealthReport = {"status": context.health.status}
    if away:
        report["sources"] = away
    if problems := context.problems():
        report["problems"] = problems
    if (problem := registry.state_problem()) is not None:
        report["state"] = problem
    return _answer(report)


@router.get("/version", summary="Get the server's version", responses=answers(ServerVersion))
async def version() -> Response:
    """Version of the server."""
    written: ServerVersion = {"version": VERSION}
    return json_answer(written)


@router.get(
    "/metrics",
    summary="Get the metrics",
    response_class=PlainTextResponse,
    responses=answers_text(),
)
async def metrics(context: Current) -> Response:
    """Metrics in Prometheus' text format."""
    if context.replicas is not None:
        text = await context.replicas.metrics()
    else:
        text = await context.administer(context.metrics.text)
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, context: Current) -> Response:
    """This API as an OpenAPI document."""
    return await context.administer(lambda: json_answer(described(request.app)))


def _answer(report: HealthReport) -> Response:
    return json_answer(report, 200 if report["status"] == "ok" else 503)
