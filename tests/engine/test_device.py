"""What the engine uses on a device, and what it does without where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from reft_runtime.edits.triton import TritonEdits
from reft_runtime.engine import core as engine_core
from reft_runtime.engine import device, graphs
from tests.helpers.models import generate, make_core, prompt, request, run, tiny_llama
from tests.helpers.pages import storage_in_pages, tables_for


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        OutOfResources(139520, 101376, "shared memory"),
    ],
)
def test_decode_steps_run_without_graphs_where_these_cannot_be_captured(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[torch.device] = []

    def capture(compute: graphs.Compute) -> graphs.Compute:
        raise error

    monkeypatch.setattr(engine_core, "storage_for", storage_in_pages)
    monkeypatch.setattr(engine_core, "tables_for", tables_for)
    monkeypatch.setattr(graphs, "GraphCapture", lambda: capture)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    model, loaded = tiny_llama()
    with caplog.at_level(logging.WARNING, device.__name__):
        core = make_core()
    assert core.runner.decoder is None
    assert waited == [loaded.device]  # nothing of the graphs is in use when they go
    assert str(error) in caplog.text
    assert run(core, [request("a", prompt(9))])["a"][0] == generate(model, prompt(9), 8)


def test_edits_of_prompts_are_compiled_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[tuple[str, torch.dtype]] = []

    def noting(name: str) -> Callable[..., None]:
        real = getattr(TritonEdits, name)

        def edit(self: TritonEdits, hidden: Tensor, *others: Tensor) -> None:
            launched.append((name, hidden.dtype))
            real(self, hidden, *others)

        return edit

    for name in ("rows", "pieces"):
        monkeypatch.setattr(TritonEdits, name, noting(name))
    monkeypatch.setattr(device, "has_triton", lambda _: True)
    _, loaded = tiny_llama()
    assert device.tables_for(loaded, 2) is not None
    assert launched == [("rows", torch.float32), ("pieces", torch.float32)]


def test_rows_are_edited_without_tables_where_their_kernels_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = OutOfResources(139520, 101376, "shared memory")
    monkeypatch.setattr(TritonEdits, "pieces", Mock(side_effect=error))
    monkeypatch.setattr(device, "has_triton", lambda _: True)
    assert device.tables_for(tiny_llama()[1], 2) is None
    assert str(error) in caplog.text
