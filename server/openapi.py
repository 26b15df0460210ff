"""The OpenAPI description, with the bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.schemas.common import WHICH_MODEL

_TEMPLATE = "#/components/schemas/{model}"
_bodies: set[type[BaseModel]] = set()


def takes(
    model: type[BaseModel], example: dict[str, Any], *, required: bool = True
) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is `model`, such as `example`."""
    _bodies.add(model)
    schema = {"$ref": _TEMPLATE.format(model=model.__name__)}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": required, "content": content}}


def limited() -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that quotas and deadlines hold for."""
    return {
        429: _response("A quota is used up; Retry-After says when to send it again."),
        504: _response("The answer took longer than a request may take."),
    }


def sends_file() -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with a file."""
    schema = {"type": "string", "format": "binary"}
    content = {"application/octet-stream": {"schema": schema}}
    return {200: {"description": "The safetensors file.", "content": content}}


def takes_file() -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a file."""
    schema = {"type": "string", "format": "binary"}
    content = {"application/octet-stream": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_IN_PATH = {
    "name": "An intervention's name; where a file is fetched also `NAME@DIGEST`.",
    "model": WHICH_MODEL,
    "response_id": "Any id: no answer is stored.",
}

_ALL = {
    400: "A field, a file or the request itself is wrong.",
    405: "The path does not accept this method.",
    408: "The request came too slowly.",
    431: "The headers are too large.",
    500: "An internal error of the server; its log has the request's id.",
    503: "The server is overloaded, shutting down or stopped; Retry-After says when to retry.",
}
_WITH_KEY = {
    401: "The API key is missing or wrong.",
    403: "The key's tenant may not do this, or without keys a page of another site.",
}
_WITH_NAME = {404: "The model, intervention or file does not exist."}
_WITH_JSON = {413: "The body is too large.", 415: "The body is not sent as JSON, or compressed."}
_WITH_CONDITION = {412: "The condition in If-Match or If-None-Match does not hold."}
_WITH_STORE = {507: "There is no room for the file, for the record of it, or for its tensors."}
_WITH_FILE = _WITH_STORE | {
    409: "The file is for another base model.",
    413: "The file is too large.",
    415: "The body is compressed.",
}


def describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI document of `app`, with every status that its routes send."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = sorted(_bodies, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template=_TEMPLATE
    )
    components = document.setdefault("components", {}).setdefault("schemas", {})
    components.update(schemas["$defs"], Error=_ERROR)
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    for path in document["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own; ours is 400
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["description"] = _IN_PATH[parameter["name"]]
            for status, meaning in _statuses(operation).items():
                responses.setdefault(str(status), _response(meaning))
    return document


def _statuses(operation: dict[str, Any]) -> dict[int, str]:
    """Meanings of an operation's error statuses, by status."""
    if "health" in operation["tags"]:
        return _ALL
    taken = operation.get("requestBody", {}).get("content", {})
    in_path = any(parameter["in"] == "path" for parameter in operation.get("parameters", ()))
    named = _WITH_NAME if taken or in_path else {}
    json_body = _WITH_JSON if "application/json" in taken else {}
    file_body = _WITH_FILE if "application/octet-stream" in taken else {}
    # vLLM's routes load a file, too.
    loads = _WITH_FILE if "vllm" in operation["tags"] else {}
    conditional, stored = file_body, {}
    if "interventions" in operation["tags"]:
        name = operation.get("operationId", "")
        if name.endswith(("_delete", "_rollback_post")):
            conditional = _WITH_STORE
        elif name.endswith(("_pin_post", "_unpin_post")):
            stored = _WITH_STORE
    if conditional:
        conditional = conditional | _WITH_CONDITION
    return _ALL | _WITH_KEY | named | loads | json_body | conditional | stored


def _response(meaning: str) -> dict[str, Any]:
    schema = {"$ref": _TEMPLATE.format(model="Error")}
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}
