"""The canonical form against pyreft's own modules, live."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2CLS

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions import CanonicalEdit, Edit, Intervention
from reft_runtime.interventions.pyreft.classes import Stored, kind_of, tensors_of
from reft_runtime.interventions.pyreft.unpickle import plain_state
from tests.helpers.canonical import apply
from tests.helpers.pyreft import BASE, CLASSES, WIDTH, interventions, module, pyvene

KINDS_WITH_ACT = ("loreft", "noreft", "direft", "nodireft")
ACTS = sorted(ACT2CLS)
H = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(7))


def ours(theirs: torch.nn.Module, act: str | None = None) -> CanonicalEdit:
    """What the import makes of a module of pyreft's."""
    state = plain_state(theirs.state_dict())
    stored = Stored("it", 1, "block_output", type(theirs).__name__, state)
    kind = kind_of(stored, None)
    edit = Edit(1, "l1", tensors_of(stored, kind, act), kind, act=act)
    (canonical,) = Intervention.build(BASE, [edit]).canonical()
    return canonical


def run(theirs: torch.nn.Module, h: Tensor) -> Tensor:
    with torch.no_grad():
        edited: Tensor = theirs(h)
    return edited


@pytest.mark.parametrize("act", [None, *ACTS])
@pytest.mark.parametrize("kind", KINDS_WITH_ACT)
def test_every_act_in_float32(kind: str, act: str | None) -> None:
    theirs = module(kind, act=act, seed=3)
    edit = ours(theirs, act)
    expected = run(theirs, H)
    assert (expected - H).abs().max() > 0.1
    torch.testing.assert_close(apply(edit, H), expected, atol=1e-5, rtol=0)
    assert (edit.learned > 0) == (act not in (None, "linear"))


@pytest.mark.parametrize("act", [None, *(act for act in ACTS if act != "prelu")])
@pytest.mark.parametrize("kind", KINDS_WITH_ACT)
def test_every_act_in_bfloat16(kind: str, act: str | None) -> None:
    theirs = module(kind, act=act, seed=4, dtype=torch.bfloat16)
    edit, h = ours(theirs, act), H.bfloat16()
    expected = run(theirs, h)
    assert edit.dtype == torch.bfloat16
    # One rounding of the result, 2^-8, where R is float32; the kinds without R round at every step.
    size = 2**-8 if kind in ("loreft", "direft") else 2**-5
    torch.testing.assert_close(apply(edit, h), expected, atol=size, rtol=size)


@pytest.mark.parametrize("act", [None, "gelu", "tanh", "silu"])
def test_only_the_learned_product_is_rounded(act: str | None) -> None:
    theirs = module("direft", act=act, seed=5, dtype=torch.bfloat16)
    expected = run(theirs, H)  # Direft alone takes float32 rows with a bfloat16 W
    torch.testing.assert_close(apply(ours(theirs, act), H), expected, atol=1e-5, rtol=0)


def test_prelu_in_bfloat16_fails_in_pyreft_and_is_refused_here() -> None:
    theirs = module("loreft", act="prelu", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Type promoting"):
        run(theirs, H.bfloat16())
    with pytest.raises(InvalidFile, match="act: prelu cannot be computed"):
        ours(theirs, "prelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["consreft", "lobireft"])
def test_kinds_without_a_learned_product(kind: str, dtype: torch.dtype) -> None:
    theirs, h = module(kind, seed=6), H.to(dtype)
    size = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(apply(ours(theirs), h), run(theirs, h), atol=size, rtol=size)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("rank", [1, 15, 16])
def test_every_rank_up_to_the_width(kind: str, rank: int) -> None:
    theirs = module(kind, rank=rank, seed=rank)
    torch.testing.assert_close(apply(ours(theirs), H), run(theirs, H), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["noreft", "nodireft"])
def test_without_a_projection_bias(kind: str) -> None:
    theirs = module(kind, add_bias=False, seed=8)
    torch.testing.assert_close(apply(ours(theirs), H), run(theirs, H), atol=1e-5, rtol=0)


def test_identity_init_is_loreft() -> None:
    stored = Stored("it", 0, "block_output", "LoreftIntervention_IdentityInit", {})
    assert kind_of(stored, None) == "loreft"


def test_trained_parameters_of_an_act_are_refused() -> None:
    theirs = module("noreft", act="prelu")
    ours(theirs, "prelu")
    theirs.act_fn.weight.data.fill_(0.5)
    with pytest.raises(InvalidFile, match="act_fn has trained parameters"):
        ours(theirs, "prelu")


def test_addition_of_a_constant_is_steering() -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    theirs = pyvene.AdditionIntervention(embed_dim=WIDTH, source_representation=vector)
    edit = ours(theirs)
    expected = theirs(H.clone(), None)
    torch.testing.assert_close(apply(edit, H), expected)


def test_subspaces_are_those_of_the_composition_notebook() -> None:
    theirs = module("loreft", act="silu", seed=9)
    with torch.no_grad():  # as SubloreftIntervention there computes it
        difference = theirs.act_fn(theirs.learned_source(H)) - theirs.rotate_layer(H)
        chosen = [3, 1]
        expected = H + difference[..., chosen] @ theirs.rotate_layer.weight[:, chosen].T
    edit = ours(theirs, "silu").subset((3, 1))
    torch.testing.assert_close(apply(edit, H), expected, atol=1e-5, rtol=0)


def test_pyrefts_classes_are_all_known() -> None:
    theirs = {name for name in vars(interventions) if name.endswith("reftIntervention")}
    assert theirs == set(CLASSES.values())
