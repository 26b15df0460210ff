"""What was last seen at a URL, kept on this machine: the listing, and each object's first bytes."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from reft_runtime.interventions.registry.remote.place import Listed

_log = logging.getLogger(__name__)

_TABLE = (
    "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, token TEXT NOT NULL,"
    " size INTEGER NOT NULL, modified_ns INTEGER NOT NULL, head BLOB NOT NULL) WITHOUT ROWID"
)


class Head(NamedTuple):
    """An object as it was listed, and its first bytes."""

    listed: Listed
    data: bytes


class Heads:
    """A small database at `path`; one that cannot be used is made anew, at worst in memory.

    Nothing depends on it but speed, and that a restart finds what is served while the URL cannot be
    reached. May be used from any thread.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._database = _opened(path)
        except (OSError, sqlite3.Error) as error:
            _log.warning("%s is made anew: %s", path, error)
            try:
                path.unlink(missing_ok=True)
                self._database = _opened(path)
            except (OSError, sqlite3.Error) as again:
                _log.warning("%s cannot be written (%s); a restart reads headers anew", path, again)
                self._database = sqlite3.connect(":memory:", check_same_thread=False)
                self._database.execute(_TABLE)

    def all(self) -> Iterator[Head]:
        """Every object that is known."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM objects").fetchall()
        for key, token, size, modified_ns, head in rows:
            yield Head(Listed(key, token, size, modified_ns), head)

    def get(self, key: str) -> bytes | None:
        """The first bytes of an object; None if it is not known, or cannot be read."""
        try:
            with self._lock:
                row = self._database.execute(
                    "SELECT head FROM objects WHERE key = ?", (key,)
                ).fetchone()
        except sqlite3.Error:  # damaged while it was in use, or closed
            return None
        return None if row is None else row[0]

    def put(self, heads: Iterable[Head]) -> None:
        """Keep what objects were read as."""
        rows = [(*head.listed, head.data) for head in heads]
        with self._lock, suppress(sqlite3.Error):  # a full disk: read again then
            self._database.executemany(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", rows
            )
            self._database.commit()

    def drop(self, keys: Iterable[str]) -> None:
        """Forget objects."""
        rows = [(key,) for key in keys]
        with self._lock, suppress(sqlite3.Error):
            self._database.executemany("DELETE FROM objects WHERE key = ?", rows)
            self._database.commit()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=10, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(_TABLE)
        database.commit()
    except sqlite3.Error:
        database.close()
        raise
    return database
