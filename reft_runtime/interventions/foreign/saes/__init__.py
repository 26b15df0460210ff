"""Features of sparse autoencoders, in the layouts in which they are published."""

from reft_runtime.interventions.foreign.saes.importing import import_sae, is_sae
from reft_runtime.interventions.foreign.saes.layouts import FILES

__all__ = ["FILES", "import_sae", "is_sae"]
