"""Sources: read-only places where intervention files are found; those that are folders."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from reft_runtime.errors import ConfigError, InvalidRequest, NotFound
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.urls import is_url, local_folder

if TYPE_CHECKING:
    from reft_runtime.interventions.format.header import Header

LOOKS_AT_ONCE = 200
"""Files that are looked at in one go, which takes about a millisecond. A step of the engine that
waits for the core, or for Python's lock, waits no longer than that."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = (
    "use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, beginning with a letter or a digit"
)

NO_FILE = "There is no such file in the configured sources."

NO_NAME = f"The file's name is no name for an intervention: {NAME_RULE}."


class File(Protocol):
    """A file of a source as it was found; equal values mean that it was not replaced since."""

    @property
    def where(self) -> str:
        """The path, or the URL as it may be shown."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    @property
    def modified_ns(self) -> int:
        """When it was written, in nanoseconds of Unix time."""

    def header(self, max_bytes: int) -> Header:
        """The file's header. Raises what `format.file.read_header` raises."""

    def fetch(self) -> Path:
        """The path of the file on this machine.

        Raises `InvalidFile`, `FileNotFoundError` if it is gone, and `OSError`.
        """

    def read(self, max_bytes: int) -> bytes:
        """The whole file as it is now. Raises what `format.file.read` raises."""

    def intact(self) -> bool:
        """Whether the same content could be had again."""

    def on_disk(self) -> bool:
        """Whether the content is on this machine, so that nobody waits for the network."""


Listing = tuple[Mapping[str, File], Mapping[str, str]]
"""Files by name (a file's stem), and by path or URL why a file cannot be listed."""


class Source(Protocol):
    """A place with intervention files, of which those directly in it are served."""

    @property
    def kind(self) -> str:
        """The word `folder`, or a URL's scheme."""

    @property
    def label(self) -> str:
        """The path, or the URL as it may be shown."""

    @property
    def problem(self) -> str | None:
        """Why it cannot be read now; None if it can."""

    def listing(self, between: Callable[[float], object]) -> Listing:
        """What there is. Raises `OSError` if the place cannot be read.

        `between` is called now and then, with the seconds that the work took since.
        """

    def find(self, name: str) -> File | None:
        """The file that `listing` has under this name now. Raises as `listing` does."""

    def glance(self, name: str, known: File | None) -> bool | None:
        """Whether the name's file is the known one; None if there is none or it is not readable."""

    def inside(self, path: str) -> str | None:
        """The place that a client's `path` leads to; None if it is outside of the source."""

    def at(self, inside: str) -> File | None:
        """The file at such a place. Raises `OSError` if the source cannot be read."""

    def is_folder(self, inside: str) -> bool:
        """Whether there is a folder at such a place."""


class Found(NamedTuple):
    """A file as it lay in its folder; equal values mean that it has not been touched since."""

    path: Path
    """Real path, without symbolic links."""
    modified_ns: int
    changed_ns: int
    size: int
    inode: int

    @property
    def where(self) -> str:
        """The file's path."""
        return str(self.path)

    def header(self, max_bytes: int) -> Header:
        """The file's header. Raises what `format.file.read_header` raises."""
        from reft_runtime.interventions.format.file import read_header  # loads torch

        return read_header(self.path, max_bytes)

    def fetch(self) -> Path:
        """The file's path. Raises `OSError` while its whole folder is away."""
        if not os.path.isdir(self.path.parent):
            raise OSError(errno.EIO, "its folder is away")
        return self.path

    def read(self, max_bytes: int) -> bytes:
        """The whole file. Raises what `format.file.read` raises."""
        from reft_runtime.interventions.format.file import read  # loads torch

        return read(self.path, max_bytes)

    def on_disk(self) -> bool:
        """Whether the content is on this machine: it is."""
        return True

    def intact(self) -> bool:
        """Whether the same content is still there.

        A new link to the file, such as backups make, does not count as a change.
        """
        try:
            now = look(self.path)
        except OSError:
            return False
        return now._replace(changed_ns=self.changed_ns) == self


