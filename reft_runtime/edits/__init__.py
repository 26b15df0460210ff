"""Which rows of a step are edited, where, and by what."""
