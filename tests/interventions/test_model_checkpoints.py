"""Edits among a model's weights do what their projects' formulas do, and the rest is refused.

They are those of LoFiT, JoLA and steerling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions.foreign import checkpoints
from reft_runtime.interventions.foreign.formats import import_foreign
from reft_runtime.interventions.format.words import in_words
from reft_runtime.interventions.pyreft import unpickle
from reft_runtime.interventions.pyreft.states import read_named
from reft_runtime.interventions.pyreft.unpickle import read_state
from tests.helpers.models import HIDDEN, tiny
from tests.helpers.reference import BASE
from tests.interventions.hooked import Hook, agrees, random


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoints, "read_named", lambda paths, pattern: [read_state(p, pattern) for p in paths]
    )


def checkpoint(folder: Path, edits: Mapping[str, Tensor], suffix: str = ".bin") -> Path:
    """A Trainer's checkpoint: the edits among weights of the tiny Llama's, and what is beside."""
    state = {**edits, "model.embed_tokens.weight": random(64, HIDDEN, seed=1)}
    if suffix == ".bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def of_heads(heads: int, size: int, gates: bool = False, layers: int = 3) -> dict[str, Tensor]:
    """Tensors of LoFiT's for some layers, and the last head of each, or with gates JoLA's."""
    state = {}
    for layer in range(1, layers):
        attention = f"model.layers.{layer}.self_attn"
        for head in range(heads):
            for seed, name in enumerate(("attn_A", "attn_v")):
                row = random(size, seed=100 * layer + 10 * head + seed, size=0.8)
                state[f"{attention}.{name}.{head}"] = row
        for seed, name in enumerate(("log_g1", "log_g2") if gates else ()):
            state[f"{attention}.{name}"] = random(heads, 1, seed=100 * layer + seed, size=3.0)
    return state


def heads_hooks(state: Mapping[str, Tensor], size: int) -> dict[str, Hook]:
    """What JoLA's attention does in front of its o_proj; LoFiT's is it with open gates."""

    def gate(layer: str, name: str, head: int) -> Tensor:
        if f"{layer}.{name}" not in state:
            return torch.ones(1)
        return (state[f"{layer}.{name}"][head].sigmoid() * (1.1 - -0.1) + -0.1).clamp(0, 1)

    def hook(layer: str) -> Hook:
        def change(projection: Any, args: Any, output: Tensor) -> Tensor:
            rows = args[0].clone()
            for head in range(rows.shape[-1] // size):
                A, v = (
                    state.get(f"{layer}.{name}.{head}", torch.zeros(size))
                    for name in ("attn_A", "attn_v")
                )
                own = rows[..., head * size : (head + 1) * size]
                own.copy_(
                    (A * gate(layer, "log_g2", head) + 1) * own + gate(layer, "log_g1", head) * v
                )
            return nn.functional.linear(rows, projection.weight, projection.bias)

        return change

    layers = {name[: name.index(".self_attn") + 10] for name in state}
    return {f"{layer}.o_proj": hook(layer) for layer in layers}


@pytest.mark.parametrize("gates", [False, True])
def test_heads(gates: bool, tmp_path: Path) -> None:
    state = of_heads(4, HIDDEN // 4, gates)
    made = import_foreign(checkpoint(tmp_path, state), base=BASE)
    agrees(made, lambda strength: heads_hooks(state, HIDDEN // 4))
    assert in_words(made.manifest) == (
        "2 red edits of attention_value_output, layers 1, 2, all positions"
    )
    assert made.manifest.training == {"source": "JoLA" if gates else "LoFiT"}


def test_heads_that_are_wider_than_hidden_states(tmp_path: Path) -> None:
    model = tiny("gemma", head_dim=16)
    state = of_heads(4, 16)
    made = import_foreign(checkpoint(tmp_path, state, ".safetensors"), base=base_shape(model))
    agrees(made, lambda strength: heads_hooks(state, 16), model)
    assert {edit.width for edit in made.manifest.edits} == {64}


def test_heads_that_no_file_could_hold(tmp_path: Path) -> None:
    gemma = BASE.model_copy(update={"architecture": "GemmaForCausalLM"})
    state = {HEAD[:-1] + "9999": torch.ones(1000)}
    with pytest.raises(InvalidFile, match="1 layers of 10000 heads of 1000, which is more than a"):
        import_foreign(checkpoint(tmp_path, state), base=gemma)


def test_heads_that_are_not_there_stay_as_they_are(tmp_path: Path) -> None:
    size = HIDDEN // 4
    state = of_heads(4, size)
    some = {name: each for name, each in state.items() if name.endswith(("A.1", "v.2"))}
    some |= {name: 0 * each for name, each in state.items() if "layers.2" in name}
    made = import_foreign(checkpoint(tmp_path, some), base=BASE)
    assert [edit.layer for edit in made.manifest.edits] == [1]
    agrees(made, lambda strength: heads_hooks(some, size))


def test_jola_of_a_qwen2(tmp_path: Path) -> None:
    qwen = BASE.model_copy(update={"architecture": "Qwen2ForCausalLM"})
    state = of_heads(4, HIDDEN // 4, gates=True)
    with pytest.raises(InvalidFile, match=r"^log_g1: of a Qwen2 JoLA applies these gates in eager"):
        import_foreign(checkpoint(tmp_path, state), base=qwen)
    plain = of_heads(4, HIDDEN // 4)
    made = import_foreign(checkpoint(tmp_path, plain), base=qwen)
    same = import_foreign(checkpoint(tmp_path, plain), base=BASE)
    assert made.manifest.edits == same.manifest.edits


PLACES = {"block": "", "attn": ".post_attention_layernorm", "mlp": ".mlp"}


def adapters(places: tuple[str, ...], rank: int = 3) -> dict[str, Tensor]:
    state = {}
    for layer in (1, 2):
        for i, place in enumerate(places):
            name, seed = f"adapters.layer{layer}_{place}", 10 * layer + i
            state[f"{name}.down.weight"] = random(rank, HIDDEN, seed=seed)
            state[f"{name}.up.weight"] = random(HIDDEN, rank, seed=100 + seed)
    return state


def vectors(places: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        f"deltas.layer{layer}_{place}": random(HIDDEN, seed=10 * layer + i)
        for layer in (1, 2)
        for i, place in enumerate(places)
    }


def steerling_hooks(
    state: Mapping[str, Tensor],
    strength: float,
    act: Callable[[Tensor], Tensor] | None = None,
    last: bool = False,
) -> dict[str, Hook]:
    """steerling's hooks, for all tokens of a step or its last."""

    def hook(name: str) -> Hook:
        def delta(rows: Tensor) -> Tensor:
            if f"deltas.{name}" in state:
                return state[f"deltas.{name}"].expand_as(rows)
            inner = rows @ state[f"adapters.{name}.down.weight"].T
            return (inner if act is None else act(inner)) @ state[f"adapters.{name}.up.weight"].T

        def change(module: nn.Module, args: Any, output: Any) -> Any:
            rows = output[0] if isinstance(output, tuple) else output
            edited = rows + strength * delta(rows)
            if last:
                edited = torch.cat([rows[:, :-1], edited[:, -1:]], dim=1)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return change

    names = {name.split(".")[1] for name in state}
    paths = {name: name.removeprefix("layer").split("_") for name in names}
    return {
        f"model.layers.{layer}{PLACES[place]}": hook(name) for name, (layer, place) in paths.items()
    }


