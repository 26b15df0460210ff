"""The folder where what was fetched or compiled is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$REFT_CACHE`, else `$XDG_CACHE_HOME/reft`, else `~/.cache/reft`."""
    if own := os.environ.get("REFT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "reft"
