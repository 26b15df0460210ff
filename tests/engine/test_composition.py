"""Strengths, subspaces, and several interventions in one request."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reft_runtime.edits.step import OnDevice, StepEdits
from reft_runtime.engine.events import Traced
from reft_runtime.engine.explain import Explanations
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import sequences_of
from tests.helpers.models import HIDDEN, answers, make_core, prompt, request, run, tiny_llama
from tests.helpers.reference import SHAPES, Applied, RandomEdit, generate_applied

HERE = OnDevice(torch.device("cpu"))
BFLOAT16 = torch.bfloat16
LENGTH = 10

EDITS = {kind: RandomEdit(kind, "f2+l2+decode", seed=i) for i, kind in enumerate(SHAPES)} | {
    "loreft relu": RandomEdit("loreft", "all", act="relu", seed=20),
    "loreft bfloat16": RandomEdit("loreft", "all", dtype=BFLOAT16, seed=21),
    "noreft gelu bfloat16": RandomEdit("noreft", "all", act="gelu", dtype=BFLOAT16, seed=22),
    "long loreft": RandomEdit("loreft", "f40+l40", seed=23),
}
DIRECTED = {name: edit for name, edit in EDITS.items() if edit.rank and "R" in edit.tensors} | {
    name: edit for name, edit in EDITS.items() if "W2" in edit.tensors
}


def asked(name: str, *interventions: Applied, **sampling: int) -> Request:
    return request(name, prompt(LENGTH), *(each.intervention for each in interventions), **sampling)


def changed(*interventions: Applied, rows: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Random rows of layer 1's output, and what a step makes of them."""
    used = [each.intervention for each in interventions]
    sequence = sequences_of(request("a", prompt(rows), *used), 0)
    old = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    hidden = old.clone()
    edits = StepEdits.of([Chunk(sequence, 0, rows)], HERE, lambda site: site)
    if edits.sites:
        edits.apply((1, "block_output"), hidden)
    assert not edits.failed
    return old, hidden


