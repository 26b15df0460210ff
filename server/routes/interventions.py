"""/v1/interventions: list, upload, replace and remove interventions."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from reft_runtime.errors import InvalidRequest
from server.body import read_body
from server.context import Server
from server.openapi import takes_file

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry

router = APIRouter(prefix="/v1/interventions", tags=["interventions"])


@router.get("")
async def list_interventions(server: Server) -> dict[str, Any]:
    """All interventions, by name."""
    entries = await asyncio.to_thread(server.engine.registry.entries)
    return {"object": "list", "data": [_entry(entry) for entry in entries]}


@router.get("/{name}")
async def get_intervention(server: Server, name: str) -> dict[str, Any]:
    """One intervention."""
    return _entry(await asyncio.to_thread(server.engine.registry.entry, name))


@router.put("/{name}", openapi_extra=takes_file(), responses={201: {"description": "New"}})
async def put_intervention(
    request: Request, response: Response, server: Server, name: str
) -> dict[str, Any]:
    """Serve the file in the body under this name: 201 for a new name, 200 for a replaced one.

    Requests in flight end on the version that they began with.
    """
    from reft_runtime.interventions.file import MAX_FILE_BYTES  # loads torch: not before it must

    sha256 = _declared_sha256(request)
    data = await read_body(request, MAX_FILE_BYTES)
    begun = time.monotonic()
    registry = server.engine.registry
    _, created = await asyncio.to_thread(registry.put, name, data, sha256)
    server.metrics.loaded(name, time.monotonic() - begun)
    response.status_code = 201 if created else 200
    return _entry(await asyncio.to_thread(registry.entry, name))


@router.delete("/{name}")
async def delete_intervention(server: Server, name: str) -> dict[str, Any]:
    """Serve this name no longer. Requests in flight end as they began."""
    await asyncio.to_thread(server.engine.registry.remove, name)
    return {"id": name, "object": "intervention", "deleted": True}


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "intervention",
        "digest": entry.digest,
        "versions": list(entry.versions),
        "origin": entry.origin,
        "tier": entry.tier,
        "in_flight": entry.in_flight,
        "requests": entry.requests,
        "last_used": entry.last_used,
        "size_bytes": entry.size_bytes,
        "manifest": entry.manifest.model_dump(mode="json"),
    }


def _declared_sha256(request: Request) -> str | None:
    """SHA-256 of the body in hex, from `x-sha256` (hex) or `Digest: sha-256=` (base64)."""
    declared = request.headers.get("x-sha256")
    if declared is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", declared):
            raise InvalidRequest("x-sha256 must be 64 hexadecimal digits.", param="x-sha256")
        return declared.lower()
    digest = request.headers.get("digest")
    if digest is None:
        return None
    algorithm, _, value = digest.partition("=")
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if algorithm.lower() != "sha-256" or len(raw) != 32:
        raise InvalidRequest("Digest must be sha-256=<base64 of 32 bytes>.", param="digest")
    return raw.hex()
