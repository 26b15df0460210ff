"""Checkpoints that pyreft saved, of every era: imported, and exported again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from reft_runtime import base_shape
from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions import Edit, Intervention, parse, serialise
from reft_runtime.interventions.pyreft import checkpoint, export_pyreft, from_live, import_pyreft
from reft_runtime.interventions.pyreft.names import Place, parse_name
from reft_runtime.interventions.pyreft.unpickle import read_state
from tests.helpers.canonical import apply
from tests.helpers.pyreft import (
    BASE,
    CLASSES,
    INNER,
    WIDTH,
    module,
    pyreft,
    pyvene,
    reft_model,
    save,
    tiny_model,
)
from tests.interventions.make import loreft_tensors

H = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
TWICE = [(1, "block_output"), (3, "block_output"), (1, "block_output"), (3, "block_output")]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are the tests' own; test_pyreft_refused has the process that reads others'."""
    monkeypatch.setattr(checkpoint, "read_states", lambda paths: [read_state(p) for p in paths])


def same(edits: Intervention, modules: list[Any], h: torch.Tensor = H) -> None:
    for edit, theirs in zip(edits.canonical(), modules, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(apply(edit, h), theirs(h), atol=1e-5, rtol=0)


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class(kind: str, tmp_path: Path) -> None:
    modules = [module(kind, seed=seed, rank=4) for seed in (1, 2)]
    folder = save(tmp_path, [(2, "block_output"), (0, "mlp_output")], modules)
    edits = import_pyreft(folder, base=BASE, positions="l1", act="linear")
    assert [(e.layer, e.component, e.kind, str(e.positions)) for e in edits.manifest.edits] == [
        (2, "block_output", kind, "l1"),
        (0, "mlp_output", kind, "l1"),
    ]
    same(edits, modules)
    same(parse(serialise(edits)), modules)


def test_untied_halves_come_from_the_order_of_the_list(tmp_path: Path) -> None:
    modules = [module("loreft", seed=seed) for seed in range(4)]
    folder = save(tmp_path, TWICE, modules)
    edits = import_pyreft(folder, base=BASE, positions="f2+l3", share_weights=False, act="linear")
    found = [(edit.layer, str(edit.positions)) for edit in edits.manifest.edits]
    assert found == [(1, "f2"), (3, "f2"), (1, "l3"), (3, "l3")]
    same(edits, modules)
    tied = import_pyreft(folder, base=BASE, positions="f2+l3", share_weights=True, act="linear")
    assert {str(edit.positions) for edit in tied.manifest.edits} == {"f2+l3"}
    one = import_pyreft(folder, base=BASE, positions="f2", share_weights=False, act="linear")
    assert {str(edit.positions) for edit in one.manifest.edits} == {"f2"}


def test_args_json_is_used_and_what_is_given_goes_first(tmp_path: Path) -> None:
    modules = [module("loreft", seed=seed, act="gelu") for seed in range(4)]
    folder = save(tmp_path, TWICE, modules)
    args = {"position": "f1+l2", "share_weights": False, "act_fn": "gelu", "rank": 9}
    (folder / "args.json").write_text(json.dumps(args))
    edits = import_pyreft(folder, base=BASE)
    assert [str(edit.positions) for edit in edits.manifest.edits] == ["f1", "f1", "l2", "l2"]
    assert {edit.act for edit in edits.manifest.edits} == {"gelu"}
    same(edits, modules)
    other = import_pyreft(folder, base=BASE, positions="all", act="relu", suffix_offset=1)
    assert {str(edit.positions) for edit in other.manifest.edits} == {"all"}
    assert {(edit.act, edit.suffix_offset) for edit in other.manifest.edits} == {("relu", 1)}


def rename(folder: Path, era: str) -> None:
    """Names, and a configuration, as older versions of pyvene wrote them."""
    for path in [*folder.glob("intkey_*")]:
        place, number = parse_name(path.name)
        path.rename(folder / place.names(number)[{"new": 0, "middle": 1, "first": 2}[era]])

    def cut(config: dict[str, Any]) -> None:
        config["representations"] = [fields[:13] for fields in config["representations"]]

    def first(config: dict[str, Any]) -> None:
        listed = config.pop("representations")
        config["intervenable_representations"] = [fields[:5] + [None] * 3 for fields in listed]
        config["intervenable_interventions_type"] = config.pop("intervention_types")
        config.pop("intervention_constant_sources")

    if (folder / "config.json").exists():
        change_config(folder, {"new": lambda _: None, "middle": cut, "first": first}[era])


@pytest.mark.parametrize("era", ["new", "middle", "first"])
@pytest.mark.parametrize("with_config", [True, False])
def test_every_era(era: str, with_config: bool, tmp_path: Path) -> None:
    modules = [module("loreft", seed=seed) for seed in range(4)]
    folder = save(tmp_path, TWICE, modules)
    if not with_config:
        (folder / "config.json").unlink()
    rename(folder, era)
    edits = import_pyreft(folder, base=BASE, positions="f1+l1", share_weights=False, act="linear")
    same(edits, modules)
    assert [str(edit.positions) for edit in edits.manifest.edits] == ["f1", "f1", "l1", "l1"]


@pytest.mark.parametrize("era", ["new", "middle"])
@pytest.mark.parametrize("with_config", [True, False])
def test_components_as_strings(era: str, with_config: bool, tmp_path: Path) -> None:
    modules = [module("loreft", seed=seed) for seed in range(4)]
    modules.append(module("loreft", seed=5, width=INNER))
    components = [
        "model.layers[0].output",
        "model.layers[1].input_layernorm.output",
        "model.layers[1].self_attn.o_proj.input",
        "model.layers[2].mlp.output",
        "model.layers[3].mlp.act_fn.output",
    ]
    folder = save(tmp_path, [(0, component) for component in components], modules)
    if not with_config:
        (folder / "config.json").unlink()
    rename(folder, era)
    edits = import_pyreft(folder, base=BASE, positions="l1", act="linear")
    assert [(e.layer, e.component, e.width) for e in edits.manifest.edits] == [
        (0, "block_output", None),
        (1, "model.layers[1].input_layernorm.output", None),
        (1, "attention_value_output", None),
        (2, "mlp_output", None),
        (3, "mlp_activation", INNER),
    ]
    for edit, theirs in zip(edits.canonical(), modules, strict=True):
        h = torch.randn(3, edit.V.shape[1])
        with torch.no_grad():
            torch.testing.assert_close(apply(edit, h), theirs(h), atol=1e-5, rtol=0)


def test_names_of_files() -> None:
    for component in (
        "base_model.model.model.layers[15].output",
        "gpt_neox.layers[2].attention.dense.input",
        "transformer.h[11].attn.resid_dropout.output",
    ):
        place = Place(0, component)
        for name in place.names(3):
            assert parse_name(name) == (place, 3)
    assert Place(8, "block_output").names(0) == (
        "intkey_layer_8_comp_block_output_unit_pos_nunit_1#0.bin",
        "intkey_layer.8.comp.block_output.unit.pos.nunit.1#0.bin",
        "intkey_layer.8.repr.block_output.unit.pos.nunit.1#0.bin",
    )


def test_dict_representations_and_a_list_of_one(tmp_path: Path) -> None:
    theirs = module("loreft")
    folder = save(tmp_path, [(2, "block_output")], [theirs])
    fields = {"layer": 2, "component": "block_output", "low_rank_dimension": 99, "unit": "pos"}
    for listed in ([fields], fields):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "representations": listed}))
        same(import_pyreft(folder, base=BASE, positions="all", act="linear"), [theirs])


