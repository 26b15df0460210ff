"""The check at load: what is served is the model, and good models are not refused by chance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from reft_runtime.base.attention import Reach, Scoring, packed_attention, running_step
from reft_runtime.base.linears import Merged
from reft_runtime.base.model import forward
from reft_runtime.base.probe import AskedMask, CausalStep
from reft_runtime.base.recurrent import MixerCall, StateCache, StateKey
from reft_runtime.errors import UnsupportedModel
from reft_runtime.kernels.cpu.decoder_layer import DecoderLayer, LayerKernels, LayerWeights
from reft_runtime.kv.row_attention import TOGETHER_FROM, RowAttentionStep
from reft_runtime.kv.rows import RowStorage
from reft_runtime.kv.states import StateStep, StateStorage
from reft_runtime.loading.loader import adopt_model, load_model
from reft_runtime.loading.samples import samples_for
from reft_runtime.machine.dtypes import name_of
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.plan import Chunk
from tests.helpers.models import (
    VOCABULARY,
    WINDOW,
    answers,
    generate,
    make_core,
    prompt,
    request,
    run,
    tiny,
)
from tools.tiny_models import tiny_config, tiny_model

BFLOAT16 = torch.bfloat16


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    cast: PreTrainedModel = model.to(dtype)  # type: ignore[arg-type]
    return cast


@torch.inference_mode()
def logprobs(model: PreTrainedModel, tokens: tuple[int, ...], implementation: str) -> Tensor:
    """The model's own log-probabilities of a prompt's tokens but the first."""
    model.set_attn_implementation(implementation)
    ids = torch.tensor(tokens)
    rows = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    found: Tensor = rows.gather(1, ids[1:, None])[:, 0]
    return found


def served_logprobs(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    core = make_core(adopt_model(copy.deepcopy(model)))
    found = answers(core, [request("a", tokens, max_tokens=1, prompt_logprobs=0)])["a"]
    assert not found.failed
    return torch.tensor([each.logprob for each in found.prompt_logprobs])


@pytest.mark.parametrize("model_type", ["olmo", "olmo2", "olmo3", "flex_olmo", "granite", "llama"])
def test_bfloat16_is_as_near_as_the_models_own_attention(model_type: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
        "granite": {"hidden_size": 64, "num_hidden_layers": 8, "residual_multiplier": 0.22},
    }
    model = in_dtype(tiny(model_type, **changes.get(model_type, {})), BFLOAT16)
    tokens = prompt(40)
    own, other = (logprobs(model, tokens, name) for name in ("eager", "sdpa"))
    served = served_logprobs(model, tokens)
    assert float((served - own).abs().median()) < 4 * float((other - own).abs().median())


@torch.inference_mode()
def errors(
    exact: PreTrainedModel, dtype: torch.dtype, tokens: tuple[int, ...], first: int, folder: Path
) -> tuple[float, float]:
    """How far the engine and transformers, in a dtype, are from float32 with the same weights.

    They are medians over the tokens from `first` on.
    """
    exact.load_state_dict({name: one.to(dtype).float() for name, one in exact.state_dict().items()})
    exact.save_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded, ids, at = load_model(str(folder), name_of(dtype)), torch.tensor(tokens), len(tokens)
    wanted = exact(input_ids=ids[None]).logits[0].log_softmax(-1)
    served = forward(loaded.model, ids, torch.arange(at), torch.arange(at), CausalStep())
    found = [
        float((logits.float().log_softmax(-1) - wanted).norm(dim=-1)[first:].median())
        for logits in (served, own(input_ids=ids[None]).logits[0])
    ]
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_late_tokens_are_as_near_to_float32_as_those_of_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rotary frequencies that are rounded to half precision turn late tokens to other angles."""
    exact = tiny("llama", max_position_embeddings=1024, head_dim=32)
    served, own = errors(exact, dtype, prompt(1000), 500, tmp_path)
    assert served < 1.2 * own


@pytest.mark.parametrize("model_type", ["flex_olmo", "gpt_oss"])
def test_norms_that_are_rounded_once_stay_so(model_type: str, tmp_path: Path) -> None:
    exact = tiny_model(tiny_config(model_type), seed=1)
    served, own = errors(exact, BFLOAT16, prompt(200), 0, tmp_path)
    assert served < 1.1 * own


