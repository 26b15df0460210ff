"""GET /v1/models: the base model and every intervention, as OpenAI lists models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.context import Context, Current
from server.listing import listing
from server.selection import find_model

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry

router = APIRouter(tags=["openai"])


@router.get("/v1/models", response_model=None)
async def list_models(context: Current) -> StreamingResponse:
    """The base model, then the interventions by name."""
    base = context.engine.info.model

    def line(entry: Entry) -> dict[str, Any]:
        return _model(context, entry.name, root=entry.digest, parent=base)

    return listing(context, line, first=(_model(context, base, root=base, parent=None),))


@router.get("/v1/models/{model:path}")
async def get_model(context: Current, model: str) -> dict[str, Any]:
    """One model, under any id that a request may use."""
    base = context.engine.info.model
    version = await asyncio.to_thread(find_model, context, model)
    if version is None:
        return _model(context, base, root=base, parent=None)
    return _model(context, model, root=version.digest, parent=base)


def _model(context: Context, model: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": context.started,
        "owned_by": "reft-server",
        "root": root,
        "parent": parent,
        "max_model_len": context.engine.info.max_model_len,
    }