def test_a_trainers_checkpoint(tmp_path: Path) -> None:
    modules = [module("direft", seed=seed) for seed in range(2)]
    saved = tmp_path / "checkpoint-12"
    live = reft_model([(1, "block_output"), (3, "block_output")], modules)
    live.save_intervention(str(saved / "intervenable_model"))
    (saved / "optimizer.pt").write_bytes(b"not read")
    args = {"position": "f1+l1", "share_weights": True, "act_fn": None}
    (tmp_path / "args.json").write_text(json.dumps(args))
    for folder in (saved, saved / "intervenable_model"):
        same(import_pyreft(folder, base=BASE), modules)


def test_tensors_that_fit_two_kinds_need_the_kind(tmp_path: Path) -> None:
    folder = save(tmp_path, [(1, "block_output")], [module("lobireft")])
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"consreft or lobireft, .* give --kind"):
        import_pyreft(folder, base=BASE, positions="l1")
    same(import_pyreft(folder, base=BASE, positions="l1", kind="lobireft"), [module("lobireft")])
    with pytest.raises(InvalidFile, match="consreft or lobireft, not loreft"):
        import_pyreft(folder, base=BASE, positions="l1", act="linear", kind="loreft")
    args = {"intervention_type": "LobireftIntervention"}
    (folder / "args.json").write_text(json.dumps(args))
    same(import_pyreft(folder, base=BASE, positions="l1"), [module("lobireft")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"act: .*--act"),
        ({"act": "gelu"}, r"positions: .*--positions"),
        ({"act": "gelu", "positions": "f1+l1"}, r"share_weights: .*--share-weights or --untied"),
        ({"act": "gulu"}, "act: unknown 'gulu'; known: gelu"),
        ({"kind": "x"}, "kind: unknown 'x'; known: consreft"),
    ],
)
def test_what_is_not_recorded_must_be_given(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, [(1, "block_output")], [module("loreft")])
    with pytest.raises(ConfigError, match=message):
        import_pyreft(folder, base=BASE, **given)


