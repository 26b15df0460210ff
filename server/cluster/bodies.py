"""Bodies that a front takes in before it asks a replica: within bounds and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from reft_runtime.errors import InvalidRequest, Overloaded
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES
from server.body import AT_ONCE_BYTES, parse_json
from server.cluster.calls import Part
from server.connections import Limits
from server.context import BodyBudget
from server.errors import ApiError

INLINE_BYTES = 256 * 2**10
"""Largest part that travels with its call; a larger one is kept where the replica fetches it."""

FILE_PART_BYTES = 4 * 2**20
"""Bytes of a file that are in the front's memory while it is received."""


class Keep(Protocol):
    """What keeps a part of a body outside of this process, for the replica that will read it."""

    def __call__(self, data: bytes) -> Awaitable[Part]:
        """Keep `data`; what is returned gives it back."""


class Bodies:
    """The bodies of one front's requests.

    `most` are the bytes of the largest JSON body. A file's parts leave this process as they come.
    """

    def __init__(self, keep: Keep, budget: BodyBudget, most: int, limits: Limits) -> None:
        self._keep = keep
        self._budget = budget
        self._most = most
        self._limits = limits

    async def take(self, scope: Scope, receive: Receive) -> tuple[list[Part], Any]:
        """Receive a request's body: its parts, and its value where it is JSON, else None.

        Raises `ApiError` for one that is too large (413) or comes too slowly (408), `Overloaded` if
        those under way leave no room, and `ClientDisconnect`.
        """
        if scope["method"] == "PUT":
            return await self._file(scope, receive), None
        body = bytearray()

        async def add(chunk: bytes) -> None:
            self._reserve(scope, len(chunk))
            body.extend(chunk)

        await self._receive(scope, receive, self._most, add)
        data = bytes(body)
        return [await self._part(data)] if data else [], await _value(data)

    async def _file(self, scope: Scope, receive: Receive) -> list[Part]:
        self._reserve(scope, FILE_PART_BYTES)
        parts: list[Part] = []
        held = bytearray()

        async def add(chunk: bytes) -> None:
            held.extend(chunk)
            if len(held) >= FILE_PART_BYTES:
                parts.append(await self._part(bytes(held)))
                held.clear()

        await self._receive(scope, receive, MAX_FILE_BYTES, add)
        if held:
            parts.append(await self._part(bytes(held)))
        return parts

    async def _part(self, data: bytes) -> Part:
        return data if len(data) <= INLINE_BYTES else await self._keep(data)

    def _reserve(self, scope: Scope, size: int) -> None:
        if not self._budget.take(scope, size):
            raise Overloaded("Too many large bodies are under way; try again later.")

    async def _receive(
        self, scope: Scope, receive: Receive, limit: int, add: Callable[[bytes], Awaitable[None]]
    ) -> None:
        too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        clock, limits = asyncio.get_running_loop().time, self._limits
        began, size, more = clock(), 0, True
        while more:
            try:
                async with asyncio.timeout(limits.body):
                    message = await receive()
            except TimeoutError:
                raise _too_slow() from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > limit:
                raise too_large
            late = clock() - began - limits.body
            if more and late * limits.body_rate > size:
                raise _too_slow()
            await add(chunk)


def _too_slow() -> ApiError:
    return ApiError(408, "The request's body came too slowly.")


async def _value(data: bytes) -> Any:
    """The value of a body; None where it is none, of which the replica says why."""

    def parse() -> Any:
        try:
            return parse_json(data)
        except InvalidRequest:
            return None

    return parse() if len(data) <= AT_ONCE_BYTES else await asyncio.to_thread(parse)
