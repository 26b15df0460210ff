"""AdapterHub's ReFT and PEFT's edits: they do what these libraries do, and the rest is refused.

The reference is what they generated themselves (`tests/fixtures/adapters/make.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reft_runtime.base.stored import StoredModules
from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions import Edit, Intervention, parse, serialise
from reft_runtime.interventions.foreign.formats import FORMATS, import_foreign
from reft_runtime.interventions.foreign.peft import _ln as ln_edit
from reft_runtime.interventions.format.kinds import by_edit
from reft_runtime.schedule.request import AppliedIntervention
from tests.helpers.models import answers, make_core, request, tiny, tiny_llama
from tests.helpers.reference import BASE

FOLDERS = Path(__file__).parents[1] / "fixtures" / "adapters"
REFERENCE: dict[str, dict[str, Any]] = json.loads((FOLDERS / "reference.json").read_text())
STEPS = 20
OPTIONS: dict[str, dict[str, str]] = {
    "loreft_first/uncached": {"positions": "[:3]"},
    "noreft_tied/steps": {"kind": "noreft"},
    "direft_last/steps": {"kind": "nodireft"},
}
CASES = sorted(REFERENCE.keys() - {"base/generate"})


def module(path: str) -> nn.Module:
    return tiny_llama()[0].get_submodule(path)


def imported(case: str) -> Intervention:
    folder = FOLDERS / case.partition("/")[0]
    made = import_foreign(folder, base=BASE, modules=module, **OPTIONS.get(case, {}))
    return parse(serialise(made))


def far(case: str, *applied: Intervention) -> float:
    """How far the engine is from the reference: infinite, or the largest error of a logarithm."""
    tokens, logprobs = REFERENCE[case]["tokens"], REFERENCE[case]["logprobs"]
    used = [AppliedIntervention(str(i), each.canonical()) for i, each in enumerate(applied)]
    asked = request("a", tokens[:-STEPS], *used, max_tokens=STEPS, logprobs=1, prompt_logprobs=1)
    found = answers(make_core(prefix_cache=False), [asked])["a"]
    if found.tokens[0] != tokens[-STEPS:]:
        return float("inf")
    ours = [each.logprob for each in (*found.prompt_logprobs, *found.logprobs[0]) if each]
    assert len(ours) == len(logprobs)
    return float((torch.tensor(ours) - torch.tensor(logprobs)).abs().max())


def changed(made: Intervention, change: Callable[[Edit], Edit]) -> Intervention:
    """A mutant of every edit."""
    tensors = by_edit(len(made.manifest.edits), made.tensors)
    edits = [
        Edit(e.layer, str(e.positions), own, e.kind, e.component, e.act, e.width)
        for e, own in zip(made.manifest.edits, tensors, strict=True)
    ]
    return Intervention.build(BASE, [change(edit) for edit in edits])


def a_layer_on(edit: Edit) -> Edit:
    layer = (edit.layer + 1) % BASE.num_layers
    component = edit.component.replace(f"[{edit.layer}]", f"[{layer}]")
    return Edit(layer, edit.positions, edit.tensors, edit.kind, component, edit.act, edit.width)


def with_a_sign(edit: Edit) -> Edit:
    name = next(name for name in ("W", "v", "s") if name in edit.tensors)
    tensors = {**edit.tensors, name: -edit.tensors[name]}
    return Edit(
        edit.layer, edit.positions, tensors, edit.kind, edit.component, edit.act, edit.width
    )


def test_the_base_model_is_that_of_the_reference() -> None:
    assert far("base/generate") < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_engine_answers_as_the_library(case: str) -> None:
    made = imported(case)
    assert REFERENCE[case]["tokens"] != REFERENCE["base/generate"]["tokens"]
    assert far(case, made) < 1e-4
    assert far(case, changed(made, a_layer_on)) > 1e-2
    assert far(case, changed(made, with_a_sign)) > 1e-2


def test_all_of_their_files_are_fetched_from_the_hub() -> None:
    patterns = [pattern for each in FORMATS for pattern in each.files]
    names = {path.name for path in FOLDERS.glob("*/*")} | {"adapter_model.bin", "head_config.json"}
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)


Change = Callable[[dict[str, Any], dict[str, Any]], object]
"""Changes a configuration and the tensors beside it."""


def copied(name: str, folder: Path, change: Change) -> Path:
    shutil.copytree(FOLDERS / name, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    [weights] = folder.glob("*.safetensors")
    tensors = dict(load_file(weights))
    change(config, tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, weights)
    return folder


def inner(**fields: Any) -> Change:
    return lambda config, tensors: config["config"].update(fields)


def outer(**fields: Any) -> Change:
    return lambda config, tensors: config.update(fields)


def of_loreft(part: str, value: Any, unit: int = 1, layer: int = 1) -> Change:
    name = f"model.layers.{layer}.reft_layer.refts.loreft_untied.units.{unit}.{part}"
    return lambda config, tensors: (
        tensors.pop(name) if value is None else tensors.update({name: value})
    )


ORTHOGONAL = "projection.parametrizations.weight"

UNSOUND_REFTS: dict[str, tuple[Change, str]] = {
    "lora": (inner(architecture="lora"), "a LoRA or IA3 of this library's; docs/from-lora.md"),
    "bottleneck": (inner(architecture=None), "a bottleneck adapter; of this library only a ReFT"),
    "unhashable": (inner(architecture=[1]), r"an adapter of architecture '\[1\]'"),
    "another model": (outer(model_type="mistral"), "model_type: it is for 'mistral', but tiny is"),
    "another width": (outer(hidden_size=64), "hidden_size: 64, but tiny is 32 wide; check --base"),
    "no name": (outer(name=None), "name: 'None'; it must be str"),
    "a layer behind": (inner(layers=[9]), "layers: 9, but tiny has layers 0 to 3; check --base"),
    "no layers": (inner(layers="some"), 'layers: must be "all" or a list'),
    "more layers": (inner(layers=[1, 2]), "layer 2, units.0.learned_source.weight: missing"),
    "other layers": (inner(layers=[2]), "layers.1.* has no such layer among its own"),
    "no positions": (inner(prefix_positions=0, suffix_positions=0), "prefix_positions: 0, as suff"),
    "negative": (inner(suffix_positions=-1), "suffix_positions: -1 is too small"),
    "a number": (inner(r="2"), "r: '2'; it must be int"),
    "another rank": (inner(r=3), r"learned_source.bias: shape \[2\], expected \[3\]"),
    "no act": (inner(non_linearity="clip"), "non_linearity: 'clip' is no act"),
    "tied": (inner(tied_weights=True), "units.1.* stored, though adapter_config.json says tied_w"),
    "not here": (inner(output_reft=False), "output_reft: must be true"),
    "unknown": (inner(gate="x"), "gate: 'x' is unknown here, and could"),
    "missing": (of_loreft("learned_source.bias", None), "units.1.learned_source.bias: missing"),
    "half": (of_loreft(f"{ORTHOGONAL}.0.base", None), "0.base: missing beside its other half"),
    "base": (of_loreft(f"{ORTHOGONAL}.0.base", torch.ones(2, 2)), r"\[2, 2\], expected \[d, d\]"),
    "original": (of_loreft(f"{ORTHOGONAL}.original", torch.ones(2)), r"\[2\], expected \[d, r\]"),
    "act's own": (of_loreft("non_linearity.f.weight", torch.ones(1)), "no tensor of the ReFT"),
    "not orthogonal": (
        of_loreft(f"{ORTHOGONAL}.0.base", torch.ones(32, 32)), "columns are not orthonormal"
    ),
}  # fmt: skip


def test_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = copied("loreft_untied", tmp_path / "x", inner())
    head = {"config": None, "model_class": "LlamaForCausalLM"}
    (folder / "head_config.json").write_text(json.dumps(head))
    import_foreign(folder, base=BASE)  # the base model's own, which is saved by default
    for changes in ({"model_class": "LlamaForSequenceClassification"}, {"config": {"layers": 1}}):
        (folder / "head_config.json").write_text(json.dumps(head | changes))
        with pytest.raises(InvalidFile, match=r"head_config\.json: a prediction head beside"):
            import_foreign(folder, base=BASE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("noreft_tied", {}, "kind: the files do not say whether this is a NoReFT"),
        (
            "noreft_tied",
            {"kind": "loreft"},
            "'loreft' contradicts adapter_config.json; give noreft",
        ),
        ("loreft_first", {"act": "gelu"}, "act: an adapter of AdapterHub's has none"),
        ("loreft_untied", {"positions": "f2+l1"}, r"give `\[:2\]\+\[-1:\]`, or .*\+decode`"),
        ("ia3", {"kind": "red"}, "kind: an adapter of PEFT's has none"),
    ],
)
def test_an_option_that_does_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_foreign(FOLDERS / name, base=BASE, **options)


def test_positions_that_are_empty() -> None:
    with pytest.raises(InvalidFile, match="positions: '' is not understood"):
        import_foreign(FOLDERS / "hra", base=BASE, positions="")


def test_positions_may_be_given() -> None:
    def places(name: str, **options: Any) -> list[str]:
        made = import_foreign(FOLDERS / name, base=BASE, **options)
        return [str(edit.positions) for edit in made.manifest.edits]

    assert places("loreft_untied", positions="[:2]+[-1:]") == ["[:2]", "[-1:]"]
    assert set(places("beft", positions="decode")) == {"decode"}
    direft = import_foreign(FOLDERS / "loreft_first", base=BASE, kind="direft")
    assert {edit.kind for edit in direft.manifest.edits} == {"direft"}


def test_what_a_later_version_may_record_is_believed(tmp_path: Path) -> None:
    folder = copied("direft_last", tmp_path / "x", inner(subtract_projection=False))
    made = import_foreign(folder, base=BASE)
    assert made.manifest.edits[0].kind == "nodireft"
    with pytest.raises(ConfigError, match="'noreft' contradicts"):
        import_foreign(folder, base=BASE, kind="noreft")


def of_ia3(name: str, value: Any) -> Change:
    return lambda config, tensors: tensors.update({name: value})


IA3 = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"

UNSOUND_IA3S: dict[str, tuple[Change, str]] = {
    "type": (outer(peft_type=None), "peft_type: 'None'; it must be str"),
    "LoKr": (outer(peft_type="LOKR"), "peft_type: LOKR changes weights: what it adds depends"),
    "prompt": (outer(peft_type="PREFIX_TUNING"), "puts learned vectors before the prompt"),
    "RoAd": (outer(peft_type="ROAD"), "turns all dimensions of a row in pairs"),
    "new": (outer(peft_type="NEXT"), "NEXT is unknown; IA3, BEFT, HRA, LN_TUNING can be read"),
    "modules": (outer(modules_to_save=["lm_head"]), "modules_to_save: .*'lm_head'.* trained, too"),
    "bias": (outer(bias="all"), "bias: 'all': biases of the base model were trained, too"),
    "unknown": (outer(gate=True), "gate: 'True': nothing that is known here"),
    "module": (of_ia3("base_model.model.lm_head.weight", torch.ones(3)), "no tensor of IA3"),
    "name": (of_ia3("down_proj.ia3_l", torch.ones(1, 48)), "no tensor of IA3, whose names are"),
    "shape": (of_ia3(IA3.format(0), torch.ones(48)), r"\[48\], expected \[out, 1\] or \[1, in\]"),
    "layer": (of_ia3(IA3.format(4), torch.ones(1, 48)), "tiny has layers 0 to 3; check --base"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("loreft_untied", case) for case in UNSOUND_REFTS),
        *(("ia3", case) for case in UNSOUND_IA3S),
    ],
)
def test_what_is_no_sound_adapter(name: str, case: str, tmp_path: Path) -> None:
    change, message = (UNSOUND_IA3S if name == "ia3" else UNSOUND_REFTS)[case]
    folder = copied(name, tmp_path / "x", change)
    with pytest.raises(InvalidFile, match=message):
        import_foreign(folder, base=BASE)


def to(dtype: torch.dtype) -> Change:
    return lambda config, tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()})


@pytest.mark.parametrize("name", ["loreft_untied", "ia3"])
def test_floats_of_any_size_are_read(name: str, tmp_path: Path) -> None:
    plain = import_foreign(FOLDERS / name, base=BASE)
    wide = import_foreign(copied(name, tmp_path / "wide", to(torch.float64)), base=BASE)
    for key, tensor in plain.tensors.items():
        assert wide.tensors[key].dtype == torch.float32
        torch.testing.assert_close(wide.tensors[key], tensor)
    with pytest.raises(InvalidFile, match=r"safetensors: '.*' holds int32 numbers; save floats"):
        import_foreign(copied(name, tmp_path / "whole", to(torch.int32)), base=BASE)


def test_other_unsound_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"LORA is a LoRA, which changes weights.*from-lora\.md"):
        import_foreign(FOLDERS / "lora" / "adapter_model.safetensors", base=BASE)
    with pytest.raises(InvalidFile, match=r"hra_u: shape .*, 3\], expected \[in, r=4\]"):
        import_foreign(copied("hra", tmp_path / "hra", outer(r=4)), base=BASE)
    name = "base_model.model.model.layers.0.self_attn.v_proj.beft_bias"
    folder = copied("beft", tmp_path / "beft", of_ia3(name, torch.ones(32, 1)))
    with pytest.raises(InvalidFile, match=r"\[32, 1\], expected \[1, out\]"):
        import_foreign(folder, base=BASE)
    folder = copied("ia3", tmp_path / "ia3", outer())
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InvalidFile, match=r"adapter_model\.safetensors: .*"):
        import_foreign(folder, base=BASE)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors or adapter_model"):
        import_foreign(folder, base=BASE)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidFile, match=r"adapter_config\.json: not readable as JSON"):
        import_foreign(folder, base=BASE)


@pytest.mark.parametrize("norm", [nn.LayerNorm, LlamaRMSNorm, Gemma3RMSNorm])
def test_a_tuned_norm_is_a_gain_of_the_norm(norm: Callable[[int], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(1)
    own, tuned = norm(32), norm(32)
    for each in (own, tuned):
        for parameter in each.parameters():
            parameter.data = torch.randn(32, generator=generator)
    side, kind, tensors = ln_edit(tuned.state_dict(), {}, lambda: own)
    assert (side, kind) == ("output", "red")
    h = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(tensors["s"] * own(h) + tensors["b"], tuned(h), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"^weight \[32\]"):
        ln_edit({"weight": torch.ones(3)}, {}, lambda: own)
    with torch.no_grad():
        own.load_state_dict({name: 0 * each for name, each in own.state_dict().items()})
    if norm is not Gemma3RMSNorm:  # which adds 1
        with pytest.raises(InvalidFile, match="is 0 at 32 of 32 places"):
            ln_edit(tuned.state_dict(), {}, lambda: own)


def test_a_norm_is_read_from_the_base_models_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replaces norms of the base model: give"):
        import_foreign(FOLDERS / "ln", base=BASE)
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    modules = StoredModules(str(tmp_path))
    for path in ("transformer.h.1.ln_2", "transformer.ln_f"):
        theirs = model.get_submodule(path)
        assert all(map(torch.equal, modules(path).parameters(), theirs.parameters()))
    with pytest.raises(ConfigError, match=r"has no module transformer\.h\.9\.ln_2; check --base"):
        modules("transformer.h.9.ln_2")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no transformer\.ln_f\.weight in its model"):
        modules("transformer.ln_f")
