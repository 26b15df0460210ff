"""Source folders: read-only places where intervention files are found."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.interventions.format.identity import SUFFIX

LOOKS_AT_ONCE = 200
"""Files that are looked at in one go, which takes about a millisecond. A step of the engine that
waits for the core, or for Python's lock, waits no longer than that."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = (
    "use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, beginning with a letter or a digit"
)


class Found(NamedTuple):
    """A file as it lay in its folder; equal values mean that it has not been touched since."""

    path: Path
    """Real path, without symbolic links."""
    modified_ns: int
    changed_ns: int
    size: int
    inode: int

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


def find(name: str, folder: Path) -> Found | None:
    """The file that `list_folder` would list under this name, if there is one.

    Raises `OSError` where the folder cannot be read.
    """
    root = Path(os.path.realpath(folder, strict=True))
    path = root / f"{name}{SUFFIX}"
    try:
        if os.path.islink(path):
            path = Path(os.path.realpath(path))
            if not path.is_relative_to(root):
                return None
        return look(path)
    except FileNotFoundError:
        return None


def list_folder(
    folder: Path, between: Callable[[float], object]
) -> tuple[dict[str, Found], dict[str, str]]:
    """List the intervention files of one folder, not those of folders below it.

    Returns the files by name (a file's stem), and by path why a file cannot be listed. Raises
    `OSError` if the folder itself cannot be read. `between` is called after every `LOOKS_AT_ONCE`
    files, with the seconds that they took.
    """
    found: dict[str, Found] = {}
    problems: dict[str, str] = {}
    root = Path(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        files = sorted((e for e in entries if e.name.endswith(SUFFIX)), key=lambda e: e.name)
    began = time.monotonic()
    for number, file in enumerate(files, 1):
        if number % LOOKS_AT_ONCE == 0:
            between(time.monotonic() - began)
            began = time.monotonic()
        name = file.name.removesuffix(SUFFIX)
        if not NAME.fullmatch(name):
            problems[file.path] = f"The file's name is no name for an intervention: {NAME_RULE}."
            continue
        path = root / file.name
        if file.is_symlink():  # the others, which may be thousands, have their real path already
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


def locate(path: str, folders: Sequence[Path]) -> Path:
    """The real path of a file inside the source folders, from what a client wrote.

    `path` is absolute, or relative to one of the folders (the first that has it). Raises
    `InvalidRequest` for a path that leads outside them, whether it exists or not, and `NotFound`
    for a missing file.
    """
    if not path or "\0" in path:
        raise InvalidRequest("The path is empty or holds a NUL character.", param="path")
    inside = []
    for folder in folders:
        root = Path(os.path.realpath(folder))
        real = Path(os.path.realpath(root / path))
        if real.is_relative_to(root):
            inside.append(real)
    if not inside:
        raise InvalidRequest("The path leads outside the configured sources.", param="path")
    for real in inside:
        if os.path.isfile(real):  # pathlib's would raise if a name is too long
            return real
    if any(os.path.isdir(real) for real in inside):
        raise InvalidRequest(
            f"The path is a folder; give the {SUFFIX} file inside it.", param="path"
        )
    raise NotFound("There is no such file in the configured sources.", param="path")
