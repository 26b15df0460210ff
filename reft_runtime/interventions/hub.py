"""Repositories of the Hugging Face hub as folders on this machine."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from reft_runtime.errors import ConfigError

HUB = "hf:"
"""How the name of a repository begins where a path could be."""


def fetched(source: str, patterns: Sequence[str], *, param: str = "source") -> Path:
    """A path, or for `hf:OWNER/REPO` the folder with that repository's files that fit the patterns.

    `hf:OWNER/REPO/PATH` is a file in it, or a folder in it with those of its files. Raises
    `ConfigError`, whose `param` is the one given.
    """
    if not source.startswith(HUB):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = source.removeprefix(HUB).strip("/").split("/")
    inside = "/".join(parts[2:])
    wanted = [*patterns]
    if inside:
        wanted = [glob.escape(inside), *(f"{glob.escape(inside)}/{each}" for each in patterns)]
    try:
        folder = Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{source}: cannot be fetched from the Hub: {str(error).splitlines()[0][:300]}",
            param=param,
        ) from None
    if ".." in parts or not (folder / inside).exists():  # it stays in the folder
        raise ConfigError(f"{source}: the repository has no such file or folder.", param=param)
    return folder / inside
