"""What is said of a training, and what its file's manifest says of it."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers
from pydantic import JsonValue
from transformers import TrainerState

from reft_runtime.training.callbacks import evaluations_since_best
from reft_runtime.training.prompts import Example
from reft_runtime.training.rows import Rows
from reft_runtime.training.settings import CHECKS, TrainSettings
from reft_runtime.training.trainable import TrainableEdits
from reft_runtime.training.wording import counted
from reft_runtime.version import VERSION


def extent_of(examples: Sequence[Example], edits: TrainableEdits, settings: TrainSettings) -> str:
    """The size of a training in words: tokens, trained parameters, passes or steps."""
    tokens = sum(len(example.tokens) for example in examples)
    parameters = sum(parameter.numel() for parameter in edits.parameters())
    length = (
        counted(settings.epochs, "pass")
        if settings.epochs
        else counted(settings.steps or 0, "step")
    )
    return f"{counted(tokens, 'token')}, {counted(parameters, 'trained parameter')}, {length}"


def taken_of(state: TrainerState) -> str:
    """Which step's edits were taken, and why none of a later one, in words."""
    best = f"step {state.best_global_step} of {state.max_steps} is taken"
    if state.global_step == state.max_steps:
        return f"{best}, the best of those that were evaluated"
    worse = counted(evaluations_since_best(state), "evaluation")
    return f"stopped at step {state.global_step}, after {worse} without an improvement; {best}"


def about(
    rows: Rows, held_out: Rows | None, settings: TrainSettings, dtype: str
) -> dict[str, JsonValue]:
    """How an intervention is trained, for its manifest; what differs is another training."""
    chosen = {name: value for name, value in asdict(settings).items() if value is not None}
    found: dict[str, JsonValue] = {
        **chosen,
        "layers": list(settings.layers or ()),
        "dtype": dtype,
        "data": rows.name,
        "data_sha256": rows.sha256,
        "rows": len(rows.rows),
        "versions": {
            "reft-server": VERSION,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if held_out is not None:
        found["eval"] = held_out.name
        found["eval_sha256"] = held_out.sha256
        found["eval_rows"] = len(held_out.rows)
    return found


def metrics_of(state: TrainerState) -> dict[str, JsonValue]:
    """Figures of the evaluation of the checkpoint that was taken."""
    best = state.best_global_step
    for entry in state.log_history:
        if entry["step"] == best and "eval_loss" in entry:
            names = ("accuracy", "loss", "perplexity")
            found = {name: entry.get(f"eval_{name}") for name in names}
            return {name: round(value, 6) for name, value in found.items() if value is not None}
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    last = losses[-math.ceil(len(losses) / CHECKS) :]
    return {"train_loss": round(statistics.fmean(last), 6)} if last else {}
