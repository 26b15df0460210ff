"""The callers' side of the engine: what is asked, checked, and told as text."""
