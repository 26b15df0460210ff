"""Threads that read tensors for the requests that are waiting for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from reft_runtime.errors import EngineDead, NotFound, ReftError, Unavailable
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.folders import Folders
from reft_runtime.interventions.registry.holding import Holding
from reft_runtime.interventions.registry.turns import Turns
from reft_runtime.interventions.registry.version import Version

CHANGES = 3
"""A file may be replaced this many times while it is being read."""

READERS = 2
"""Files that are read at the same time."""

FETCHERS = 8
"""Files that are fetched over the network at the same time, which hold up no other."""


class Readers:
    """Lets requests hold versions whose tensors may have to be read first.

    A version that several requests wait for is read once, and no request's thread waits for it.
    """

    def __init__(self, catalog: Catalog, folders: Folders, turns: Turns) -> None:
        self._catalog = catalog
        self._turns = turns
        self._folders = folders
        self._lock = threading.Lock()  # guards what follows
        self._jobs: dict[Version, Future[None]] = {}
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, "reft-reader")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "reft-fetcher")

    def acquire(self, refs: Sequence[str | Version]) -> Holding:
        """See `Registry.acquire`."""
        versions = [self._folders.resolve(ref) if isinstance(ref, str) else ref for ref in refs]
        holding = Holding(refs, versions, self._begin, self._turns.let_go)
        if versions:
            self._turns.queue(holding)
        else:  # the base model's requests wait for nobody
            holding.granted = True
            holding.ready.set_result(None)
        return holding

    def close(self) -> None:
        """Begin to read nothing any more; whoever waits for it is told."""
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, holding: Holding) -> None:
        try:
            self._advance(holding)
        except RuntimeError as error:  # no thread can be started, or it is closed
            self._fail(holding, error)

    def _advance(self, holding: Holding) -> None:
        """Read the first of a holding's versions that is not in memory; if all are, it is ready."""
        for position, version in enumerate(holding.versions):
            if not version.loaded and not holding.released:
                self._job(version).add_done_callback(partial(self._was_read, holding, position))
                return
        holding.ready.set_result(None)

    def _job(self, version: Version) -> Future[None]:
        with self._lock:
            job = self._jobs.get(version)
            if job is None:
                threads = self._readers if version.near else self._fetchers
                job = self._jobs[version] = threads.submit(self._read, version)
            return job

    def _read(self, version: Version) -> None:
        try:
            self._catalog.make_room()
            self._catalog.read(version)
        finally:
            with self._lock:
                self._jobs.pop(version, None)

    def _was_read(self, holding: Holding, position: int, job: Future[None]) -> None:
        """Go on with a holding; if its file was replaced at this moment, with the new version."""
        try:
            try:
                job.result()
            except (NotFound, Unavailable):
                self._look_anew(holding, position)
            self._advance(holding)
        except BaseException as error:
            self._fail(holding, error)

    def _look_anew(self, holding: Holding, position: int) -> None:
        """Exchange a version that could not be read for a new one; else raise the error again."""
        version, ref = holding.versions[position], holding.refs[position]
        self._folders.forget(version)
        holding.changes += 1
        if self._closed or holding.changes > CHANGES or not isinstance(ref, str):
            raise
        fresh = self._folders.resolve(ref)
        if fresh is version:
            raise
        self._turns.exchange(holding, position, fresh)

    def _fail(self, holding: Holding, error: BaseException) -> None:
        if self._closed and not isinstance(error, ReftError):  # its job was cancelled, or refused
            error = EngineDead("the engine is closed")
        holding.release()
        holding.ready.set_exception(error)
