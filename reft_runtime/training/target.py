"""Where files are going to be written: what is wrong with the place is said before the work."""

from __future__ import annotations

import os
from pathlib import Path

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.sources import NAME, NAME_RULE
from reft_runtime.machine.places import check_folder


def check_target(out: str | Path) -> Path:
    """The path of a file to write, whose folder is made where need be; raises `ConfigError`."""
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out: give the name of a file, not {type(out).__name__}.")
    out = Path(out)
    if out.suffix != SUFFIX:
        raise ConfigError(f"out: {out} must end with {SUFFIX}.", param="out")
    if not NAME.fullmatch(out.stem):
        raise ConfigError(
            f"out: {out.stem[:80]!r} is no name for an intervention: {NAME_RULE}.", param="out"
        )
    if os.path.isdir(out):
        raise ConfigError(f"out: {out} is a folder; name a file.", param="out")
    check_folder(out.parent, "out")
    return out
