"""Blocks: keys and values are counted, and reused, in runs of tokens of one size."""

from __future__ import annotations

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)
