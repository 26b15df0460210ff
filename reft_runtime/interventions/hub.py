"""Repositories of the Hugging Face hub as folders on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_runtime.errors import ConfigError

HUB = "hf:"
"""How the name of a repository begins where a path could be."""


def fetched(source: str, patterns: Sequence[str], *, param: str = "source") -> Path:
    """A path, or for `hf:REPO` the folder with that repository's files that fit the patterns.

    Raises `ConfigError`, whose `param` is the one given.
    """
    if not source.startswith(HUB):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=[*patterns]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{source}: cannot be fetched from the Hub: {str(error).splitlines()[0][:300]}",
            param=param,
        ) from None
