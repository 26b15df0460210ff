"""Folders of what one replica keeps for itself: as many as there were replicas at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from reft_runtime.interventions.registry.urls import is_url, local_folder
from server.settings import Settings

FOLDER = "replicas"
"""The slots' folder in the state folder."""

LOCK = ".lock"

HELD_SECONDS = 1.0
"""How long a slot that somebody holds is waited for: others may be reading it, which is short."""


def state_folder(settings: Settings) -> Path | None:
    """The folder below which slots lie: the state that all replicas have mounted.

    For a state at a URL it is a part of this machine's cache; None without a state.
    """
    if settings.state_dir is None or is_url(settings.state_dir):
        return settings.state_folder
    return local_folder(settings.state_dir)


class Slot:
    """A folder that one process holds until it ends; the next one takes what is there over."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder = folder
        self._lock = lock

    @property
    def name(self) -> str:
        """What tells the slot from others of the same state."""
        return self.folder.name

    @classmethod
    def take(cls, state: Path) -> Slot:
        """Hold the first slot of a state folder that nobody holds. Raises `OSError`."""
        root = state / FOLDER
        number = 0
        while True:
            folder = root / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            if (lock := _locked(folder)) is not None:
                return cls(folder, lock)
            number += 1

    def release(self) -> None:
        """Let another process take the slot."""
        self._lock.release()


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a slot's folder in the block; False if another holds it for `HELD_SECONDS`."""
    lock = _locked(folder, HELD_SECONDS)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def slots_of(state: Path) -> list[Path]:
    """The folders of all slots of a state folder."""
    with suppress(FileNotFoundError):
        return sorted(path for path in (state / FOLDER).iterdir() if path.is_dir())
    return []


def _locked(folder: Path, seconds: float = 0.0) -> FileLock | None:
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(seconds, poll_interval=0.01)
    except Timeout:
        return None
    return lock
