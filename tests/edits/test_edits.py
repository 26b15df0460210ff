"""Edits in a mixed batch are the paper's formula on each request's own prompt positions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reft_runtime.edits.sites import Site
from reft_runtime.edits.step import BATCHED_ROWS, OnDevice, StepEdits
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.sequence import sequences_of
from tests.helpers.models import (
    HIDDEN,
    LoReFT,
    applied,
    generate,
    generate_edited,
    loreft,
    make_core,
    prompt,
    request,
    run,
    step,
    tiny_llama,
)

HERE = OnDevice(torch.device("cpu"))


def as_named(site: Site) -> Site:
    """All places are named by layer here."""
    return site


Case = tuple[int, list[tuple[list[LoReFT], float]]]


def cases() -> dict[str, Case]:
    """Prompt lengths, and interventions (edits and strength) in the order of application."""
    a, b = loreft(1, "l1", seed=1), loreft(1, "l2", seed=2, rank=2)
    untied = [loreft(0, "f3", seed=3), loreft(0, "l3", seed=4, rank=1)]
    overlapping = [loreft(1, "f4", seed=5), loreft(1, "f2+l2", seed=6)]
    deep = [loreft(layer, "l1", seed=7 + layer) for layer in range(4)]
    return {
        "l1": (9, [([a], 1)]),
        "f1": (9, [([loreft(0, "f1", seed=8)], 1)]),
        "untied": (12, [(untied, 1)]),
        "all layers": (10, [(deep, 1)]),
        "half strength": (9, [([a], 0.5)]),
        "negative strength": (9, [([a], -1)]),
        "a then b": (9, [([a], 1), ([b], 0.7)]),
        "b then a": (9, [([b], 0.7), ([a], 1)]),
        "twice": (9, [([a], 1), ([a], 1)]),
        "overlapping edits of one file": (9, [(overlapping, 1)]),
        "overlapping edits, other order": (9, [(overlapping[::-1], 1)]),
        "both sides clamped": (5, [([loreft(0, "f40+l40", seed=9)], 1)]),
        "clamped to one": (3, [([loreft(0, "f7+l7", seed=9)], 1)]),
        "long segments": (90, [([loreft(0, "f40+l40", seed=9)], 1)]),
        "long beside short": (90, [([loreft(0, "f40", seed=9), loreft(0, "l1", seed=1)], 1)]),
    }


def asked(name: str, case: Case) -> Request:
    length, interventions = case
    return request(name, prompt(length), *(applied(*e, strength=s) for e, s in interventions))


def wanted(case: Case) -> list[int]:
    model, _ = tiny_llama()
    length, interventions = case
    edits = [(edit, strength) for edits, strength in interventions for edit in edits]
    return generate_edited(model, model.model.layers, prompt(length), edits)


@pytest.mark.parametrize("max_step_tokens", [512, 16], ids=["whole", "chunked"])
def test_every_request_of_a_batch_gets_its_own_edits(max_step_tokens: int) -> None:
    core = make_core(max_running=16, max_step_tokens=max_step_tokens)
    got = run(core, [asked(name, case) for name, case in cases().items()])
    for name, case in cases().items():
        assert got[name][0] == wanted(case), name
        assert got[name][0] != generate(tiny_llama()[0], prompt(case[0])), name


def test_the_order_of_composition_matters() -> None:
    for pair in (
        ("a then b", "b then a"),
        ("overlapping edits of one file", "overlapping edits, other order"),
        ("l1", "twice"),
        ("l1", "half strength"),
    ):
        first, second = (wanted(cases()[name]) for name in pair)
        assert first != second, pair


def test_strength_zero_is_the_base_model() -> None:
    edit = loreft(0, "f3+l3")
    off, on = applied(edit, strength=0), applied(edit)
    got = run(make_core(), [request("off", prompt(9), off), request("on", prompt(9), on)])
    assert got["off"][0] == generate(tiny_llama()[0], prompt(9)) != got["on"][0]
    zeros = [request("z", prompt(9), off, on, off), request("on", prompt(9), on)]
    got = run(make_core(), zeros)
    assert got["z"] == got["on"]


def test_a_prompt_of_one_token_is_not_edited() -> None:
    got = run(make_core(), [request("a", prompt(1), applied(loreft(0, "f5+l5")))])
    assert got["a"][0] == generate(tiny_llama()[0], prompt(1))


class HookCount:
    """Counts the hooks that decoder layers get."""

    def __init__(self) -> None:
        self.registered = 0


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[HookCount]:
    count = HookCount()
    register = nn.Module.register_forward_hook

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count.registered += 1
        return register(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", counting)
        yield count


def test_only_steps_with_something_to_edit_have_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(max_running=4, max_step_tokens=6)
    loaded = core.loaded
    hooks = [layer._forward_hooks for layer in loaded.layers]
    with counted(monkeypatch) as count:
        core.add(request("a", prompt(18), applied(loreft(1, "l1"), loreft(2, "l1", seed=1))))
        seen = []
        while not core.idle:
            before = count.registered
            step(core, {})
            seen.append(count.registered - before)
            assert not any(hooks)
    # Three prompt chunks, of which only the last holds an edited token; then decode steps.
    assert seen == [0, 0, 2, *[0] * 7]


def chunk(
    interventions: tuple[AppliedIntervention, ...], length: int, start: int, stop: int
) -> Chunk:
    sequence = sequences_of(request("a", prompt(length), *interventions), 0)
    return Chunk(sequence, start, stop - start)


def test_positions_are_those_of_the_prompt_whatever_the_chunks() -> None:
    both = (applied(loreft(0, "f3+l2")),)

    def rows(*chunks: Chunk) -> Mapping[Any, list[list[list[int]]]]:
        passes = StepEdits.of(chunks, HERE, as_named).passes
        return {site: [[s.rows for s in part] for part in parts] for site, parts in passes.items()}

    site = (0, "block_output")
    assert rows(chunk(both, 10, 0, 10)) == {site: [[[0, 1, 2, 8, 9]]]}
    assert rows(chunk(both, 10, 0, 2), chunk(both, 10, 2, 9)) == {site: [[[0, 1], [2, 8]]]}
    assert rows(chunk(both, 10, 3, 8)) == {}
    # Only generated tokens: nothing, though the sequence has an intervention.
    assert rows(chunk(both, 10, 10, 11)) == {}
    assert rows(chunk((applied(loreft(0, "f3"), strength=0),), 10, 0, 10)) == {}
    assert rows(chunk((), 7, 0, 7), chunk(both, 4, 0, 4)) == {site: [[[7, 8, 9, 10]]]}


def test_edits_of_other_rows_share_a_pass() -> None:
    untied = (applied(loreft(0, "f2"), loreft(0, "l2", seed=1)),)
    (passes,) = StepEdits.of(
        [chunk(untied, 10, 0, 10), chunk(untied, 8, 0, 8)], HERE, as_named
    ).passes.values()
    assert [[s.rows for s in part] for part in passes] == [[[0, 1], [8, 9], [10, 11], [16, 17]]]


def test_edits_of_one_row_are_in_passes_one_after_another() -> None:
    """Wherever the last edit of it was, and as early as that permits."""
    file = [loreft(0, at, seed=i) for i, at in enumerate(("[0]", "[0:2]", "[1]", "[2]", "[0]"))]
    (passes,) = StepEdits.of([chunk((applied(*file),), 10, 0, 10)], HERE, as_named).passes.values()
    assert [[s.rows for s in part] for part in passes] == [[[0], [2]], [[0, 1]], [[1], [0]]]


@pytest.mark.skipif(cpu_operators() is None, reason="there is no compiler")
def test_what_compiled_layers_may_edit_themselves() -> None:
    """One pass of short affine edits, as wide as the rows, of which no trace is wanted."""
    site, short, long = (0, "block_output"), f"[:{BATCHED_ROWS}]", f"[:{BATCHED_ROWS + 1}]"

    def rows(*edits: LoReFT, width: int = HIDDEN, **fields: Any) -> int | None:
        """How many, where they may."""
        asked = replace(request("a", prompt(90), applied(*edits, strength=0.5)), **fields)
        found = StepEdits.of([Chunk(sequences_of(asked, 0), 0, 90)], HERE, as_named)
        told = found.row_edits(site, width)
        assert told is found.row_edits(site, width), "kept"
        return None if told is None else len(told)

    assert rows(loreft(0, short)) == BATCHED_ROWS
    assert rows(loreft(0, "f2"), loreft(0, "l3", seed=1)) == 5
    for wrong in (
        rows(loreft(0, long)),
        rows(loreft(0, short), width=2 * HIDDEN),
        rows(loreft(0, short), trace=True),
        rows(loreft(0, "f2"), loreft(0, "f1", seed=1)),
        rows(loreft(1, "f2")),
    ):
        assert wrong is None


@pytest.mark.parametrize("compiler", [True, False])
def test_one_edit_in_a_batch_is_the_formula(
    compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr("reft_runtime.edits.step.cpu_operators", lambda: None)
    small, large = loreft(0, "f2+l2", rank=2), loreft(0, "l40", rank=5, seed=1)
    edits = StepEdits.of(
        [
            chunk((applied(small, strength=0.5),), 6, 0, 6),
            chunk((applied(large, strength=-0.7),), 90, 0, 90),
            chunk((applied(loreft(0, "l1", seed=2)),), 3, 0, 3),
        ],
        HERE,
        as_named,
    )
    hidden = torch.randn(99, HIDDEN)
    old = hidden.clone()
    edits.apply((0, "block_output"), hidden)
    assert not edits.failed
    changed = {0, 1, 4, 5, *range(6 + 50, 6 + 90), 98}
    assert {row for row in range(99) if not torch.equal(hidden[row], old[row])} == changed
    for edit, strength, rows in ((small, 0.5, (0, 1, 4, 5)), (large, -0.7, range(56, 96))):
        for row in rows:
            h = old[row]
            new = h + strength * (edit.R @ (edit.W @ h + edit.b - edit.R.T @ h))
            torch.testing.assert_close(hidden[row], new, rtol=1e-5, atol=1e-5)


def test_the_change_of_a_row_of_zeros_has_a_size() -> None:
    asked = replace(request("a", prompt(6), applied(loreft(0, "f2"))), trace=True)
    sequence = sequences_of(asked, 0)
    edits = StepEdits.of([Chunk(sequence, 0, 6)], HERE, as_named)
    hidden = torch.zeros(6, HIDDEN)
    edits.apply((0, "block_output"), hidden)
    [[segment]] = edits.passes[0, "block_output"]
    edits._trace(segment, torch.zeros(2, HIDDEN), torch.zeros(2, HIDDEN))
    changed, same = (traced.relative_sizes for traced in edits.traces[sequence])
    assert changed == pytest.approx((hidden[:2].norm(dim=1) / 1e-12).tolist())
    assert same == (0, 0)


def test_nobody_waits_for_edits_on_their_way_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    real = Tensor.to

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        waits.append(not options.get("non_blocking"))
        return real(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", to)
    moved = OnDevice(torch.device("meta"))(loreft(0, "l1").edit)
    assert moved.V.is_meta
    assert waits == [False] * 3
