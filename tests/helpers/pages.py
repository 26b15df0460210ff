"""Storage in pages and graphs of decode steps, as on a device, in the place of rows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from warnings import catch_warnings, simplefilter

import pytest
import torch
from torch import Tensor

from reft_runtime.base.model import LoadedModel
from reft_runtime.edits.tables import PIECE_RANKS, PIECE_ROWS, EditTables, RowEdits
from reft_runtime.engine import core
from reft_runtime.engine.device_sampler import DeviceSampler
from reft_runtime.engine.graphs import Compute, DecodeGraphs, GraphCapture
from reft_runtime.engine.runner import Runner
from reft_runtime.kv.choice import Places, with_states
from reft_runtime.kv.page_attention import GatheredAttention, PageKernel
from reft_runtime.kv.pages import PageStorage
from reft_runtime.kv.storage import KVStorage
from reft_runtime.schedule.budget import BlockBudget
from tests.helpers.models import DEVICE
from tests.helpers.sampling import plain_select, triton_select


def pages_for(
    loaded: LoadedModel,
    budget: BlockBudget,
    max_running: int,
    places: Places | None,
    kernel: PageKernel | None = None,
) -> PageStorage:
    """What `storage_for` gives on a device; without one the reference attends."""
    if kernel is None:
        kernel = triton_attention(loaded) if DEVICE.type == "cuda" else GatheredAttention()
    return PageStorage(
        loaded.shapes,
        loaded.dtype,
        loaded.device,
        budget.total,
        max_running,
        loaded.max_model_len,
        kernel,
        tuple if places is None else places.vacant,
    )


def storage_in_pages(
    loaded: LoadedModel, budget: BlockBudget, max_running: int, places: Places | None
) -> KVStorage:
    """As `pages_for`, with recurrent states where the model has them."""
    storage = pages_for(loaded, budget, max_running, places)
    return with_states(storage, loaded, budget, max_running)


def triton_attention(loaded: LoadedModel) -> PageKernel:
    """The kernel of devices; without one in Triton's interpreter, which takes seconds."""
    from reft_runtime.kv.triton_attention import Tiles, TritonAttention

    tiles = Tiles.of(loaded.dtype, 128)
    assert tiles is not None
    return TritonAttention(loaded.group, 8, tiles)


def triton_edits() -> RowEdits:
    """See `triton_attention`."""
    from reft_runtime.edits.triton import TritonEdits

    return TritonEdits()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where something in the `with` block waits for a CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    with catch_warnings():
        simplefilter("ignore")  # torch warns that its debug mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def again(compute: Compute) -> Compute:
    """A "capture" that computes everything again at each replay."""
    return compute


class PlainEdits:
    """`RowEdits` by torch's own operators, of tables on the CPU.

    A device edits the rows of a call at once, in any order: none may be edited twice.
    """

    def rows(
        self, hidden: Tensor, index: Tensor, places: Tensor, entries: Tensor, strengths: Tensor
    ) -> None:
        width = hidden.shape[1]

        def at(address: int, *shape: int) -> Tensor:
            numbers = math.prod(shape)
            memory = (ctypes.c_float * numbers).from_address(address)
            return torch.frombuffer(memory, dtype=torch.float32, count=numbers).view(shape)

        _at_once(index, places[entries])
        for row, entry, strength in zip(index, entries, strengths, strict=True):
            V, U, b, offset, rank = places[entry].tolist()
            old, change = hidden[row].float(), torch.zeros(width)
            if rank:
                change += (at(V, rank, width) @ old + at(b, rank)) @ at(U, rank, width)
            if offset > 0:
                change += at(offset, width)
            hidden[row] = (old + strength * change).to(hidden.dtype)

    def pieces(
        self,
        hidden: Tensor,
        index: Tensor,
        pieces: Tensor,
        places: Tensor,
        entries: Tensor,
        strengths: Tensor,
    ) -> None:
        _at_once(index, places[entries])
        for first, count in pieces.tolist():
            own = slice(first, first + count)
            assert len(set(entries[own].tolist())) == len(set(strengths[own].tolist())) == 1
            assert count <= PIECE_ROWS
            assert places[entries[own], -1].max() <= PIECE_RANKS
            self.rows(hidden, index[own], places, entries[own], strengths[own])


def _at_once(index: Tensor, places: Tensor) -> None:
    changed = index[(places[:, -1] > 0) | (places[:, 3] > 0)].tolist()
    assert len(changed) == len(set(changed)), changed


def tables_for(
    loaded: LoadedModel, max_running: int, edit: RowEdits | None = None, budget: int = 1 << 30
) -> EditTables:
    """What the engine's `tables_for` gives on a device."""
    if edit is None:
        edit = triton_edits() if DEVICE.type == "cuda" else PlainEdits()
    return EditTables(len(loaded.layers), loaded.hidden_size, budget, loaded.device, edit)


def graphs_for(runner: Runner, max_running: int) -> DecodeGraphs:
    """What `decoder_for` gives on a device; without one nothing is captured."""
    loaded, pages, tables = runner.loaded, runner.storage, runner.tables
    assert isinstance(pages, PageStorage)
    assert tables is not None
    capture = GraphCapture() if loaded.device.type == "cuda" else again
    return DecodeGraphs(loaded, pages, runner.sites, tables, max_running, capture)


def decoder_for(runner: Runner, max_running: int) -> DecodeGraphs | None:
    """`graphs_for` where keys and values lie in pages alone."""
    return graphs_for(runner, max_running) if isinstance(runner.storage, PageStorage) else None


def sampler_for(loaded: LoadedModel, max_running: int) -> DeviceSampler:
    """What `device.sampler_for` gives on a device; without one torch's operators pick."""
    select = triton_select() if DEVICE.type == "cuda" else plain_select
    return DeviceSampler(loaded.vocab_size, max_running, loaded.eos_ids, loaded.device, select)


@pytest.fixture(scope="module", params=["rows", "pages", "graphs"])
def storages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests over each kind of storage, and with steps that begin ahead."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "rows":
            patch.setattr(core, "storage_for", storage_in_pages)
        if request.param == "graphs":
            patch.setattr(core, "tables_for", tables_for)
            patch.setattr(core, "sampler_for", sampler_for)
            patch.setattr(core, "decoder_for", decoder_for)
        yield
