"""What an evaluation judges: interventions by file or by a server's names, at strengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from reft_runtime.client import Server
from reft_runtime.errors import ConfigError, InvalidFile, InvalidRequest, NotFound, did_you_mean
from reft_runtime.interventions import Intervention, parse, read
from reft_runtime.interventions.format.identity import SUFFIX, names_file
from reft_runtime.outputs import BASE_LABEL
from reft_runtime.training.wording import listed
from reft_runtime.use import MAX_STRENGTH, Use, with_strength

MOST_NAMED = 10
"""An error lists this many names where none is like the one asked for."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An intervention at a strength; `name` None is the base model."""

    name: str | None = None
    strength: float = 1.0

    @property
    def label(self) -> str:
        """What a report calls it: the name, and the strength where it is not 1."""
        return BASE_LABEL if self.name is None else with_strength(self.name, self.strength)


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """An intervention file that was read and checked."""

    data: bytes
    content: Intervention


def find_files(wanted: Sequence[str], folder: str | Path | None) -> list[tuple[Candidate, File]]:
    """The candidates that are wanted, in order, each with its file.

    Each is a file, a name in `folder`, or a shell pattern of either, with `=STRENGTH` or without.
    Raises `NotFound` with the names that are nearest, `InvalidRequest` and `ConfigError`.
    """
    found: dict[str, Path] = {}
    candidates: dict[Candidate, None] = {}
    for use in map(_parse, wanted):
        for path in _paths(use.label, folder):
            if found.setdefault(path.stem, path) != path:
                raise ConfigError(
                    f"intervention: {found[path.stem]} and {path} have one name.",
                    param="intervention",
                )
            candidates[Candidate(path.stem, use.strength)] = None
    files = {name: _sound(path) for name, path in found.items()}
    return [(candidate, files[candidate.name or ""]) for candidate in candidates]


def find_served(wanted: Sequence[str], server: Server) -> list[Candidate]:
    """The candidates that are wanted of a server, in order.

    Each is a name, a pattern, or NAME@DIGEST, with `=STRENGTH` or without. Raises `NotFound` with
    the names that are nearest, and `InvalidRequest`.
    """
    known = server.names()
    candidates: dict[Candidate, None] = {}
    for use in map(_parse, wanted):
        reference = use.label
        names = [name for name in known if fnmatchcase(name, reference)]
        if "@" in reference and reference.partition("@")[0] in known:
            if not server.has_model(reference):
                raise NotFound(
                    f"intervention: the server has no version {reference!r}; GET"
                    " /v1/interventions lists the versions of each.",
                    param="intervention",
                )
            names = [reference]
        if not names:
            meant = did_you_mean(reference.partition("@")[0], known)
            raise NotFound(
                f"intervention: the server has no {reference!r}{'.' if meant else ''}"
                f"{meant or f'; it has {_some(known)}.'} A file is put on it with"
                " `reft train --push`, or PUT /v1/interventions/NAME.",
                param="intervention",
            )
        candidates.update(dict.fromkeys(Candidate(name, use.strength) for name in names))
    return list(candidates)


def _parse(text: str) -> Use:
    """Read NAME=STRENGTH; raises `InvalidRequest` for a strength that a server would refuse."""
    use = Use.parse(text)
    if abs(use.strength) > MAX_STRENGTH:
        raise InvalidRequest(
            f"intervention: {text!r}: the strength must be from {-MAX_STRENGTH:g} to"
            f" {MAX_STRENGTH:g}.",
            param="intervention",
        )
    return use


def _paths(reference: str, folder: str | Path | None) -> list[Path]:
    """The files that a reference names, at least one; raises `NotFound`."""
    if names_file(reference):
        place, pattern, where = Path(reference).parent, Path(reference).name, ""
    elif folder is not None:
        place, pattern, where = Path(folder), f"{reference}{SUFFIX}", f" in {folder}"
    else:
        raise NotFound(f"intervention: there is no {reference}.", param="intervention")
    paths = sorted(place.glob(pattern))
    if not paths:
        names = sorted(path.stem for path in place.glob(f"*{SUFFIX}"))
        meant = did_you_mean(pattern.removesuffix(SUFFIX), names)
        if Path(f"{reference}{SUFFIX}").is_file():
            meant = f" Did you mean the file `{reference}{SUFFIX}`?"
        there = f" There are: {_some(names)}." if place.is_dir() else f" No folder {place} exists."
        meant = meant or there
        raise NotFound(
            f"intervention: there is no {reference}{where}.{meant}", param="intervention"
        )
    return paths


def _some(names: Sequence[str]) -> str:
    return listed(names, MOST_NAMED) or "none"


def _sound(path: Path) -> File:
    """Read and check a file, before any model is loaded; raises `ConfigError`."""
    try:
        data = read(os.path.realpath(path))
        return File(data, parse(data))
    except (OSError, InvalidFile) as error:
        reason = error.message if isinstance(error, InvalidFile) else f"{error.strerror}."
        raise ConfigError(f"intervention: {path}: {reason}", param="intervention") from None
