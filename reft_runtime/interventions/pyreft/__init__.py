"""Reads pyreft's checkpoints into interventions, and writes them; never at serving time."""

from reft_runtime.interventions.pyreft.exporting import export_pyreft
from reft_runtime.interventions.pyreft.importing import from_live, import_pyreft

__all__ = ["export_pyreft", "from_live", "import_pyreft"]
