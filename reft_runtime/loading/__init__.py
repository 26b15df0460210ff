"""A base model made ready: loaded, its layers replaced, and checked by packed steps."""
