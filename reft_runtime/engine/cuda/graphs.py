"""Decode steps as CUDA graphs: one launch in the place of hundreds.

A graph is captured for each of some numbers of rows; a step takes the next larger one, and rows
without a sequence write to nobody's page. What a step needs lies at fixed addresses, and is copied
there in one piece. There are two sets: the plain one knows no edits at all; the other one edits the
outputs of all layers from `EditTables`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from reft_runtime.engine.cuda.tables import EditTables
from reft_runtime.engine.kv_pages import PageStorage
from reft_runtime.engine.loader import LoadedModel, forward
from reft_runtime.engine.page_attention import PageAttentionStep, PageBatch
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.engine.sites import EditSites

Replay = Callable[[], Tensor]
"""Computes a step from what lies at the fixed addresses; gives logits [rows, vocabulary]."""

_INPUTS = 5
"""Numbers of a row: token, position, place of its key and value, tokens attended, lane."""


def buckets(most: int) -> list[int]:
    """Numbers of rows to capture: close together where rows are few, never over a fifth apart."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size += max(1, 2 ** max(0, size.bit_length() - 3))
    return [*sizes, most]


class DecodeGraphs:
    """The graphs of one model over one storage, for up to `most` rows.

    `capture` turns a function into one that replays what it did.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        storage: PageStorage,
        sites: EditSites,
        tables: EditTables,
        most: int,
        capture: Callable[[Replay], Replay],
    ) -> None:
        self._loaded = loaded
        self._storage = storage
        self._sites = sites
        self._tables = tables
        self._capture = capture
        self._buckets = buckets(most)
        device = loaded.device
        self._inputs = torch.zeros(_INPUTS, most, dtype=torch.long, device=device)
        self._staging = torch.zeros(
            _INPUTS, most, dtype=torch.long, pin_memory=device.type == "cuda"
        )
        self._firsts = torch.arange(most + 1, device=device)
        self._plain: dict[int, Replay] = {}
        self._edited: dict[int, Replay] = {}

    def warm_up(self, *, progress: bool) -> None:
        """Capture the plain set, the largest first, whose memory the others use."""
        for rows in tqdm(self._buckets[::-1], desc="CUDA graphs", disable=not progress):
            self._graph(rows, edited=False)

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """See `Decoder.logits`; it cannot do what the tables cannot hold, or what is traced."""
        if len(chunks) > self._buckets[-1] or not all(map(_decodes, chunks)):
            return None
        edited = None
        if any(chunk.sequence.edits_decode for chunk in chunks):
            edited = self._tables.slots_of(chunks)
            if edited is None:
                return None
        count = len(chunks)
        bucket = next(size for size in self._buckets if size >= count)
        spare = bucket - count
        rows = [self._row(chunk) for chunk in chunks]
        rows += [(0, 0, 0, 1, self._storage.spare_lane)] * spare
        self._staging[:, :bucket] = torch.tensor(rows).T
        self._inputs.copy_(self._staging, non_blocking=True)
        if edited is not None:
            self._tables.choose([*edited, *[(0, 0.0)] * spare])
        return self._graph(bucket, edited=edited is not None)()[:count]

    def _row(self, chunk: Chunk) -> tuple[int, ...]:
        row = self._storage.row(chunk)
        token = chunk.sequence.tokens[chunk.start]
        return token, chunk.start, row.slots[0], row.stop, row.lane

    def _graph(self, rows: int, *, edited: bool) -> Replay:
        kept = self._edited if edited else self._plain
        if rows not in kept:
            kept[rows] = self._capture(lambda: self._compute(rows, edited=edited))
        return kept[rows]

    def _compute(self, rows: int, *, edited: bool) -> Tensor:
        ids, positions, slots, stops, lanes = self._inputs[:, :rows].unbind()
        batch = PageBatch(
            decodes=rows,
            slots=slots,
            firsts=self._firsts[: rows + 1],
            stops=stops,
            lanes=lanes,
            tables=self._storage.tables,
            blocks=self._firsts[:0].view(0, 2),
        )
        step = PageAttentionStep(
            self._storage.keys, self._storage.values, batch, self._storage.kernel
        )
        with self._sites.hooked(self._tables) if edited else nullcontext():
            logits: Tensor = forward(self._loaded.model, ids, positions, self._firsts[:rows], step)
        return logits


def _decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one generated token, or one token that nothing edits; and not traced."""
    request = chunk.sequence.request
    return chunk.length == 1 and (
        not request.interventions
        or (chunk.start >= chunk.sequence.prompt_length and not request.trace)
    )


class GraphCapture:
    """Captures functions as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Replay) -> Replay:
        """Run a function until nothing in it is new (compiled, allocated), then capture it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self._pool):
            out = compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
