"""What a CUDA device's memory has room for, by made-up numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reft_runtime.edits.step import MOVED_BYTES
from reft_runtime.edits.tables import table_bytes
from reft_runtime.engine import kv_budget as budgets
from reft_runtime.engine.device_sampler import sampling_bytes
from reft_runtime.engine.kv_budget import DEVICE_MARGIN, kv_budget, step_bytes
from reft_runtime.errors import ConfigError

GIB = 1 << 30
ROWS, STEP, VOCABULARY, LONGEST = 256, 8192, 32_000, 4096


def model(width: int, *, layers: int = 32, vocabulary: int = VOCABULARY) -> Any:
    """As much of a `LoadedModel` as its budget depends on."""
    return SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(intermediate_size=3 * width)),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        layers=(None,) * layers,
        hidden_size=width,
        vocab_size=vocabulary,
        max_model_len=LONGEST,
        kv_bytes_per_token=4 * width * layers,
        state_bytes=0,
        ranks=1,
    )


def reserve(loaded: Any, free: int, max_step_tokens: int) -> float:
    """What is left of nine tenths of the free memory beside keys and values."""
    tokens = kv_budget(loaded, ROWS, max_step_tokens, None)
    assert LONGEST < tokens < ROWS * LONGEST
    taken: int = tokens * loaded.kv_bytes_per_token
    return 0.9 * free - taken


@pytest.fixture(params=[60 * GIB])
def free(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(budgets, "free_memory", lambda _: request.param)
    size: int = request.param
    return size


@pytest.mark.parametrize("width", [1024, 4096, 8192])
def test_the_largest_step_has_room(free: int, width: int) -> None:
    loaded = model(width)
    held = sampling_bytes(VOCABULARY, ROWS) + table_bytes(len(loaded.layers), width, ROWS)
    # Its activations, rows of logits, and the edits that are moved there beside the tables.
    step = STEP * (3 * 3 * width + 8 * width) * 2 + (ROWS + 512) * VOCABULARY * (2 + 4 + 4)
    assert step_bytes(loaded, ROWS, STEP) == step
    wanted = held + max(DEVICE_MARGIN, step + MOVED_BYTES)
    assert reserve(loaded, free, STEP) == pytest.approx(wanted, abs=loaded.kv_bytes_per_token)


def test_the_widest_of_the_layers_counts() -> None:
    """Gemma 3n's configuration lists the widths of its layers."""
    loaded, same = model(1024), model(1024)
    loaded.model.config.intermediate_size = [1024, 3 * 1024, 2 * 1024]
    assert step_bytes(loaded, ROWS, STEP) == step_bytes(same, ROWS, STEP)


def test_longer_steps_leave_less_for_keys_and_values(free: int) -> None:
    loaded = model(4096)
    short, long = reserve(loaded, free, 8192), reserve(loaded, free, 32_768)
    assert long - short == pytest.approx(24_576 * 17 * 4096 * 2, abs=loaded.kv_bytes_per_token)


def test_more_tokens_than_a_device_has_room_for_are_refused(free: int) -> None:
    loaded = model(4096)
    fits = kv_budget(loaded, ROWS, STEP, None)
    assert kv_budget(loaded, ROWS, STEP, fits) == fits
    # Whoever names a number may leave less to steps, but not what is not there.
    assert kv_budget(loaded, ROWS, STEP, fits + 1000) == fits + 1000
    with pytest.raises(ConfigError, match=rf"^kv_tokens: .*There is room for {fits} ") as refused:
        kv_budget(loaded, ROWS, STEP, 2 * fits)
    assert refused.value.param == "kv_tokens"


@pytest.mark.parametrize("free", [4 * GIB], indirect=True)
@pytest.mark.parametrize("wanted", [None, 10_000])
def test_a_device_with_too_little_room_is_refused(free: int, wanted: int | None) -> None:
    with pytest.raises(ConfigError, match=r"^device: after the model 4\.0 GiB") as refused:
        kv_budget(model(4096), ROWS, STEP, wanted)
    assert refused.value.param == "device"
