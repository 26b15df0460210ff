"""Two ranks of a tiny model for many tests, and the same model in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reft_runtime.base.ranks import smallest
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.sizing import Limits
from reft_runtime.loading.loader import load_model
from reft_runtime.parallel.ranks import Ranks
from tests.helpers.models import MAX_LENGTH, tiny

CONFIG = EngineConfig(max_running=8, max_step_tokens=24, kv_tokens=2 * (MAX_LENGTH + 16))
"""Prompts are computed in several chunks, and a few long answers fill the memory."""


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineCore, EngineCore]]:
    """A core over two ranks, and one by itself, of the same weights; their clocks stand still."""
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(folder)
    ranks = Ranks(
        folder,
        2,
        Limits(None, CONFIG.max_running, CONFIG.max_step_tokens, CONFIG.kv_tokens),
        device="cpu",
        dtype="float32",
    )
    try:
        loaded = load_model(str(folder), "float32", ranks=2)
        assert smallest(CONFIG.kv_tokens, loaded.device) == CONFIG.kv_tokens
        core = EngineCore(loaded, CONFIG, lambda: 0.0, ranks.leader)
        alone = EngineCore(load_model(str(folder), "float32"), CONFIG, lambda: 0.0)
        yield core, alone
        assert core.idle
        core.check_integrity()
        assert ranks.leader.lost() is None
    finally:
        ranks.close()
