from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from reft_runtime.errors import InvalidFile, InvalidRequest
from reft_runtime.interventions import Edit, Intervention
from reft_runtime.interventions.format.kinds import KINDS
from tests.helpers.canonical import apply
from tests.helpers.reference import BASE as REFERENCE
from tests.helpers.reference import SHAPES, RandomEdit
from tests.interventions.make import BASE, loreft_tensors


def build(tensors: dict[str, Tensor], **where: int) -> Intervention:
    return Intervention.build(BASE, [Edit(where.get("layer", 1), "f2+l1", tensors)])


def loreft(h: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Arxiv 2404.03592, equation 2, with R stored [d, r]; h W in W's dtype, as pyreft has it."""
    W, R = tensors["W"], tensors["R"].float()
    b = tensors.get("b", torch.zeros(W.shape[0])).to(W.dtype)
    return h + (linear(h.to(W.dtype), W, b).float() - h @ R) @ R.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loreft_equals_its_formula(dtype: torch.dtype, with_bias: bool) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in loreft_tensors(5).items()}
    if not with_bias:
        del tensors["b"]
    (edit,) = build(tensors).canonical()
    h = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply(edit, h), loreft(h, tensors), atol=1e-5, rtol=0)
    assert torch.equal(apply(edit, h, strength=0.0), h)


ROW = torch.linspace(-1, 1, 16)


