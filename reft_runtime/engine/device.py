"""What the engine uses on which device: sizes, storage, attention, graphs of decode steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from reft_runtime.base.fused_delta import runs_fused
from reft_runtime.base.model import LoadedModel
from reft_runtime.edits.tables import EditTables, table_bytes
from reft_runtime.engine.device_sampler import DeviceSampler
from reft_runtime.engine.runner import Decoder, Runner
from reft_runtime.kernels.operators import has_triton, operators_for
from reft_runtime.kv.choice import attends_by_kernels
from reft_runtime.kv.pages import PageStorage
from reft_runtime.schedule.pacing import LEAST_TOKENS

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The default limits of a device.

    `max_running` bounds the sequences that run at once, `max_step_tokens` the tokens of a step. A
    step in which sequences decode has at most `mixed_tokens` prompt tokens, and at least
    `least_tokens`, however long they take: such steps cost a device's host a fixed time that pure
    decode steps do not, so that fewer prompt tokens hardly make them shorter.
    """

    max_running: int
    max_step_tokens: int
    mixed_tokens: int
    least_tokens: int


ON_CPU = Sizes(64, 2048, 2048, LEAST_TOKENS)
ON_CUDA = Sizes(max_running=256, max_step_tokens=8192, mixed_tokens=2048, least_tokens=256)


def sizes_for(device: torch.device) -> Sizes:
    """The sizes that suit a device."""
    return ON_CPU if device.type == "cpu" else ON_CUDA


def tables_for(loaded: LoadedModel, max_running: int) -> EditTables | None:
    """The device's tables of interventions; None where no Triton kernel edits by them."""
    if not has_triton(loaded.device):
        return None
    from reft_runtime.edits.triton import TritonEdits

    layers, width = len(loaded.layers), loaded.hidden_size
    budget = table_bytes(layers, width, max_running)
    tables = EditTables(layers, width, budget, loaded.device, TritonEdits())
    warm_up = partial(tables.warm_up, loaded.dtype)
    return tables if _runs(warm_up, "Rows are edited by torch's own operators") else None


def sampler_for(loaded: LoadedModel, max_running: int) -> DeviceSampler | None:
    """The sampler that does not wait for the device; None where `sampler.sample` picks tokens."""
    if not has_triton(loaded.device):
        return None
    from reft_runtime.engine.triton_selection import TritonSelection

    sampler = DeviceSampler(
        loaded.vocab_size, max_running, loaded.eos_ids, loaded.device, TritonSelection()
    )
    warm_up = partial(sampler.warm_up, loaded.dtype)
    return sampler if _runs(warm_up, "Every decode step waits for the tokens of the last") else None


def decoder_for(runner: Runner, max_running: int) -> Decoder | None:
    """The captured CUDA graphs of decode steps; None where they cannot be used."""
    loaded, storage, tables = runner.loaded, runner.storage, runner.tables
    if tables is None or not isinstance(storage, PageStorage) or loaded.ranks > 1:
        return None
    from reft_runtime.engine.graphs import DecodeGraphs, GraphCapture

    graphs = DecodeGraphs(loaded, storage, runner.sites, tables, max_running, GraphCapture())
    if _runs(partial(graphs.warm_up, progress=True), "Decode steps run without CUDA graphs"):
        return graphs
    torch.cuda.synchronize(loaded.device)  # what was begun may use the graphs' memory
    return None


def _runs(warm_up: Callable[[], None], otherwise: str) -> bool:
    """Whether something warms up; if it fails, the log says what happens `otherwise`, and why."""
    try:
        warm_up()
    except Exception as error:
        _log.warning("%s: %s", otherwise, error)
        return False
    return True


def active(runner: Runner) -> str:
    """One line for the log: which fast paths the loaded model uses."""
    loaded, device = runner.loaded, runner.loaded.device
    operators = operators_for(device)
    fused = f"{loaded.fused.whole} of {len(loaded.layers)} layers fused"
    if loaded.fused.in_parts:
        fused += f" and parts of {loaded.fused.in_parts} more"
    kernels = "torch's own operators" if operators is None else operators.name
    decodes, prompts = attends_by_kernels(loaded)
    attention = "torch's own operators"
    if decodes:
        attention = "kernels" if prompts else f"kernels, that of prompts by {attention}"
    parts = [fused]
    if device.type == "cpu":
        packed = loaded.packed
        experts = f" and {packed.experts} mixtures of experts" if packed.experts else ""
        parts.append(f"{packed.layers} linear layers{experts} packed")
    parts += [kernels, f"attention by {attention}"]
    if loaded.ranks > 1:
        parts.append(f"{loaded.ranks} ranks")
    if loaded.mixers:
        count, whole = len(loaded.mixers), sum(map(runs_fused, loaded.mixers))
        layers = f"{count} recurrent layer{'s' * (count != 1)}"
        how = f"{whole} fused" if whole else "by their own code"
        states = f"{loaded.state_bytes / 2**20:.2f} MiB of states for a sequence"
        parts += [f"{layers} ({how})", states]
    if device.type == "cuda":
        parts.append("no CUDA graphs" if runner.decoder is None else "CUDA graphs of decode steps")
    return f"Active: {', '.join(parts)}"
