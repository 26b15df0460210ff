"""Gated delta nets that run once for all sequences of a step, against each sequence by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reft_runtime.base import packed_delta
from reft_runtime.base.packed_delta import PackedDeltaNet, Part, packed_delta_net
from reft_runtime.base.rebinding import code_of
from reft_runtime.base.recurrent import MixerForward, StateCache, StateKey, StateShape
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.loading.loader import adopt_model
from tests.base.test_delta_rule import CACHE, net, rows
from tests.helpers.models import tiny

KEYS = StateKey("conv", 0), StateKey("recurrent", 0)
CONV = 2 * 2 * 8 + 4 * 40


class NoOperators:
    """As on a machine whose operators do not take these tensors."""

    def delta_rule_(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def convolve_(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def shapes(dtype: torch.dtype) -> dict[StateKey, StateShape]:
    return {
        KEYS[0]: StateShape((CONV, 4), dtype),
        KEYS[1]: StateShape((4, 8, 40), torch.float32),
    }


def states(count: int, dtype: torch.dtype) -> dict[StateKey, Tensor]:
    """States that spoil whatever reads them."""
    return {
        key: torch.full((count, *shape.sizes), torch.nan, dtype=shape.dtype)
        for key, shape in shapes(dtype).items()
    }


def one(states: dict[StateKey, Tensor], at: int) -> dict[StateKey, Tensor]:
    return {key: tensor[at : at + 1] for key, tensor in states.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operators", [cpu_operators(), NoOperators()], ids=["C++", "torch"])
@torch.inference_mode()
def test_sequences_are_as_by_themselves(dtype: torch.dtype, operators: Any) -> None:
    module, given = net(dtype), rows(1, 31, 32, dtype=dtype)
    code = code_of(type(module).forward)
    assert code is not None
    packed = PackedDeltaNet(module, code, CACHE, operators)
    theirs, ours = states(3, dtype), states(3, dtype)
    # By step: the sequence of each chunk, and its length. The last one decodes.
    position, begun = 0, set[int]()
    for step in ([(0, 1), (1, 3), (2, 9)], [(0, 2), (2, 5), (1, 1)], [(0, 1), (1, 1), (2, 1)]):
        parts, wanted, first = [], [], 0
        for number, length in step:
            own, begins = given[:, position : position + length], number not in begun
            cache = StateCache(one(theirs, number), begins=begins)
            wanted.append(module(own, **{CACHE: cache}))
            parts.append(Part(first, first + length, one(ours, number), begins))
            begun.add(number)
            first, position = first + length, position + length
        if all(length == 1 for _, length in step):
            parts = [Part(0, len(step), ours)]
        found = packed(parts, hidden_states=given[:, position - first : position])
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found, torch.cat(wanted, 1), atol=tolerance, rtol=tolerance)
        for key in KEYS:
            torch.testing.assert_close(ours[key], theirs[key], atol=tolerance, rtol=tolerance)


def test_a_module_that_computes_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, operators = net(torch.float32), cpu_operators()
    assert operators is not None, "the tests need a C++ compiler"
    given = module, CACHE, shapes(torch.float32)
    with torch.inference_mode():
        assert packed_delta_net(*given, module.forward, operators) is not None
        doubled = lambda *args, **kwargs: 1.01 * module(*args, **kwargs)  # noqa: E731
        assert packed_delta_net(*given, doubled, operators) is None
        assert packed_delta_net(*given[:2], {}, module.forward, operators) is None
        monkeypatch.setattr(packed_delta, "_RULE", "another")
        assert packed_delta_net(*given, module.forward, operators) is None


def test_a_dtype_without_a_tolerance_keeps_the_own_code() -> None:
    model: Any = tiny("qwen3_5_text", initializer_range=0.05)
    forwards = [mixer.forward for mixer in adopt_model(model.to(torch.float16)).mixers]
    for forward in forwards:
        assert isinstance(forward, MixerForward)
        assert forward.packed is None
    assert forwards
