"""Listings of interventions, long ones in parts, so that none blocks the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from reft_runtime.errors import Overloaded
from server.context import Context
from server.streaming import json_bytes

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry
    from reft_runtime.interventions.registry.entry import Page

REST_SECONDS = 0.002
"""Seconds of pause after each part: the engine's thread needs the interpreter, too."""


LINES = 100
"""Number of lines of a page between two pauses."""


def listing(
    server: Context,
    line: Callable[[Entry], Mapping[str, Any]],
    first: tuple[Mapping[str, Any], ...] = (),
    more: Callable[[], Mapping[str, Any]] = dict,
) -> StreamingResponse:
    """Stream a list object: the lines of `first`, then a `line` for every intervention, by name.

    `more` makes the object's fields after the list. Each part of the list is made in a thread,
    once the client has taken the part before it, so memory holds one part at a time.
    """
    pages = server.registry.pages()

    async def parts() -> AsyncIterator[bytes]:
        text = b",".join(map(json_bytes, first))
        yield b'{"object":"list","data":[' + text
        sent = bool(text)
        while (page := await server.administer(_page, pages, line)) is not None:
            if page:
                yield b"," + page if sent else page
                sent = True
            await asyncio.sleep(REST_SECONDS)
        fields = json_bytes(await server.administer(more))[1:]
        yield b"]," + fields if fields != b"}" else b"]}"

    return StreamingResponse(parts(), media_type="application/json")


async def page(
    request: Request,
    server: Context,
    ask: Callable[[], Page],
    line: Callable[[Entry], Mapping[str, Any]],
    more: Callable[[], Mapping[str, Any]],
) -> Response:
    """Answer one page as a list object: its lines, `total`, `next` and the fields of `more`.

    `total` counts the entries of all pages, and `next` is where the next page begins. Raises
    `Overloaded` if too many large answers are under way.
    """

    def made() -> bytes:
        found = ask()
        lines: list[bytes] = []
        for entry in found.entries:
            if lines and len(lines) % LINES == 0:
                time.sleep(REST_SECONDS)
            lines.append(json_bytes(line(entry)))
        fields = json_bytes({"total": found.total, "next": found.next, **more()})[1:]
        return b'{"object":"list","data":[' + b",".join(lines) + b"]," + fields

    content = await server.administer(made)
    if not server.bodies.take(request.scope, len(content)):
        raise Overloaded("Too many large answers are under way; try again later.")
    return Response(content, media_type="application/json")


def _page(pages: Iterator[list[Entry]], line: Callable[[Entry], Mapping[str, Any]]) -> bytes | None:
    page = next(pages, None)
    return None if page is None else b",".join(json_bytes(line(entry)) for entry in page)
