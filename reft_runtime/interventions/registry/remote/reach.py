"""Whether the folder at a URL can be reached, as what was tried last tells."""

from __future__ import annotations

import logging

from reft_runtime.interventions.registry.remote.place import Place

_log = logging.getLogger(__name__)


class Reach:
    """The reach of `place`, called `what` in the log, which has a line for every change.

    `kept` is the word for what is served on while it is away. `problem` says why the place cannot
    be reached; it is None if it could be the last time.
    """

    def __init__(self, what: str, kept: str, place: Place) -> None:
        self.problem: str | None = None
        self._what, self._kept = what, kept
        self._place = place

    def lost(self, error: OSError) -> None:
        """Note that the place could not be reached."""
        problem = str(error.strerror)
        if self.problem != problem:
            _log.warning(
                "%s is away: %s; what it %s is served on (%s)",
                self._what,
                problem,
                self._kept,
                self._place.detail,
            )
        self.problem = problem

    def back(self) -> None:
        """Note that the place could be reached."""
        if self.problem is not None:
            _log.info("%s is back", self._what)
            self.problem = None
