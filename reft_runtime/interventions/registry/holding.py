"""What one request holds of the registry: all of its versions together, in its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from reft_runtime.interventions.registry.version import Version


class Holding:
    """The versions of one request, in the order in which it names them (`refs`).

    Until `release` they stay addressable by their digest. `ready` is done once their tensors are in
    memory, and these stay there until `release`; it raises what `Version.edits` raises, or
    `Unavailable` if there is no room for them. `granted` says whether there is room, so that only
    reading is left to be done. `versions` are final when it is ready.
    """

    def __init__(
        self,
        refs: Sequence[str | Version],
        versions: Sequence[Version],
        on_grant: Callable[[Holding], None],
        on_release: Callable[[Holding], None],
    ) -> None:
        self.refs = tuple(refs)
        self.versions = list(versions)
        self.granted = False
        self.released = False
        self.changes = 0
        """How often a file was found to be replaced while it was read."""
        self.ready: Future[None] = Future()
        self.on_grant = on_grant
        self._on_release = on_release

    def release(self) -> None:
        """Let go of the versions, or wait for them no longer; does nothing when called again."""
        self._on_release(self)
