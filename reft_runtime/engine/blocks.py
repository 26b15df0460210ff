"""The KV budget in blocks, and the keys under which a block's keys and values may be reused.

The budget is logical: it decides who is admitted and who is preempted. Where the tensors lie is
the storage's business (`kv_rows` on a CPU).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_runtime.engine.sequence import Request, Sequence

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockBudget:
    """Counts the blocks that each sequence holds, out of a fixed total."""

    def __init__(self, total_tokens: int) -> None:
        self.total = total_tokens // BLOCK_TOKENS
        self._held: dict[Sequence, int] = {}
        self._used = 0

    @property
    def used(self) -> int:
        """Blocks held by all sequences."""
        return self._used

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return self.total - self._used

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Let `sequence` hold blocks for `tokens` tokens in all; False if there are too few."""
        more = blocks_for(tokens) - self._held.get(sequence, 0)
        if more > self.free:
            return False
        if more > 0:
            self._held[sequence] = self._held.get(sequence, 0) + more
            self._used += more
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back every block of `sequence`; nothing happens if it holds none."""
        self._used -= self._held.pop(sequence, 0)

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is held adds up to what is used."""
        held = sum(self._held.values())
        if held != self._used or not 0 <= self._used <= self.total:
            raise AssertionError(f"KV budget: {held} held, {self._used} used, {self.total} in all")


def block_keys(request: Request) -> Iterator[bytes]:
    """Keys of the prompt's full blocks, in order.

    Two blocks have the same key only if their keys and values are equal: a key chains the block's
    token ids, the edits that fall in it (digest, strength, subspace, site, offsets; in order) and
    the key before it; the chain starts at the request's salt. So blocks before the first edited
    position carry the base model's keys.
    """
    length = len(request.prompt)
    key = hashlib.sha256(b"reft-kv" + request.salt).digest()
    for start in range(0, length - length % BLOCK_TOKENS, BLOCK_TOKENS):
        stop = start + BLOCK_TOKENS
        edits = [
            (
                applied.digest,
                applied.strength,
                applied.subspace,
                edit.layer,
                edit.component,
                tuple(offsets),
            )
            for applied in request.interventions
            for edit in applied.edits
            if applied.strength and (offsets := edit.positions.offsets(length, start, stop))
        ]
        content = repr((request.prompt[start:stop], edits)).encode()
        key = hashlib.sha256(key + content).digest()
        yield key
