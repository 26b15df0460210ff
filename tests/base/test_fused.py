"""Fused operators are used where they give the same, and nowhere else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.cpu.decoder_layer import DecoderLayer
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import generate, make_core, prompt, request, run, tiny


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operator was called."""
    counts: dict[str, int] = {}
    operators: list[tuple[type, str]] = [(DecoderLayer, "compute")]
    operators += [(Kernels, name) for name in ("rms_norm", "add_rms_norm", "silu_mul", "rotate_")]
    for kind, name in operators:

        def counted(
            *args: object, name: str = name, own: object = getattr(kind, name), **kwargs: object
        ) -> object:
            counts[name] = counts.get(name, 0) + 1
            return own(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(kind, name, counted)
    return counts


def answer(model: PreTrainedModel, calls: dict[str, int]) -> list[int]:
    core = make_core(adopt_model(model))
    calls.clear()
    return run(core, [request("a", prompt(5), max_tokens=6)])["a"][0]


@pytest.mark.parametrize(
    ("model_type", "used"),
    [
        # Whole layers, and the norm behind them.
        ("llama", {"compute": 4, "rms_norm": 1}),
        ("qwen2", {"compute": 3, "rms_norm": 1}),
        ("mistral", {"compute": 3, "rms_norm": 1}),
        # Norms of queries and keys too: fused piece by piece.
        ("qwen3", {"rms_norm": 13, "silu_mul": 3, "rotate_": 3}),
        ("olmo2", {"rms_norm": 13, "silu_mul": 3, "rotate_": 3}),
        # Norms whose weight is how far a factor is from one, and another activation.
        ("gemma3_text", {"rms_norm": 18, "rotate_": 3}),
        # The first numbers of each head are rotated, by the function itself or before it.
        ("qwen3_5_text", {"rms_norm": 11, "silu_mul": 4, "rotate_": 1}),
        ("stablelm", {"silu_mul": 3, "rotate_": 3}),
        ("gpt2", {}),
    ],
)
def test_what_is_fused(model_type: str, used: dict[str, int], calls: dict[str, int]) -> None:
    model = tiny(model_type)
    wanted = generate(model, prompt(5), 6)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls == {name: 6 * count for name, count in used.items()}


def test_without_torchs_functions_the_operators_of_a_layer_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    monkeypatch.setattr("reft_runtime.kernels.cpu.decoder_layer.torch_functions", lambda _: None)
    model = tiny("llama")
    wanted = generate(model, prompt(5), 6)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls == {"rms_norm": 30, "add_rms_norm": 24, "silu_mul": 24, "rotate_": 24}


def test_a_compiled_layer_that_fails_leaves_it_to_the_operators(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    model = tiny("llama")
    wanted = generate(model, prompt(5), 6)
    monkeypatch.setattr(DecoderLayer, "compute", lambda *_: None)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls["add_rms_norm"] == 24


def test_what_looks_the_same_and_is_not_keeps_its_own_code(calls: dict[str, int]) -> None:
    # Granite scales what it adds to the residual.
    granite = tiny("granite", residual_multiplier=0.5)
    wanted = generate(granite, prompt(5), 6)
    assert answer(copy.deepcopy(granite), calls) == wanted
    assert "add_rms_norm" not in calls
    assert calls["silu_mul"]


@pytest.mark.parametrize(
    "path", ["mlp.act_fn", "self_attn.q_proj", "input_layernorm", "mlp", "self_attn"]
)
@torch.inference_mode()
def test_hooks_inside_a_fused_layer_run(path: str) -> None:
    plain = tiny("llama")
    fused = adopt_model(copy.deepcopy(plain)).model

    def double(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (2 * output[0], *output[1:])
        return 2 * output

    for model in (plain, fused):
        model.get_submodule(f"model.layers.1.{path}").register_forward_hook(double)
    ids = torch.tensor(prompt(7))
    core_step = make_core(adopt_model(fused))
    wanted = plain(input_ids=ids[None]).logits[0, -1]
    given = run(core_step, [request("a", prompt(7), max_tokens=1)])["a"][0]
    assert given == [int(wanted.argmax())]


def test_without_a_compiler_nothing_is_fused(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    monkeypatch.setattr("reft_runtime.kernels.operators.kernels", lambda: None)
    model = tiny("llama")
    wanted = generate(model, prompt(5), 6)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls == {}
