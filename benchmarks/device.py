"""A CUDA device beside its own limits: decode steps, prompts, interventions, at real shapes.

    python -m benchmarks.device --shape llama-3-8b --out docs/measurements/device.json

Weights are random. The floor of a decode step is the bytes that it must read (weights, keys and
values) over the measured bandwidth of a copy; beside it stands the time of the model's matrix
products alone, by torch. A prompt is measured by its arithmetic, in linear layers and in attention,
over the measured rate of a matrix product.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measuring import SECONDS, Figures, measure, median, speed_ratio, table
from benchmarks.workload import F3L3, PROMPT_TOKENS, random_intervention, random_tokens, settings
from reft_runtime.base.model import LoadedModel
from reft_runtime.base.shape import shape_of
from reft_runtime.edits.step import OnDevice
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.graphs import GraphCapture
from reft_runtime.interventions import CanonicalEdit, Positions, parse
from reft_runtime.interventions.format.canonical import PackedEdits
from reft_runtime.loading.loader import adopt_model, choose_device, choose_dtype
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import AppliedIntervention, Request

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "smallest": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""Shapes of models: Llama-3-8B, Qwen2.5-1.5B, and one to try the script with."""

ANSWER_TOKENS = 64
FILES = 32
MAX_TOKENS = 8192
STEP, PROMPTS, COPIES = "step", "prompts", "copies"
BASE = "base"
WHOLE = "n tasks: all layers, r=8, whole prompt"
ALL = "n tasks: all layers, r=8, all"


