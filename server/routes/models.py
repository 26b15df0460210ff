"""GET /v1/models: the base model and every intervention, as OpenAI lists models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from server.context import Context, Server
from server.selection import select

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(server: Server) -> dict[str, Any]:
    """The base model, then the interventions by name."""
    base = server.engine.info.model
    entries = await asyncio.to_thread(server.engine.registry.entries)
    models = [_model(server, base, root=base, parent=None)]
    models += [_model(server, entry.name, root=entry.digest, parent=base) for entry in entries]
    return {"object": "list", "data": models}


@router.get("/v1/models/{model:path}")
async def get_model(server: Server, model: str) -> dict[str, Any]:
    """One model, under any id that a request may use."""
    base = server.engine.info.model
    if model == base:
        return _model(server, base, root=base, parent=None)
    selection = await asyncio.to_thread(select, server.engine, model)
    (use,) = selection.uses
    return _model(server, model, root=use.label.partition("@")[2], parent=base)


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
