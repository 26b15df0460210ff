"""Long listings, sent in parts: none of them takes the event loop or the memory for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from server.context import Context
from server.streaming import json_bytes

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry

REST_SECONDS = 0.002
"""Pause after each part: the engine's thread needs the interpreter, too."""


def listing(
    server: Context,
    line: Callable[[Entry], Mapping[str, Any]],
    first: tuple[Mapping[str, Any], ...] = (),
    more: Callable[[], Mapping[str, Any]] = dict,
) -> StreamingResponse:
    """A list object with a `line` for every intervention, by name, behind those that come `first`.

    `more` makes the object's fields behind the list. A part of the list is made, in a thread, when
    the client has taken the one before it.
    """
    pages = server.engine.registry.pages()

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


def _page(pages: Iterator[list[Entry]], line: Callable[[Entry], Mapping[str, Any]]) -> bytes | None:
    page = next(pages, None)
    return None if page is None else b",".join(json_bytes(line(entry)) for entry in page)
