"""Uploads under way: read within one budget of bytes and a deadline, whoever sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from reft_runtime.errors import Overloaded
from server.errors import ApiError

BUDGET_BYTES = 256 << 20
"""What all uploads under way may take of memory together."""

IDLE_SECONDS = 10.0
"""How long an upload may stand still."""

UPLOAD_SECONDS = 300.0
"""How long an upload may take."""


class UploadBudget:
    """The bytes of all uploads that are being received or checked."""

    def __init__(self, limit: int = BUDGET_BYTES) -> None:
        self._limit = limit
        self.used = 0

    @contextmanager
    def share(self) -> Iterator[UploadShare]:
        """One upload's part, given back at the end of the block."""
        share = UploadShare(self)
        try:
            yield share
        finally:
            self.used -= share.taken

    def take(self, size: int) -> None:
        """Count `size` bytes more; raises `Overloaded` where others have taken too much."""
        if self.used + size > self._limit:
            raise Overloaded(
                f"Uploads under way take {self.used} bytes of memory, and there may be"
                f" {self._limit}; try again when they have ended.",
                retry_after=IDLE_SECONDS,
            )
        self.used += size


class UploadShare:
    """What one upload has taken of the budget."""

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self.taken = 0

    async def read(self, request: Request, limit: int) -> bytearray:
        """The whole body, of at most `limit` bytes: 413 where it is longer, 408 where it is slow.

        Raises `Overloaded` as soon as the budget does not hold what has come.
        """
        too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        chunks = aiter(request.stream())
        loop = asyncio.get_running_loop()
        end = loop.time() + UPLOAD_SECONDS
        try:
            while True:
                async with asyncio.timeout_at(min(loop.time() + IDLE_SECONDS, end)):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return body
                if len(body) + len(chunk) > limit:
                    raise too_large
                self._budget.take(len(chunk))
                self.taken += len(chunk)
                body += chunk
        except TimeoutError:
            raise ApiError(
                408,
                f"The upload stood still for {IDLE_SECONDS:g} seconds, or took longer than"
                f" {UPLOAD_SECONDS:g}; send it again.",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
