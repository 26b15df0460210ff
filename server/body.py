"""Request bodies: read with a bound, parsed strictly, validated completely."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from reft_runtime.errors import InvalidRequest, Overloaded, nearest
from reft_runtime.interventions.format.strict_json import RepeatedKey, load_strict
from server.context import Context, Current
from server.errors import ApiError
from server.refusals import instead
from server.schemas.common import InterventionUse

if TYPE_CHECKING:
    from reft_runtime.interventions.registry.incoming import Incoming

Body = TypeVar("Body", bound=BaseModel)
Made = TypeVar("Made")

AT_ONCE_BYTES = 16 * 2**10
"""Largest body, in bytes, that is parsed on the event loop; a larger one would hold it up."""

FILE_PART_BYTES = 256 * 2**10
"""Bytes of a file that are in memory while it is received."""

MAX_STRINGS = 100_000
"""Most strings in one body, keys included: more than the messages of any chat need."""

MAX_VALUES = 2**18
"""Most values in one body, counted by its commas and opening brackets."""

MAX_KEYS = 2048
"""Most keys in one object."""

MAX_WHOLE = 2**63
MAX_DIGITS = 1000

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A JSON string, which may lack its end; matching never backtracks."""


async def read_body(request: Request, limit: int) -> bytes:
    """Read the whole body.

    Raises `ApiError` (413) as soon as the body is known to be longer than `limit` bytes and (415)
    if it is compressed, and `Overloaded` (503) if the bodies of all requests under way leave no
    room for it.
    """
    context: Context = request.app.state.context
    body = bytearray()
    async for chunk in _chunks(request, limit):
        if not context.bodies.take(request.scope, len(chunk)):
            raise Overloaded("Too many large bodies are under way; try again later.")
        body += chunk
    return bytes(body)


async def receive_file(request: Request, file: Incoming, limit: int) -> None:
    """Write the whole body to a file, part by part, in worker threads.

    Raises `ApiError` (413) as soon as the body is known to be longer than `limit` bytes and (415)
    if it is compressed, `Overloaded` (503) if the bodies of all requests under way leave no room
    for a part, and what `Incoming.write` raises.
    """
    context: Context = request.app.state.context
    if not context.bodies.take(request.scope, FILE_PART_BYTES):
        raise Overloaded("Too many large bodies are under way; try again later.")
    part = bytearray()
    async for chunk in _chunks(request, limit):
        part += chunk
        if len(part) >= FILE_PART_BYTES:
            await context.administer(file.write, bytes(part))
            part.clear()
    await context.administer(file.write, bytes(part))


async def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes.

    Raises `ApiError`: 415 if it is compressed, 413 once it is known to be too long.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415,
            "Send the body as it is, without Content-Encoding.",
            headers={"accept-encoding": "identity"},
        )
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        yield chunk


def json_body(
    model: type[Body], *, required: bool = True
) -> Callable[[Request, Current], Awaitable[Body]]:
    """Make a dependency that reads the JSON body as `model`.

    If the body is not `required`, a request without one gets the defaults of all fields.
    """
    read = body_as(partial(validated, model))

    async def read_if_there(request: Request, context: Current) -> Body:
        if not required and not _has_body(request):
            return model()
        return await read(request, context)

    return read_if_there


def body_as(made: Callable[[Any], Made]) -> Callable[[Request, Current], Awaitable[Made]]:
    """Make a dependency that reads the body as JSON and returns what is `made` of its value.

    FastAPI's own body parameter is not used: it is read and parsed before the router's
    dependencies run, and so before the key is checked.
    """

    async def read(request: Request, context: Current) -> Made:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send the body as JSON, with Content-Type: application/json.")
        body = await read_body(request, context.settings.max_body_bytes)
        if len(body) <= AT_ONCE_BYTES:
            return made(parse_json(body))
        return await context.work(lambda: made(parse_json(body)))

    return read


def _has_body(request: Request) -> bool:
    headers = request.headers
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def validated(model: type[Body], data: Any) -> Body:
    """Validate the value of a body; raises `InvalidRequest`, which names the first wrong field."""
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _first_problem(error, data, model) from None


