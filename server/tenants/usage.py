"""What tenants have used, by UTC day and intervention: counted at once, written every second."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from reft_runtime.errors import Unavailable

logger = logging.getLogger("reft.server")

FILE = "usage.sqlite3"
"""The file's name in the state folder."""

WRITE_SECONDS = 0.5
"""Pause between two writes; with the write itself, no count is unwritten for a second."""

LOCK_SECONDS = 0.2
"""How long a write waits for a program that holds the file's lock; the next one tries again."""

LAST_LOCK_SECONDS = 5.0
"""How long the last write of a server waits for it."""

MAX_MEMORY_ROWS = 100_000
"""Most rows that are counted where nothing is written; later interventions share `(other)`."""

BASE, OTHER = "(base)", "(other)"
"""Rows that no intervention can have, as a name cannot contain a parenthesis."""

_TABLE = """ (
    day TEXT, tenant TEXT, intervention TEXT,
    requests INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
    PRIMARY KEY (day, tenant, intervention)
) WITHOUT ROWID;
"""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS usage {_TABLE}
CREATE TABLE IF NOT EXISTS kept (since REAL);
"""

_SINCE = "INSERT INTO kept SELECT ? WHERE NOT EXISTS (SELECT * FROM kept)"

_ADD = """
INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""

Group = Literal["day", "tenant", "intervention"]

GROUPS: tuple[Group, ...] = get_args(Group)
"""What rows can differ in, in the order in which they are sorted."""


