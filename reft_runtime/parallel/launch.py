"""Where the ranks of a model run: what starts those that follow, and the devices they have."""

from __future__ import annotations

from typing import Protocol

from reft_runtime.parallel.processes import RankProcess


class Rank(Protocol):
    """A rank that was started."""

    def how_ended(self, seconds: float = 0.0) -> str | None:
        """What became of it, such as "ended with status 1"; None if it runs after `seconds`."""

    def end(self) -> None:
        """Wait for the end of a rank that has been told to end; kill it if it does not."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts the ranks that follow rank 0, which this process is."""

    @property
    def host(self) -> str:
        """The address of this machine at which the others reach it."""

    def device(self, rank: int) -> int:
        """The number of a rank's CUDA device, among those that its process sees."""

    def launch(self, rank: int, host: str, port: int, key: bytes) -> Rank:
        """Start `reft_runtime.parallel.follower.follow` in a process of its own.

        Raises `Unavailable` if none can be started.
        """


class ThisMachine:
    """Ranks as processes of this machine, each with the device that has its number."""

    host = "127.0.0.1"

    def device(self, rank: int) -> int:
        """See `Launcher.device`."""
        return rank

    def launch(self, rank: int, host: str, port: int, key: bytes) -> RankProcess:
        """See `Launcher.launch`."""
        return RankProcess(rank, f"{host}:{port}", key)
