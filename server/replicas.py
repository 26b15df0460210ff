"""The other servers of a cluster, which serve the same interventions from the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from server.tenants.usage import Found, Query


class Replicas(Protocol):
    """All servers of a cluster, this one included. A server by itself has none of these."""

    @property
    def folder(self) -> Path | None:
        """Folder of what this server alone keeps; None where nothing is kept."""

    async def catch_up(self, name: str) -> Sequence[str]:
        """Let every replica that lives take in what a name stands for in the state.

        Returns when all have, or after some seconds the names of those that have not: printable
        ASCII without commas. It raises nothing: the change is made.
        """

    async def metrics(self) -> bytes:
        """The metrics of all replicas, each with the label `replica`, in Prometheus' text format.

        As the others, it leaves out those that do not answer in time, which is told with the rest,
        and raises `Unavailable` if none does.
        """

    async def stats(self) -> Mapping[str, Any]:
        """What all replicas say of themselves, as one server would. Raises `Unavailable`."""

    async def usage(self, query: Query) -> Found:
        """What was used at all replicas, those that are gone included. Raises `Unavailable`."""