@pytest.mark.parametrize(
    ("act", "function"), [("silu", nn.functional.silu), ("linear", None), ("tanh", torch.tanh)]
)
@pytest.mark.parametrize("places", [("block",), ("attn", "mlp")])
def test_adapters_of_steerling(
    places: tuple[str, ...],
    act: str,
    function: Callable[[Tensor], Tensor] | None,
    tmp_path: Path,
) -> None:
    state = adapters(places)
    made = import_foreign(checkpoint(tmp_path, state), base=BASE, act=act)
    agrees(made, lambda strength: steerling_hooks(state, strength, function))
    assert "--intervene-last" in str(made.manifest.training["assumed"])


@pytest.mark.parametrize("places", [("block",), ("attn", "mlp")])
def test_vectors_of_steerling(places: tuple[str, ...], tmp_path: Path) -> None:
    state = vectors(places)
    made = import_foreign(checkpoint(tmp_path, state, ".safetensors"), base=BASE)
    agrees(made, lambda strength: steerling_hooks(state, strength), strengths=(1.0, -1.0, 0.5))


def test_steerling_of_last_tokens(tmp_path: Path) -> None:
    state = adapters(("block",))
    where: dict[str, Any] = {"positions": "[-1:]+decode", "act": "silu"}
    made = import_foreign(checkpoint(tmp_path, state), base=BASE, **where)
    agrees(made, lambda strength: steerling_hooks(state, 1, nn.functional.silu, last=True))
    assert "assumed" not in made.manifest.training


