"""Tiny random models and edits, a driver of the engine's core, and independent references."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.edits.sites import EditSites
from reft_runtime.engine import runner
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.events import Event, Failed, PromptScored, TokenMade
from reft_runtime.interventions import CanonicalEdit, Positions
from reft_runtime.loading.loader import adopt_model
from reft_runtime.outputs import TokenLogprob
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.plan import StepPlan
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.sequence import Sequence
from tools import tiny_models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Of the engine's copy of a model; what it is compared with stays on the CPU."""

VOCABULARY = tiny_models.VOCABULARY
HIDDEN = tiny_models.HIDDEN
MAX_LENGTH = tiny_models.MAX_LENGTH
WINDOW = tiny_models.WINDOW

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
"""Multi-head latent attention, with latents that are smaller than keys and values."""

_OWN: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
    },
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "minicpm3": _LATENT,
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "tie_word_embeddings": False,
    },
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo2": {},
    "phi3": {"sliding_window": None},
}

_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_CONV = {"layer_types": ["conv", "conv", "full_attention"]}

RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, **_SHARED},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_SHARED},
    "olmo_hybrid": _DELTA,
    "kimi_linear": {
        **_LATENT,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        **_EXPERTS,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "mamba", "attention"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        **_EXPERTS,
    },
    "falcon_h1": {
        **_MAMBA,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
    },
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [2], "attn_rotary_emb": 8},
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": _CONV,
    "lfm2_moe": {**_CONV, "num_experts": 4, "num_dense_layers": 1, **_EXPERTS},
    "lfm3": _CONV,
    "mamba": {"num_hidden_layers": 2},
    "mamba2": {
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
}
"""Models with recurrent layers: gated delta nets, Mamba 1 and 2, short convolutions."""


def tiny(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose greedy answers vary with the prompt."""
    values = {**_COMMON, **_OWN.get(model_type, {}), **RECURRENT.get(model_type, {}), **changes}
    if model_type in ("gpt2", "gpt_neox"):
        del values["num_key_value_heads"]
    if model_type == "gpt2":
        values["n_inner"] = values.pop("intermediate_size")
    return tiny_models.tiny_model(AutoConfig.for_model(model_type, **values), seed=seed)


@cache
def tiny_llama() -> tuple[PreTrainedModel, LoadedModel]:
    """A grouped-query Llama as transformers runs it, and the same weights as the engine does."""
    model = tiny("llama")
    return model, adopt_model(copy.deepcopy(model).to(DEVICE))  # type: ignore[arg-type]


def make_core(
    loaded: LoadedModel | None = None,
    *,
    max_running: int = 16,
    max_step_tokens: int = 512,
    kv_tokens: int = 16 * (MAX_LENGTH + 16),
    prefix_cache: bool = True,
    snapshots: int = 64,
) -> EngineCore:
    """A core with room enough; of the tiny Llama unless another is given.

    Its clock stands still, so that its steps are the same in every run.
    """
    config = EngineConfig(
        max_running, max(max_step_tokens, max_running), kv_tokens, prefix_cache, snapshots
    )
    if loaded is not None:
        return EngineCore(loaded, config, clock=lambda: 0.0)
    with patch.object(runner, "EditSites", _tiny_sites):
        return EngineCore(tiny_llama()[1], config, clock=lambda: 0.0)


def _tiny_sites(*of_the_model: Any) -> EditSites:
    """The tiny Llama's, which each of its cores would find out anew."""
    if not _sites:
        _sites.append(EditSites(*of_the_model))
    return _sites[0]


_sites: list[EditSites] = []


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())


def request(
    name: str,
    tokens: SequenceOf[int],
    *interventions: AppliedIntervention,
    seed: int = 0,
    **sampling: Any,
) -> Request:
    """A request, greedy unless `sampling` says otherwise."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **sampling})
    return Request(name, tuple(tokens), params, seed, interventions)


@dataclass
class Answer:
    """What became of one request: by choice, its tokens and why it ended."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob | None]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    stop_ids: dict[int, int | None] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    failed: str | None = None

    def note(self, event: Event) -> None:
        """Add an event; nothing may come after an end."""
        assert self.failed is None
        match event:
            case PromptScored():
                self.prompt_logprobs.extend(event.logprobs)
            case Failed():
                self.failed = event.reason
            case TokenMade():
                assert event.choice not in self.reasons
                made = self.tokens.setdefault(event.choice, [])
                if event.token is not None:
                    made.append(event.token)
                    self.logprobs.setdefault(event.choice, []).append(event.logprob)
                if event.finish_reason:
                    self.reasons[event.choice] = event.finish_reason
                    self.stop_ids[event.choice] = event.stop_id


