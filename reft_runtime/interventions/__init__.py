"""Interventions: their maths, files and positions, and the registry of versions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_runtime.interventions.format.canonical import CanonicalEdit as CanonicalEdit
    from reft_runtime.interventions.format.file import parse as parse
    from reft_runtime.interventions.format.file import read as read
    from reft_runtime.interventions.format.file import read_header as read_header
    from reft_runtime.interventions.format.file import serialise as serialise
    from reft_runtime.interventions.format.file import write as write
    from reft_runtime.interventions.format.header import Header as Header
    from reft_runtime.interventions.format.intervention import Edit as Edit
    from reft_runtime.interventions.format.intervention import Intervention as Intervention
    from reft_runtime.interventions.format.manifest import BaseShape as BaseShape
    from reft_runtime.interventions.format.manifest import EditSpec as EditSpec
    from reft_runtime.interventions.format.manifest import Manifest as Manifest
    from reft_runtime.interventions.format.positions import Positions as Positions
    from reft_runtime.interventions.registry.entry import Entry as Entry
    from reft_runtime.interventions.registry.registry import Registry as Registry
    from reft_runtime.interventions.registry.version import Version as Version

_HOMES = {
    "BaseShape": "format.manifest",
    "CanonicalEdit": "format.canonical",
    "Edit": "format.intervention",
    "EditSpec": "format.manifest",
    "Entry": "registry.entry",
    "Header": "format.header",
    "Intervention": "format.intervention",
    "Manifest": "format.manifest",
    "Positions": "format.positions",
    "Registry": "registry.registry",
    "Version": "registry.version",
    "parse": "format.file",
    "read": "format.file",
    "read_header": "format.file",
    "serialise": "format.file",
    "write": "format.file",
}

__all__ = [
    "BaseShape",
    "CanonicalEdit",
    "Edit",
    "EditSpec",
    "Entry",
    "Header",
    "Intervention",
    "Manifest",
    "Positions",
    "Registry",
    "Version",
    "parse",
    "read",
    "read_header",
    "serialise",
    "write",
]


def __getattr__(name: str) -> object:
    """Import on first use, so that file names can be recognised without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