def cases_of(layers: int) -> dict[str, tuple[list[int], int, str]]:
    """The interventions that are measured, by label: layers, rank, positions."""
    found = {label: setting for label, setting in settings(layers).items() if label != F3L3}
    every = list(range(layers))
    half = MAX_TOKENS // 2
    return {**found, WHOLE: (every, 8, f"f{half}+l{half}"), ALL: (every, 8, "all")}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device can do in a second: bytes of a copy, and operations of a matrix product."""

    bandwidth: float
    arithmetic: float

    @classmethod
    def measured(cls, loaded: LoadedModel) -> Limits:
        """Limits that are measured now, with products of 8,192 rows, and of 512 on a CPU."""
        n = 8192 if loaded.device.type == "cuda" else 512
        a, b = (torch.randn(n, n, device=loaded.device).to(loaded.dtype) for _ in "ab")
        multiplied = seconds(lambda: a @ b, loaded.device)
        return cls(bandwidth(loaded.device), 2 * n**3 / multiplied)


def name_of(device: torch.device) -> str:
    """The name of a device: the GPU's own, or its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read or written, of a copy that is larger than any cache."""
    size = 1 << (32 if device.type == "cuda" else 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median time of one run in seconds, until the device has finished it."""
    times = []
    for _ in range(repeats + 3):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of transformers of this shape, with random weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=MAX_TOKENS, eos_token_id=None)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )


def build(shape: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A random model, ready for the engine."""
    return adopt_model(random_model(shape, device, dtype))


class Bench:
    """Measurements of one engine core."""

    def __init__(self, loaded: LoadedModel, most: int) -> None:
        self.loaded = loaded
        context = PROMPT_TOKENS + ANSWER_TOKENS + 16
        config = EngineConfig(most, max(8192, most), max(2, most) * max(context, MAX_TOKENS // 8))
        self.core = EngineCore(loaded, config)
        self._ids = itertools.count()
        self._made: dict[tuple[int, int], list[Sequence[CanonicalEdit]]] = {}

    def interventions(
        self, count: int, layers: list[int], rank: int, positions: str
    ) -> list[tuple[AppliedIntervention, ...]]:
        """Different interventions of random weights; files are made once for all positions.

        Where more than `FILES` are wanted, some differ in their bias alone.
        """
        shape = shape_of("random", self.loaded)
        made = self._made.setdefault((len(layers), rank), [])
        while len(made) < min(count, FILES):
            file = random_intervention(shape, layers, rank, "l1")
            made.append(parse(file).canonical())
        where = Positions.parse(positions)
        found: list[tuple[AppliedIntervention, ...]] = []
        for i in range(count):
            edits = [
                replace(edit, positions=where, b=edit.b + 0.01 * (i // FILES))
                for edit in made[i % FILES]
            ]
            found.append((AppliedIntervention(f"{next(self._ids)}", PackedEdits.of(edits)),))
        return found

    def case(
        self,
        n: int,
        applied: Sequence[tuple[AppliedIntervention, ...]],
        prompt_tokens: int = PROMPT_TOKENS,
        answer_tokens: int = ANSWER_TOKENS,
        settings: Sequence[dict[str, Any]] = ({"temperature": 0},),
    ) -> Callable[[int], Figures]:
        """A case of n requests at once, which take the `applied` in turn.

        Before the run they are copied to the device, where other cases have pushed them off it.
        """

        def run(number: int) -> Figures:
            copies = self._copy(applied)
            rng = random.Random(f"{n} {number} {next(self._ids)}")
            samplings = [
                SamplingParams(max_tokens=answer_tokens, ignore_eos=True, **own) for own in settings
            ]
            for i in range(n):
                prompt = tuple(random_tokens(rng, self.loaded.vocab_size, prompt_tokens))
                used = applied[i % len(applied)]
                sampling = samplings[i % len(samplings)]
                self.core.add(Request(f"{next(self._ids)}", prompt, sampling, i, used))
            begin = time.perf_counter()
            while any(not s.generated_length for s in self._sequences()):
                self.core.step()
            prompts = time.perf_counter() - begin
            steps = []
            while not self.core.idle:
                now = time.perf_counter()
                self.core.step()
                steps.append(time.perf_counter() - now)
            seconds = time.perf_counter() - begin
            step = statistics.median(steps)
            return {SECONDS: seconds, PROMPTS: prompts, STEP: step, COPIES: copies}

        return run

    def _copy(self, applied: Sequence[tuple[AppliedIntervention, ...]]) -> float:
        """Bring interventions into the tables on the device; returns the seconds it took."""
        tables, used = self.core.runner.tables, [one for own in applied for one in own]
        if tables is None:
            return 0.0
        begin = time.perf_counter()
        tables.begin_step(used)
        for one in used:
            tables.groups_of(one)
        _wait(self.loaded.device)
        return time.perf_counter() - begin

    def _sequences(self) -> list[Any]:
        scheduler = self.core.scheduler
        return [*scheduler.running, *scheduler.waiting]

    def floor(self, n: int, limits: Limits) -> float:
        """The seconds of a decode step of n rows that does nothing but read everything once."""
        tokens = PROMPT_TOKENS + ANSWER_TOKENS // 2
        read = self._weight_bytes() + n * tokens * self.loaded.kv_bytes_per_token
        return read / limits.bandwidth

    def products(self, n: int) -> float:
        """The seconds that the linear layers of a step of n rows take, one after another."""
        device, dtype = self.loaded.device, self.loaded.dtype
        layers = {
            id(module.weight): module
            for module in self.loaded.model.modules()
            if isinstance(module, nn.Linear)
        }.values()
        inputs = {
            width: torch.randn(n, width, device=device, dtype=dtype)
            for width in {layer.in_features for layer in layers}
        }

        def run() -> None:
            for layer in layers:
                if layer.weight.is_mkldnn:
                    layer(inputs[layer.in_features])
                else:  # of layers that were put together all
                    linear(inputs[layer.in_features], layer.weight)

        with torch.inference_mode():
            return seconds(GraphCapture()(run) if device.type == "cuda" else run, device)

    def share_of_peak(self, n: int, tokens: int, seconds: float, limits: Limits) -> float:
        """The share of the device's arithmetic that n prompts of so many tokens reach."""
        loaded = self.loaded
        numbers = self._weight_bytes() / loaded.dtype.itemsize
        head = loaded.vocab_size * loaded.hidden_size  # for the last token alone
        width: int = loaded.model.config.num_attention_heads * loaded.shapes[0].key_dim
        attended = 2 * tokens * tokens * width * len(loaded.layers)  # half of the square, twice
        work = n * (2 * (tokens * (numbers - head) + head) + attended)
        return work / seconds / limits.arithmetic

    def _weight_bytes(self) -> int:
        """Bytes of all weights that a step reads: of the embeddings it reads a few rows only."""
        embeddings: Any = self.loaded.model.get_input_embeddings()
        table: int = embeddings.weight.nbytes
        return self.loaded.weight_bytes - table

    def swap(self, layers: list[int], rank: int, positions: str) -> float:
        """Seconds to bring an intervention from the CPU into the tables on the device."""
        device, tables = self.loaded.device, self.core.runner.tables
        made = iter(self.interventions(13, layers, rank, positions))

        def move() -> None:
            (applied,) = next(made)
            if tables is None or tables.groups_of(applied) is None:
                on_device = OnDevice(device)
                for edit in applied.edits:
                    on_device(edit)

        return seconds(move, device)


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "llama-3-8b",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of requests at once, comma-separated.")
    ] = "1,32,256",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a long prompt.")] = 8000,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print the tables of decode steps and of a long prompt."""
    place = choose_device(device)
    loaded = build(shape, place, choose_dtype(dtype, place))
    limits = Limits.measured(loaded)
    counts = [int(n) for n in concurrency.split(",")]
    bench = Bench(loaded, max(counts))
    used = cases_of(len(loaded.layers))
    print(
        f"{shape}, {loaded.dtype} on {loaded.device}: copies {limits.bandwidth / 1e12:.2f} TB/s,"
        f" products {limits.arithmetic / 1e12:.1f} TFLOP/s\n"
    )
    key: dict[str, str | int] = {"benchmark": "device", "shape": shape}
    key |= {"device": name_of(place), "dtype": str(loaded.dtype).removeprefix("torch.")}
    rows: list[tuple[object, ...]] = []
    for n in counts:
        cases = {BASE: bench.case(n, [()])}
        for label, setting in used.items():
            cases[label] = bench.case(n, bench.interventions(n, *setting))
        taken = measure(cases, rounds, {**key, "n": n}, out)
        products = bench.products(n)
        for label in cases:
            step, prompts = median(taken, label, STEP), median(taken, label, PROMPTS)
            rows.append(
                (
                    n,
                    label,
                    round(1000 * step, 2),
                    round(step / bench.floor(n, limits), 2),
                    round(step / products, 2),
                    round(n / step),
                    round(100 * bench.share_of_peak(n, PROMPT_TOKENS, prompts, limits)),
                    "" if label == BASE else speed_ratio(taken, label, BASE),
                    round(1000 * median(taken, label, COPIES), 1),
                )
            )
    header = (
        *("n", "case", "step, ms", "over floor", "over products"),
        *("tokens/s", "prompts, % of peak", "over base", "copies before it, ms"),
    )
    print(table(header, rows))

    cases = {BASE: bench.case(1, [()], prompt, 4)}
    for label, setting in used.items():
        cases[label] = bench.case(1, bench.interventions(1, *setting), prompt, 4)
    taken = measure(cases, rounds, {**key, "prompt": prompt}, out)
    rows = []
    for label in cases:
        took = median(taken, label, PROMPTS)
        share = round(100 * bench.share_of_peak(1, prompt, took, limits))
        ratio = "" if label == BASE else speed_ratio(taken, label, BASE, PROMPTS)
        rows.append((label, round(1000 * took, 1), share, ratio))
    print(f"\nA prompt of {prompt:,} tokens:\n")
    print(table(("case", "ms", "% of peak", "over base"), rows))
    for label, setting in used.items():
        print(f"\nswap in, {label}: {1e6 * bench.swap(*setting):.0f} us", end="")
    print()


if __name__ == "__main__":
    typer.run(main)