HEADS: dict[str, Any] = of_heads(4, HIDDEN // 4)
JOLA: dict[str, Any] = of_heads(4, HIDDEN // 4, gates=True)
ADAPTERS: dict[str, Any] = adapters(("block",))
VECTORS: dict[str, Any] = vectors(("block",))
HEAD, GATE = "model.layers.1.self_attn.attn_A.1", "model.layers.1.self_attn.log_g2"
DOWN, UP = "adapters.layer1_block.down.weight", "adapters.layer1_block.up.weight"
LORA = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
SILU: dict[str, Any] = {"act": "silu"}

REFUSED: list[tuple[Mapping[str, Tensor | None], dict[str, Any], str]] = [
    ({}, {}, r"a model's weights, without edits of LoFiT, JoLA or steerling"),
    (HEADS | {"model.layers.1.attn_A.0": torch.ones(8)}, {}, "no tensor of LoFiT's or JoLA's"),
    (HEADS | {HEAD: torch.ones(7)}, {}, r"attn_A\.1: shape \[7\], expected \[8\]"),
    (HEADS | {HEAD: torch.ones(8).long()}, {}, r"attn_A\.1' holds int64 numbers"),
    (HEADS | {HEAD[:-1] + "4": torch.ones(8)}, {}, r"5 heads of 8, but tiny is 32 wide"),
    ({HEAD: torch.ones(7)}, {}, r"2 heads of 7, but tiny is 32 wide; check --base"),
    ({HEAD: torch.zeros(8)}, {}, "no head is changed; was it trained"),
    ({HEAD.replace("1.self", "4.self"): torch.ones(8)}, {}, "tiny has layers 0 to 3; check --base"),
    (HEADS, {"positions": ""}, "positions: '' is not understood"),
    (HEADS, SILU, "^act: scaled and moved heads have none"),
    (JOLA | {GATE: None}, {}, r"1\.self_attn\.log_g2: missing, expected \[4, 1\]"),
    (JOLA | {GATE: torch.ones(4)}, {}, r"log_g2: shape \[4\], expected \[4, 1\]"),
    ({GATE: torch.ones(4, 1)}, {}, "^attn_A: missing beside log_g1"),
    (ADAPTERS, {}, r"^act: steerling does not record .* give --act, `silu`"),
    (ADAPTERS, {"act": "clip"}, "^act: 'clip' is unknown; silu is steerling's"),
    (VECTORS, SILU, "^act: fixed vectors have none"),
    (ADAPTERS | {UP: None}, SILU, r"layer1_block\.up\.weight: missing beside its other half"),
    (ADAPTERS | {UP: torch.ones(HIDDEN, 2)}, SILU, r"up\.weight: rank 2, but .* has 3"),
    (ADAPTERS | {DOWN: torch.ones(3)}, SILU, r"shape \[3\], expected \[r, d\]"),
    (ADAPTERS | {DOWN: torch.ones(3, 8)}, SILU, r"\[3, 8\], expected \[r, d\], but tiny is 32"),
    (ADAPTERS | {DOWN[:-6] + "bias": torch.ones(3)}, SILU, "no tensor of steerling's"),
    (ADAPTERS | {LORA: torch.ones(2, HIDDEN)}, SILU, "a LoRA, which changes weights; of steerling"),
    ({"deltas.layer1_block": torch.zeros(HIDDEN)}, {}, "^deltas: all are zero; were they trained"),
    ({"deltas.layer4_mlp": torch.ones(HIDDEN)}, {}, "tiny has layers 0 to 3; check --base"),
]


@pytest.mark.parametrize(("state", "options", "message"), REFUSED)
def test_what_of_a_checkpoint_is_refused(
    state: Mapping[str, Tensor | None], options: Any, message: str, tmp_path: Path
) -> None:
    there = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ReftError, match=message):
        import_foreign(checkpoint(tmp_path, there), base=BASE, **options)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_checkpoint_in_shards_is_read_whole(suffix: str, tmp_path: Path) -> None:
    names = [f"model-0000{n}-of-00002" for n in (1, 2)]
    files = [tmp_path / f"{'pytorch_' * (suffix == '.bin')}{name}{suffix}" for name in names]
    save = torch.save if suffix == ".bin" else save_file
    for file, part in zip(files, (HEADS, {"lm_head.weight": torch.ones(2)}), strict=True):
        save(part, file)
    whole = import_foreign(checkpoint(tmp_path, HEADS, suffix), base=BASE).tensors
    for path in (tmp_path / files[1].name, tmp_path):
        for each in tmp_path.glob("*model.*"):
            each.unlink()
        made = import_foreign(path, base=BASE)
        assert all(tensor.equal(whole[name]) for name, tensor in made.tensors.items())
    files[0].unlink()
    with pytest.raises(InvalidFile, match=rf"has 1 of the 2 files that {files[1].name} is one of"):
        import_foreign(tmp_path, base=BASE)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(InvalidFile, match=r"model\.safetensors: not a regular file"):
        import_foreign(tmp_path, base=BASE)


def test_a_direction_beside_a_models_weights_is_a_direction(tmp_path: Path) -> None:
    torch.save(torch.ones(HIDDEN), checkpoint(tmp_path, {}, ".safetensors") / "direction.pt")
    with pytest.raises(ConfigError, match=r"^kind: a direction is ablated"):
        import_foreign(tmp_path, base=BASE, kind="x")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_wide_floats_are_narrowed(suffix: str, tmp_path: Path) -> None:
    state = {name: tensor.double() for name, tensor in VECTORS.items()}
    made = import_foreign(checkpoint(tmp_path, state, suffix), base=BASE)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.float32}


