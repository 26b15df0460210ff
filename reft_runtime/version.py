"""The version of this project, as it was installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("reft-server")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+unknown"
