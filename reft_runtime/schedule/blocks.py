"""Blocks: runs of `BLOCK_TOKENS` tokens, in which keys and values are counted and reused."""

from __future__ import annotations

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Number of blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)
