"""The other servers of a cluster, which serve the same interventions from the same state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Replicas(Protocol):
    """All servers of a cluster, this one included. A server by itself has none of these."""

    async def catch_up(self, name: str) -> Sequence[str]:
        """Let every replica that lives take in what a name stands for in the state.

        Returns when all have, or after some seconds the names of those that have not: printable
        ASCII without commas. It raises nothing: the change is made.
        """