@pytest.mark.parametrize("strength", [-2.0, -1.0, 0.25, 3.0])
def test_strengths_of_every_kind(strength: float) -> None:
    model, _ = tiny_llama()
    requests = [asked(name, Applied((edit,), strength)) for name, edit in EDITS.items()]
    got = run(make_core(), requests)
    for name, edit in EDITS.items():
        wanted = generate_applied(model, prompt(LENGTH), [Applied((edit,), strength)])
        assert got[name][0] == wanted, name
        old, new = changed(Applied((edit,), strength))
        rows = [0, 1, LENGTH - 2, LENGTH - 1]
        formula = old + strength * (edit.formula(old) - old)
        torch.testing.assert_close(new[rows], formula[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_strength_zero_is_the_base_bit_for_bit(name: str, zero: float) -> None:
    def first(*interventions: Applied) -> tuple[Tensor, list[object]]:
        """The whole distribution of the first token, and the later ones' log-probabilities."""
        core = make_core()
        each = replace(asked("a", *interventions, logprobs=20), trace=True)
        core.add(each)
        found: dict[str, Tensor] = {}

        def keep(_: Explanations, name: str, logprobs: Tensor) -> None:
            found[name] = logprobs

        later: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Explanations, "first", keep)
            while not core.idle:
                for event in core.step():
                    if not isinstance(event, Traced):
                        later.append(getattr(event, "logprob", None))
        return found["a"], later

    edit = EDITS[name]
    off, later = first(Applied((edit,), zero))
    base, base_later = first()
    assert torch.equal(off, base)
    assert later == base_later
    on, _ = first(Applied((edit,)))
    assert not torch.equal(on, base) or edit.positions == "decode"
    # Beside one that is on, and in rows that are edited, too.
    both, both_later = first(Applied((edit,), zero), Applied((EDITS["loreft"],)))
    alone, alone_later = first(Applied((EDITS["loreft"],)))
    assert torch.equal(both, alone)
    assert both_later == alone_later


def test_one_module_under_two_layers_keeps_each_requests_order() -> None:
    model, _ = tiny_llama()
    a, b = (
        Applied((RandomEdit("loreft", "all", layer, "model.norm.output", seed=30 + layer),))
        for layer in (1, 2)
    )
    orders = {"ab": (a, b), "ba": (b, a), "a": (a,), "b": (b,)}
    got = run(make_core(), [asked(name, *order) for name, order in orders.items()])
    for name, order in orders.items():
        assert got[name][0] == generate_applied(model, prompt(LENGTH), order), name
    assert got["ab"] != got["ba"]


@pytest.mark.parametrize("name", DIRECTED)
@pytest.mark.parametrize("subspace", [(0,), (2, 0), (1, 2), (0, 1, 2)])
def test_only_the_named_directions_are_edited(name: str, subspace: tuple[int, ...]) -> None:
    edit = DIRECTED[name]
    old, new = changed(Applied((edit,), 0.5, subspace))
    rows = [0, 1, LENGTH - 2, LENGTH - 1]
    formula = old + 0.5 * (edit.formula(old, subspace) - old)
    torch.testing.assert_close(new[rows], formula[rows], rtol=1e-5, atol=1e-5)
    directions = edit.tensors["R"] if "R" in edit.tensors else edit.tensors["W2"].float().T
    spanned, _ = torch.linalg.qr(directions[:, list(subspace)])
    change = (new - old)[rows]
    assert change.norm() > 0.1
    outside = change - change @ spanned @ spanned.T
    assert outside.norm() < 1e-4


def test_subspaces_through_the_engine() -> None:
    model, _ = tiny_llama()
    used = {
        f"{name} {subspace}": Applied((edit,), 1.5, subspace)
        for name, edit in DIRECTED.items()
        for subspace in ((1,), (0, 2))
    }
    got = run(make_core(), [asked(name, each) for name, each in used.items()])
    for name, each in used.items():
        assert got[name][0] == generate_applied(model, prompt(LENGTH), [each]), name


def test_disjoint_subspaces_of_one_loreft_make_the_whole() -> None:
    edit = replace(EDITS["loreft"])
    W, R = edit.tensors["W"], edit.tensors["R"]
    W -= W @ R @ R.T  # so that what the first pass changes is nothing to the second
    whole = changed(Applied((edit,)))[1]
    for first, second in (((0,), (1, 2)), ((2, 1), (0,))):
        parts = changed(Applied((edit,), 1, first), Applied((edit,), 1, second))[1]
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_compositions_apply_in_their_order() -> None:
    model, _ = tiny_llama()
    three = {
        "loreft": Applied((EDITS["loreft relu"],), 0.7),
        "red": Applied((EDITS["red"],), 1.3),
        "steering": Applied((RandomEdit("steering", "all", seed=40, size=2),), -1),
    }
    orders = list(itertools.permutations(three))
    got = run(make_core(), [asked("+".join(o), *(three[n] for n in o)) for o in orders])
    seen = set()
    for order in orders:
        interventions = [three[name] for name in order]
        wanted = generate_applied(model, prompt(LENGTH), interventions)
        assert got["+".join(order)][0] == wanted, order
        old, new = changed(*interventions)
        expected = old[:2]
        for each in interventions:
            formula = each.edits[0].formula(expected)
            expected = expected + each.strength * (formula - expected)
        torch.testing.assert_close(new[:2], expected, rtol=1e-5, atol=1e-4)
        seen.add(tuple(new[0].tolist()))
    assert len(seen) == len(orders)


def test_places_of_one_layer_are_edited_as_the_layer_computes_them() -> None:
    model, _ = tiny_llama()
    components = ("block_output", "mlp_output", "block_input", "attention_output")
    edits = [
        RandomEdit("direft", "all", component=component, seed=50 + i)
        for i, component in enumerate(components)
    ]
    together, alone = Applied(tuple(edits)), [Applied((edit,)) for edit in edits]
    wanted = generate_applied(model, prompt(LENGTH), [together])
    other = answers(make_core(), [asked("file", together), asked("request", *alone[::-1])])
    assert other["file"].tokens[0] == other["request"].tokens[0] == wanted
    for each in alone:
        assert generate_applied(model, prompt(LENGTH), [each]) != wanted
