"""Lets vLLM import torchvision, which is not there: every module of it has every name.

vLLM imports the code for pictures also where only text is served, as for Qwen3.5, and torchvision
is not built for its torch everywhere. Python runs this file at its start if `PYTHONPATH` names
this folder; the version is in the folder beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock


class StandIn(MetaPathFinder, Loader):
    """Finds and makes modules of torchvision."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A package for each name in torchvision."""
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module every name that is asked for."""

        def anything(name: str) -> MagicMock:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=name)

        vars(module).update(__getattr__=anything, __version__="0.28.0")


sys.meta_path.append(StandIn())
