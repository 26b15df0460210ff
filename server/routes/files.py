"""GET /v1/interventions/{name}/file: the file that is served under a name."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.context import Current
from server.download import Download
from server.openapi import answers_file

router = APIRouter(prefix="/v1/interventions", tags=["interventions"])


@router.get(
    "/{name}/file",
    summary="Download an intervention's file",
    response_class=Response,
    responses=answers_file(),
)
async def get_file(context: Current, name: str) -> Response:
    """The safetensors file of `NAME` or `NAME@DIGEST`, as it was uploaded or lies in its source."""
    return Download(context, name)
