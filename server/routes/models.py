"""GET /v1/models: the base model and every intervention, as OpenAI lists models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse

from server.context import Context, Current
from server.listing import listing
from server.openapi import answers
from server.schemas.answers.interventions import Model, ModelList
from server.selection import find_model
from server.streaming import json_answer

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry

router = APIRouter(tags=["openai"])


@router.get("/v1/models", summary="List models", responses=answers(ModelList))
async def list_models(context: Current) -> StreamingResponse:
    """The base model, then the interventions by name."""
    base = context.engine.info.model

    def line(entry: Entry) -> Model:
        return _model(context, entry.name, root=entry.digest, parent=base)

    return listing(context, line, first=(_model(context, base, root=base, parent=None),))


@router.get("/v1/models/{model:path}", summary="Get a model", responses=answers(Model))
async def get_model(context: Current, model: str) -> Response:
    """One model, under any id that a request may use."""
    base = context.engine.info.model
    version = await asyncio.to_thread(find_model, context, model)
    if version is None:
        return json_answer(_model(context, base, root=base, parent=None))
    return json_answer(_model(context, model, root=version.digest, parent=base))


def _model(context: Context, model: str, *, root: str, parent: str | None) -> Model:
    return {
        "id": model,
        "object": "model",
        "created": context.started,
        "owned_by": "reft-server",
        "root": root,
        "parent": parent,
        "max_model_len": context.engine.info.max_model_len,
    }
