"""What an intervention is: its maths, its file, its positions, and the registry of versions."""

from reft_runtime.interventions.canonical import CanonicalEdit
from reft_runtime.interventions.entry import Entry
from reft_runtime.interventions.file import parse, read, read_header, serialise, write
from reft_runtime.interventions.header import Header
from reft_runtime.interventions.intervention import Edit, Intervention
from reft_runtime.interventions.manifest import BaseShape, EditSpec, Manifest
from reft_runtime.interventions.positions import Positions
from reft_runtime.interventions.registry import Registry
from reft_runtime.interventions.version import Version

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
