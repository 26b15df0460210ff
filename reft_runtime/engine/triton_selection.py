"""Launches the kernels that pick tokens; for each row only what it asks for is done."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from reft_runtime.engine.device_sampler import Batch, Chosen
from reft_runtime.kernels.cuda import drawing_kernels, logprob_kernels, sampling_kernels
from reft_runtime.sampling import MAX_LOGPROBS

CHUNK = 4096
"""Token ids that one program works on."""
EACH, EACH_SUMMED = 16, 32
"""Token ids per thread; more where many sums are made, which cost every thread the same."""
MOST_WARPS = 8

PASSES, STEPS = 3, 8
"""How often, and into how many parts, a threshold's interval is divided before it is bisected.

This makes 512 parts of the distances that weigh anything: with the flattest distributions a few
thousand ids are left.
"""

CANDIDATES = 2048
"""Numbers that a bisecting program reads at once."""


class TritonSelection:
    """`Select` by Triton kernels; a row's token does not depend on the size of the chunks."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk

    def __call__(self, batch: Batch) -> Chosen:
        """See `Select`."""
        logits, settings, rows = batch.logits, batch.settings, len(batch.settings)
        vocabulary, stride = logits.shape[1], logits.stride(0)
        chunks = triton.cdiv(vocabulary, self._chunk)
        new = partial(torch.empty, device=logits.device)
        edited = new(max(1, batch.edited), vocabulary if batch.edited else 1)
        tops, lows = new(rows, 2, chunks), new(rows, chunks)
        firsts = new(rows, chunks, dtype=torch.int32)
        totals = new(rows, chunks, dtype=torch.int64)
        tokens = new(rows, dtype=torch.int64)
        counts = firsts if batch.counts is None else batch.counts
        before = tokens if batch.before is None else batch.before
        masks = firsts if batch.masks is None else batch.masks
        sizes = {"VOCABULARY": vocabulary, "CHUNK": self._chunk, "CHUNKS": chunks}
        wide = {"WIDE": triton.next_power_of_2(chunks)}
        scale = {"SCALE": 2.0 ** (62 - vocabulary.bit_length())}
        steps = {"STEPS": STEPS}
        grid, warps, fewer = (rows, chunks), self._warps(EACH), self._warps(EACH_SUMMED)
        source = logits, edited, settings, tops

        sampling_kernels.scan[grid](
            logits, edited, counts, before, batch.items, masks, settings, tops, lows, firsts,
            stride,
            **sizes, **warps,
        )  # fmt: skip
        masses, bounds = new(rows, chunks, dtype=torch.int64), new(rows, 2)
        numbers, lengths = (new(rows, chunks, dtype=torch.int32) for _ in "nl")
        left = new(rows, chunks * self._chunk) if batch.needs.truncates else bounds
        edges, ends = new(PASSES, rows, STEPS), new(PASSES, rows)
        sums = new(PASSES, rows, STEPS, chunks)
        if batch.needs.truncates:
            for number in range(PASSES):
                sampling_kernels.narrow[grid](
                    *source, lows, totals, edges, ends, sums, stride, rows,
                    **sizes, **wide, **steps, **scale, **fewer, PASS=number,
                )  # fmt: skip
        if batch.needs.draws:
            sampling_kernels.gather[grid](
                *source, totals, edges[-1], ends[-1], sums[-1], masses, numbers, left, lengths,
                bounds, stride, **sizes, **wide, **steps, **scale, **fewer,
            )  # fmt: skip
        at_once = {"AT_ONCE": max(16, CANDIDATES // wide["WIDE"])}
        drawing_kernels.choose[(rows,)](
            *source, firsts, totals, masses, numbers, left, lengths, bounds, tokens, stride,
            **sizes, **wide, **at_once, **scale, **warps,
        )  # fmt: skip
        if not batch.needs.logprobs:
            return Chosen(tokens)
        return Chosen(tokens, *_logprobs(batch, tops, tokens, sizes, {**wide, **scale}, warps))

    def _warps(self, each: int) -> dict[str, int]:
        return {"num_warps": max(1, min(MOST_WARPS, self._chunk // (32 * each)))}


def _logprobs(
    batch: Batch,
    tops: Tensor,
    tokens: Tensor,
    sizes: dict[str, int],
    more: dict[str, Any],
    warps: dict[str, int],
) -> tuple[Tensor, Tensor]:
    logits, rows, chunks = batch.logits, len(batch.settings), sizes["CHUNKS"]
    new = partial(torch.empty, device=logits.device)
    totals = new(rows, chunks, dtype=torch.int64)
    room = rows, chunks, int(logprob_kernels.TOPS.value)
    values, ids = new(room), new(room, dtype=torch.int32)
    found = new(rows, 1 + MAX_LOGPROBS)
    found_ids = new(rows, MAX_LOGPROBS, dtype=torch.int32)
    stride: Any = logits.stride(0)
    logprob_kernels.best_few[(rows, chunks)](
        logits, batch.settings, tops, totals, values, ids, stride, **sizes, **more, **warps
    )
    logprob_kernels.report[(rows,)](
        logits, batch.settings, tops, totals, values, ids, tokens, found, found_ids, stride,
        CHUNKS=chunks, **more, MOST=MAX_LOGPROBS,
    )  # fmt: skip
    return found, found_ids
