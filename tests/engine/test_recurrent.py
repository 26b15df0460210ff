"""Models with recurrent layers: the tokens of `model.generate`, and nobody else's state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.engine import core as engine
from reft_runtime.engine import kv_budget, runner
from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.device import active
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.errors import ConfigError
from reft_runtime.kv.hybrid import HybridStorage
from reft_runtime.kv.states import StateStorage
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import (
    RECURRENT,
    Answer,
    answers,
    applied,
    finish,
    generate,
    generate_edited,
    loreft,
    make_core,
    preempt,
    prompt,
    request,
    run,
    step,
    tiny,
)
from tests.helpers.pages import storage_in_pages

LENGTHS = (1, 2, 5, 19, 24)
NEW_TOKENS = 8

ONE = "qwen3_5_text"
"""The model of tests whose subject is the same for all."""

EACH = (ONE, "mamba2", "jamba", "lfm2")
"""One for each kind of recurrent layers."""


@cache
def pair(model_type: str) -> tuple[PreTrainedModel, LoadedModel]:
    """A model, and the same as the engine runs it."""
    model = tiny(model_type)
    return model, adopt_model(copy.deepcopy(model))


@cache
def wanted(model_type: str) -> list[list[int]]:
    """The model's own answers to prompts of `LENGTHS`."""
    return [generate(pair(model_type)[0], prompt(length), NEW_TOKENS) for length in LENGTHS]


def asked(*lengths: int, **sampling: Any) -> list[Any]:
    return [request(str(n), prompt(n), **{"max_tokens": NEW_TOKENS, **sampling}) for n in lengths]


def states(core: EngineCore) -> StateStorage:
    storage = core.runner.storage
    assert isinstance(storage, HybridStorage)
    return storage.states


@pytest.mark.parametrize(
    ("model_type", "max_step_tokens"),
    [*product(RECURRENT, (512, 3)), *product(EACH, (7, 1))],
    ids=lambda value: value if isinstance(value, str) else f"step{value}",
)
def test_a_mixed_batch_gives_the_tokens_of_generate(model_type: str, max_step_tokens: int) -> None:
    assert len({token for tokens in wanted(model_type) for token in tokens}) > len(LENGTHS)
    places = min(len(LENGTHS), max_step_tokens)
    core = make_core(
        pair(model_type)[1], max_running=places, max_step_tokens=max_step_tokens, prefix_cache=False
    )
    got = run(core, asked(*LENGTHS))
    assert [got[str(n)][0] for n in LENGTHS] == wanted(model_type)


@pytest.mark.parametrize("model_type", [ONE, "falcon_h1", "mamba2"])
@pytest.mark.parametrize("max_step_tokens", [512, 3])
def test_in_pages_as_on_a_device(
    monkeypatch: pytest.MonkeyPatch, model_type: str, max_step_tokens: int
) -> None:
    monkeypatch.setattr(engine, "storage_for", storage_in_pages)
    core = make_core(
        pair(model_type)[1], max_running=3, max_step_tokens=max_step_tokens, prefix_cache=False
    )
    got = run(core, asked(*LENGTHS, n=2))
    for n, tokens in zip(LENGTHS, wanted(model_type), strict=True):
        assert got[str(n)] == dict.fromkeys(range(2), tokens)


@pytest.mark.parametrize("model_type", RECURRENT)
def test_alone_after_preemption_and_several_choices(model_type: str) -> None:
    _, loaded = pair(model_type)
    core = make_core(loaded, prefix_cache=False)
    alone = [run(core, asked(n))[str(n)][0] for n in LENGTHS]
    assert alone == wanted(model_type)
    found: dict[str, Answer] = {}
    for each in asked(*LENGTHS, n=3):
        core.add(each)
    for turn in range(12):
        step(core, found)
        if core.scheduler.running and turn % 3 == 2:
            preempt(core, core.scheduler.running[turn % len(core.scheduler.running)])
    finish(core, found)
    for n, tokens in zip(LENGTHS, wanted(model_type), strict=True):
        assert found[str(n)].tokens == dict.fromkeys(range(3), tokens)
    assert core.scheduler.preemptions


@pytest.mark.parametrize("model_type", RECURRENT)
def test_edits_at_block_outputs_are_those_of_plain_hooks(model_type: str) -> None:
    model, loaded = pair(model_type)
    layers: Any = model.get_decoder().layers  # type: ignore[no-untyped-call]
    edits = [loreft(layer, "f2+l2", seed=layer) for layer in range(2)]
    requests = [
        request(str(n), prompt(n), *([applied(*edits)] if n % 2 else []), max_tokens=4)
        for n in LENGTHS
    ]
    got = run(make_core(loaded, max_step_tokens=16, prefix_cache=False), requests)
    for n in LENGTHS:
        used = [(edit, 1.0) for edit in edits] if n % 2 else []
        assert got[str(n)][0] == generate_edited(model, layers, prompt(n), used, 4), n


