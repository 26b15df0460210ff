"""vLLM's routes to load and unload, so that controllers written for it work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse

from reft_runtime.errors import ReftError
from server.body import json_body
from server.context import Current
from server.entries import behind_headers
from server.openapi import FILE_ERRORS, answers_text, refuses, takes
from server.schemas.interventions import LoadRequest, UnloadRequest

router = APIRouter(prefix="/v1", tags=["vllm"])

_FIELDS = {"name": "lora_name", "path": "lora_path"}


@router.post(
    "/load_lora_adapter",
    summary="Serve a file, as vLLM's route",
    response_class=PlainTextResponse,
    responses=answers_text() | refuses(*FILE_ERRORS, 412),
    openapi_extra=takes(LoadRequest, {"lora_name": "polite", "lora_path": "polite.safetensors"}),
)
async def load_lora_adapter(
    context: Current, body: Annotated[LoadRequest, Depends(json_body(LoadRequest))]
) -> PlainTextResponse:
    """Serve a file inside the configured sources under a name."""
    begun = time.monotonic()
    with _vllm_fields():
        await context.make(
            context.registry.load, body.lora_name, body.lora_path, replace=body.load_inplace
        )
    context.metrics.loaded(body.lora_name, time.monotonic() - begun)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    summary="Stop serving a name, as vLLM's route",
    response_class=PlainTextResponse,
    responses=answers_text(headers=["x-replicas-behind"]) | refuses(507),
    openapi_extra=takes(UnloadRequest, {"lora_name": "polite"}),
)
async def unload_lora_adapter(
    context: Current, body: Annotated[UnloadRequest, Depends(json_body(UnloadRequest))]
) -> PlainTextResponse:
    """Stop serving a name."""
    with _vllm_fields():
        made = await context.make(context.registry.remove, body.lora_name)
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' removed successfully.",
        headers=behind_headers(made.behind),
    )


@contextmanager
def _vllm_fields() -> Iterator[None]:
    """Let errors name the fields of these routes instead of the registry's."""
    try:
        yield
    except ReftError as error:
        if error.param is not None:
            error.param = _FIELDS.get(error.param, error.param)
        raise
