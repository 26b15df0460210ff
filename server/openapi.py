"""The OpenAPI description: what routes read and answer, which they do without FastAPI's help."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from server.schemas.answers.base import Error
from server.schemas.common import WHICH_MODEL

Responses = dict[int | str, dict[str, Any]]
"""What a route's `responses` says: an OpenAPI response object by status."""

_TEMPLATE = "#/components/schemas/{model}"
_SSE = "text/event-stream"

_models: set[type] = {Error}
"""Bodies and answers of all routes."""

_describing = threading.Lock()

ABOUT = (
    "OpenAI's API, as far as it applies to one text model, and routes for interventions: small"
    " files that make the model answer differently, named by `model`. Errors are OpenAI's object."
)

TAGS = {
    "openai": "Answers and models, as OpenAI's API has them.",
    "interventions": "What is served: list, upload, replace and remove it, and go back.",
    "text": "Labels and tokens of a text.",
    "operations": "The server itself: who asks, how busy it is, and what was used.",
    "health": "Whether the server is well; without a key.",
    "vllm": "vLLM's routes, for controllers that are written for it.",
}

HEADERS = {
    "x-request-id": "The request's id: its own `x-request-id`, if that is a sane one.",
    "retry-after": "Seconds after which the request may be sent again.",
    "accept-encoding": "Always `identity`: a body that is not compressed is taken.",
    "www-authenticate": "Always `Bearer`.",
    "etag": 'The version\'s digest in quotes: `"DIGEST"`.',
    "x-intervention": "What was applied: `NAME@DIGEST`, with commas between several.",
    "x-prompt-tokens": "Number of tokens of all prompts.",
    "x-queue-time": "Milliseconds for which the request waited in the queue.",
    "x-replicas-behind": "In a cluster: servers that have not taken the change in.",
    "x-ratelimit-limit-requests": "The tenant's quota of requests a minute.",
    "x-ratelimit-remaining-requests": "How many requests are left of it.",
    "x-ratelimit-reset-requests": "When it is whole again, such as `6m0s`.",
    "x-ratelimit-limit-tokens": "The tenant's quota of tokens a minute.",
    "x-ratelimit-remaining-tokens": "How many tokens are left of it.",
    "x-ratelimit-reset-tokens": "When it is whole again, such as `6m0s`.",
}
"""Headers of answers, which a route names."""

OF_QUOTAS = [name for name in HEADERS if name.startswith("x-ratelimit-")]
OF_GENERATION = ["x-intervention", "x-prompt-tokens", "x-queue-time", *OF_QUOTAS]
OF_CHANGES = ["etag", "x-replicas-behind"]

CONDITIONS = {
    "If-Match": 'Only if the name stands for this version: `"DIGEST"`; `*` is any.',
    "If-None-Match": "Only if the name is new: always `*`.",
    "x-sha256": "SHA-256 of the body in hex, to be checked.",
    "Digest": "The same in base64: `sha-256=...`.",
}
"""Headers of requests that change what is served."""

UNLESS_SERVED = {"If-None-Match": '304 without a body if this version is still served: `"DIGEST"`.'}

_IN_PATH = {
    "name": "An intervention's name; where a file is fetched also `NAME@DIGEST`.",
    "model": WHICH_MODEL,
    "response_id": "Any id: no answer is stored.",
}

_ERRORS = {
    400: "A field, a file or the request itself is wrong.",
    401: "The API key is missing or wrong.",
    403: "The key's tenant may not do this, or without keys a page of another site.",
    404: "The model, intervention or file does not exist.",
    408: "The request came too slowly.",
    409: "The file is for another base model.",
    412: "The condition in If-Match or If-None-Match does not hold.",
    413: "The body is too large.",
    415: "The body is compressed, or not of the type that is taken.",
    429: "A quota is used up; Retry-After says when to send it again.",
    431: "The headers are too large.",
    500: "An internal error of the server; its log has the request's id.",
    503: "The server is overloaded, shutting down or stopped; Retry-After says when to retry.",
    504: "The answer took longer than a request may take.",
    507: "There is no room for the file, for the record of it, or for its tensors.",
}

_OF_ERRORS = {
    401: ["www-authenticate"],
    415: ["accept-encoding"],
    429: ["retry-after", *OF_QUOTAS],
    503: ["retry-after"],
}

ANYWHERE = (400, 408, 431, 500, 503)
WITH_KEY = (401, 403)
WITH_BODY = (404, 413, 415)
FILE_ERRORS = (409, 413, 415, 507)
"""Errors of routes that take a file, in the body or by its path."""


