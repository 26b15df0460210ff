from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipes import RECIPES
from reft_runtime.interventions import BaseShape, Registry, parse, serialise

ROOT = Path(__file__).parents[2]
CASES: dict[str, list[dict[str, Any]]] = json.loads(
    (ROOT / "tests/fixtures/pyreft_reference.json").read_text()
)
DEMO = BaseShape(
    model="SmolLM2-135M-Instruct",
    architecture="LlamaForCausalLM",
    hidden_size=576,
    num_layers=30,
    vocab_size=49152,
)


def test_every_shipped_file_is_served() -> None:
    registry = Registry(DEMO, [ROOT / "interventions"])
    assert registry.problems() == {}
    names = {entry.name for entry in registry.entries()}
    assert names == {*RECIPES, "cheerful", "emoji", "pirate"}
    table = (ROOT / "interventions" / "README.md").read_text()
    for name in names:
        assert f"| `{name}` |" in table
        assert (ROOT / "interventions" / f"{name}.safetensors").stat().st_size <= 300_000


def test_the_classifiers_name_their_labels() -> None:
    found = {
        path.stem: parse(path.read_bytes()).manifest.labels
        for path in (ROOT / "interventions").glob("*.safetensors")
    }
    assert {name: labels for name, labels in found.items() if labels is not None} == {
        "sentiment": ("negative", "positive"),
        "question-type": (
            *("abbreviation", "description", "entity"),
            *("location", "number", "person"),
        ),
        "yes-no": ("false", "true"),
    }


@pytest.mark.parametrize("name", CASES)
def test_shipped_files_keep_their_digest_when_written_again(name: str) -> None:
    data = (ROOT / "interventions" / f"{name}.safetensors").read_bytes()
    assert serialise(parse(data)) == data


@pytest.mark.parametrize(
    ("name", "layers", "rank"), [("emoji", [8, 16, 24], 4), ("pirate", [6, 12, 18, 24], 8)]
)
def test_shipped_edits_are_pyrefts(name: str, layers: list[int], rank: int) -> None:
    version = Registry(DEMO, [ROOT / "interventions"]).resolve(name)
    edits = version.edits()
    assert [edit.layer for edit in edits] == layers
    assert {edit.rank for edit in edits} == {rank}
    template = version.manifest.template
    assert template is not None
    before, after = template.split("{prompt}")
    for case in CASES[name]:
        assert case["prompt"].startswith(before)
        assert case["prompt"].endswith(after)
        n = len(case["prompt_tokens"])
        assert [edit.positions.offsets(n, 0, n) for edit in edits] == case["unit_locations"]
