"""The callers' side of the engine: requests are checked and queued, and tokens become text."""
