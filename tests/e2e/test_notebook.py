"""The notebook runs from any folder, whether or not its environment is active."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.e2e.test_readme import outside
from tests.helpers.documents import ROOT

NOTEBOOK = ROOT / "docs/train-and-serve.ipynb"


def executed(notebook: NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What all cells print and show, run in a folder."""
    monkeypatch.setenv("PATH", outside()["PATH"])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-any-return,no-untyped-call]


def test_it_runs(notebook: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [cell] = [cell for cell in notebook.cells if "steps = None" in cell.source]
    cell.source = cell.source.replace("steps = None", "steps = 2")
    [cell] = [cell for cell in notebook.cells if "steps=steps" in cell.source]
    cell.source = cell.source.replace("steps=steps", "steps=steps, batch_size=4")
    [cell] = [cell for cell in notebook.cells if "tickets-test.csv" in cell.source]
    cell.source = cell.source.replace('tickets.csv"', 'tickets.csv", nrows=40')
    cell.source = cell.source.replace('tickets-test.csv"', 'tickets-test.csv", nrows=12')
    [cell] = [cell for cell in notebook.cells if "max_tokens=48" in cell.source]
    cell.source = cell.source.replace("max_tokens=48", "max_tokens=4")
    printed = executed(notebook, tmp_path, monkeypatch)
    assert "Serving at" in printed
    assert "accuracy" in printed


@pytest.mark.long
def test_as_written(
    notebook: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "'account'" in executed(notebook, tmp_path, monkeypatch)