def parse_json(body: bytes) -> Any:
    """Parse `body` as JSON with `load_strict`, within the bounds of a body.

    A whole number becomes an int however it is written: 4.0 and 4 are the same number in JSON.
    Raises `InvalidRequest`.
    """
    _check_size(body)
    try:
        return load_strict(body, max_keys=MAX_KEYS, parse_int=_whole, parse_float=_number)
    except RepeatedKey as error:
        raise InvalidRequest(
            f"The key {error.key!r} is there twice in one object.", param=error.key
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"The body cannot be read as JSON: {error}.") from None


def _check_size(body: bytes) -> None:
    """Refuse a body of too many values before parsing: the parser holds up all other threads."""
    if body.count(b'"') - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise InvalidRequest(f"The body has more than {MAX_STRINGS} strings and keys.")
    if _values(body, 0, len(body)) > MAX_VALUES:
        # Strings have commas, too. Counting outside them is slower; other threads run meanwhile.
        values, end = 0, 0
        for string in _STRING.finditer(body):
            values += _values(body, end, string.start())
            end = string.end()
        if values + _values(body, end, len(body)) > MAX_VALUES:
            raise InvalidRequest(f"The body has more than {MAX_VALUES} values.")


def _values(body: bytes, start: int, end: int) -> int:
    return sum(body.count(mark, start, end) for mark in (b",", b"[", b"{"))


def _whole(text: str) -> int:
    # A Python function, though int alone would do: other threads can run between its calls.
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if abs(value) < MAX_WHOLE and value.is_integer() else value


def _first_problem(error: ValidationError, data: Any, model: type[BaseModel]) -> InvalidRequest:
    problems = [
        (_path(problem["loc"], data, missing=problem["type"] == "missing"), problem)
        for problem in error.errors(include_url=False, include_input=False)
    ]
    # The member of a union whose error lies deepest is the one that was meant.
    param, problem = max(problems, key=lambda pair: pair[0].count("."))
    if problem["type"] == "extra_forbidden" or _is_for_nothing(problem):
        hint = instead(param)
        if problem["type"] == "extra_forbidden" and not hint:
            *_, name = param.split(".")
            others = [field for field in _fields(model, problem["loc"][:-1]) if field != name]
            if like := nearest(name, others, 1):
                hint = f"did you mean {like[0]}? If not, leave it out"
        hint = hint or "leave it out"
        return InvalidRequest(f"{param} is not supported by this server; {hint}.", param=param)
    message = problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if problem["type"] in _NO_OBJECT:
        message = _object(_kinds(model, problem["loc"]))
    hint = instead(param) if problem["type"] == "literal_error" else None
    message = f"{message}; {hint}" if hint else message
    return InvalidRequest(f"{param}: {message[:1].lower()}{message[1:]}.", param=param)


def _fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the object at `loc` may have, of all kinds that it may be of.

    At the top level the fields of one of its interventions are added.
    """
    fields = (each for kind in _kinds(model, loc) for each in kind.model_fields.items())
    names = dict.fromkeys(field.alias or name for name, field in fields)
    if not loc and "interventions" in names:
        names |= dict.fromkeys(InterventionUse.model_fields)
    return list(names)


def _kinds(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The models that the object at `loc` may be of."""
    found = [model]
    for step in loc:
        inner = [kind.model_fields[step] for kind in found if step in kind.model_fields]
        if inner:
            found = [kind for field in inner for kind in _models(field.annotation)]
    return found


_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")
"""Pydantic's words for what is no object; its messages name Python's classes."""


def _object(kinds: Sequence[type[BaseModel]]) -> str:
    """What to give where an object of one of these kinds belongs."""
    fields = kinds[0].model_fields.items() if kinds else ()
    needed = [f'"{name}": ...' for name, field in fields if field.is_required()]
    return f"give an object, such as {{{', '.join(needed)}}}" if needed else "give an object"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """All models in an annotation, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _is_for_nothing(problem: ErrorDetails) -> bool:
    """Whether the field may only be empty; it exists for clients that always send it."""
    context = problem.get("ctx", {})
    return context.get("max_length") == 0 or context.get("expected") == "''"


def _path(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> str:
    """Dotted path of `loc`, without the labels that pydantic adds for the members of a union."""
    steps: list[str] = []
    for position, step in enumerate(loc):
        if isinstance(data, dict) and step in data:
            data = data[str(step)]
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
        elif not (missing and position == len(loc) - 1):
            continue
        steps.append(str(step))
    return ".".join(steps)
