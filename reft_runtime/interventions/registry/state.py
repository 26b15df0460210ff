"""The state: where uploads and pins are kept, by one server or by several that share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.registry.incoming import Incoming
from reft_runtime.interventions.registry.pointers import Pointers
from reft_runtime.interventions.registry.remote.mounted import MountedFolder
from reft_runtime.interventions.registry.remote.place import Place
from reft_runtime.interventions.registry.remote.store import RemoteStore
from reft_runtime.interventions.registry.sources import File
from reft_runtime.interventions.registry.store import Store
from reft_runtime.interventions.registry.urls import is_url, local_folder


class State(Protocol):
    """Files by their digests, and pointers with history. Methods raise `StoreFull`, `Unavailable`.

    The names, and what they stand for, are in `pointers`.
    """

    @property
    def pointers(self) -> Pointers:
        """What the pointers say, as far as is known."""

    def close(self) -> None:
        """Let another process use the place, if only one may."""

    def check(self) -> bool:
        """Whether the place still holds what it held. Raises `Unavailable` if it is away."""

    def unwritable(self) -> str | None:
        """Why nothing can be written to a place that is there; None if that is not known."""

    def changing(self) -> AbstractContextManager[None]:
        """Change names in the block, from `look_again` on, while no other server does.

        Where there is no lock other servers may, and the later change counts.
        """

    def changed(self) -> Iterable[str]:
        """The names that another server has changed since they were looked at; may take long."""

    def look_again(self, name: str) -> bool:
        """Look at a name's pointer; return whether another server has changed it."""

    def file(self, digest: str) -> File:
        """The file of this digest. Raises `OSError` if it is gone, or cannot be read now."""

    def holds(self, digest: str) -> bool:
        """Whether the file of this digest is kept."""

    def incoming(self, max_bytes: int) -> Incoming:
        """A temporary file, for a file that is being uploaded."""

    def add_blob(self, digest: str, file: Incoming) -> None:
        """Keep a file, whose identity is `digest`."""

    def keep_for_now(self, digest: str, file: Incoming) -> File:
        """Keep a file that no pointer will name, until this process ends or `collect` drops it."""

    def point(self, name: str, digests: Sequence[str], *, pinned: bool) -> None:
        """Let a name stand for the first of `digests`; the others are its history."""

    def remove(self, name: str) -> None:
        """Forget a name, also one whose pointer is damaged."""

    def collect(self, keep: Iterable[str]) -> None:
        """Delete files that no pointer names and that are not in `keep`, now or later."""


def open_state(place: str | Path, max_bytes: int, *, shared: bool) -> State:
    """The state in a folder, which several servers may have if `shared`, or at a URL.

    Raises `ConfigError` if it cannot be used.
    """
    if is_url(place):
        return RemoteStore(Place(str(place)), max_bytes)
    if shared:
        return RemoteStore(MountedFolder(local_folder(place)), max_bytes)
    return Store(local_folder(place), max_bytes)


def check_state(place: str | Path | None, *, shared: bool) -> None:
    """Raise `ConfigError` for a state that cannot be opened; what is at a URL is not looked at."""
    if place is None:
        if shared:
            raise ConfigError(
                "shared_state: there is no state to share; say with --state-dir where it is.",
                param="shared_state",
            )
    elif is_url(place):
        Place(str(place))
    elif shared:
        MountedFolder(local_folder(place)).close()
    else:
        Store(local_folder(place)).close()