@pytest.mark.parametrize(
    ("kind", "tensors", "expected"),
    [
        ("steering", {"v": ROW}, lambda h: h + ROW),
        ("red", {"s": ROW + 2, "b": 3 * ROW}, lambda h: (ROW + 2) * h + 3 * ROW),
        ("reft_r1", {"w": ROW, "factor": torch.tensor([2.5])}, lambda h: h + 2.5 * ROW),
    ],
)
def test_kinds_without_directions(
    kind: str, tensors: dict[str, Tensor], expected: Callable[[Tensor], Tensor]
) -> None:
    (edit,) = Intervention.build(BASE, [Edit(0, "all", tensors, kind)]).canonical()
    assert (edit.rank, edit.directions, edit.learned) == (0, 0, 0)
    assert edit.V.shape == edit.U.shape == (0, 16)
    h = torch.randn(3, 5, 16)
    torch.testing.assert_close(apply(edit, h), expected(h), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(apply(edit, h, -0.5), h - 0.5 * (expected(h) - h))
    with pytest.raises(InvalidRequest, match=r"subspace: .* no directions"):
        edit.subset((0,))


@pytest.mark.parametrize("kind", SHAPES)
def test_coordinates_are_products_with_directions_of_length_1(kind: str) -> None:
    stored = RandomEdit(kind, "all", rank=4, act="relu" if KINDS[kind].has_act else None).stored
    (edit,) = Intervention.build(REFERENCE, [stored]).canonical()
    t = {name: tensor.numpy() for name, tensor in stored.tensors.items()}
    match kind:
        case "loreft" | "direft" | "consreft" | "lobireft":
            directions = t["R"].T
        case "noreft" | "nodireft":
            directions = t["W2"]
        case "red":
            directions = np.empty((0, REFERENCE.hidden_size), np.float32)
        case _:
            directions = t["v" if kind == "steering" else "w"][None]
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    h = torch.randn(2, 5, REFERENCE.hidden_size)
    np.testing.assert_allclose(edit.coordinates(h), h.numpy() @ directions.T, atol=1e-5)
    if edit.directions:
        part = edit.subset((3, 1)).coordinates(h)
        torch.testing.assert_close(part, edit.coordinates(h)[..., [1, 3]])


@pytest.mark.parametrize("act", [None, "relu"])
def test_a_subset_of_the_directions(act: str | None) -> None:
    tensors = loreft_tensors(3, r=4)
    edit = Intervention.build(BASE, [Edit(0, "l1", tensors, act=act)]).canonical()[0]
    h = torch.randn(5, 16)
    chosen = [2, 0]
    part = edit.subset((2, 0))
    W, R, b = tensors["W"][chosen], tensors["R"][:, chosen], tensors["b"][chosen]
    learned = linear(h, W, b).relu() if act else linear(h, W, b)
    torch.testing.assert_close(apply(part, h), h + (learned - h @ R) @ R.T, atol=1e-5, rtol=0)
    assert part.directions == 2
    torch.testing.assert_close(apply(edit.subset((0, 1, 2, 3)), h), apply(edit, h))
    torch.testing.assert_close(apply(part.subset((1,)), h), apply(edit.subset((2,)), h))
    for wrong, message in (
        ((4,), "4 is out of range; .* 0 to 3"),
        ((-1,), "-1 is out of range"),
        ((1, 1), "once"),
        ((), "once"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            edit.subset(wrong)


def test_canonical_form_is_ready_for_use() -> None:
    (edit,) = build(loreft_tensors(1)).canonical()
    assert (edit.layer, edit.component, str(edit.positions)) == (1, "block_output", "f2+l1")
    assert (edit.rank, edit.learned, edit.directions) == (3, 0, 3)
    tensors = loreft_tensors(1)
    tensors["W"] = tensors["W"].bfloat16()
    tensors["b"] = tensors["b"].bfloat16()
    (mixed,) = build(tensors).canonical()  # W in bfloat16 beside R in float32, as pyreft writes
    assert (mixed.rank, mixed.learned, mixed.directions) == (6, 3, 3)
    assert mixed.dtype == torch.bfloat16
    for each in (edit, mixed):
        assert each.V.shape == each.U.shape == (each.rank, 16)
        assert each.b.shape == (each.rank,)
        for tensor in (each.V, each.b, each.U):
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.device.type == "cpu"


def test_untied_edits_share_a_layer_in_the_order_given() -> None:
    first, last = loreft_tensors(1), loreft_tensors(2, r=2)
    built = Intervention.build(BASE, [Edit(3, "f2", first), Edit(3, "l2", last)])
    edits = built.canonical()
    assert [(edit.layer, str(edit.positions), edit.rank) for edit in edits] == [
        (3, "f2", 3),
        (3, "l2", 2),
    ]
    h = torch.randn(4, 16)
    torch.testing.assert_close(apply(edits[1], h), loreft(h, last), atol=1e-5, rtol=0)


def test_building_copies_the_tensors() -> None:
    tensors = loreft_tensors(1)
    built = Intervention.build(BASE, [Edit(0, "l1", tensors), Edit(1, "l1", tensors)])
    before = built.tensors["edits.0.W"].clone()
    tensors["W"].zero_()
    assert torch.equal(built.tensors["edits.0.W"], before)
    assert torch.equal(built.tensors["edits.1.W"], before)


def broken(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = loreft_tensors(1)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return tensors


R = loreft_tensors(1)["R"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken("W", None), r"edits\.0\.W: missing"),
        (broken("R", None), r"edits\.0\.R: missing"),
        (broken("Q", torch.ones(3)), r"edits\.0\.Q: a loreft edit has no such tensor"),
        (broken("W", torch.ones(3, 15)), r"edits\.0\.W: shape \[3, 15\], expected \[r=3, d=16\]"),
        (broken("W", torch.ones(48)), r"edits\.0\.W: shape \[48\]"),
        (broken("W", torch.ones(2, 16)), r"edits\.0\.R: shape \[16, 3\], expected \[d=16, r=2\]"),
        (broken("R", R.T.contiguous()), r"edits\.0\.R: shape \[3, 16\]"),
        (broken("b", torch.ones(2)), r"edits\.0\.b: shape \[2\]"),
        (broken("b", torch.ones(3, 1)), r"edits\.0\.b: shape \[3, 1\]"),
        (broken("b", torch.ones(3).half()), r"edits\.0\.b: dtype float16, .* says float32"),
        (broken("W", torch.ones(3, 16).double()), r"edits\.0\.dtype"),
        (broken("R", R.double()), r"edits\.0\.R: dtype float64"),
        (broken("W", torch.full((3, 16), torch.nan)), r"edits\.0\.W: holds NaN"),
        (broken("b", torch.tensor([0.0, torch.inf, 0.0])), r"edits\.0\.b: holds NaN or infinite"),
        (broken("R", R * 1.01), r"edits\.0\.R: columns are not orthonormal"),
        (broken("R", R[:, [0, 0, 1]]), r"edits\.0\.R: columns are not orthonormal"),
        ({"W": torch.ones(0, 16), "R": torch.ones(16, 0)}, r"rank 0"),
        ({"W": torch.ones(17, 16), "R": torch.ones(16, 17)}, r"rank 17"),
        ({}, r"edits\.0\.W: missing"),
    ],
)
def test_broken_tensors_are_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidFile, match=message):
        build(tensors)


def test_layer_out_of_range_and_unknown_kind() -> None:
    with pytest.raises(InvalidFile, match=r"edits\.0\.layer is 4, .* 0 to 3"):
        build(loreft_tensors(), layer=4)
    with pytest.raises(InvalidFile, match=r"edits\.0\.kind: unknown kind 'magic'; known: loreft"):
        Intervention.build(BASE, [Edit(0, "l1", loreft_tensors(), kind="magic")])
    with pytest.raises(InvalidFile, match=r"edits\.0\.positions: 'x9' is not understood;.* all\.$"):
        Intervention.build(BASE, [Edit(0, "x9", loreft_tensors())])
    with pytest.raises(InvalidFile, match="edits"):
        Intervention.build(BASE, [])


@pytest.mark.parametrize("template", ["", "no field", "{prompt} and {prompt}", "CHAT"])
def test_templates_without_one_field_are_refused(template: str) -> None:
    with pytest.raises(InvalidFile, match=r"template: .*\{prompt\} exactly once"):
        Intervention.build(BASE, [Edit(0, "l1", loreft_tensors())], template=template)


@pytest.mark.parametrize("template", [None, "chat", "Q: {prompt}\nA: {other}"])
def test_templates(template: str | None) -> None:
    built = Intervention.build(BASE, [Edit(0, "l1", loreft_tensors())], template=template)
    assert built.manifest.template == template
