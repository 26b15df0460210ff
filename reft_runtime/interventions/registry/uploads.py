"""Uploaded versions: kept in the state folder, restored at the start, and rolled back to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from reft_runtime.errors import (
    Changed,
    InvalidFile,
    InvalidRequest,
    NotFound,
    ReftError,
    Unavailable,
)
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.entry import Change
from reft_runtime.interventions.registry.folders import Folders
from reft_runtime.interventions.registry.incoming import Incoming, telling
from reft_runtime.interventions.registry.listing import entry, shown_entry
from reft_runtime.interventions.registry.sources import File
from reft_runtime.interventions.registry.state import State
from reft_runtime.interventions.registry.store import Store
from reft_runtime.interventions.registry.version import Origin, Version

HISTORY = 8
"""How many uploaded versions of a name are kept, the current one included."""

MAX_ADDED_NAMES = 100_000
"""Most names that may be uploaded or loaded at run time."""

_ADDED: tuple[Origin, ...] = ("loaded", "uploaded")

_log = logging.getLogger(__name__)


class Uploads:
    """The layers of a catalog that clients change, and the pins of its names.

    All is kept in `store`, or without one in a temporary store, which is made when it is needed.
    The last `HISTORY` uploaded versions of a name are kept, in the order in which they were served
    last. `put`, `load`, `remove`, `rollback`, `pin` and `unpin` are documented in `Registry`. The
    change that they return is told before the next one may begin.
    """

    def __init__(
        self, catalog: Catalog, folders: Folders, store: State | None, state_bytes: int
    ) -> None:
        self._catalog = catalog
        self._folders = folders
        self._kept = store
        self._state_bytes = state_bytes
        self._making = threading.Lock()  # guards `_kept` while a temporary store is made
        self._changing = threading.Lock()  # one change at a time; taken before the other locks
        self._added: set[str] = set()  # names that were uploaded or loaded
        self._reserved: str | None = None
        self._listed: Callable[[str, File, Origin], Version] | None = None
        self._problems: dict[str, str] = {}
        self._unread: set[str] = set()  # names with versions that could not be read when looked at
        self._state_problem: str | None = None
        self._closed = False

    def incoming(self, max_bytes: int) -> Incoming:
        """A temporary file for what is being uploaded."""
        with self._changing:
            self._tend()
            return self._store.incoming(max_bytes)

    def put(
        self, version: Version, file: Incoming, expected: Collection[str] | None, share: float
    ) -> Change:
        """Let the version's name stand for it; `file` is its file."""
        name = version.name
        with self._change(name):
            shown = self._expect(name, expected)
            before = self._catalog.history(name)
            kept = [old for old in before if old.digest != version.digest][: HISTORY - 1]
            self._admit(version, leaving=set(before) - set(kept), share=share)
            self._write(version, file, kept)
            self._catalog.place_upload([version, *kept])
            self._problems.pop(name, None)
            self._collect()
            change = Change(_digest(shown), entry(self._catalog, name))
        _log.info("%s %r", "replaced" if shown else "added", version)
        _tell_hidden(shown, version)
        return change

    def load(self, version: Version, file: Incoming, *, replace: bool) -> Change:
        """Let the version's name stand for it until the process ends; `file` is its file."""
        name = version.name
        with self._changing:
            self._tend()
            shown = self._catalog.current(name)
            if not replace and shown is not None:
                raise InvalidRequest(
                    f"The intervention `{name}` is loaded already; ask to replace it, or unload it"
                    " first.",
                    param="name",
                )
            before = self._catalog.layer(name, "loaded")
            self._admit(version, leaving=set() if before is None else {before}, share=1.0)
            with self._undone(name):
                version.moved(self._store.keep_for_now(version.digest, file))
            self._catalog.place(version)
            self._collect()
            change = Change(_digest(shown), entry(self._catalog, name))
        _log.info("loaded %r", version)
        _tell_hidden(shown, version)
        return change

    def remove(self, name: str, expected: Collection[str] | None, *, uploads_only: bool) -> Change:
        """Remove what a name stands for."""
        with self._change(name):
            version = self._expect(name, expected)
            origin = None if version is None else version.origin
            if origin in (None, "folder") and name in self._problems:
                origin = "uploaded"
            if origin is None:
                raise self._catalog.unknown(name)
            if uploads_only and origin != "uploaded":
                raise InvalidRequest(
                    f"`{name}` is no upload but a file of a source, which every server of the"
                    " cluster reads for itself: remove the file there.",
                    param="name",
                )
            if origin == "uploaded":
                self._store.remove(name)
                self._catalog.pin(name, pinned=False)
                self._problems.pop(name, None)
            # The folder's file may have been replaced by now; the new one is not to be removed.
            self._catalog.displace(name, origin, version if origin == "folder" else None)
            if not any(self._catalog.layer(name, layer) for layer in _ADDED):
                self._added.discard(name)
            self._collect()
            change = Change(_digest(version), shown_entry(self._catalog, name))
        _log.info("removed %s (%s)", name, origin)
        return change

    def rollback(
        self, name: str, digest: str | None, expected: Collection[str] | None, share: float
    ) -> Change:
        """Serve an uploaded version again that is still kept."""
        with self._change(name):
            current = self._expect(name, expected)
            if current is None:
                raise self._catalog.unknown(name)
            if current.origin != "uploaded":
                raise InvalidRequest(_NOT_UPLOADED[current.origin].format(name), param="name")
            history = self._catalog.history(name)
            version = _kept(name, history, digest)
            if version is current:
                return Change(current.digest, entry(self._catalog, name))
            if pinned := self._catalog.pinned(name):
                self._catalog.check_room(version, pinned=True, share=share)
            version.edits()  # reads and verifies it
            after = [version, *(old for old in history if old is not version)]
            self._point(name, after, pinned=pinned)
            self._catalog.place_upload(after)
            self._catalog.was_read(version)
            change = Change(current.digest, entry(self._catalog, name))
        _log.info("rolled %r back to %r", current, version)
        return change

    def pin(self, name: str, share: float) -> Change:
        """Read the tensors of what a name stands for, and keep them in memory."""
        with self._change(name):
            version = self.current(name)
            self._catalog.check_room(version, pinned=True, share=share)
            version.edits()
            self._point(name, self._catalog.history(name), pinned=True)
            self._catalog.pin(name, pinned=True)
            self._catalog.was_read(version)
            change = Change(version.digest, entry(self._catalog, name))
        _log.info("pinned %r", version)
        return change

    def unpin(self, name: str) -> Change:
        """Let the tensors of a name be evicted again."""
        with self._change(name):
            version = self.current(name)
            if self._catalog.pinned(name):
                self._point(name, self._catalog.history(name), pinned=False)
                self._catalog.pin(name, pinned=False)
                _log.info("unpinned %r", version)
            return Change(version.digest, entry(self._catalog, name))

    def read_pinned(self) -> None:
        """Read the tensors of pinned names that are not in memory, such as after a start."""
        for name in self._catalog.pinned_names():
            version = self._catalog.current(name)
            if version is None or version.loaded or version.problem is not None:
                continue
            try:
                self._catalog.read(version)
            except ReftError as error:
                _log.warning("the pinned %s is not in memory: %s", name, error.message)

    def current(self, name: str) -> Version:
        """What a name stands for at this moment. Raises `NotFound`."""
        self._folders.refresh(name)
        version = self._catalog.current(name)
        if version is None:
            raise self._catalog.unknown(name)
        return version

    def restore(self, reserved: str, listed: Callable[[str, File, Origin], Version]) -> None:
        """Restore what was uploaded before the last stop.

        `listed` makes a version of a stored file from its header; `reserved` is a name that no file
        can have.
        """
        self._reserved, self._listed = reserved, listed
        if self._kept is None:
            return
        pointers = self._kept.pointers
        for name in [*pointers.damaged, *pointers.pinned - pointers.histories.keys()]:
            self._take_in(self._kept, name)
        for name in list(pointers.histories):
            self._take_in(self._kept, name)
        for name, why in self._problems.items():
            _log.warning("the upload %s is not served as it was: %s", name, why)
        self._collect()

    def follow(self) -> bool:
        """Take in what other servers have changed in the state; may take long.

        Returns whether the state could be reached.
        """
        store = self._kept
        if store is None:
            return True
        try:
            for name in {*store.changed(), *self._unread}:
                with self._changing:
                    self._catch_up(name)
            store.check()
        except Unavailable as error:
            self._state_problem = error.message
            return False
        self._state_problem = None
        return True

    def catch_up(self, name: str) -> None:
        """Take in what a name's pointer says now. Raises `Unavailable` if that is not served."""
        with self._changing:
            self._catch_up(name)
            if self._kept is None:
                return
            digests = self._kept.pointers.histories.get(name, ())
            served = self._catalog.layer(name, "uploaded")
            if _digest(served) != (digests[0] if digests else None):
                raise Unavailable(f"`{name}`: {self._problems.get(name, 'it cannot be read now.')}")

    def tend(self) -> None:
        """Check the state folder, unless a change is under way, which checks it as well."""
        known = self._state_problem
        if self._changing.acquire(blocking=False):
            try:
                with suppress(Unavailable):
                    self._tend()
                if self._state_problem not in (None, known):
                    _log.error("%s", self._state_problem)
            finally:
                self._changing.release()

    @property
    def state_problem(self) -> str | None:
        """Why nothing can be kept in the state now; None if it can."""
        return self._state_problem

    def problems(self) -> dict[str, str]:
        """What is wrong with the state folder, and by name why uploads are not served."""
        state = {} if self._state_problem is None else {"(state)": self._state_problem}
        return {**state, **self._problems}

    def close(self) -> None:
        """Let another process have the state folder."""
        with self._changing:
            self._closed = True
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    @contextmanager
    def _change(self, name: str) -> Iterator[None]:
        """Change a name in the block, beginning with what it is now. Raises `Unavailable`."""
        with self._changing:
            self._tend()
            with nullcontext() if self._kept is None else self._kept.changing():
                self._catch_up(name)
                yield

    def _catch_up(self, name: str) -> None:
        """Take in what another server has made of a name. Raises `Unavailable`."""
        if self._kept is None:
            return
        changed = self._kept.look_again(name)
        if changed or name in self._unread:
            self._take_in(self._kept, name)
        if changed:
            _log.info("another server has changed %s", name)

    def _take_in(self, store: State, name: str) -> None:
        """Let a name stand for what its pointer says."""
        pointers = store.pointers
        self._problems.pop(name, None)
        self._unread.discard(name)
        if name in pointers.damaged:
            self._problems[name] = "Its pointer is damaged; upload it again, or delete it."
            return
        digests = pointers.histories.get(name, ())
        if digests and name == self._reserved:
            self._problems[name] = "The name is the base model's own id; delete it."
            return
        self._catalog.pin(name, pinned=name in pointers.pinned)
        history = self._restored(store, name, digests)
        if history:
            self._catalog.place_upload(history)
            self._added.add(name)
        elif not digests:
            self._catalog.displace(name, "uploaded")
            if not any(self._catalog.layer(name, layer) for layer in _ADDED):
                self._added.discard(name)

    def _restored(self, store: State, name: str, digests: Sequence[str]) -> list[Version]:
        """The versions of a name; those that cannot be listed are left out, or all if the first."""
        assert self._listed is not None
        known = {version.digest: version for version in self._catalog.history(name)}
        history: list[Version] = []
        for digest in digests:
            try:
                version = known.get(digest)
                if version is None:
                    version = self._listed(name, store.file(digest), "uploaded")
                if version.digest != digest:
                    raise InvalidFile("The stored file is not the one that was uploaded.")
            except (ReftError, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    self._unread.add(name)
                reason = error.message if isinstance(error, ReftError) else error.strerror
                self._problems.setdefault(name, f"Version {digest[:12]}: {reason}")
                if not history:
                    break
            else:
                history.append(version)
        return history

    def _expect(self, name: str, expected: Collection[str] | None) -> Version | None:
        """The version the name stands for now, which must be one of the digests `expected`.

        In `expected`, `*` is any digest, an empty collection no version, and None means no
        condition. Raises `Changed`.
        """
        if expected is None:
            return self._catalog.current(name)
        self._folders.refresh(name)
        current = self._catalog.current(name)
        if current is None and expected:
            raise Changed.missing(name)
        if current is not None and not {current.digest, "*"} & set(expected):
            wanted = "another one was expected" if expected else "none was to be there"
            raise Changed(f"`{name}` is served as {current.digest}, and {wanted}.", param="name")
        return current

    def _admit(self, version: Version, *, leaving: set[Version], share: float) -> None:
        """Raise `StoreFull` or `InvalidRequest` if a version would not fit."""
        if version.name not in self._added and len(self._added) >= MAX_ADDED_NAMES:
            raise InvalidRequest(
                f"There are {MAX_ADDED_NAMES} uploaded names, as many as there may be; delete one"
                " first.",
                param="name",
            )
        self._catalog.reserve(version, leaving, share)
        self._added.add(version.name)

    def _write(self, version: Version, file: Incoming, kept: Sequence[Version]) -> None:
        """Keep an upload on disk, so that its tensors can be read again from there."""
        store, name = self._store, version.name
        digests = [version.digest, *(old.digest for old in kept if store.holds(old.digest))]
        with self._undone(name):
            store.add_blob(version.digest, file)
            with telling():
                version.moved(store.file(version.digest))
            store.point(name, digests, pinned=self._catalog.pinned(name))

    @contextmanager
    def _undone(self, name: str) -> Iterator[None]:
        """If the block fails, delete what it has kept on disk."""
        try:
            yield
        except BaseException:
            if not any(self._catalog.layer(name, layer) for layer in _ADDED):
                self._added.discard(name)
            self._collect()
            raise

    def _point(self, name: str, history: Sequence[Version], *, pinned: bool) -> None:
        """Write to disk which versions a name has, and whether it is pinned."""
        store = self._store
        if history and not store.holds(history[0].digest):
            raise Unavailable(
                f"The version {history[0].digest} is kept in memory only, since the state folder"
                " was deleted; upload its file again."
            )
        digests = [old.digest for old in history if store.holds(old.digest)]
        store.point(name, digests, pinned=pinned)

    def _tend(self) -> None:
        """Check that the state folder is still there, and ours. Raises `Unavailable`."""
        if self._closed:  # else the change would be kept in a temporary folder, and told as made
            raise Unavailable("The server is stopping, and nothing can be changed any more.")
        if self._kept is None:
            return
        try:
            if not self._kept.check():
                self._problems.clear()
                for version in self._catalog.uploads():
                    version.problem = (
                        "The state folder was deleted while the server ran, and this upload is no"
                        " longer kept there; upload it again."
                    )
        except Unavailable as error:
            self._state_problem = error.message
            raise
        self._state_problem = self._kept.unwritable()

    def _collect(self) -> None:
        if self._kept is not None:
            self._kept.collect(keep=self._catalog.kept_digests())

    @property
    def _store(self) -> State:
        with self._making:
            if self._kept is None:
                self._kept = Store.temporary(self._state_bytes)
            return self._kept


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


def _digest(version: Version | None) -> str | None:
    return None if version is None else version.digest


def _tell_hidden(before: Version | None, now: Version) -> None:
    """Log a warning if what a client put under a name hides a folder's file."""
    if before is not None and before.origin == "folder":
        _log.warning("%s: the folder's file is hidden by what was %s", now.name, now.origin)


def _kept(name: str, history: Sequence[Version], digest: str | None) -> Version:
    """The version to go back to. Raises `NotFound`, which names the versions that there are."""
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
