"""How an intervention and its versions are written in answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from orjson import Fragment

from server.context import Context, Made
from server.schemas.answers.interventions import (
    InterventionEntry,
    InterventionVersion,
    RemovedIntervention,
)
from server.streaming import json_answer

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry
    from reft_runtime.interventions.registry.entry import VersionEntry


def entry_fields(server: Context, entry: Entry) -> InterventionEntry:
    """Fields of one intervention, as all routes write them.

    `share` is the number of its parameters over that of the base model.
    """
    summary = entry.summary
    manifest: Any = Fragment(entry.manifest_json)
    return {
        "id": entry.name,
        "object": "intervention",
        "digest": entry.digest,
        "versions": entry.versions,
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
        "manifest": manifest,
    }


def entry_answer(server: Context, entry: Entry) -> Response:
    """Answer of one intervention, with its digest as `ETag`."""
    return json_answer(entry_fields(server, entry), headers=etag(entry))


def change_answer(server: Context, made: Made, status: int = 200) -> Response:
    """Answer of a change that leaves the name with an entry: that entry, and who is behind."""
    entry = made.change.entry
    return _answer(entry_fields(server, entry), made.behind, status, etag(entry))


def removal_answer(name: str, made: Made) -> Response:
    """Answer of a removal."""
    removed: RemovedIntervention = {"id": name, "object": "intervention", "deleted": True}
    return _answer(removed, made.behind)


def behind_headers(behind: Sequence[str]) -> dict[str, str]:
    """The header that names the replicas which have not taken a change in; none if all have."""
    return {"x-replicas-behind": ", ".join(behind)} if behind else {}


def etag(entry: Entry) -> dict[str, str]:
    """The `ETag` header, which names the version by its digest."""
    return {"etag": f'"{entry.digest}"'}


def _answer(
    fields: Mapping[str, Any],
    behind: Sequence[str],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer in JSON; where replicas are behind, a field and a header name them."""
    content = {**fields, "replicas_behind": list(behind)} if behind else fields
    return json_answer(content, status, {**(headers or {}), **behind_headers(behind)})


def version_fields(version: VersionEntry) -> InterventionVersion:
    """Fields of one version of an intervention."""
    return {
        "object": "intervention.version",
        "digest": version.digest,
        "origin": version.origin,
        "size_bytes": version.size_bytes,
        "modified": version.modified,
        "in_flight": version.in_flight,
        "current": version.current,
        "kept": version.kept,
    }
