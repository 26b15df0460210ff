"""How an intervention and its versions are written in answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from orjson import Fragment

from server.context import Context
from server.streaming import json_bytes

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry
    from reft_runtime.interventions.registry.entry import VersionEntry


def entry_fields(server: Context, entry: Entry) -> dict[str, Any]:
    """Fields of one intervention, as all routes write them.

    `share` is the number of its parameters over that of the base model.
    """
    summary = entry.summary
    return {
        "id": entry.name,
        "object": "intervention",
        "digest": entry.digest,
        "versions": list(entry.versions),
        "origin": entry.origin,
        "tier": entry.tier,
        "pinned": entry.pinned,
        "in_flight": entry.in_flight,
        "requests": entry.requests,
        "prompt_tokens": entry.prompt_tokens,
        "generation_tokens": entry.generation_tokens,
        "last_used": entry.last_used,
        "size_bytes": entry.size_bytes,
        "modified": entry.modified,
        "kinds": summary.kinds,
        "positions": summary.positions,
        "layers": summary.layers,
        "directions": summary.directions,
        "parameters": summary.parameters,
        "share": summary.parameters / server.engine.info.parameters,
        "problem": entry.problem,
        "hides": entry.hides,
        "manifest": Fragment(entry.manifest_json),
    }


def entry_answer(server: Context, entry: Entry, status: int = 200) -> Response:
    """Answer of one intervention, with its digest as `ETag`."""
    content = json_bytes(entry_fields(server, entry))
    return Response(content, status, etag(entry), media_type="application/json")


def etag(entry: Entry) -> dict[str, str]:
    """The `ETag` header, which names the version by its digest."""
    return {"etag": f'"{entry.digest}"'}


def version_fields(version: VersionEntry) -> dict[str, Any]:
    """Fields of one version of an intervention."""
    return {"object": "intervention.version", **asdict(version)}