def step(core: EngineCore, answers: dict[str, Answer]) -> list[Event]:
    """Turn the core once and note what it says."""
    events = core.step()
    core.check_integrity()
    for event in events:
        answers.setdefault(event.request_id, Answer()).note(event)
    return events


def preempt(core: EngineCore, sequence: Sequence) -> None:
    """Preempt as the core does when KV runs out."""
    plan = StepPlan()
    core.scheduler._preempt(sequence, plan)
    core.runner.keep(plan.kept, plan.kept_states)
    core.runner.release([sequence])


def finish(core: EngineCore, answers: dict[str, Answer]) -> None:
    """Turn the core until nothing is left, and note what it says."""
    while not core.idle:
        step(core, answers)
    core.check_integrity()


def answers(core: EngineCore, requests: Iterable[Request]) -> dict[str, Answer]:
    """Run requests, all added at once, until nothing is left."""
    found: dict[str, Answer] = {}
    for each in requests:
        core.add(each)
    finish(core, found)
    return found


def run(core: EngineCore, requests: Iterable[Request]) -> dict[str, dict[int, list[int]]]:
    """As `answers`, only the tokens by request and choice; no request may fail."""
    found = answers(core, requests)
    assert not {name: answer.failed for name, answer in found.items() if answer.failed}
    return {name: answer.tokens for name, answer in found.items()}


@torch.inference_mode()
def generate(model: PreTrainedModel, tokens: SequenceOf[int], max_tokens: int = 8) -> list[int]:
    """transformers' own greedy answer."""
    ids = torch.tensor([list(tokens)])
    mask = torch.ones_like(ids)
    found: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=0
    )
    made: list[int] = found[0, len(tokens) :].tolist()
    return made


@dataclass(frozen=True)
class LoReFT:
    """One random LoReFT in the paper's own terms: R [d, r] with orthonormal columns, W [r, d]."""

    layer: int
    positions: Positions
    R: Tensor
    W: Tensor
    b: Tensor

    @property
    def edit(self) -> CanonicalEdit:
        """The form in which the engine takes it."""
        U = self.R.T.contiguous()
        return CanonicalEdit(self.layer, "block_output", self.positions, self.W - U, self.b, U)


def loreft(layer: int, positions: str, *, rank: int = 4, seed: int = 0, size: float = 1) -> LoReFT:
    """A random LoReFT of the tiny models' width, strong enough to change the answers."""
    generator = torch.Generator().manual_seed(1 + seed)
    R, _ = torch.linalg.qr(torch.randn(HIDDEN, rank, generator=generator))
    W = size * torch.randn(rank, HIDDEN, generator=generator)
    b = size * torch.randn(rank, generator=generator)
    return LoReFT(layer, Positions.parse(positions), R, W, b)


def applied(*edits: LoReFT, strength: float = 1) -> AppliedIntervention:
    """An intervention of these edits; its digest is as good as a real one in the tests."""
    digest = repr([(e.layer, str(e.positions), e.W.sum().item()) for e in edits])
    return AppliedIntervention(digest, tuple(edit.edit for edit in edits), strength)


def intervention(seed: int, strength: float = 1) -> AppliedIntervention:
    """One of many interventions that differ in ranks, layers and positions."""
    positions = ("l1", "f1", "f2+l2", "l3", "f3", "f3+l1", "f40+l40", "l2")[seed % 8]
    edits = [
        loreft(layer, positions, rank=1 + seed % 5, seed=10 * seed + layer)
        for layer in {seed % 3, 2 - seed % 2}
    ]
    return applied(*edits, strength=strength)


def edited_positions(positions: Positions, length: int) -> list[int]:
    """pyreft's reading: each side is clamped to half of the prompt."""
    first, last = min(positions.first, length // 2), min(positions.last, length // 2)
    return [*range(first), *range(length - last, length)]


@torch.inference_mode()
def generate_edited(
    model: PreTrainedModel,
    layers: SequenceOf[nn.Module],
    tokens: SequenceOf[int],
    edits: SequenceOf[tuple[LoReFT, float]],
    max_tokens: int = 8,
) -> list[int]:
    """The greedy answer under LoReFTs with strengths, in order: eq. 2 of arXiv 2404.03592.

    Every token comes from a forward over the whole text, without a cache.
    """
    length = len(tokens)

    def hook(loreft: LoReFT, strength: float) -> Any:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for at in edited_positions(loreft.positions, length):
                h = hidden[0, at]
                hidden[0, at] = h + strength * (
                    loreft.R @ (loreft.W @ h + loreft.b - loreft.R.T @ h)
                )
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    text = list(tokens)
    with ExitStack() as stack:
        for loreft, strength in edits:
            handle = layers[loreft.layer].register_forward_hook(hook(loreft, strength))
            stack.callback(handle.remove)
        for _ in range(max_tokens):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text[length:]