def test_float64_becomes_float32(tmp_path: Path) -> None:
    theirs = module("loreft", dtype=torch.float64)
    folder = save(tmp_path, [(1, "block_output")], [theirs])
    edits = import_pyreft(folder, base=BASE, positions="l1", act="linear")
    assert {tensor.dtype for tensor in edits.tensors.values()} == {torch.float32}
    same(edits, [theirs.float()])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    theirs = module("loreft", dtype=torch.bfloat16)
    folder = save(tmp_path, [(1, "block_output")], [theirs])
    edits = import_pyreft(folder, base=BASE, positions="l1", act="linear")
    assert edits.manifest.edits[0].dtype == "bfloat16"
    assert edits.tensors["edits.0.W"].dtype == torch.bfloat16
    assert edits.tensors["edits.0.R"].dtype == torch.float32
    same(edits, [theirs], H.bfloat16())


def test_a_live_model() -> None:
    modules = [
        module("loreft", seed=1, act="silu"),
        module("noreft", seed=2, act="prelu"),
        module("direft", seed=3, act="gelu_new", dtype=torch.bfloat16),
        module("consreft", seed=4),
    ]
    live = reft_model(TWICE, modules)
    base = base_shape(live.model)
    edits = from_live(live, base=base, positions="f1+l2", share_weights=False)
    assert edits.manifest.base.architecture == "LlamaForCausalLM"
    found = [(e.layer, e.kind, str(e.positions), e.act) for e in edits.manifest.edits]
    assert found == [
        (1, "loreft", "f1", "silu"),
        (3, "noreft", "f1", "prelu"),
        (1, "direft", "l2", "gelu_new"),
        (3, "consreft", "l2", None),
    ]
    same(edits, modules)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_10", "silu", "swish", "relu", "relu6"])
def test_a_live_models_act_is_found(act: str) -> None:
    live = reft_model([(1, "block_output")], [module("loreft", act=act)])
    (edit,) = from_live(live, base=BASE, positions="l1").canonical()
    theirs = module("loreft", act=act)
    torch.testing.assert_close(apply(edit, H), theirs(H).detach(), atol=1e-5, rtol=0)