def test_shards_of_another_save_are_not_counted(tmp_path: Path) -> None:
    for count in ("2", "3"):
        save_file(HEADS, tmp_path / f"model-00001-of-0000{count}.safetensors")
    with pytest.raises(InvalidFile, match="has 1 of the 2 files that model-00001-of-00002"):
        import_foreign(tmp_path, base=BASE)
    with pytest.raises(InvalidFile, match="has 1 of the 3 files that model-00001-of-00003"):
        import_foreign(tmp_path / "model-00001-of-00003.safetensors", base=BASE)


def test_no_more_than_the_edits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 4096)
    monkeypatch.setattr(unpickle, "MAX_TENSOR_BYTES", 4096)
    monkeypatch.setattr(unpickle, "MAX_STATES_BYTES", 4096)
    import_foreign(checkpoint(tmp_path, HEADS), base=BASE)
    big = {"deltas.layer1_block": torch.ones(1025)}
    with pytest.raises(ValueError, match="too large when unpacked"):
        import_foreign(checkpoint(tmp_path, big), base=BASE)


def test_the_separate_process_reads_the_edits_alone(tmp_path: Path) -> None:
    [found] = read_named([checkpoint(tmp_path, HEADS) / "pytorch_model.bin"], r".*\.attn_A\.1")
    assert found.keys() == {name for name in HEADS if name.endswith("attn_A.1")}


def test_what_pyreft_saves_beside_its_model_is_of_pyreft(tmp_path: Path) -> None:
    (checkpoint(tmp_path, HEADS) / "intkey_x.bin").write_bytes(b"")
    with pytest.raises(
        InvalidFile, match="representations: missing; not a configuration of pyvene"
    ):
        import_foreign(tmp_path, base=BASE, positions="l1")
