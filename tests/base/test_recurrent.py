"""Which modules are recurrent, what states they keep, and how their code is called."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reft_runtime.base.attention import running
from reft_runtime.base.recurrent import (
    EachTokenStep,
    MixerCall,
    Rows,
    StateCache,
    StateKey,
    StateShape,
    find_mixers,
    run_by_step,
)
from reft_runtime.errors import UnsupportedModel
from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import tiny

KINDS: dict[str, tuple[str, int, dict[Any, tuple[int, ...]]]] = {
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet", 3, {"recurrent": (4, 8, 8), "conv": (64, 4)}),
    "falcon_h1": ("FalconH1Mixer", 2, {"recurrent": (4, 8, 8), "conv": (48, 4)}),
    "jamba": ("JambaMambaMixer", 2, {"recurrent": (64, 8), "conv": (64, 4)}),
    "lfm3": ("Lfm3ShortConv", 2, {"conv": (32, 7)}),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_the_mixers_of_a_model_and_their_states(model_type: str) -> None:
    loaded = adopt_model(tiny(model_type))
    name, count, sizes = KINDS[model_type]
    assert [type(module).__name__ for module in loaded.mixers] == [name] * count
    shapes = {StateKey(kind, 0): StateShape(size, torch.float32) for kind, size in sizes.items()}
    assert [mixer.shapes for mixer in loaded.states] == [shapes] * count
    # Jamba's scan begins without a state, whatever there is.
    assert {mixer.continues for mixer in loaded.states} == {model_type != "jamba"}
    assert loaded.state_bytes == count * sum(4 * math.prod(size) for size in sizes.values())


def test_a_model_without_recurrent_layers_has_no_states() -> None:
    loaded = adopt_model(tiny("llama"))
    assert (loaded.mixers, loaded.states, loaded.state_bytes) == ((), (), 0)


def test_states_keep_the_model_s_dtype_and_float32_where_it_does() -> None:
    loaded = adopt_model(tiny("qwen3_5_text").to(torch.bfloat16))  # type: ignore[arg-type]
    assert {key.kind: shape.dtype for key, shape in loaded.states[0].shapes.items()} == {
        "conv": torch.bfloat16,
        "recurrent": torch.float32,
    }


class Inner(nn.Module):
    def forward(self, hidden: Tensor, past_key_values: Any = None) -> Tensor:
        past_key_values.update_conv_state(hidden.transpose(1, 2), 0)
        return hidden


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, hidden: Tensor, other: Any = None, past_key_values: Any = None) -> Tensor:
        return self._help(self.inner(hidden, past_key_values), past_key_values)

    def _help(self, rows: Tensor, cache: Any) -> Tensor:
        cache.update_recurrent_state(rows[:, -1], 0)
        return rows


class Seeing(EachTokenStep):
    """Notes what it is asked to run."""

    def __init__(self) -> None:
        self.calls: list[MixerCall] = []

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        self.calls.append(call)
        return call.rows["hidden"]


def test_a_mixer_inside_another_belongs_to_it() -> None:
    model: Any = nn.Sequential(Outer(), nn.Linear(2, 2))
    assert find_mixers(model) == (model[0],)


def test_arguments_of_a_call() -> None:
    model: Any = nn.Sequential(Outer())
    run_by_step(find_mixers(model))
    rows = torch.ones(1, 3, 2)
    with running(step := Seeing()):
        model[0](rows, other=(rows, rows))
        model[0](hidden=rows, other=None, past_key_values=None)
    assert [sorted(call.rows) for call in step.calls] == [["hidden", "other"], ["hidden"]]
    assert [call.tokens for call in step.calls] == [3, 3]
    for other in (torch.ones(2, 2), torch.ones(4, 1, 3), [rows], object()):
        with running(step), pytest.raises(UnsupportedModel, match="gets other that is not one"):
            model[0](rows, other=other)


def test_a_mixer_that_attends_or_takes_no_cache_is_refused() -> None:
    class Both(nn.Module):
        def forward(self, hidden: Tensor, past_key_values: Any = None) -> Tensor:
            ALL_ATTENTION_FUNCTIONS.get_interface  # type: ignore[name-defined]  # noqa: B018, F821
            return past_key_values.update_conv_state(hidden, 0)  # type: ignore[no-any-return]

    class Neither(nn.Module):
        def forward(self, hidden: Tensor, memory: Any) -> Tensor:
            return memory.update_conv_state(hidden, 0)  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedModel, match="Both attends and keeps states in one"):
        find_mixers(nn.Sequential(Both()))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="Neither takes its cache by no known name"):
        run_by_step([Neither()])


def test_the_newest_inputs_of_a_convolution() -> None:
    kept = torch.full((1, 1, 4), torch.nan)
    key = StateKey("conv", 0)
    short = torch.tensor([[[1.0, 2.0]]])
    made = StateCache({key: kept}, begins=True).update_conv_state(short, 0)
    assert made.tolist() == kept.tolist() == [[[0, 0, 1, 2]]]
    long = torch.arange(3.0, 9.0)[None, None]
    made = StateCache({key: kept}, begins=False).update_conv_state(long, 0)
    assert made.tolist() == [[[0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]]
    assert kept.tolist() == [[[5, 6, 7, 8]]]
    made = StateCache({key: kept}, begins=True).update_conv_state(long, 0)
    assert made.tolist() == [[[3, 4, 5, 6, 7, 8]]]
    assert kept.tolist() == [[[5, 6, 7, 8]]]


def test_states_as_releases_before_5_22_read_them() -> None:
    conv, recurrent = torch.ones(1, 2, 3), torch.zeros(1, 2)
    states = {StateKey("conv", 1): conv, StateKey("recurrent", 0): recurrent}
    layer = StateCache(states, begins=False).layers[7]
    assert layer.conv_states[1] is conv
    assert layer.recurrent_states[0] is recurrent
    assert not layer.record_past


def test_weights_that_a_mixer_s_own_code_reads_stay_as_they_are() -> None:
    model = tiny("jamba")
    before = copy.deepcopy(model.state_dict())
    loaded = adopt_model(model)
    for mixer in loaded.mixers:
        read: Any = mixer.dt_proj
        assert not read.weight.is_mkldnn
    assert loaded.packed.layers or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    loaded.give_back()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
