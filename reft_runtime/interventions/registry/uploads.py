"""Versions that were uploaded: kept in the state folder, brought back, rolled back to."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

from reft_runtime.errors import InvalidFile, InvalidRequest, NotFound, ReftError, Unavailable
from reft_runtime.interventions.registry.entry import Entry
from reft_runtime.interventions.registry.folders import Folders
from reft_runtime.interventions.registry.sources import Found, look
from reft_runtime.interventions.registry.store import Store
from reft_runtime.interventions.registry.version import Origin, Version

HISTORY = 8
"""How many uploaded versions of a name are kept, the current one included."""

MAX_ADDED_NAMES = 100_000
"""Names that may be uploaded or loaded at run time."""

_log = logging.getLogger(__name__)


class Uploads(Folders):
    """The layer of the catalog that clients change, in memory or, with a `state_dir`, on disk too.

    The last `HISTORY` uploaded versions of a name are kept, in the order in which they were served
    last.
    """

    def __init__(
        self,
        memory_bytes: int,
        sources: Sequence[str | Path],
        reserved: str,
        state_dir: str | Path | None,
        state_bytes: int,
    ) -> None:
        super().__init__(memory_bytes, sources, reserved)
        self._changing = threading.Lock()  # one change at a time; taken before _lock, never after
        self._added: set[str] = set()  # names that were uploaded or loaded
        self._upload_problems: dict[str, str] = {}
        self._state_problem: str | None = None
        self._store = None if state_dir is None else Store(Path(state_dir), state_bytes)
        if self._store is not None:
            self._restore(self._store)

    @abstractmethod
    def _listed(self, name: str, file: Found, origin: Origin = "folder") -> Version:
        """As in `Folders`."""

    def rollback(
        self, name: str, digest: str | None = None, expected: Collection[str] | None = None
    ) -> Entry:
        """Serve an uploaded version again that is still kept, in one step; returns the new entry.

        `digest` may be a prefix of 8 digits or more; without one it is the version that was served
        before the current one, so that a second call undoes the first. Nothing falls out of the
        history by it. Raises `InvalidRequest` where the name stands for something that was not
        uploaded, `NotFound` where there is no such version, `Changed` as `put`, and what reading
        the version raises; then nothing has changed.
        """
        with self._changing:
            self._tend()
            current = self._expect(name, expected)
            if current is None:
                raise self._unknown(name)
            if current.origin != "uploaded":
                raise InvalidRequest(_NOT_UPLOADED[current.origin].format(name), param="name")
            history = self._history(name)
            version = _kept(name, history, digest)
            if version is current:
                return self.entry(name)
            self._pin(version)  # reads and verifies it
            try:
                after = [version, *(old for old in history if old is not version)]
                if self._store is not None:
                    self._point_back(self._store, name, after)
                self._place_upload(after)
            finally:
                self.release(version)
            entry = self.entry(name)
        _log.info("rolled %r back to %r", current, version)
        return entry

    def _admit(self, version: Version, *, kept: bool, leaving: set[Version]) -> None:
        """Refuse what would not fit; of what is `kept` on disk only its line must stay."""
        if version.name not in self._added and len(self._added) >= MAX_ADDED_NAMES:
            raise InvalidRequest(
                f"There are {MAX_ADDED_NAMES} uploaded names, as many as there may be; delete one"
                " first.",
                param="name",
            )
        self._reserve(version.listed_bytes if kept else version.fixed_bytes, leaving)
        self._added.add(version.name)

    def _write(self, store: Store, version: Version, data: bytes, kept: Sequence[Version]) -> None:
        """Keep an upload on disk, from where its tensors can be read again."""
        digests = [version.digest, *(old.digest for old in kept if store.holds(old.digest))]
        try:
            store.add_blob(version.digest, data)
            version.moved(look(store.blob(version.digest)))
            store.point(version.name, digests)
        except BaseException:
            if self._layer(version.name, "uploaded") is None:
                self._added.discard(version.name)
            self._collect()
            raise

    def _point_back(self, store: Store, name: str, history: Sequence[Version]) -> None:
        """Keep on disk which version is served."""
        if not store.holds(history[0].digest):
            raise Unavailable(
                f"The version {history[0].digest} is kept in memory only, since the state folder"
                " was deleted; upload its file again."
            )
        store.point(name, [old.digest for old in history if store.holds(old.digest)])

    def _restore(self, store: Store) -> None:
        """Bring back what was uploaded before the last stop."""
        for name in store.damaged:
            self._upload_problems[name] = "Its pointer is damaged; upload it again, or delete it."
        for name, digests in store.histories.items():
            if name == self._reserved:
                self._upload_problems[name] = "The name is the base model's own id; delete it."
                continue
            history: list[Version] = []
            for digest in digests:
                try:
                    version = self._listed(name, look(store.blob(digest)), "uploaded")
                    if version.digest != digest:
                        raise InvalidFile("The stored file is not the one that was uploaded.")
                except (ReftError, OSError) as error:
                    reason = error.message if isinstance(error, ReftError) else error.strerror
                    self._upload_problems.setdefault(name, f"Version {digest[:12]}: {reason}")
                    if not history:
                        break
                else:
                    history.append(version)
            if history:
                self._place_upload(history)
                self._added.add(name)
        for name, why in self._upload_problems.items():
            _log.warning("the upload %s is not served as it was: %s", name, why)
        self._collect()

    def _tend(self) -> None:
        """See that the state folder is still there, and ours; raises `Unavailable`."""
        if self._store is None:
            return
        try:
            if not self._store.check():
                self._upload_problems.clear()
                for version in self._uploads():
                    version.problem = (
                        "The state folder was deleted while the server ran, and this upload is no"
                        " longer kept there; upload it again."
                    )
        except Unavailable as error:
            self._state_problem = error.message
            raise
        self._state_problem = None

    def _collect(self) -> None:
        if self._store is not None:
            self._store.collect(keep=self._held_digests())


_NOT_UPLOADED: dict[Origin, str] = {
    "folder": (
        "`{}` is a file of the served folder, which is only read and keeps no versions: put the"
        " older file there again, or upload it under this name."
    ),
    "loaded": (
        "`{}` was loaded from a path, and only uploads are kept in versions: unload it, and what"
        " was uploaded before is served again."
    ),
}


def _kept(name: str, history: Sequence[Version], digest: str | None) -> Version:
    """The version to go back to; raises `NotFound`, which names those that there are."""
    if digest is None:
        if len(history) > 1:
            return history[1]
        raise NotFound(
            f"There is no version of `{name}` before the current one,"
            f" {history[0].digest[:12]}: it is the only one that is kept.",
            param="digest",
        )
    found = [version for version in history if version.digest.startswith(digest)]
    if len(found) == 1:
        return found[0]
    raise NotFound(
        f"`{name}` has {'more than one' if found else 'no'} kept version {digest}; kept are"
        f" {', '.join(version.digest[:12] for version in history)}.",
        param="digest",
    )