def test_what_a_live_model_has_and_cannot_be_served() -> None:
    linked = [
        {"layer": layer, "component": "block_output", "intervention_link_key": 0}
        for layer in (0, 1)
    ]
    for representation in linked:
        representation["intervention"] = module("loreft")
    live = pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=linked))
    with pytest.raises(InvalidFile, match="intervention_link_key"):
        from_live(live, base=BASE, positions="l1")
    trained = module("loreft", act="prelu")
    trained.act_fn.weight.data.fill_(0.7)
    with pytest.raises(InvalidFile, match="act_fn is none of"):
        from_live(reft_model([(1, "block_output")], [trained]), base=BASE, positions="l1")
    vanilla = pyvene.VanillaIntervention(embed_dim=WIDTH)
    with pytest.raises(InvalidFile, match="VanillaIntervention takes its values from the run"):
        from_live(reft_model([(1, "block_output")], [vanilla]), base=BASE, positions="l1")


LOADABLE = ("loreft", "direft", "consreft", "lobireft")
"""Noreft and Nodireft ask for add_bias, which pyvene's load does not give them."""


@pytest.mark.parametrize("kind", CLASSES)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    modules = [module(kind, seed=seed, dtype=torch.bfloat16) for seed in range(4)]
    if kind in ("consreft", "lobireft"):
        modules = [module(kind, seed=seed) for seed in range(4)]
    folder = save(tmp_path / "theirs", TWICE, modules)
    args = {"position": "f2+l3", "share_weights": False, "act_fn": None}
    (folder / "args.json").write_text(json.dumps(args))
    edits = import_pyreft(folder, base=BASE)
    export_pyreft(edits, tmp_path / "ours")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    again = import_pyreft(tmp_path / "ours", base=BASE)
    assert again.manifest == edits.manifest
    for name, tensor in edits.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, atol=1e-6, rtol=0)
    if kind in LOADABLE:
        loaded = pyreft.ReftModel.load(str(tmp_path / "ours"), tiny_model())
        h = H.bfloat16() if kind == "loreft" else H
        for key, theirs in zip(loaded.interventions, modules, strict=True):
            with torch.no_grad():
                expected = theirs(h)
                torch.testing.assert_close(
                    loaded.interventions[key].eval()(h), expected, atol=1e-5, rtol=1e-2
                )
    else:
        fresh = module(kind, seed=9, dtype=torch.bfloat16, add_bias=kind == "noreft")
        name = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#1.bin"
        fresh.load_state_dict(torch.load(tmp_path / "ours" / name))
        h = H.bfloat16()
        assert torch.equal(fresh(h), modules[2](h))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["direft", "consreft", "lobireft"])