class Counts(NamedTuple):
    """What was used: requests, and tokens as answers say them in their `usage`."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


def add(row: list[int], more: Sequence[int]) -> None:
    """Add `Counts`, or numbers in their order, to a row of such numbers; called for every token."""
    row[0] += more[0]
    row[1] += more[1]
    row[2] += more[2]
    row[3] += more[3]


class Key(NamedTuple):
    """Whose counts these are; `day` is the number of days since 1970, in UTC."""

    day: int
    tenant: str
    intervention: str


_New = dict[Key, list[int]]

_Identity = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """Which counts are asked for: from the first to the last day, both included.

    `groups` are what rows differ in; they are sums over the rest. At most `most` rows are found.
    """

    first: date
    last: date
    groups: Sequence[Group] = GROUPS
    tenant: str | None = None
    intervention: str | None = None
    most: int = MAX_MEMORY_ROWS


@dataclass(frozen=True, slots=True)
class Found:
    """The rows that were asked for, sorted by their groups, and since when there are counts.

    A row is the values of its groups, and its counts. `since` is Unix time in seconds. `problem` is
    what is missing of them.
    """

    rows: list[tuple[tuple[str, ...], Counts]]
    since: float
    problem: str | None = None


class Usage:
    """The counts of one server.

    With a folder they are kept there in SQLite, and later servers add to them; a process that is
    killed loses those of its last second. Without one, and while the file cannot be used, they are
    kept in memory. Every method may be called from any thread; `add` never waits for a disk.
    """

    def __init__(self, folder: Path | None) -> None:
        self.problem: str | None = None
        """What is wrong, in words that may be shown to anybody; None if all is well."""
        self._path = None if folder is None else folder / FILE
        self._since = time.time()
        self._new: _New = {}
        self._counting = threading.Lock()
        self._file: sqlite3.Connection | None = None
        self._identity: _Identity | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="reft-usage", daemon=True)

    def start(self) -> None:
        """Begin to write what is counted."""
        if self._path is not None:
            self._writer.start()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._ended.set()
        if self._writer.ident is not None:
            self._writer.join()
        with self._writing:
            if self._file is not None:
                self._file.execute(f"PRAGMA busy_timeout = {1000 * LAST_LOCK_SECONDS:.0f}")
            self._write()
            self._shut()

    def add(self, tenant: str, intervention: str, more: Sequence[int]) -> None:
        """Count what a tenant used just now: `Counts`, or numbers in their order."""
        key = Key(int(time.time() // 86400), tenant, intervention)
        with self._counting:
            add(self._new.get(key) or self._begun(key), more)

    def find(self, query: Query) -> Found:
        """Look counts up, those of the last second too; reads the file.

        Raises `Unavailable` if the file is damaged where it is read.
        """
        with self._writing:
            self._write()
            with self._counting:
                new = dict(self._new)
            if self._file is not None:
                try:
                    return _found(self._file, query, new)
                except sqlite3.Error as error:
                    logger.error("Usage cannot be read: %s: %s", self._path, error)
                    raise Unavailable("The file with the usage cannot be read.") from None
        with closing(sqlite3.connect(":memory:")) as memory:
            _prepare(memory, self._since)
            return _found(memory, query, new)

    def _begun(self, key: Key) -> list[int]:
        """The row of a key without one; that of the others where there is no room."""
        if len(self._new) >= MAX_MEMORY_ROWS:
            key = key._replace(intervention=OTHER)
        return self._new.setdefault(key, [0] * len(Counts._fields))

    def _write_on(self) -> None:
        while not self._ended.is_set():
            with self._writing:
                self._write()
            self._ended.wait(WRITE_SECONDS)

    def _write(self) -> bool:
        """Add the new counts to the file; False if they stay in memory."""
        if self._path is None:
            return False
        with self._counting:
            new, self._new = self._new, {}
        try:
            _add(self._open(self._path), new)
        except (sqlite3.Error, OSError) as error:
            locked = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            if not locked:  # else nothing was written, and what is there can be read
                self._shut()
            with self._counting:
                # The older counts first: where there is no room, later ones share a row.
                later, self._new = self._new, new
                for key, more in later.items():
                    add(self._new.get(key) or self._begun(key), more)
            if self.problem is None:
                logger.error("Usage is counted in memory: %s: %s", self._path, error)
            why = "another program has locked its file" if locked else "its file cannot be used"
            self.problem = f"usage is counted in memory: {why}"
            return False
        if self.problem is not None:
            logger.warning("Usage is written again: %s", self._path)
            self.problem = None
        return True

    def _open(self, path: Path) -> sqlite3.Connection:
        """The file, which is made anew where it is gone.

        Where its journal is gone, closing the file writes what the journal had to the file itself.
        """
        if self._file is not None and _identity(path) == self._identity:
            return self._file
        self._shut()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False)
        # A commit need not wait for the disk: what a process has written survives its end.
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        _prepare(self._file, time.time())
        self._identity = _identity(path)
        return self._file

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _identity(path: Path) -> _Identity:
    """What tells the file and its journal from others of their names; None for one that is gone."""
    return _file_identity(path), _file_identity(path.with_name(f"{path.name}-wal"))


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _prepare(file: sqlite3.Connection, now: float) -> None:
    file.executescript(_SCHEMA)
    with file:
        file.execute(_SINCE, [now])


def _add(file: sqlite3.Connection, new: _New, table: str = "usage") -> None:
    rows = [
        (datetime.fromtimestamp(86400 * key.day, UTC).date().isoformat(), *key[1:], *counts)
        for key, counts in new.items()
    ]
    if rows:
        with file:
            file.executemany(_ADD.format(table=table), rows)


def _found(file: sqlite3.Connection, query: Query, new: _New) -> Found:
    """What is asked for, of the file and of what is not yet written to it."""
    file.executescript(f"DROP TABLE IF EXISTS unwritten; CREATE TEMP TABLE unwritten {_TABLE}")
    _add(file, new, "unwritten")
    groups = ", ".join(query.groups)
    where, values = ["day BETWEEN ? AND ?"], [query.first.isoformat(), query.last.isoformat()]
    if query.tenant is not None:
        where.append("tenant = ?")
        values.append(query.tenant)
    if query.intervention is not None:
        where.append("intervention = ?")
        values.append(query.intervention)
    sums = ", ".join(f"SUM({name})" for name in Counts._fields)
    rows = file.execute(
        f"SELECT {groups}, {sums} FROM (SELECT * FROM usage UNION ALL SELECT * FROM unwritten)"
        f" WHERE {' AND '.join(where)}"
        f" GROUP BY {groups} ORDER BY {groups} LIMIT {query.most}",
        values,
    )
    [[since]] = file.execute("SELECT since FROM kept")
    many = len(query.groups)
    return Found([(row[:many], Counts(*row[many:])) for row in rows], since)
