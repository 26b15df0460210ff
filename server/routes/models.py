"""GET /v1/models: the base model and every intervention, as OpenAI lists models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.context import Context, Server
from server.listing import listing
from server.selection import find_model

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry

router = APIRouter(tags=["openai"])


@router.get("/v1/models", response_model=None)
async def list_models(server: Server) -> StreamingResponse:
    """The base model, then the interventions by name."""
    base = server.engine.info.model

    def line(entry: Entry) -> dict[str, Any]:
        return _model(server, entry.name, root=entry.digest, parent=base)

    return listing(server, line, first=(_model(server, base, root=base, parent=None),))


@router.get("/v1/models/{model:path}")
async def get_model(server: Server, model: str) -> dict[str, Any]:
    """One model, under any id that a request may use."""
    base = server.engine.info.model
    version = await asyncio.to_thread(find_model, server.engine, model)
    if version is None:
        return _model(server, base, root=base, parent=None)
    return _model(server, model, root=version.digest, parent=base)


def _model(server: Context, model: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": server.started,
        "owned_by": "reft-server",
        "root": root,
        "parent": parent,
        "max_model_len": server.engine.info.max_model_len,
    }
