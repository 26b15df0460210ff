from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions import CanonicalEdit, Edit, Intervention
from tests.interventions.make import BASE, loreft_tensors


def build(tensors: dict[str, Tensor], **where: int) -> Intervention:
    return Intervention.build(BASE, [Edit(where.get("layer", 1), "f2+l1", tensors)])


def apply(edit: CanonicalEdit, h: Tensor, strength: float = 1.0) -> Tensor:
    return h + strength * ((h @ edit.V.T + edit.b) @ edit.U)


def loreft(h: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Arxiv 2404.03592, equation 2, with R stored [d, r]."""
    W, R = tensors["W"].float(), tensors["R"].float()
    b = tensors.get("b", torch.zeros(W.shape[0])).float()
    return h + ((h @ W.T + b) - h @ R) @ R.T


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


def test_canonical_form_is_ready_for_use() -> None:
    tensors = loreft_tensors(1)
    tensors["W"] = tensors["W"].bfloat16()
    tensors["b"] = tensors["b"].bfloat16()
    (edit,) = build(tensors).canonical()  # W in bfloat16 beside R in float32, as pyreft writes
    assert (edit.layer, edit.component, str(edit.positions)) == (1, "block_output", "f2+l1")
    assert edit.rank == 3
    assert edit.V.shape == edit.U.shape == (3, 16)
    assert edit.b.shape == (3,)
    for tensor in (edit.V, edit.b, edit.U):
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
    with pytest.raises(InvalidFile, match=r"edits\.0\.positions: 'x9' is not understood"):
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