def test_recurrent_layers_in_float16_with_weights_in_float32(tmp_path: Path) -> None:
    tiny_model(tiny_config("olmo_hybrid")).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float16")
    assert {torch.float16, torch.float32} == {one.dtype for one in loaded.model.parameters()}


DEEP: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 26},
    "granite_swa": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 8},
}
"""Models with one attention implementation, or with layers that do not attend."""


@pytest.mark.parametrize("model_type", DEEP)
def test_deep_models_are_not_refused_for_their_rounding(model_type: str) -> None:
    for seed in range(2):
        adopt_model(in_dtype(deep(model_type, seed), BFLOAT16))


def deep(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of `DEEP`, its kinds of layers by turns as in the family's own configuration."""
    changes = dict(DEEP[model_type])
    count = changes["num_hidden_layers"]
    changes["layer_types"] = (list(tiny_config(model_type).layer_types) * count)[:count]
    return tiny_model(tiny_config(model_type, **changes), seed=seed)


def test_faults_of_models_with_one_attention_implementation_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose_keys(monkeypatch, lambda chunk: True)
    refused(in_dtype(deep("granite_swa"), BFLOAT16), "chunks|decode")


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("multiplier", [0.22, 0.97])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_layers_that_scale_what_they_add_keep_their_code(
    dtype: torch.dtype, multiplier: float, scale: float
) -> None:
    # With small weights a layer adds little to its rows: a share of those would hide it.
    model = tiny("granite", residual_multiplier=multiplier, initializer_range=scale)
    loaded = adopt_model(in_dtype(model, dtype))
    assert not any("forward" in vars(layer) for layer in loaded.layers)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_plain_layers_are_fused_in_every_dtype(dtype: torch.dtype) -> None:
    for scale in (0.02, 0.1, 0.3):
        loaded = adopt_model(in_dtype(tiny("llama", initializer_range=scale), dtype))
        assert all("forward" in vars(layer) for layer in loaded.layers)


@pytest.mark.parametrize("kept", ["buffer", "list", "tensor"])
def test_layers_that_differ_in_more_than_weights_keep_their_code(kept: str) -> None:
    model = in_dtype(tiny("llama"), BFLOAT16)
    for index, layer in enumerate(dict(model.named_modules())["model.layers"].children()):
        share: Any = torch.tensor([1.0 if index == 0 else 0.9], dtype=BFLOAT16)
        mlp: Any = layer.mlp
        if kept == "buffer":
            mlp.register_buffer("share", share)
        else:
            mlp.share = share.tolist() if kept == "list" else share
        mlp.__class__ = SharedMLP
    loaded = adopt_model(model)
    assert ["forward" in vars(layer) for layer in loaded.layers] == [True, False, False, False]


class SharedMLP(LlamaMLP):
    """One that gives a share of what it computes, which may be all of it."""

    def forward(self, x: Tensor) -> Tensor:
        """A share of what its parent gives."""
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        share: Any = self.share
        return out * float(share[0])


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_a_window_that_lives_in_the_mask_alone(length: int) -> None:
    model = tiny("phimoe", sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    core = make_core(adopt_model(copy.deepcopy(model)))
    got = run(core, [request("a", prompt(length), max_tokens=12)])["a"][0]
    assert got == generate(model, prompt(length), 12)


def test_windows_larger_than_any_probe_are_known() -> None:
    model = tiny("phimoe", sliding_window=100, num_local_experts=4, num_experts_per_tok=2)
    core = make_core(adopt_model(copy.deepcopy(model)))
    got = run(core, [request("a", prompt(120), max_tokens=8)])["a"][0]
    assert got == generate(model, prompt(120), 8)


def asked(sees: Callable[..., Any]) -> AskedMask:
    return AskedMask(lambda batch, head, query, key: sees(query, key))


def test_the_reach_of_a_mask() -> None:
    assert asked(lambda q, k: k <= q).reach(1000) == Reach()
    for length in (1, 2, 63, 64, 100, 999):
        window = asked(lambda q, k, length=length: (k <= q) & (k > q - length))
        chunks = asked(lambda q, k, length=length: (k <= q) & (k // length == q // length))
        alone = length == 1  # a window and a chunk of one token are the same
        assert window.reach(1000) == (Reach(chunk=1) if alone else Reach(window=length))
        assert chunks.reach(1000) == Reach(chunk=length)
        assert window.reach(length) == chunks.reach(length) == Reach()  # never reached
    assert asked(lambda q, k: k <= q).reach(1) == Reach()


@pytest.mark.parametrize(
    "sees",
    [
        lambda q, k: q >= 0,  # both ways
        lambda q, k: k < q,  # not itself
        lambda q, k: (k <= q) & (k // 16 == q // 16) & (k > q - 8),  # windows in chunks
        lambda q, k: (k <= q) & ((k + 4) // 16 == (q + 4) // 16),  # the first chunk is shorter
        lambda q, k: (k <= q) & ((k // 16 == q // 16) | (k < 1)),  # chunks and the beginning
        lambda q, k: k // 16 == q // 16,  # both ways in chunks
        lambda q, k: (k <= q) & (k % 2 == 0),  # every other
        lambda q, k: (k <= q) & ((k > q - 8) | (k < 4)),  # a window and the beginning
        lambda q, k: (k <= q) & ((k > q - 8) | (q >= 200)),  # a window, and then none
        lambda q, k: (k <= q) | (k < 3),  # a prefix both ways
    ],
)
def test_other_masks_are_refused(sees: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match="neither causal"):
        asked(sees).reach(256)


# What goes wrong behind the fused operators, the storage or the attention is seen.


def refused(model: PreTrainedModel, why: str = "differ from its own") -> None:
    with pytest.raises(UnsupportedModel, match=why):
        adopt_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_wrong_merge_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = Merged.merge

    def scaled(self: Merged) -> None:
        merge(self)
        product = self.product
        self.product = lambda rows: 1.5 * product(rows)

    monkeypatch.setattr(Merged, "merge", scaled)
    refused(in_dtype(tiny("llama"), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("decoding", [False, True])
def test_keys_that_are_lost_between_chunks_are_seen(
    dtype: torch.dtype, decoding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_keys(monkeypatch, lambda chunk: (chunk.length == 1) == decoding)
    refused(in_dtype(tiny("llama"), dtype), "decode" if decoding else "chunks")


def lose_keys(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[Chunk], bool], first: int = 0
) -> None:
    """Let chunks that go on lose the keys and values before them, from token `first` on."""
    prepare = RowStorage.prepare

    def forgetful(self: RowStorage, chunks: Any) -> Any:
        chunks = prepare(self, chunks)
        for chunk in chunks:
            if chunk.start and when(chunk):
                row = self.where(chunk.sequence)
                for part in range(len(self._layout.parts)):
                    row.part(part)[:, first : chunk.start] = 0
        return chunks

    monkeypatch.setattr(RowStorage, "prepare", forgetful)


def test_sequences_that_see_each_other_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = RowStorage.attention

    def mixed(self: RowStorage, chunks: Any) -> Any:
        first = chunks[-1].sequence
        where = self.where
        monkeypatch.setattr(self, "where", lambda s: where(first), raising=False)
        return attention(self, chunks)

    monkeypatch.setattr(RowStorage, "attention", mixed)
    refused(tiny("llama"), "differ from its own|packed")


def test_logits_that_are_not_finite_are_told() -> None:
    model = in_dtype(tiny("llama"), torch.float16)
    dict(model.named_parameters())["lm_head.weight"].data *= 6e4
    refused(model, "not finite in float16; try another dtype")


def test_a_model_that_is_all_rounding_is_told() -> None:
    model = in_dtype(tiny("llama", num_hidden_layers=24), BFLOAT16)
    for name, weight in model.named_parameters():
        if "q_proj" in name:
            weight.data *= 200  # whom a token attends to turns on the last bit
    refused(model, "take float32")


def test_attention_that_is_not_called_through_the_interface_is_told() -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        adopt_model(tiny_model(tiny_config("xglm")))
    message = refusal.value.message
    assert "interface" in message
    assert "argument" not in message


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 8, 8)])
def test_masks_of_a_models_own_code_are_told(
    mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: mask
    )
    refused(tiny("llama"), "attention masks are not those")


def test_attention_in_another_dtype_than_keys_are_kept_in_is_told() -> None:
    model = in_dtype(tiny("llama"), BFLOAT16)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(lambda module, args, output: output.float())
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda module, args: (args[0].to(BFLOAT16),))
    with pytest.raises(UnsupportedModel, match="bfloat16; take another dtype"):
        adopt_model(model)


def test_packed_attention_without_a_step_is_told() -> None:
    heads = torch.zeros(1, 1, 1, 8)
    with pytest.raises(UnsupportedModel, match="interface"):
        packed_attention(nn.Module(), heads, heads, heads, None)


# What goes wrong at some lengths alone is seen: each of these is red without the samples for it.


@pytest.mark.parametrize(
    ("dtype", "seen"),
    [(torch.float32, 39), (torch.float32, 41), (torch.float32, None), (BFLOAT16, None)],
)
def test_a_window_that_attention_does_not_keep_to_is_seen(
    dtype: torch.dtype, seen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = RowAttentionStep.attend

    def off(self: Any, layer: int, query: Any, key: Any, value: Any, scoring: Scoring) -> Tensor:
        return attend(self, layer, query, key, value, replace(scoring, window=seen))

    model = tiny("mistral", sliding_window=40)
    monkeypatch.setattr(RowAttentionStep, "attend", off)
    refused(in_dtype(model, dtype))


@pytest.mark.parametrize("way", ["whole", "going on", "decoding"])
def test_one_way_of_computing_that_ignores_its_window_is_seen(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = RowAttentionStep.attend

    def off(self: Any, layer: int, query: Any, key: Any, value: Any, scoring: Scoring) -> Tensor:
        made = attend(self, layer, query, key, value, scoring)
        wide = attend(self, layer, query, key, value, replace(scoring, window=None))
        for segment in self._segments:
            going_on = "decoding" if segment.length == 1 else "going on"
            if way == ("whole" if segment.start == 0 else going_on):
                own = slice(segment.first, segment.first + segment.length)
                made[own] = wide[own]
        return made

    monkeypatch.setattr(RowAttentionStep, "attend", off)
    monkeypatch.setattr(RowAttentionStep, "whole_layers", lambda *_: None)
    refused(tiny("mistral", sliding_window=40), "past its window")


def test_a_compiled_layer_that_ignores_its_window_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = LayerKernels.decoder_layer

    def off(self: LayerKernels, weights: LayerWeights) -> DecoderLayer | None:
        return made(self, replace(weights, scoring=replace(weights.scoring, window=0)))

    monkeypatch.setattr(LayerKernels, "decoder_layer", off)
    refused(tiny("mistral", sliding_window=40), "past its window")


def test_keys_that_are_lost_behind_the_first_block_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose_keys(monkeypatch, lambda chunk: True, first=BLOCK_TOKENS)
    refused(tiny("llama"))


@pytest.mark.parametrize("after", ["beginning", "going on"])
def test_short_chunks_that_lose_their_keys_are_seen(
    after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their tokens attend one by one, as those that decode do.
    attend = RowAttentionStep.attend

    def off(self: Any, layer: int, query: Any, *args: Any) -> Tensor:
        made = attend(self, layer, query, *args)
        for segment in self._segments:
            if 1 < segment.length < TOGETHER_FROM and (segment.start == 0) == (
                after == "beginning"
            ):
                made[segment.first] = 0
        return made

    monkeypatch.setattr(RowAttentionStep, "attend", off)
    refused(tiny("llama"))


@pytest.mark.parametrize(("experts", "tokens"), [(32, 31), (32, 32), (32, 33), (128, 129)])
def test_a_layer_that_differs_at_one_number_of_tokens_is_seen(
    experts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = MixtralSparseMoeBlock.forward

    def forward(self: Any, rows: Tensor) -> Any:
        out = own(self, rows)
        return out.flip(1) if rows.shape[1] == tokens and running_step() is not None else out

    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", forward)
    refused(tiny("mixtral", num_local_experts=experts), "as large as its routing")


# The same of recurrent states: those that nobody has had yet are zero here, as a beginning is.


@pytest.fixture
def zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages of states begin with zeros."""
    own = StateStorage.__init__

    def begin(self: StateStorage, *args: Any) -> None:
        own(self, *args)
        for mixer in self.states:
            for tensor in mixer.values():
                tensor.zero_()

    monkeypatch.setattr(StateStorage, "__init__", begin)


@pytest.mark.usefixtures("zeros")
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_sequence_that_begins_with_the_state_of_another_is_seen(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = StateStep._in_order

    def going_on(self: Any, mixer: int, call: Any, first: int, stop: int, *args: Any, begins: bool):  # type: ignore[no-untyped-def]
        begins = begins and stop - first != tokens
        return in_order(self, mixer, call, first, stop, *args, begins=begins)

    monkeypatch.setattr(StateStep, "_in_order", going_on)
    refused(tiny("falcon_h1"), "in a later sequence")


@pytest.mark.usefixtures("zeros")
def test_what_is_left_of_another_convolution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    update = StateCache.update_conv_state

    def partly(self: StateCache, conv_states: Tensor, *args: Any, **more: Any) -> Tensor:
        kept = self._states[StateKey("conv", 0)]
        before = kept[..., : -conv_states.shape[-1]].clone()
        every = update(self, conv_states, *args, **more)
        if self._begins:
            kept[..., : -conv_states.shape[-1]] = before
        return every

    monkeypatch.setattr(StateCache, "update_conv_state", partly)
    refused(tiny("falcon_h1"), "in a later sequence")


def test_states_that_a_decode_does_not_keep_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    together = MixerCall.together

    def forgetful(self: MixerCall, first: int, stop: int, states: StateCache) -> Any:
        copies = {key: state.clone() for key, state in states._states.items()}
        return together(self, first, stop, StateCache(copies, begins=False))

    monkeypatch.setattr(MixerCall, "together", forgetful)
    refused(tiny("falcon_h1"), "in decode steps")


def test_decoding_sequences_that_are_mixed_up_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(model: Any, ids: Tensor, positions: Tensor, keep: Tensor, step: Any) -> Tensor:
        rows: Tensor = forward(model, ids, positions, keep, step)
        decodes = len(ids) > 1 and int((positions[1:] == positions[:-1] + 1).sum()) == 0
        return rows.roll(1, 0) if decodes else rows

    monkeypatch.setattr("reft_runtime.loading.fidelity.forward", mixed)
    refused(tiny("llama"), "decode steps")


def test_angles_that_depend_on_other_sequences_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = own(self, x, position_ids)
        return (cos, sin) if int(position_ids.max()) < 200 else (cos * 1.1, sin * 1.1)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    refused(tiny("llama"))


def test_samples_are_ordinary_tokens_of_every_length() -> None:
    config = tiny("mixtral", num_local_experts=128).config
    samples = samples_for(config, {WINDOW}, 256)
    tokens = torch.cat([sample.tokens for sample in samples])
    assert int(tokens.min()) >= VOCABULARY // 8
    assert int(tokens.max()) < VOCABULARY // 2
    ends = {end for sample in samples for end in sample.ends}
    assert {WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3} <= ends
    assert all(len(s.tokens) <= 5 for s in samples_for(config, {WINDOW}, 5))


def test_samples_come_in_every_way_of_serving() -> None:
    config = tiny("mixtral", num_local_experts=128).config
    samples = samples_for(config, (), 256)
    steps = [
        [part for sample in samples if (part := sample.chunks.get(turn))]
        for turn in range(max(sample.over for sample in samples))
    ]
    lengths = [[stop - start for start, stop in step] for step in steps]
    assert all(lengths)
    assert any(len(step) > 2 and set(step) == {1} for step in lengths)  # decodes of several
    assert any(1 in step and max(step) > 1 for step in lengths)  # decodes beside chunks
    assert any(start and stop - start > 1 for step in steps for start, stop in step)
    assert [129] in lengths  # more tokens than experts, alone
    assert {(1,), (2,), (3,)} <= set(map(tuple, lengths))  # around those that a token gets
    last = [sample for sample in samples if sample.position]
    assert [sample.position + len(sample.tokens) for sample in last] == [256]
    first = min(sample.over for sample in samples)
    assert any(sample.turn >= first for sample in samples)  # in the memory of another
