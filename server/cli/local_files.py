"""Intervention files of this machine, as a command's arguments name them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from reft_runtime.base.model_files import check_named
from reft_runtime.errors import (
    MOST_COMPARED,
    ConfigError,
    InvalidFile,
    NotFound,
    WrongBaseModel,
    nearest,
)
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.hub import HUB

SHIPPED = Path("interventions")
"""The folder in which a file may lie that is called by its name alone."""


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Let errors about a file begin with its path, as it was given.

    Where there is none, `NotFound` says which may have been meant.
    """
    try:
        yield
    except (InvalidFile, WrongBaseModel) as error:
        raise type(error)(f"{file}: {error.message}") from None
    except OSError as error:
        meant = _meant(file) if isinstance(error, FileNotFoundError) else ""
        raise NotFound(f"{file}: {error.strerror}.{meant}") from None


def read_file(file: Path) -> bytes:
    """A whole file; a link to it is followed. Raises `InvalidFile` and `OSError`."""
    path = os.path.realpath(file)  # pathlib raises no OSError for links in a circle
    os.lstat(path)  # what is not there is told before torch is imported
    from reft_runtime.interventions import read

    return read(path)


def check_there(*sources: str | Path | None) -> None:
    """Raise `ConfigError` for a path where nothing is, before what takes seconds to import.

    None is an option that was not given; what is on the hub is not looked up.
    """
    for source in sources:
        if source is None or str(source).startswith(HUB):
            continue
        try:
            os.stat(source)
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}.") from None


def check_model(model: str | None, option: str = "model") -> None:
    """Raise `ConfigError` for a base model's folder that cannot be used, as early as that.

    None is an option that was not given.
    """
    try:
        if model is not None:
            check_named(model)
    except ConfigError as error:
        message = f"{option}: {error.message.removeprefix('model: ')}"
        raise ConfigError(message, param=option) from None


def check_free(path: Path, *, force: bool) -> None:
    """Raise `ConfigError` for a file to write that is there already, unless `force`."""
    if not force and os.path.lexists(path):
        raise ConfigError(f"out: {path} is there already; --force replaces it.", param="out")


def _meant(file: Path) -> str:
    found: dict[str, Path] = {}
    for folder in (SHIPPED, file.parent):
        with suppress(OSError):
            for path in islice(folder.glob(f"*{SUFFIX}"), MOST_COMPARED):
                found[path.stem] = path
    stem = file.name.removesuffix(SUFFIX)
    near = [stem] if stem in found else nearest(stem, found)
    return f" Did you mean {' or '.join(str(found[name]) for name in near)}?" if near else ""
