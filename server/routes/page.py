"""The page at /, the API's reference at /docs, and their files: no key, for they hold no data."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.static import page


async def _index(request: Request) -> Response:
    return page().files["index.html"].answer(request.headers)


async def _reference(request: Request) -> Response:
    return page().files["docs.html"].answer(request.headers)


async def _file(request: Request) -> Response:
    """Answer a file of this page; 404 for another version's, which may not fit the others."""
    found = page().files.get(request.path_params["file"])
    if request.path_params["digest"] != page().digest or found is None:
        raise HTTPException(404)
    return found.answer(request.headers)


routes = [
    Route("/", _index, methods=["GET"]),
    Route("/docs", _reference, methods=["GET"]),
    Route("/page/{digest}/{file:path}", _file, methods=["GET"]),
]
"""Routes of the page. Each answers HEAD, too; none is part of the API's description."""
