"""Requests that use versions, and those that wait for memory, in order of arrival.

A request waits until the tensors of all its versions fit into memory beside those of the requests
before it. Nobody goes ahead: else tasks that are always in use would keep the others out.
"""

from __future__ import annotations

import time
from collections import deque

from reft_runtime.errors import EngineDead, InvalidRequest, Overloaded, ReftError, Unavailable
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.holding import Holding
from reft_runtime.interventions.registry.version import Version


class Turns:
    """Who holds the versions of a catalog, and who waits; methods may be called from any thread.

    At most `max_waiting` requests wait.
    """

    def __init__(self, catalog: Catalog, max_waiting: int) -> None:
        self._catalog = catalog
        self._waiting: deque[Holding] = deque()  # the catalog's lock guards it
        self._max_waiting = max_waiting
        self._closed = False

    def queue(self, holding: Holding) -> None:
        """Hold the versions of a request; when it is granted, `on_grant` is called.

        That may be at once, or later from the thread that makes room. Raises `Overloaded` if too
        many wait, `InvalidRequest` if the versions alone are more than there may be, and
        `Unavailable` if pinned names leave them no room.
        """
        with self._catalog.lock:
            if self._closed:
                raise EngineDead("the engine is closed")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(
                    f"{self._max_waiting} requests wait for memory for their interventions; try"
                    " again in a moment."
                )
            if self._catalog.memory.never_fits(holding.versions):
                raise self._too_large(holding)
            for version in holding.versions:
                self._take(version)
            self._waiting.append(holding)
        self._serve()

    def let_go(self, holding: Holding) -> None:
        """Let go of the versions of a request that runs or waits; may be called again."""
        with self._catalog.lock:
            if holding.released:
                return
            holding.released = True
            if not holding.granted:
                self._waiting.remove(holding)
            for version in holding.versions:
                self._give_back(version, used=holding.granted)
        self._serve_and_evict()

    def exchange(self, holding: Holding, position: int, fresh: Version) -> None:
        """Hold another version in the place of one that cannot be read any more."""
        with self._catalog.lock:
            if holding.released:
                return
            self._take(fresh, used=True)
            old, holding.versions[position] = holding.versions[position], fresh
            self._give_back(old, used=True)

    def hold(self, version: Version) -> bool:
        """Begin a request on a version that is in use; False if nobody uses it."""
        with self._catalog.lock:
            if not version.users:
                return False
            self._take(version, used=True)
            with self._catalog.changed(version.name) as known:
                known.requests += 1
                known.last_used = time.time()
            return True

    def release(self, version: Version) -> None:
        """End one request that held a version."""
        with self._catalog.lock:
            if version.users < 1:
                raise RuntimeError(f"{version!r} is released more often than held")
            self._give_back(version, used=True)
        self._serve_and_evict()

    def close(self) -> None:
        """Let nobody wait any longer, and nobody begin."""
        with self._catalog.lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            for holding in waiting:
                holding.released = True
                for version in holding.versions:
                    self._give_back(version, used=False)
        for holding in waiting:
            holding.ready.set_exception(EngineDead("the engine is closed"))

    def waiting(self) -> int:
        """Number of requests that wait for memory."""
        return len(self._waiting)

    def _serve_and_evict(self) -> None:
        """After something was let go: uploads that came meanwhile may have left too little room."""
        self._serve()
        if self._catalog.memory.excess > 0:
            self._catalog.make_room()

    def _serve(self) -> None:
        """Grant what those who wait the longest wait for, as far as there is room."""
        granted, refused = [], []
        with self._catalog.lock:
            while self._waiting:
                first = self._waiting[0]
                if self._catalog.memory.fits(first.versions):
                    for version in first.versions:
                        version.users += 1
                        self._catalog.memory.touch(version)
                    first.granted = True
                    granted.append(first)
                elif self._catalog.memory.idle:  # nobody will make room
                    refused.append((first, self._too_large(first)))
                    first.released = True
                    for version in first.versions:
                        self._give_back(version, used=False)
                else:
                    break
                self._waiting.popleft()
        for holding in granted:
            holding.on_grant(holding)
        for holding, error in refused:
            holding.ready.set_exception(error)

    def _too_large(self, holding: Holding) -> ReftError:
        """The error for versions that do not fit, whatever other requests do."""
        own = sum(version.memory_bytes for version in set(holding.versions))
        most = self._catalog.memory.budget
        if own > most:
            return InvalidRequest(
                f"interventions: those of this request take {own} bytes of memory, and there may be"
                f" {most}; name fewer, or start the server with more --intervention-bytes.",
                param="interventions",
            )
        return Unavailable(
            f"The interventions of this request take {own} bytes of memory, and what stays there"
            f" (pinned ones, those without their file, the listing of uploads) leaves less of"
            f" {most}; unpin or delete some, or start the server with more --intervention-bytes."
        )

    def _take(self, version: Version, *, used: bool = False) -> None:
        """Hold a version once more, under the lock; `used` if its tensors have their room."""
        with self._catalog.changed(version.name) as known:
            known.held.add(version)
            version.in_flight += 1
            version.users += used

    def _give_back(self, version: Version, *, used: bool) -> None:
        """Hold a version once less, under the lock."""
        with self._catalog.changed(version.name) as known:
            version.in_flight -= 1
            version.users -= used
            if not version.in_flight:
                known.held.discard(version)