def look(path: Path, *, follow: bool = False) -> Found:
    """A file as it is now; `path` is a real path unless links are to be followed (`follow`).

    Raises `OSError`.
    """
    status = os.stat(path, follow_symlinks=follow)
    return Found(path, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


class Folder:
    """A source that is a folder on this machine. Raises `ConfigError` if it does not exist."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        if not os.path.isdir(path):  # pathlib's raises if a name is too long
            raise ConfigError(
                f"The interventions folder {path} does not exist; make it, or name another."
            )
        self.path = path
        self.label = str(path)
        self.problem: str | None = None

    def listing(self, between: Callable[[float], object]) -> Listing:
        """What there is, without what lies in folders below. Raises `OSError`.

        `between` is called after every `LOOKS_AT_ONCE` files, with the seconds that they took.
        """
        try:
            with os.scandir(self.path) as entries:
                files = sorted((e for e in entries if e.name.endswith(SUFFIX)), key=_name_of)
        except OSError as error:
            self.problem = f"The folder cannot be read: {error.strerror}."
            raise
        self.problem = None
        found: dict[str, Found] = {}
        problems: dict[str, str] = {}
        root = Path(os.path.realpath(self.path))
        began = time.monotonic()
        for number, file in enumerate(files, 1):
            if number % LOOKS_AT_ONCE == 0:
                between(time.monotonic() - began)
                began = time.monotonic()
            name = file.name.removesuffix(SUFFIX)
            if not NAME.fullmatch(name):
                problems[file.path] = NO_NAME
                continue
            path = root / file.name
            if file.is_symlink():  # the others, which may be thousands, have their real path
                path = Path(os.path.realpath(path))
                if not path.is_relative_to(root):
                    problems[file.path] = (
                        "A link that leads out of the folder; put the file itself there."
                    )
                    continue
            try:
                found[name] = look(path)
            except OSError as error:
                problems[file.path] = f"Cannot be read: {error.strerror}."
        return found, problems

    def find(self, name: str) -> Found | None:
        """The file that `listing` has under this name now. Raises `OSError`."""
        root = Path(os.path.realpath(self.path, strict=True))
        path = root / f"{name}{SUFFIX}"
        try:
            if os.path.islink(path):
                path = Path(os.path.realpath(path))
                if not path.is_relative_to(root):
                    return None
            return look(path)
        except FileNotFoundError:
            return None

    def glance(self, name: str, known: File | None) -> bool | None:
        """Whether the name's file is the known one, by one look at the disk."""
        try:
            now = look(self.path / f"{name}{SUFFIX}", follow=True)
        except OSError:
            return None
        return isinstance(known, Found) and now._replace(path=known.path) == known

    def inside(self, path: str) -> str | None:
        """The real path that `path` leads to, absolute or from here; None if it leads outside."""
        if is_url(path):
            return None
        root = Path(os.path.realpath(self.path))
        real = Path(os.path.realpath(root / local_folder(path)))
        return str(real) if real.is_relative_to(root) else None

    def at(self, inside: str) -> Found | None:
        """The file at a real path. Raises `OSError`."""
        return look(Path(inside)) if os.path.isfile(inside) else None

    def is_folder(self, inside: str) -> bool:
        """Whether there is a folder at a real path."""
        return os.path.isdir(inside)


def locate(path: str, sources: Sequence[Source]) -> File:
    """The file inside the sources that a client's `path` stands for.

    `path` is absolute, or the whole URL of a file, or relative to one of the sources (the first
    that has it). Raises `InvalidRequest` for a path that leads outside of all sources, whether it
    exists or not, `NotFound` for a missing file, and `OSError` if a source cannot be read.
    """
    if not path or "\0" in path:
        raise InvalidRequest("The path is empty or holds a NUL character.", param="path")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidRequest("The path holds half of a surrogate pair.", param="path") from None
    inside = [(source, place) for source in sources if (place := source.inside(path)) is not None]
    if not inside:
        raise InvalidRequest("The path leads outside the configured sources.", param="path")
    away: OSError | None = None
    for source, place in inside:
        try:
            if (file := source.at(place)) is not None:
                return file
        except OSError as error:  # another source may have it
            away = away or error
    if away is not None:
        raise away
    if any(source.is_folder(place) for source, place in inside):
        raise InvalidRequest(
            f"The path is a folder; give the {SUFFIX} file inside it.", param="path"
        )
    raise NotFound(NO_FILE, param="path")


def _name_of(entry: os.DirEntry[str]) -> str:
    return entry.name