def takes(
    model: type, example: dict[str, Any], *, required: bool = True, headers: Collection[str] = ()
) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is `model`, such as `example`."""
    content = {"application/json": {"schema": _ref(model), "example": example}}
    body = {"requestBody": {"required": required, "content": content}}
    return body | takes_headers({name: CONDITIONS[name] for name in headers})


def takes_file() -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a file."""
    return {"requestBody": {"required": True, "content": _FILE}} | takes_headers(CONDITIONS)


def takes_headers(headers: dict[str, str]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads these headers, each with what it is for."""
    taken = [
        {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}
        for name, about in headers.items()
    ]
    return {"parameters": taken} if taken else {}


def answers(
    model: type | tuple[type, ...],
    about: str = "The answer.",
    *,
    status: int = 200,
    events: tuple[type, ...] = (),
    headers: Collection[str] = (),
) -> Responses:
    """`responses` of a route whose JSON answer is `model`, or a stream of `events`.

    Of several models, or events, it is one.
    """
    content = {"application/json": {"schema": _one_of(model)}}
    if events:
        # As OpenAI describes streams: OpenAPI 3.1 has no word for what one event holds.
        content[_SSE] = {"schema": _one_of(events)}
    return {status: _response(about, content, headers)}


def answers_text(headers: Collection[str] = ()) -> Responses:
    """`responses` of a route whose answer is a text."""
    return {200: _response("The answer.", {"text/plain": {"schema": {"type": "string"}}}, headers)}


def answers_file() -> Responses:
    """`responses` of a route that answers with a file."""
    return {200: _response("The safetensors file.", _FILE, ["etag"])}


def empty(status: int, about: str, headers: Collection[str] = ()) -> Responses:
    """`responses` of a route that may answer without a body."""
    return {status: _response(about, {}, headers)}


def refuses(*statuses: int) -> Responses:
    """`responses` of a route with errors beside those that `describe` adds."""
    content = {"application/json": {"schema": _ref(Error)}}
    return {
        status: _response(_ERRORS[status], content, _OF_ERRORS.get(status, ()))
        for status in statuses
    }


_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI document of `app`, with every status that its routes send."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=ABOUT,
        routes=app.routes,
        tags=[{"name": name, "description": about} for name, about in TAGS.items()],
    )
    models = sorted(_models, key=lambda model: model.__name__)
    _, schemas = TypeAdapter.json_schemas(
        [(model.__name__, "validation", TypeAdapter(model)) for model in models],
        ref_template=_TEMPLATE,
    )
    key = {"type": "http", "scheme": "bearer", "description": "The API key, if the server has any."}
    told = json.dumps([document, schemas])  # pydantic defines what it then leaves out, too
    document["components"] = {
        "schemas": {
            name: schema
            for name, schema in schemas["$defs"].items()
            if f'"{_TEMPLATE.format(model=name)}"' in told
        },
        "headers": {
            name: {"description": about, "schema": {"type": "string"}}
            for name, about in HEADERS.items()
        },
        "securitySchemes": {"bearer": key},
    }
    needs_key: list[dict[str, list[str]]] = [{"bearer": []}]
    if not app.state.context.keys.configured:
        needs_key.append({})
    for path in document["paths"].values():
        for operation in path.values():
            _complete(operation, needs_key)
    return document


def described(app: FastAPI) -> dict[str, Any]:
    """The same, made once: that takes longer than the event loop has.

    May be called from any thread. Two of them at it may fail in Python's parser, with which
    pydantic reads docstrings.
    """
    with _describing:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema


def _complete(operation: dict[str, Any], needs_key: list[dict[str, list[str]]]) -> None:
    """Add to an operation what follows from its tag, its path and its body."""
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own; ours is 400
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["description"] = _IN_PATH[parameter["name"]]
    public = "health" in operation["tags"]
    operation["security"] = [] if public else needs_key
    in_path = any(one["in"] == "path" for one in operation.get("parameters", ()))
    statuses = [
        *ANYWHERE,
        *(() if public else WITH_KEY),
        *((404,) if in_path else ()),
        *(WITH_BODY if "requestBody" in operation else ()),
    ]
    for status, response in refuses(*statuses).items():
        responses.setdefault(str(status), response)
    for response in responses.values():
        response.setdefault("headers", {}).update(_headers(["x-request-id"]))
    operation["responses"] = dict(sorted(responses.items()))


def _one_of(models: type | tuple[type, ...]) -> dict[str, Any]:
    if isinstance(models, tuple):
        return {"oneOf": [_ref(model) for model in models]}
    return _ref(models)


def _ref(model: type) -> dict[str, str]:
    _models.add(model)
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def _response(about: str, content: dict[str, Any], headers: Collection[str] = ()) -> dict[str, Any]:
    found = {"description": about, "headers": _headers(headers)}
    return found | {"content": content} if content else found


def _headers(names: Collection[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
