"""Decode steps as CUDA graphs: one launch instead of hundreds.

Graphs are captured for several numbers of rows. A step uses the smallest graph that is large
enough, and the graph's rows without a sequence write to nobody's page. A step's inputs lie at fixed
addresses and are copied there in one piece. There are two sets of graphs: the plain one has no
edits; the other edits the outputs of all layers from `EditTables`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.edits.editors import FixedRows
from reft_runtime.edits.sites import EditSites
from reft_runtime.edits.tables import EditTables
from reft_runtime.kernels.cuda.products import FEW_ROWS
from reft_runtime.kernels.staging import send
from reft_runtime.kv.page_attention import PageAttentionStep, PageBatch, RowInPages
from reft_runtime.kv.pages import PageStorage
from reft_runtime.progress import bar
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.plan import Chunk

Compute = Callable[[], None]
"""Computes a step: its inputs and its logits lie at fixed addresses."""

_NOBODY = (0, 0, 0, 1)
"""Token, position, address of key and value, and tokens attended of a row without a sequence."""


def buckets(most: int) -> list[int]:
    """Numbers of rows to capture graphs for; from 4 on each is at most a quarter above the last."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size += 2 ** max(0, size.bit_length() - 3)
    return [*sizes, most]


class DecodeGraphs:
    """The graphs of one model over one storage, for up to `most` rows.

    `capture` turns a function into one that replays its work on the device.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        storage: PageStorage,
        sites: EditSites,
        tables: EditTables,
        most: int,
        capture: Callable[[Compute], Compute],
    ) -> None:
        self._loaded = loaded
        self._storage = storage
        self._sites = sites
        self._edits = FixedRows(tables, len(loaded.layers), most)
        self._capture = capture
        self._buckets = buckets(most)
        device = loaded.device
        nobody = torch.tensor([*_NOBODY, storage.spare_lane])
        self._inputs = nobody[:, None].repeat(1, most).to(device)
        self._firsts = torch.arange(most + 1, device=device)
        self._logits = torch.empty(most, loaded.vocab_size, dtype=loaded.dtype, device=device)
        self._graphs: dict[tuple[int, bool], Compute] = {}

    @torch.inference_mode()
    def warm_up(self, *, progress: bool) -> None:
        """Compile the kernels of prompts, and capture both sets of graphs, the largest first."""
        for length in (2, 2 * FEW_ROWS):
            length = min(length, self._loaded.max_model_len)
            some = torch.arange(length, device=self._inputs.device) % BLOCK_TOKENS
            row = RowInPages(0, some.tolist(), self._storage.spare_lane)
            batch = PageBatch.of([row], self._storage.tables, self._storage.kernel.query_block)
            forward(self._loaded.model, some, some, some[:1], self._step(batch))
        wanted = [(rows, edited) for rows in self._buckets[::-1] for edited in (False, True)]
        for rows, edited in bar(wanted, desc="CUDA graphs", disable=not progress):
            self._graph(rows, edited=edited)

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk], tokens: Tensor | None = None) -> Tensor | None:
        """See `Decoder.logits`.

        Returns None if there are more rows than the largest graph has, if a request with edits is
        traced, or if the tables cannot hold its edits.
        """
        count = len(chunks)
        if count > self._buckets[-1] or not all(map(_decodes, chunks)):
            return None
        edited = None
        if any(chunk.sequence.decode_edits for chunk in chunks):
            edited = self._edits.entries_of(chunks)
            if edited is None:
                return None
        bucket = next(size for size in self._buckets if size >= count)
        ids = [0 if tokens is not None else c.sequence.tokens[c.start] for c in chunks]
        addresses, lanes = zip(*map(self._storage.address, chunks), strict=True)
        used = (ids, [c.start for c in chunks], addresses, [c.stop for c in chunks], lanes)
        nobody = (*_NOBODY, self._storage.spare_lane)
        rows = [
            [*numbers, *[no] * (bucket - count)] for numbers, no in zip(used, nobody, strict=True)
        ]
        self._inputs[:, :bucket] = send(torch.tensor(rows), self._inputs.device)
        if tokens is not None:
            self._inputs[0, :count] = tokens.clamp(min=0)
        if edited is not None:
            self._edits.choose([*edited, *[(0, 0.0)] * (bucket - count)])
        self._graph(bucket, edited=edited is not None)()
        return self._logits[:count]

    def _graph(self, rows: int, *, edited: bool) -> Compute:
        if (rows, edited) not in self._graphs:
            graph = self._capture(lambda: self._compute(rows, edited=edited))
            self._graphs[rows, edited] = graph
        return self._graphs[rows, edited]

    def _compute(self, rows: int, *, edited: bool) -> None:
        ids, positions, addresses, stops, lanes = self._inputs[:, :rows].unbind()
        batch = PageBatch(
            decodes=rows,
            addresses=addresses,
            firsts=self._firsts[: rows + 1],
            stops=stops,
            lanes=lanes,
            tables=self._storage.tables,
            blocks=self._firsts[:0].view(0, 2),
        )
        with self._sites.hooked(self._edits) if edited else nullcontext():
            logits = forward(
                self._loaded.model, ids, positions, self._firsts[:rows], self._step(batch)
            )
        self._logits[:rows] = logits

    def _step(self, batch: PageBatch) -> PageAttentionStep:
        storage = self._storage
        return PageAttentionStep(storage.keys, storage.values, batch, storage.kernel)


def _decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one token without interventions, or one generated, untraced token."""
    request = chunk.sequence.request
    return chunk.length == 1 and (
        not request.interventions
        or (chunk.start >= chunk.sequence.prompt_length and not request.trace)
    )


class GraphCapture:
    """Captures functions as CUDA graphs, on one stream and in one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, compute: Compute) -> Compute:
        """Run a function until it compiles and allocates nothing new, then capture it.

        Returns a function that replays it.

        Raises RuntimeError if the function waits for the device: that cannot be captured. The
        current stream is the same as before then, and waits for what was begun.
        """
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), torch.inference_mode():
                compute()
                compute()
        finally:
            here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with torch.inference_mode(), captured:
                compute()
        finally:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own
        return graph.replay
