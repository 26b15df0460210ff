"""What a test's replicas of a cluster need not do: they only take changes in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.tenants.usage import Found, Query


class OnlyChanges:
    """Replicas that say nothing of themselves and keep nothing."""

    folder: Path | None = None

    async def metrics(self) -> bytes:
        raise NotImplementedError

    async def stats(self) -> Mapping[str, Any]:
        raise NotImplementedError

    async def usage(self, query: Query) -> Found:
        raise NotImplementedError