@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_warm_cache_changes_no_token(model_type: str) -> None:
    model, loaded = pair(model_type)
    core = make_core(loaded)
    begin = prompt(70)
    texts = {f"{n}": (*begin, *prompt(n)) for n in (1, 5, 19)}
    for _ in range(2):
        for name, text in texts.items():
            got = run(core, [request(name, text, max_tokens=4)])
            assert got[name][0] == generate(model, text, 4), name
    assert core.scheduler.snapshots is not None
    assert core.scheduler.snapshots.stats().hits


def poison(storage: StateStorage) -> None:
    """Fill the slots that nobody has with values that spoil whatever reads them."""
    first = len(storage._order)
    with torch.inference_mode():
        for mixer in storage.states:
            for tensor in mixer.values():
                tensor[first:].fill_(torch.nan if tensor.is_floating_point() else -1)


@pytest.mark.parametrize("model_type", RECURRENT)
def test_what_a_freed_slot_held_is_never_read(model_type: str) -> None:
    core = make_core(pair(model_type)[1], max_running=3, prefix_cache=False)
    found: dict[str, Answer] = {}
    for each in asked(*LENGTHS):
        core.add(each)
    while not core.idle:
        poison(states(core))
        step(core, found)
    assert [found[str(n)].tokens[0] for n in LENGTHS] == wanted(model_type)


def test_a_fault_reaches_nobody_else() -> None:
    _, loaded = pair(ONE)
    core = make_core(loaded, prefix_cache=False)
    found: dict[str, Answer] = {}
    for each in asked(*LENGTHS):
        core.add(each)
    for _ in range(3):
        step(core, found)
    storage = states(core)
    victim = next(s for s in core.scheduler.running if s.request.id == "5")
    with torch.inference_mode():
        for mixer in storage.states:
            for tensor in mixer.values():
                tensor[storage.slot(victim)].fill_(torch.nan)
    finish(core, found)
    for n, tokens in zip(LENGTHS, wanted(ONE), strict=True):
        if n == 5:
            assert found["5"].failed == runner.NOT_FINITE
        else:
            assert found[str(n)].tokens[0] == tokens
    assert run(core, asked(5))["5"][0] == wanted(ONE)[LENGTHS.index(5)]


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`real`, for which memory runs out once, at its call number `at`."""
    calls = iter(range(1_000_000))

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise MemoryError
        return real(*args, **options)

    return call


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_step_for_which_memory_ran_out_is_not_repeated_on_states(
    monkeypatch: pytest.MonkeyPatch, at: int, choices: int
) -> None:
    """Some layers' states have gone on when it is noticed."""
    _, loaded = pair(ONE)
    core = make_core(loaded, prefix_cache=False)
    last = loaded.mixers[-1]
    monkeypatch.setattr(last, "forward", failing(last.forward, at))
    found = answers(core, asked(*LENGTHS, n=choices))
    failed = {name for name, answer in found.items() if answer.failed == OUT_OF_MEMORY}
    assert len(failed) == 1
    for n, tokens in zip(LENGTHS, wanted(ONE), strict=True):
        if str(n) not in failed:
            assert found[str(n)].tokens == dict.fromkeys(range(choices), tokens)


def test_a_model_is_given_back_as_it_was() -> None:
    model = tiny("jamba")
    own = generate(model, prompt(9))
    loaded = adopt_model(model)
    assert run(make_core(loaded), asked(9))["9"][0] == own
    loaded.give_back()
    assert not any("forward" in vars(module) for module in model.modules())
    assert generate(model, prompt(9)) == own


@pytest.mark.parametrize(
    ("family", "told"), [(ONE, "3 recurrent layers (3 fused)"), ("mamba", "(by their own code)")]
)
def test_the_start_says_how_recurrent_layers_run(family: str, told: str) -> None:
    core = make_core(pair(family)[1])
    assert f"{told}, 0.01 MiB of states for a sequence" in active(core.runner)


def test_memory_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    _, loaded = pair(ONE)
    one = loaded.state_bytes
    monkeypatch.setattr(kv_budget, "free_memory", lambda _: 10 << 30)
    places = kv_budget.snapshot_places(loaded, 4)
    assert places * one <= kv_budget.LEAST_SNAPSHOT_BYTES < (places + 1) * one
    many = 1 << 16
    assert kv_budget.snapshot_places(loaded, many) == many
    monkeypatch.setattr(kv_budget, "free_memory", lambda _: 4000 * one)
    assert kv_budget.snapshot_places(loaded, 4) == 400
    with pytest.raises(ConfigError, match="max_running: the recurrent states of 3601 sequences"):
        kv_budget.kv_budget(loaded, 3601, 100, None, 400)
    monkeypatch.setattr(kv_budget, "free_memory", lambda _: 10 << 20)
    without, beside = (kv_budget.kv_budget(loaded, 64, 100, None, kept) for kept in (0, 400))
    assert without - beside == pytest.approx(0.3 * 400 * one / loaded.kv_bytes_per_token, abs=1)
    held = kv_budget.memory_bytes(loaded, 1000, 4, 100, 400)
    assert held - kv_budget.memory_bytes(loaded, 1000, 4, 100) == pytest.approx(
        400 * one, abs=8 << 20
    )
    assert kv_budget.snapshot_places(adopt_model(tiny("llama")), 4) == 0