def test_directions_of_few_bits_go_there_and_back(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    R = loreft_tensors()["R"].to(dtype)
    own = {"c": torch.ones(R.shape[1])}
    if kind == "direft":
        own = {"W": loreft_tensors()["W"].bfloat16()}  # in which pyreft loads it
    built = Intervention.build(BASE, [Edit(1, "l1", {**own, "R": R}, kind)])
    export_pyreft(built, tmp_path / "out")
    again = import_pyreft(tmp_path / "out", base=BASE)
    assert torch.equal(again.tensors["edits.0.R"], R)
    loaded = pyreft.ReftModel.load(str(tmp_path / "out"), tiny_model())
    same(built, [module.eval() for module in loaded.interventions.values()])


def test_lorefts_files_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    modules = [module("loreft", seed=seed) for seed in range(4)]
    live = reft_model(TWICE, modules)
    live.save(str(tmp_path / "theirs"))
    edits = import_pyreft(
        tmp_path / "theirs", base=BASE, positions="f1+l1", share_weights=False, act="linear"
    )
    export_pyreft(edits, tmp_path / "ours")
    for state in (tmp_path / "theirs").glob("*.bin"):
        exported = torch.load(tmp_path / "ours" / state.name)
        theirs = torch.load(state)
        assert exported.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(exported[key], tensor)


def test_steering_goes_to_pyvene_and_back(tmp_path: Path) -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    edits = Intervention.build(BASE, [Edit(2, "all", {"v": vector}, "steering")])
    export_pyreft(edits, tmp_path / "out")
    loaded = pyvene.IntervenableModel.load(str(tmp_path / "out"), tiny_model())
    (theirs,) = loaded.interventions.values()
    assert torch.equal(theirs(H.clone(), None), H + vector)
    assert import_pyreft(tmp_path / "out", base=BASE).manifest.edits == edits.manifest.edits


def test_edits_in_another_order_are_exported_in_halves(tmp_path: Path) -> None:
    edits = [
        Edit(layer, positions, loreft_tensors(seed), suffix_offset=1)
        for seed, (layer, positions) in enumerate([(0, "f2"), (0, "l1"), (2, "f2"), (2, "l1")])
    ]
    built = Intervention.build(BASE, edits)
    export_pyreft(built, tmp_path / "out")
    again = import_pyreft(tmp_path / "out", base=BASE)
    found = [(e.layer, str(e.positions), e.suffix_offset) for e in again.manifest.edits]
    assert found == [(0, "f2", 1), (2, "f2", 1), (0, "l1", 1), (2, "l1", 1)]
    assert torch.equal(again.tensors["edits.1.W"], built.tensors["edits.2.W"])


def test_an_act_goes_with_kinds_that_have_none(tmp_path: Path) -> None:
    edits = [
        Edit(1, "l1", loreft_tensors(), act="relu"),
        Edit(1, "l1", {"v": H[0]}, "steering"),
    ]
    export_pyreft(Intervention.build(BASE, edits), tmp_path / "out")
    again = import_pyreft(tmp_path / "out", base=BASE)
    assert [(edit.kind, edit.act) for edit in again.manifest.edits] == [
        ("loreft", "relu"),
        ("steering", None),
    ]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit(0, "l1", {"s": H[0], "b": H[1]}, "red")], r"edits\.0\.kind: .* no class for red"),
        (
            [Edit(0, "l1", loreft_tensors(), act=act) for act in ("relu", "silu")],
            r"edits\.\*\.act",
        ),
        (
            [Edit(0, "l1", loreft_tensors(), suffix_offset=offset) for offset in (0, 1)],
            r"edits\.\*\.suffix_offset",
        ),
        ([Edit(0, p, loreft_tensors()) for p in ("f1", "l1", "l1")], r"edits\.\*\.positions"),
        ([Edit(0, p, loreft_tensors()) for p in ("f1", "f2")], r"edits\.\*\.positions"),
        ([Edit(0, p, loreft_tensors()) for p in ("f1", "l1", "all")], r"edits\.\*\.positions"),
        ([Edit(0, p, loreft_tensors()) for p in ("f1+l1", "l1")], r"edits\.\*\.positions"),
        *(
            ([Edit(0, text, loreft_tensors())], r"edits\.0\.positions: .* cannot say")
            for text in ("[1:]", "prompt", "[0,-1]", "decode", "l1+decode")
        ),
    ],
)
def test_what_pyreft_cannot_say_is_not_exported(
    edits: list[Edit], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidFile, match=message):
        export_pyreft(Intervention.build(BASE, edits), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    built = Intervention.build(BASE, [Edit(0, "l1", loreft_tensors())])
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_pyreft(built, tmp_path)


def test_repositories_come_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = module("loreft")
    folder = save(tmp_path / "blobs", [(1, "block_output")], [theirs])
    snapshot = tmp_path / "snapshot"  # of links into a cache, as the Hub's client makes it
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "someone/reft"
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(import_pyreft("hf:someone/reft", base=BASE, positions="l1", act="linear"), [theirs])

    def offline(repository: str, **_: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"hf:someone/reft: cannot be fetched .* no route"):
        import_pyreft("hf:someone/reft", base=BASE, positions="l1", act="linear")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"hf:a/b--c: cannot be fetched"):
        import_pyreft("hf:a/b--c", base=BASE, positions="l1", act="linear")
