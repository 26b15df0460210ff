"""Fused operators are used where they give the same, and nowhere else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from reft_runtime.base import fused
from reft_runtime.base.compiled_layer import AHEAD_ROWS
from reft_runtime.errors import UnsupportedModel
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.cpu.decoder_layer import LayerRun
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import DEVICE, generate, make_core, prompt, request, run, tiny


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operator was called."""
    counts: dict[str, int] = {}
    operators: list[tuple[type, str]] = [(LayerRun, "compute")]
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
        # All layers at once, and the norm behind them.
        ("llama", {"compute": 1, "rms_norm": 1}),
        ("qwen2", {"compute": 1, "rms_norm": 1}),
        ("mistral", {"compute": 1, "rms_norm": 1}),
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


def test_attention_with_a_gate_is_fused_with_the_operators_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """These rotate the first numbers of heads, too."""
    pytest.importorskip("triton")
    from reft_runtime.kernels.cuda.operators import TritonOperators

    model, rotated, real = tiny("qwen3_5_text"), list[int](), TritonOperators.rotate_

    def rotate_(self: TritonOperators, query: Tensor, *others: Tensor) -> None:
        rotated.append(query.shape[-1])
        real(self, query, *others)

    monkeypatch.setattr(fused, "operators_for", lambda device: TritonOperators())
    monkeypatch.setattr(TritonOperators, "rotate_", rotate_)
    core = make_core(adopt_model(copy.deepcopy(model).to(DEVICE)))  # type: ignore[arg-type]
    rotated.clear()
    found = run(core, [request("a", prompt(5), max_tokens=2)])["a"][0]
    assert found == generate(model, prompt(5), 2)
    assert rotated == [2, 2]


def test_a_compiled_layer_that_fails_leaves_it_to_the_operators(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    model = tiny("llama")
    wanted = generate(model, prompt(5), 6)
    monkeypatch.setattr(LayerRun, "compute", lambda *_: None)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls["add_rms_norm"] == 24


def test_layers_are_computed_ahead_in_steps_of_few_tokens(calls: dict[str, int]) -> None:
    model = tiny("llama")
    wanted = generate(model, prompt(AHEAD_ROWS + 1), 6)
    core = make_core(adopt_model(model))
    calls.clear()
    assert run(core, [request("a", prompt(AHEAD_ROWS + 1), max_tokens=6)])["a"][0] == wanted
    assert calls["compute"] == 4 + 5, "the prompt's layers one by one"


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_layers_are_computed_ahead_up_to_a_hook(where: str, calls: dict[str, int]) -> None:
    plain = tiny("llama")
    fused = copy.deepcopy(plain)
    core = make_core(adopt_model(fused))

    def doubled(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 2

    def turned(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> object:
        return (args[0].flip(-1), *args[1:]), kwargs

    for model in (plain, fused):
        layer = model.model.layers[2]
        if where == "before":
            layer.register_forward_pre_hook(turned, with_kwargs=True)
        else:
            layer = layer.mlp if where == "inside" else layer
            layer.register_forward_hook(doubled)
    wanted = generate(plain, prompt(5), 6)
    calls.clear()
    assert run(core, [request("a", prompt(5), max_tokens=6)])["a"][0] == wanted
    assert calls["compute"] == 6 * 2, "the layers up to the hook, and those behind it"


def looping(
    between: Callable[[Tensor], Tensor], *, faster: bool = False, order: slice = slice(None)
) -> Callable[..., object]:
    """A Llama model's forward that calls its layers in an `order`, and does something `between`.

    If it is `faster`, the positions of each layer turn faster than those of the one before.
    """

    def forward(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            self.config, hidden, attention_mask, None, position_ids=position_ids
        )
        angles = self.rotary_emb(hidden, position_ids=position_ids)
        for number, layer in enumerate(list(self.layers)[order], 1):
            if faster:
                angles = self.rotary_emb(hidden, position_ids=position_ids * number)
            hidden = between(layer(hidden, attention_mask=mask, position_embeddings=angles))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward


@pytest.mark.parametrize("changes", ["rows", "angles", "both"])
def test_a_model_that_does_something_between_its_layers(
    changes: str, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    forward = looping(
        lambda rows: rows if changes == "angles" else rows.flip(-1), faster=changes != "rows"
    )
    monkeypatch.setattr(LlamaModel, "forward", forward)
    model = tiny("llama")
    model.generation_config.use_cache = False
    wanted = generate(model, prompt(5), 6)
    assert answer(copy.deepcopy(model), calls) == wanted
    assert calls["compute"] == 6 * 4, "each layer by itself, once that was seen"


def test_a_model_that_calls_its_layers_backwards(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    forward = looping(lambda rows: rows, order=slice(None, None, -1))
    monkeypatch.setattr(LlamaModel, "forward", forward)
    model = tiny("llama")
    model.generation_config.use_cache = False
    wanted = generate(model, prompt(5), 6)
    assert answer(copy.deepcopy(model), calls) == wanted


def test_a_forward_that_a_caller_replaces_later_is_used(calls: dict[str, int]) -> None:
    plain = tiny("llama")
    plain.generation_config.use_cache = False
    fused = copy.deepcopy(plain)
    core = make_core(adopt_model(fused))
    for model in (plain, fused):
        layer = model.model.layers[1]
        layer.forward = twice(layer.forward)
    wanted = generate(plain, prompt(5), 6)
    calls.clear()
    assert run(core, [request("a", prompt(5), max_tokens=6)])["a"][0] == wanted
    assert calls["compute"] == 6 * 3, "the first layer, the second, and those behind it"


def twice(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's forward whose output is doubled in place."""

    def forward(*args: object, **kwargs: object) -> Tensor:
        return own(*args, **kwargs).mul_(2)

    return forward


def test_a_model_that_changes_rows_in_place_between_its_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LlamaModel, "forward", looping(lambda rows: rows.copy_(rows.flip(-1))))
    with pytest.raises(UnsupportedModel, match="logits"):
        adopt_model(tiny("llama"))


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
