"""What the engine uses on a device, and what it does without where that fails."""

from __future__ import annotations

import logging

import pytest
import torch
from triton.runtime.errors import OutOfResources

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
