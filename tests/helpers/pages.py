"""Storage in pages and graphs of decode steps, as on a device, in the place of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reft_runtime.engine import core
from reft_runtime.engine.blocks import BlockBudget
from reft_runtime.engine.cuda.graphs import Compute, DecodeGraphs, GraphCapture
from reft_runtime.engine.cuda.tables import RANK, EditRows, EditTables, LayerTable
from reft_runtime.engine.kv_pages import PageStorage
from reft_runtime.engine.loader import LoadedModel
from reft_runtime.engine.page_attention import GatheredAttention, PageKernel
from reft_runtime.engine.runner import Runner
from tests.helpers.models import DEVICE


def pages_for(
    loaded: LoadedModel, budget: BlockBudget, max_running: int, kernel: PageKernel | None = None
) -> PageStorage:
    """What `storage_for` gives on a device; without one the reference attends."""
    if kernel is None:
        kernel = triton_attention(loaded) if DEVICE.type == "cuda" else GatheredAttention()
    cache = budget.cache
    return PageStorage(
        loaded.shapes,
        loaded.dtype,
        loaded.device,
        budget.total,
        max_running,
        loaded.max_model_len,
        kernel,
        tuple if cache is None else cache.vacant,
    )


def triton_attention(loaded: LoadedModel) -> PageKernel:
    """The kernel of devices; without one in Triton's interpreter, which takes seconds."""
    from reft_runtime.engine.cuda.attention import Tiles, TritonAttention

    return TritonAttention(loaded.group, 8, Tiles.of(loaded.dtype, 128))


def triton_edit() -> EditRows:
    """See `triton_attention`."""
    from reft_runtime.engine.cuda.operators import edit_rows

    return edit_rows


def again(compute: Compute) -> Compute:
    """A "capture" that computes everything again at each replay."""
    return compute


def plain_edit(rows: Tensor, layer: LayerTable, slots: Tensor, strengths: Tensor) -> None:
    """`EditRows` by torch's own operators."""
    low_rank = torch.einsum("nd,nrd->nr", rows, layer.V[slots]) + layer.b[slots]
    low_rank[torch.arange(RANK, device=rows.device) >= layer.ranks[slots][:, None]] = 0
    rows += strengths[:, None] * torch.einsum("nr,nrd->nd", low_rank, layer.U[slots])


def graphs_for(runner: Runner, max_running: int, edit: EditRows | None = None) -> DecodeGraphs:
    """What `decoder_for` gives on a device; without one nothing is captured."""
    loaded, pages = runner.loaded, runner.storage
    assert isinstance(pages, PageStorage)
    layers, width, device = len(loaded.layers), loaded.hidden_size, loaded.device
    if edit is None:
        edit = triton_edit() if DEVICE.type == "cuda" else plain_edit
    held = EditTables(layers, width, max_running, device, edit)
    capture = GraphCapture() if device.type == "cuda" else again
    return DecodeGraphs(loaded, pages, runner.sites, held, max_running, capture)


@pytest.fixture(scope="module", params=["rows", "pages", "graphs"])
def storages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests over each kind of storage, and with steps that begin ahead."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "rows":
            patch.setattr(core, "storage_for", pages_for)
        if request.param == "graphs":
            patch.setattr(core, "decoder_for", graphs_for)
        yield
