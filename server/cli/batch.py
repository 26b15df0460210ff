"""Requests in OpenAI's batch format: read from a file, asked together, and answered in order."""

from __future__ import annotations

import asyncio
import json
import uuid
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.strict_json import load_strict
from reft_runtime.reaching import checked, reaching

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a line may ask."""

AHEAD = 8
"""So many times the requests that are under way may have answers that wait for an earlier one."""

TRIES = 100
"""A request that the server has no room for is sent so many times."""

LONGEST_WAIT = 30.0
"""Seconds between two of these, however long the server says."""

Written = Callable[[dict[str, Any]], object]
"""A function that is given the answers, in the order of the requests."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file: where it is, its name, its route and its body."""

    place: str
    custom_id: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> Iterator[Line]:
    """The requests of a file, one a line; blank lines are passed over.

    Raises `ConfigError` that names the line and the field at fault.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if number == 1:
                    text = text.removeprefix(BOM_UTF8)  # editors of Windows write it
                if text.strip():
                    yield _request(text, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None


def check_requests(path: Path) -> int:
    """Read all requests of a file and return their number; raises as `read_requests` does.

    It is an error if there is none, or if two have one `custom_id`.
    """
    seen: dict[str, str] = {}
    for line in read_requests(path):
        if line.custom_id in seen:
            raise ConfigError(
                f"{line.place}: custom_id: {line.custom_id!r} is that of {seen[line.custom_id]},"
                " too; give each request its own."
            )
        seen[line.custom_id] = line.place
    if not seen:
        raise ConfigError(f"{path}: there is no request in it.")
    return len(seen)


def resume(out: Path, requests: Iterator[Line]) -> tuple[int, int]:
    """Take the requests that a file of answers has already from `requests`.

    Returns how many they are, and how many of them were refused. A last line that was cut off is
    removed. Raises `ConfigError` if an answer is not that of the request in its place, or if the
    file cannot be read or written.
    """
    done = refused = whole = 0
    try:
        with out.open("a+b") as file:
            file.seek(0)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                line, (name, was_refused) = next(requests, None), _read_answer(text)
                if line is None or name != line.custom_id:
                    raise ConfigError(
                        f"out: line {done + 1} of {out} does not answer"
                        f" {'any request' if line is None else repr(line.custom_id)}: the file is"
                        " of other requests. Name another one, or remove it.",
                        param="out",
                    )
                done += 1
                refused += was_refused
                whole += len(text)
            file.truncate(whole)
    except OSError as error:
        raise ConfigError(f"out: {out}: {error.strerror}.", param="out") from None
    return done, refused


async def answer_all(
    client: httpx.AsyncClient, requests: Iterator[Line], at_once: int, written: Written
) -> None:
    """Ask all requests, `at_once` at a time; `written` gets their answers in order.

    Raises `Unreachable` if no answer comes, and `ConfigError` if the key is not taken; what was
    written until then stays.
    """
    under_way = asyncio.Semaphore(at_once)
    asked: deque[asyncio.Task[dict[str, Any]]] = deque()
    try:
        for line in requests:
            asked.append(asyncio.create_task(_answer(client, line, under_way)))
            if len(asked) == AHEAD * at_once:
                written(await asked.popleft())
        while asked:
            written(await asked.popleft())
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _answer(
    client: httpx.AsyncClient, line: Line, under_way: asyncio.Semaphore
) -> dict[str, Any]:
    async with under_way:
        response = await _sent(client, line)
    if response.status_code in (401, 403):
        checked(response)
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": response.text[:1000], "type": "server_error"}}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id"),
            "body": body,
        },
        "error": None,
    }


async def _sent(client: httpx.AsyncClient, line: Line) -> httpx.Response:
    for last in [*[False] * (TRIES - 1), True]:
        with reaching(client.base_url):
            response = await client.post(line.url, json=line.body)
        if response.status_code not in (429, 503) or last:
            break
        await asyncio.sleep(_wait(response.headers.get("retry-after")))
    return response


def _wait(retry_after: str | None) -> float:
    try:
        return min(max(0.0, float(retry_after or 1)), LONGEST_WAIT)
    except ValueError:  # a date
        return 1.0


def _request(text: bytes, place: str) -> Line:
    try:
        value = load_strict(text)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: an object is wanted, with custom_id, method, url and body.")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ConfigError(f"{place}: custom_id: give a text, which names the request's answer.")
    if value.get("method") != "POST":
        raise ConfigError(f"{place}: method: must be POST.")
    if url not in PATHS:
        raise ConfigError(f"{place}: url: must be {' or '.join(PATHS)}, not {str(url)[:80]!r}.")
    if not isinstance(body, dict):
        raise ConfigError(f"{place}: body: give the request's body, an object.")
    if body.get("stream"):
        raise ConfigError(f"{place}: body.stream: answers are written whole; leave it out.")
    return Line(place, custom_id, url, body)


def is_refused(answer: dict[str, Any]) -> bool:
    """Whether an answer says that its request was refused, or that it failed."""
    return bool(answer["response"]["status_code"] != httpx.codes.OK)


def _read_answer(text: bytes) -> tuple[str | None, bool]:
    """The name of a line's request, None if it is no answer; and whether it was refused."""
    try:
        value = json.loads(text)
        return value["custom_id"], is_refused(value)
    except (ValueError, KeyError, TypeError):
        return None, False
