"""What keeps uploads and pins: written at each change, restored at the start, and followed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from reft_runtime.errors import InvalidFile, ReftError, Unavailable
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.incoming import Incoming, telling
from reft_runtime.interventions.registry.state import State
from reft_runtime.interventions.registry.store import Store
from reft_runtime.interventions.registry.verifier import Verifier
from reft_runtime.interventions.registry.version import Version

_log = logging.getLogger(__name__)


class UploadState:
    """The uploads and pins of a catalog as a state has them, and what is wrong with them.

    All is kept in `store`, or without one in a temporary store, which is made when it is needed.
    `keep` and what stands below it is for within a change, of which there is one at a time.
    """

    def __init__(
        self, catalog: Catalog, verifier: Verifier, store: State | None, max_bytes: int
    ) -> None:
        self._catalog = catalog
        self._verifier = verifier
        self._kept = store
        self._max_bytes = max_bytes
        self._making = threading.Lock()  # guards `_kept` while a temporary store is made
        self._changing = threading.Lock()  # one change at a time; taken before the other locks
        self._problems: dict[str, str] = {}
        self._unread: set[str] = set()  # names with versions that could not be read when looked at
        self._problem: str | None = None
        self._closed = False

    @property
    def problem(self) -> str | None:
        """Why nothing can be kept in the state now; None if it can."""
        return self._problem

    def problems(self) -> dict[str, str]:
        """What is wrong with the state, and by name why uploads are not served."""
        state = {} if self._problem is None else {"(state)": self._problem}
        return {**state, **self._problems}

    def restore(self) -> None:
        """Take in what was kept before the last stop."""
        if self._kept is None:
            return
        pointers = self._kept.pointers
        for name in [*pointers.damaged, *pointers.pinned - pointers.histories.keys()]:
            self._take_in(self._kept, name)
        for name in list(pointers.histories):
            self._take_in(self._kept, name)
        for name, why in self._problems.items():
            _log.warning("the upload %s is not served as it was: %s", name, why)
        self.collect()

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
            self._problem = error.message
            return False
        self._problem = None
        return True

    def catch_up(self, name: str) -> None:
        """Take in what a name's pointer says now. Raises `Unavailable` if that is not served."""
        with self._changing:
            self._catch_up(name)
            if self._kept is None:
                return
            digests = self._kept.pointers.histories.get(name, ())
            served = self._catalog.layer(name, "uploaded")
            if (served and served.digest) != (digests[0] if digests else None):
                raise Unavailable(f"`{name}`: {self._problems.get(name, 'it cannot be read now.')}")

    def tend(self) -> None:
        """Check the state, unless a change is under way, which checks it as well."""
        known = self._problem
        if self._changing.acquire(blocking=False):
            try:
                with suppress(Unavailable):
                    self._check()
                if self._problem not in (None, known):
                    _log.error("%s", self._problem)
            finally:
                self._changing.release()

    def close(self) -> None:
        """Let another process have the state."""
        with self._changing:
            self._closed = True
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    def incoming(self, max_bytes: int) -> Incoming:
        """A temporary file for what is being uploaded."""
        with self.changing():
            return self._store.incoming(max_bytes)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let one change be made in the block. Raises `Unavailable` if nothing can be kept."""
        with self._changing:
            self._check()
            yield

    @contextmanager
    def changing_name(self, name: str) -> Iterator[None]:
        """The same for what other servers see as well, beginning with what the name is now."""
        with self.changing(), nullcontext() if self._kept is None else self._kept.changing():
            self._catch_up(name)
            yield

    def damaged(self, name: str) -> bool:
        """Whether something is wrong with what is kept under a name."""
        return name in self._problems

    def keep(self, version: Version, file: Incoming, older: Sequence[Version]) -> None:
        """Keep an upload, so that its tensors can be read again from there, and its history."""
        store, name = self._store, version.name
        digests = [version.digest, *(old.digest for old in older if store.holds(old.digest))]
        with self._undone():
            store.add_blob(version.digest, file)
            with telling():
                version.moved(store.file(version.digest))
            store.point(name, digests, pinned=self._catalog.pinned(name))
        self._problems.pop(name, None)

    def keep_for_now(self, version: Version, file: Incoming) -> None:
        """Keep the file of a version until this process ends, or until it stands for nothing."""
        with self._undone():
            version.moved(self._store.keep_for_now(version.digest, file))

    def point(self, name: str, history: Sequence[Version], *, pinned: bool) -> None:
        """Keep which versions a name has, and whether it is pinned."""
        store = self._store
        if history and not store.holds(history[0].digest):
            raise Unavailable(
                f"The version {history[0].digest} is kept in memory only, since the state folder"
                " was deleted; upload its file again."
            )
        digests = [old.digest for old in history if store.holds(old.digest)]
        store.point(name, digests, pinned=pinned)

    def remove(self, name: str) -> None:
        """Forget what is kept under a name, also what cannot be served."""
        self._store.remove(name)
        self._problems.pop(name, None)

    def collect(self) -> None:
        """Delete the files that nothing stands for any more."""
        if self._kept is not None:
            self._kept.collect(keep=self._catalog.kept_digests())

    def _check(self) -> None:
        """Check that the state is still there, and ours. Raises `Unavailable`."""
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
            self._problem = error.message
            raise
        self._problem = self._kept.unwritable()

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
        if digests and name == self._verifier.base.model:
            self._problems[name] = "The name is the base model's own id; delete it."
            return
        self._catalog.pin(name, pinned=name in pointers.pinned)
        history = self._restored(store, name, digests)
        if history:
            self._catalog.place_upload(history)
        elif not digests:
            self._catalog.displace(name, "uploaded")

    def _restored(self, store: State, name: str, digests: Sequence[str]) -> list[Version]:
        """The versions of a name; those that cannot be listed are left out, or all if the first."""
        known = {version.digest: version for version in self._catalog.history(name)}
        history: list[Version] = []
        for digest in digests:
            try:
                version = known.get(digest)
                if version is None:
                    version = self._verifier.listed(name, store.file(digest), "uploaded")
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

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """If the block fails, delete what it has kept."""
        try:
            yield
        except BaseException:
            self.collect()
            raise

    @property
    def _store(self) -> State:
        with self._making:
            if self._kept is None:
                self._kept = Store.temporary(self._max_bytes)
            return self._kept
