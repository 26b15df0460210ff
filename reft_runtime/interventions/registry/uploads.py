"""What clients change of names: uploads, loads, removals, rollbacks and pins."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from reft_runtime.errors import (
    Changed,
    InvalidFile,
    InvalidRequest,
    NotFound,
    ReftError,
    Unavailable,
)
from reft_runtime.interventions.format.file import too_large
from reft_runtime.interventions.format.recognise import HEAD_BYTES
from reft_runtime.interventions.registry.catalog import Catalog
from reft_runtime.interventions.registry.entry import Change, Entry
from reft_runtime.interventions.registry.folders import Folders
from reft_runtime.interventions.registry.incoming import Incoming
from reft_runtime.interventions.registry.listing import entry, shown_entry
from reft_runtime.interventions.registry.sources import locate
from reft_runtime.interventions.registry.upload_state import UploadState
from reft_runtime.interventions.registry.verifier import Verifier
from reft_runtime.interventions.registry.version import Origin, Version

HISTORY = 8
"""How many uploaded versions of a name are kept, the current one included."""

MAX_ADDED_NAMES = 100_000
"""Most names that may be uploaded or loaded at run time."""

_log = logging.getLogger(__name__)


class Uploads:
    """The layers of a catalog that clients change, and the pins of its names.

    The last `HISTORY` uploaded versions of a name are kept in `state`, in the order in which they
    were served last. Public methods are documented in `Registry`. The change that they return is
    told before the next one may begin.
    """

    def __init__(
        self, catalog: Catalog, folders: Folders, verifier: Verifier, state: UploadState
    ) -> None:
        self._catalog = catalog
        self._folders = folders
        self._verifier = verifier
        self._state = state

    def incoming(self) -> Incoming:
        """A temporary file for an upload."""
        return self._state.incoming(self._verifier.max_file_bytes)

    def put(
        self,
        name: str,
        data: bytes | Incoming,
        sha256: str | None,
        expected: Collection[str] | None,
        share: float,
    ) -> Change:
        """Upload a file under a name."""
        self._verifier.check_name(name)
        with self._written(data) if isinstance(data, bytes) else nullcontext(data) as file:
            if sha256 is not None and file.sha256 != sha256.lower():
                raise InvalidFile(
                    f"The file's SHA-256 is {file.sha256}, not the one that was sent with it;"
                    " upload it again."
                )
            version = self._verifier.verified(name, file.read(), "uploaded")
            return self._put(version, file, expected, share)

    def load(self, name: str, path: str, *, replace: bool) -> Change:
        """Load a file inside the sources under a name until the process ends."""
        self._verifier.check_name(name)
        try:
            data = locate(path, self._folders.sources).read(self._verifier.max_file_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"The file cannot be read: {error.strerror}.", param="path") from error
        except OSError as error:
            raise Unavailable(
                f"The file cannot be read: {error.strerror}.", param="path"
            ) from error
        version = self._verifier.verified(name, data, "loaded")
        with self._written(data) as kept:
            return self._load(version, kept, replace=replace)

    def remove(self, name: str, expected: Collection[str] | None, *, uploads_only: bool) -> Change:
        """Remove what a name stands for."""
        with self._state.changing_name(name):
            version = self._expect(name, expected)
            origin = None if version is None else version.origin
            if origin in (None, "folder") and self._state.damaged(name):
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
                self._state.remove(name)
                self._catalog.pin(name, pinned=False)
            # The folder's file may have been replaced by now; the new one is not to be removed.
            self._catalog.displace(name, origin, version if origin == "folder" else None)
            self._state.collect()
            change = Change(_digest(version), shown_entry(self._catalog, name))
        _log.info("removed %s (%s)", name, origin)
        return change

    def rollback(
        self, name: str, digest: str | None, expected: Collection[str] | None, share: float
    ) -> Change:
        """Serve an uploaded version again that is still kept."""
        with self._state.changing_name(name):
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
            self._state.point(name, after, pinned=pinned)
            self._catalog.place_upload(after)
            self._catalog.was_read(version)
            change = Change(current.digest, entry(self._catalog, name))
        _log.info("rolled %r back to %r", current, version)
        return change

    def pin(self, name: str, share: float) -> Change:
        """Read the tensors of what a name stands for, and keep them in memory."""
        with self._state.changing_name(name):
            version = self._current(name)
            self._catalog.check_room(version, pinned=True, share=share)
            version.edits()
            self._state.point(name, self._catalog.history(name), pinned=True)
            self._catalog.pin(name, pinned=True)
            self._catalog.was_read(version)
            change = Change(version.digest, entry(self._catalog, name))
        _log.info("pinned %r", version)
        return change

    def unpin(self, name: str) -> Change:
        """Let the tensors of a name be evicted again."""
        with self._state.changing_name(name):
            version = self._current(name)
            if self._catalog.pinned(name):
                self._state.point(name, self._catalog.history(name), pinned=False)
                self._catalog.pin(name, pinned=False)
                _log.info("unpinned %r", version)
            return Change(version.digest, entry(self._catalog, name))

    def warm(self, name: str) -> Entry:
        """Read the tensors of what a name stands for, as a first use would."""
        version = self._current(name)
        self._catalog.check_room(version, pinned=False)
        self._catalog.read(version)
        return entry(self._catalog, name)

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

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Incoming]:
        limit = self._verifier.max_file_bytes
        if len(data) > limit:
            raise too_large(len(data), limit, data[:HEAD_BYTES])
        with self.incoming() as file:
            file.write(data)
            yield file

    def _put(
        self, version: Version, file: Incoming, expected: Collection[str] | None, share: float
    ) -> Change:
        """Let the version's name stand for it; `file` is its file."""
        name = version.name
        with self._state.changing_name(name):
            shown = self._expect(name, expected)
            before = self._catalog.history(name)
            kept = [old for old in before if old.digest != version.digest][: HISTORY - 1]
            self._admit(version, leaving=set(before) - set(kept), share=share)
            self._state.keep(version, file, kept)
            self._catalog.place_upload([version, *kept])
            self._state.collect()
            change = Change(_digest(shown), entry(self._catalog, name))
        _log.info("%s %r", "replaced" if shown else "added", version)
        _tell_hidden(shown, version)
        return change

    def _load(self, version: Version, file: Incoming, *, replace: bool) -> Change:
        """Let the version's name stand for it until the process ends; `file` is its file."""
        name = version.name
        with self._state.changing():
            shown = self._catalog.current(name)
            if not replace and shown is not None:
                raise InvalidRequest(
                    f"The intervention `{name}` is loaded already; ask to replace it, or unload it"
                    " first.",
                    param="name",
                )
            before = self._catalog.layer(name, "loaded")
            self._admit(version, leaving=set() if before is None else {before}, share=1.0)
            self._state.keep_for_now(version, file)
            self._catalog.place(version)
            self._state.collect()
            change = Change(_digest(shown), entry(self._catalog, name))
        _log.info("loaded %r", version)
        _tell_hidden(shown, version)
        return change

    def _current(self, name: str) -> Version:
        """What a name stands for at this moment. Raises `NotFound`."""
        self._folders.refresh(name)
        version = self._catalog.current(name)
        if version is None:
            raise self._catalog.unknown(name)
        return version

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
        added = self._catalog.added
        if version.name not in added and len(added) >= MAX_ADDED_NAMES:
            raise InvalidRequest(
                f"There are {MAX_ADDED_NAMES} uploaded names, as many as there may be; delete one"
                " first.",
                param="name",
            )
        self._catalog.reserve(version, leaving, share)


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
