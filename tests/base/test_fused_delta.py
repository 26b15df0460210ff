"""Gated delta nets in their fused form, against their own code for each sequence by itself."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_5 import modeling_qwen3_5

from reft_runtime.base.fused_delta import DeltaNetForm, DeltaNetFuser, FusedDeltaNet
from reft_runtime.base.packed_delta import Part, packed_delta_net
from reft_runtime.base.recurrent import StateCache
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.loading.loader import adopt_model
from tests.base.test_delta_rule import CACHE, net, rows
from tests.base.test_packed_delta import CONV, KEYS, one, shapes, states
from tests.helpers.models import generate, make_core, prompt, request, run, tiny

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of parts of the calls of fused forms."""
    counts: list[int] = []
    own = DeltaNetForm.__call__

    def counted(self: DeltaNetForm, parts: Any, hidden_states: Tensor) -> Tensor:
        counts.append(len(parts))
        return own(self, parts, hidden_states)

    monkeypatch.setattr(DeltaNetForm, "__call__", counted)
    return counts


def fused(module: nn.Module, *read: nn.Module) -> FusedDeltaNet | None:
    """The module with a fused form; its projections are merged."""
    operators = cpu_operators()
    assert operators is not None, "the tests need a C++ compiler"
    dtype = next(module.parameters()).dtype
    given = module, CACHE, shapes(dtype), module.forward
    with torch.inference_mode(mode=False), torch.no_grad():
        packed = packed_delta_net(*given, operators)
        assert packed is not None
        return DeltaNetFuser(operators, set(read)).fused(*given, packed)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_sequences_are_as_by_themselves(dtype: torch.dtype, calls: list[int]) -> None:
    module, given = net(dtype), rows(1, 43, 32, dtype=dtype)
    own, made = copy.deepcopy(module), fused(module)
    assert made is not None
    calls.clear()
    theirs, ours = states(3, dtype), states(3, dtype)
    position = 0
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    # By step: chunks of sequences, with where they begin. The first two sequences of the last two
    # steps decode together.
    for step in (
        [(0, 1, True), (1, 3, True), (2, 20, True)],
        [(0, 2, False), (2, 7, False), (1, 1, False)],
        [(0, 1, False), (1, 1, False), (2, 1, False)],
        [(0, 1, False), (1, 1, False), (2, 5, True)],
    ):
        parts, wanted, first = [], [], 0
        for number, length, begins in step:
            chunk = given[:, position + first : position + first + length]
            cache = StateCache(one(theirs, number), begins=begins)
            wanted.append(own(chunk, **{CACHE: cache}))
            parts.append(Part(first, first + length, one(ours, number), begins))
            first += length
        if [length for _, length, _ in step[:2]] == [1, 1]:
            pair = {key: tensor[:2] for key, tensor in ours.items()}
            parts[:2] = [Part(0, 2, pair)]
        found = made(parts, hidden_states=given[:, position : position + first])
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.cat(wanted, 1), atol=tolerance, rtol=tolerance)
        for key in KEYS:
            torch.testing.assert_close(ours[key], theirs[key], atol=tolerance, rtol=tolerance)
        position += first
    assert calls == [3, 3, 2, 2]


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_models_answer_by_it(model_type: str, calls: list[int]) -> None:
    model = tiny(model_type)
    prompts = {name: prompt(length) for name, length in (("a", 5), ("b", 1), ("c", 19))}
    wanted = {name: generate(model, ids, 6) for name, ids in prompts.items()}
    core = make_core(adopt_model(copy.deepcopy(model)))
    calls.clear()
    answers = run(core, [request(name, ids, max_tokens=6) for name, ids in prompts.items()])
    assert {name: answers[name][0] for name in prompts} == wanted
    assert calls


@pytest.mark.parametrize("path", ["in_proj_z", "in_proj_a", "norm", "conv1d", "out_proj"])
@torch.inference_mode()
def test_a_hook_inside_turns_it_off(path: str, calls: list[int]) -> None:
    module, given = net(torch.float32), rows(1, 5, 32, dtype=torch.float32)
    own, made = copy.deepcopy(module), fused(module)
    assert made is not None
    handles = [
        one.get_submodule(path).register_forward_hook(lambda *given: 2 * given[-1])
        for one in (own, module)
    ]
    calls.clear()

    def answer() -> Tensor:
        made_for: Tensor = made([Part(0, 5, states(1, torch.float32), True)], hidden_states=given)
        return made_for

    torch.testing.assert_close(answer(), own(given), atol=1e-5, rtol=1e-5)
    assert not calls
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(answer(), own(given), atol=1e-5, rtol=1e-5)
    assert calls


@torch.inference_mode()
def test_arguments_that_say_something_turn_it_off(calls: list[int]) -> None:
    made, given = fused(net(torch.float32)), rows(1, 5, 32, dtype=torch.float32)
    assert made is not None
    calls.clear()
    for mask, count in ((torch.ones(1, 5), 0), (None, 1)):
        part = Part(0, 5, states(1, torch.float32), True)
        made([part], hidden_states=given, attention_mask=mask, use_cache=False)
        assert len(calls) == count


class Functions:
    """torch's functional operators, but another softplus."""

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def softplus(self, rows: Tensor) -> Tensor:
        """A little below torch's own."""
        return functional.softplus(rows, beta=1.1)


class OtherNorm(modeling_qwen3_5.Qwen3_5RMSNormGated):
    """Norms with another epsilon than they say."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Any:
        """The norm of numbers that count for less, and so epsilon for more."""
        return super().forward(hidden_states / 8, gate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_gating_is_left_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In bfloat16, too, where rounding hides it: the trial on a float32 copy shows it."""
    monkeypatch.setattr(modeling_qwen3_5, "F", Functions())
    assert fused(net(dtype)) is None


def test_another_module_is_left_alone() -> None:
    names = [f"in_proj_{part}" for part in ("qkv", "z", "b", "a")]
    for change in (
        {"norm": OtherNorm(40, eps=1e-4)},
        {"in_proj_b": nn.Linear(32, 4)},
        {"conv1d": nn.Conv1d(CONV, CONV, 4, groups=CONV, padding=3)},
        {"more": nn.Identity()},
        {"num_k_heads": 1},
    ):
        module: Any = net(torch.float32)
        for name, value in change.items():
            setattr(module, name, value)
        assert fused(module.requires_grad_(False)) is None, change
        assert all("forward" not in vars(module.get_submodule(name)) for name in names)


def test_projections_whose_weights_are_read_are_left_alone() -> None:
    module: Any = net(torch.float32)
    assert fused(module, module.in_proj_z) is None
    assert fused(module, module.out_proj) is not None
