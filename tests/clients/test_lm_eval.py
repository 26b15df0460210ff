"""lm-evaluation-harness, `local-completions`: tasks on rows of ours, its numbers transformers' own.

Tokens come from the server (`/tokenizer_info`), so that nothing is fetched from a hub.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate

from tests.clients.asked import BASE
from tests.clients.conftest import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]  # it warns of its own

ROWS = ROOT / "tests/fixtures/reviews.jsonl"
LABELS = [" positive", " negative"]
MAX_TOKENS = 12


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def task(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    """A task as a YAML file says it, on the rows of a file."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(ROWS)}, "cache_dir": str(folder)},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        **fields,
    }


def scores(folder: Path) -> dict[str, Any]:
    """Which label is the likelier one."""
    return task(
        folder,
        "scores",
        output_type="multiple_choice",
        doc_to_choice=LABELS,
        doc_to_target="{{label}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )


def answers(folder: Path) -> dict[str, Any]:
    """The first line that is written."""
    return task(
        folder,
        "answers",
        output_type="generate_until",
        doc_to_target="{{label}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )


def evaluate(base_url: str, model: str, tasks: list[dict[str, Any]], limit: int) -> Any:
    return simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"{base_url}/completions",
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=tasks,
        limit=limit,
        bootstrap_iters=0,
    )


def test_the_base_gives_transformers_numbers(
    base_url: str, server_python: str, tmp_path: Path
) -> None:
    found = evaluate(base_url, BASE, [scores(tmp_path), answers(tmp_path)], 10)
    samples = found["samples"]
    job: dict[str, Any] = {
        "pairs": [
            list(arguments) for sample in samples["scores"] for arguments in sample["arguments"]
        ],
        "prompts": [sample["arguments"][0][0] for sample in samples["answers"]],
        "max_tokens": MAX_TOKENS,
    }
    assert len(job["pairs"]) == 20
    command = [server_python, "-m", "tests.clients.reference"]
    said = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=True, cwd=ROOT
    )
    reference = json.loads(said.stdout)
    measured = [response for sample in samples["scores"] for response in sample["filtered_resps"]]
    for (ours, greedy), (theirs, best) in zip(measured, reference["loglikelihoods"], strict=True):
        assert float(ours) == pytest.approx(theirs, abs=1e-3)
        assert str(greedy) == str(best)
    written = [sample["filtered_resps"][0] for sample in samples["answers"]]
    assert written == [text.split("\n")[0] for text in reference["texts"]]


def test_an_intervention(base_url: str, tmp_path: Path) -> None:
    found = evaluate(base_url, "sentiment", [scores(tmp_path), answers(tmp_path)], 24)
    assert found["results"]["scores"]["acc,none"] > 0.9
    written = [sample["filtered_resps"][0] for sample in found["samples"]["answers"]]
    assert set(written) == set(LABELS)
