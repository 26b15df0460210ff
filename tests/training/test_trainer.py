"""What is relied on of transformers' Trainer, without a word of its documentation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.trainer import EditTrainer, arguments

CALLED: dict[str, tuple[Any, ...]] = {
    "_save_checkpoint": ("model", None),
    "_evaluate": (None, None),
    "_determine_best_metric": ({}, None),
}
"""Private methods that are called, with the arguments that they get."""

OVERRIDDEN = {"_get_train_sampler", "_run_epoch", "_maybe_log_save_evaluate"}


@pytest.mark.parametrize("name", CALLED)
def test_private_methods_take_what_they_are_given(name: str) -> None:
    inspect.signature(getattr(Trainer, name)).bind(None, *CALLED[name])


def test_private_methods_are_overridden_where_the_trainer_calls_them() -> None:
    """Where one is renamed ours would never be called, and nothing would say so."""
    ours = {name for name in vars(EditTrainer) if name.startswith("_") and hasattr(Trainer, name)}
    assert {name for name in ours if not name.startswith("__")} == OVERRIDDEN
    source = inspect.getsource(Trainer)
    for name in OVERRIDDEN:
        assert f"self.{name}" in source, name


def test_one_process_uses_one_device(tmp_path: Path) -> None:
    """`_n_gpu` is what `n_gpu` gives."""
    settings = TrainSettings(steps=1, batch_size=1)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = arguments(settings, tmp_path, 1, evaluates=False, device=place, progress=False)
    assert args.n_gpu <= 1
    many = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert many.n_gpu == 0
    many._n_gpu = 3
    assert many.n_gpu == 3
