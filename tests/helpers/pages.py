"""Storage in pages, as on a device, in the place of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reft_runtime.engine import core
from reft_runtime.engine.blocks import BlockBudget
from reft_runtime.engine.kv_pages import PageStorage
from reft_runtime.engine.loader import LoadedModel
from reft_runtime.engine.page_attention import GatheredAttention, PageKernel


def pages_for(
    loaded: LoadedModel, budget: BlockBudget, max_running: int, kernel: PageKernel | None = None
) -> PageStorage:
    """What `storage_for` gives on a device."""
    cache = budget.cache
    return PageStorage(
        loaded.shapes,
        loaded.dtype,
        loaded.device,
        budget.total,
        max_running,
        loaded.max_model_len,
        kernel or GatheredAttention(),
        tuple if cache is None else cache.vacant,
    )


@pytest.fixture(scope="module", params=["rows", "pages"])
def storages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests over each kind of storage."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pages":
            patch.setattr(core, "storage_for", pages_for)
        yield
