"""Gated delta nets with fused operators, against transformers' own code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from reft_runtime.base.delta_rule import DeltaNets
from reft_runtime.base.recurrent import MixerForward, cache_argument
from reft_runtime.kernels.operators import cpu_operators
from reft_runtime.loading.loader import adopt_model

CONFIG = Qwen3_5TextConfig(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    vocab_size=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=40,
)


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config: Any = CONFIG
    made: nn.Module = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, 0).to(dtype)
    return made.requires_grad_(False)


CACHE = cache_argument(net(torch.float32))
"""What the net's own code calls the argument for its cache."""


def fused_forward(module: nn.Module) -> Any:
    operators = cpu_operators()
    assert operators is not None, "the tests need a C++ compiler"
    return DeltaNets(operators).forward_of(module, module.forward)


def rows(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.inference_mode()
def answers(forward: Any, given: Tensor) -> list[Tensor]:
    """The outputs for a prompt, for some more tokens at once, and for single ones; the states."""
    cache: Any = DynamicCache(config=CONFIG)
    parts = torch.split(given, [7, 3, 1, 1, 1], 1)
    made = [forward(part, **{CACHE: cache}) for part in parts]
    return [*made, cache.get_conv_state(0), cache.get_recurrent_state(0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_own_code_gives(dtype: torch.dtype) -> None:
    own, given = net(dtype), rows(3, 13, 32, dtype=dtype)
    fused = fused_forward(own)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for wanted, found in zip(answers(own, given), answers(fused, given), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_the_operators_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that are replaced are not called, neither for prompts nor for tokens."""
    module, given = net(torch.float32), rows(2, 13, 32, dtype=torch.float32)
    wanted = answers(module, given)
    calls = []

    def counted(own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(own.__name__)
            return own(*args, **kwargs)

        return call

    for name in (
        "torch_recurrent_gated_delta_rule",
        "torch_chunk_gated_delta_rule",
        "causal_conv1d_update",
    ):
        monkeypatch.setattr(modeling_qwen3_5, name, counted(getattr(modeling_qwen3_5, name)))
    fused = fused_forward(module)
    calls.clear()  # the trials called them
    for one, other in zip(wanted, answers(fused, given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert calls == []


class OnceRMSNormGated(Qwen3_5RMSNormGated):
    """As in Lara: only the result is rounded."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        normal = rms_norm(hidden_states.float(), (24,), self.weight.float(), self.variance_epsilon)
        return (normal * silu(gate.float())).to(hidden_states.dtype)


@pytest.mark.parametrize("kind", [Qwen3_5RMSNormGated, OnceRMSNormGated])
@torch.inference_mode()
def test_gated_norms_are_rounded_as_by_the_own_code(kind: type[nn.Module]) -> None:
    """Qwen3.5 rounds three times in bfloat16."""
    norm = kind(24).to(torch.bfloat16).requires_grad_(False)
    norm.load_state_dict({"weight": 1 + rows(24, dtype=torch.bfloat16) / 4})
    given, gate = rows(2, 400, 24, dtype=torch.bfloat16)
    wanted = norm(given, gate)
    operators = cpu_operators()
    assert operators is not None
    DeltaNets(operators).fuse_norms(norm)
    assert "forward" in vars(norm)
    assert float((norm(given, gate) == wanted).float().mean()) > 0.99


def test_gradients_go_through_the_own_code() -> None:
    own, given = net(torch.float32), rows(1, 5, 32, dtype=torch.float32).requires_grad_()
    fused = fused_forward(own)
    [wanted] = torch.autograd.grad(own(given).square().sum(), given)
    [found] = torch.autograd.grad(fused(given).square().sum(), given)
    torch.testing.assert_close(found, wanted)


def test_another_rule_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of the same names that compute something else keep the module as it is."""

    def other(name: str) -> Any:
        own = getattr(modeling_qwen3_5, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            made = own(*args, **kwargs)
            return (made[0] * 1.01, made[1]) if isinstance(made, tuple) else made * 1.01

        return changed

    for name in (
        "torch_recurrent_gated_delta_rule",
        "torch_chunk_gated_delta_rule",
        "causal_conv1d_update",
    ):
        monkeypatch.setattr(modeling_qwen3_5, name, other(name))
    assert fused_forward(net(torch.float32)) is None


def test_other_modules_are_none() -> None:
    assert fused_forward(nn.Linear(2, 2)) is None


def test_packed_steps_run_it_until_the_model_is_given_back() -> None:
    model = modeling_qwen3_5.Qwen3_5ForCausalLM(CONFIG)
    loaded = adopt_model(model)
    assert len(loaded.mixers) == 3
    for mixer in loaded.mixers:
        replaced = mixer.forward
        assert isinstance(replaced, MixerForward)
        names = getattr(replaced.own, "__func__").__globals__  # noqa: B009
        for name in ("torch_recurrent_gated_delta_rule", "causal_conv1d_update"):
            assert names[name] is not getattr(modeling_qwen3_5, name)
    loaded.give_back()
    assert all("forward" not in vars(mixer) for mixer in loaded.mixers)
