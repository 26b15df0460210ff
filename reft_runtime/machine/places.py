"""Places in the file system where something is going to be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from reft_runtime.errors import ConfigError

STANDARD_OUTPUT = Path("-")
"""What stands for standard output where a file is named."""


def check_folder(folder: Path, option: str) -> None:
    """Make a folder if it is missing, and check that files can be written to it.

    Raises `ConfigError`, which names `option`, if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option}: {folder} cannot be made: {error.strerror}.", param=option
        ) from None
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}: {folder} cannot be written to: {error.strerror}.", param=option
        ) from None
