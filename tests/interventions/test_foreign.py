"""Other libraries' vectors: here they do what they do there, and what cannot be is refused.

The files of `tests/fixtures/foreign`, and the answers, are those of the libraries: see its make.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file

from reft_runtime.base.model import LoadedModel
from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions import Edit, Intervention, parse, serialise
from reft_runtime.interventions.foreign import refusal, vectors
from reft_runtime.interventions.foreign.formats import import_foreign
from reft_runtime.interventions.foreign.saes import rows
from reft_runtime.interventions.format.words import in_words
from reft_runtime.interventions.pyreft.unpickle import ALONE, Slice, read_state
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.request import AppliedIntervention
from tests.helpers.models import DEVICE, answers, make_core, request
from tests.helpers.numbered import PROMPT, numbered_llama
from tests.interventions.make import BASE

FILES = Path(__file__).parents[1] / "fixtures/foreign"
REFERENCE: dict[str, list[dict[str, Any]]] = json.loads((FILES / "reference.json").read_text())

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "sae_post": ("sae_post", {"feature": 2}, "1 steering edit of block_output, layer 2"),
    "sae_pre": ("sae_pre", {"feature": 2}, "1 steering edit of block_input, layer 1"),
    "sae_mlp": ("sae_mlp", {"feature": 2}, "1 steering edit of mlp_output, layer 1"),
    "sae_attention": (
        "sae_attention/sae_weights.safetensors",
        {"feature": 2},
        "1 steering edit of attention_output, layer 2",
    ),
    "sae_z": ("sae_z", {"feature": 2}, "1 steering edit of attention_value_output, layer 1"),
    **{
        name: (name, {"feature": 2}, f"1 steering edit of {place}")
        for name, place in (
            ("gemma_scope_2/resid_post/layer_2_width_4", "block_output, layer 2"),
            ("gemma_scope_2/attn_out/layer_1_width_4", "attention_value_output, layer 1"),
            ("llama_scope/L1R-8x", "block_output, layer 1"),
            ("dictionary_learning/trainer_0", "block_output, layer 2"),
            ("SAE-Res-numbered-W1K-L0_2/layer1.sae.pt", "block_output, layer 1"),
            ("sparsify/layers.2", "block_output, layer 2"),
            ("sparsify/layers.1.mlp", "mlp_output, layer 1"),
        )
    },
    "decoder_block": ("decoder_block.pt", {}, "2 steering edits of block_output, layers 1, 2"),
    "self_attn": ("self_attn.pt", {}, "2 steering edits of attention_output, layers 1, 2"),
    "mlp": ("mlp.pt", {}, "2 steering edits of mlp_output, layers 1, 2"),
    "input_layernorm": (
        "input_layernorm.pt",
        {},
        "2 steering edits of attention_input, layers 1, 2",
    ),
    "post_attention_layernorm": (
        "post_attention_layernorm.pt",
        {},
        "2 steering edits of mlp_input, layers 1, 2",
    ),
    "behaviour": (
        "behaviour.svec",
        {"layer": [1, 2]},
        "2 steering edits of block_input, layers 1, 2",
    ),
    "refusal": (
        "refusal",
        {},
        "4 consreft edits of block_input, layers 0 to 3, all positions;"
        " 4 consreft edits of attention_output, layers 0 to 3, all positions;"
        " 4 consreft edits of mlp_output, layers 0 to 3",
    ),
    "refusal_added": (
        "refusal",
        {"kind": "steering"},
        "1 steering edit of block_input, layer 2",
    ),
    "persona": ("persona.pt", {"layer": 2}, "1 steering edit of block_output, layer 2"),
    "axbench": (
        "DiffMean_weight.pt",
        {"feature": 2, "layer": 1, "positions": "[1:]+decode"},
        "1 steering edit of block_output, layer 1",
    ),
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return adopt_model(numbered_llama().to(DEVICE))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vectors, refusal):
        monkeypatch.setattr(module, "read_states", lambda paths: [read_state(p) for p in paths])
    monkeypatch.setattr(rows, "read_slice", _sliced)


def _sliced(path: Path, along: dict[str, int], place: int) -> torch.Tensor:
    try:
        return read_state(path, Slice(place, along))[ALONE]
    except ValueError as error:
        raise InvalidFile(f"{path.name}: {error}.") from None


def test_the_reference_is_of_all_cases() -> None:
    assert REFERENCE.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_engine_answers_as_the_library_does(name: str, loaded: LoadedModel) -> None:
    source, options, words = CASES[name]
    shape = base_shape(loaded.model)
    made = parse(serialise(import_foreign(FILES / source, base=shape, **options)))
    where = "positions [1:]+decode" if "positions" in options else "all positions"
    assert in_words(made.manifest) == f"{words}, {where}"
    edits = made.canonical()
    requests = [
        request(
            str(case["strength"]),
            PROMPT,
            AppliedIntervention(f"{name}", edits, case["strength"]),
            logprobs=1,
            prompt_logprobs=1,
        )
        for case in REFERENCE[name]
    ]
    found = answers(make_core(loaded), requests)
    for case in REFERENCE[name]:
        answer = found[str(case["strength"])]
        assert answer.tokens[0] == case["tokens"]
        said = [each.logprob for each in answer.prompt_logprobs]
        np.testing.assert_allclose(said[-len(case["prompt"]) :], case["prompt"], atol=2e-4)
        made_logprobs = [each.logprob for each in answer.logprobs[0] if each is not None]
        np.testing.assert_allclose(made_logprobs, case["logprobs"], atol=2e-4)


def test_paths_of_modules_are_said_together() -> None:
    edits = [
        Edit(layer, "prompt", {"v": torch.ones(16)}, "steering", f"model.layers[{layer}].{name}")
        for layer in (0, 1, 2)
        for name in ("input_layernorm.output", "mlp.gate_proj.input")
    ]
    assert in_words(Intervention.build(BASE, edits).manifest) == (
        "3 steering edits of model.layers[N].input_layernorm.output, layers 0 to 2, positions"
        " prompt; 3 steering edits of model.layers[N].mlp.gate_proj.input, layers 0 to 2,"
        " positions prompt"
    )


def test_saklas_vectors_are_what_its_control_vector_says() -> None:
    made, same = (
        import_foreign(FILES / f"saklas.{suffix}", base=BASE) for suffix in ("safetensors", "gguf")
    )
    assert made.manifest.edits == same.manifest.edits
    assert [edit.layer for edit in made.manifest.edits] == [1, 3]
    for name, tensor in made.tensors.items():
        assert tensor.equal(same.tensors[name])


def test_a_row_of_gemma_scope_is_read_alone(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "params.npz", W_enc=rows.T, W_dec=rows, threshold=rows[:, 0])
        options: dict[str, Any] = {"base": BASE, "feature": 3, "layer": 2}
        made = import_foreign(tmp_path / "params.npz", **options)
        assert in_words(made.manifest).startswith("1 steering edit of block_output, layer 2")
        assert made.tensors["edits.0.v"].equal(torch.from_numpy(rows[3]))
    made = import_foreign(tmp_path / "params.npz", component="mlp_output", **options)
    assert made.manifest.edits[0].component == "mlp_output"
    gemma = "model.layers[2].post_feedforward_layernorm.output"
    made = import_foreign(tmp_path / "params.npz", component=gemma, **options)
    assert (made.manifest.edits[0].layer, made.manifest.edits[0].component) == (2, gemma)
    for wrong, message in (
        (rows.astype(int), r"W_dec must be floats"),
        (np.asfortranarray(rows), r"W_dec must be floats, row by row"),
        (rows[0], r"W_dec has 1 dimensions"),
        (rows[:, :8], r"its decoder is 8 wide, but block_output of tiny 16"),
    ):
        np.savez(tmp_path / "params.npz", W_dec=wrong)
        with pytest.raises(InvalidFile, match=message):
            import_foreign(tmp_path / "params.npz", **options)
    data = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(data.replace(b"descr", b"descx"))
    with pytest.raises(InvalidFile, match=r"params.npz: not readable as numpy's arrays"):
        import_foreign(tmp_path / "params.npz", **options)


def test_a_place_in_a_repository_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(
            (repository, list(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns)))
        )
        return str(FILES)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = "gemma_scope_2/resid_post/layer_2_width_4"
    for path, wanted in ((folder, PUBLISHED[:2]), (f"/{QWEN}", PUBLISHED[3:])):
        found = import_foreign(f"hf:someone/saes/{path}".replace("//", "/"), base=BASE, **ONE)
        same = import_foreign(FILES / path.strip("/"), base=BASE, **ONE)
        assert found.tensors["edits.0.v"].equal(same.tensors["edits.0.v"])
        assert asked.pop() == ("someone/saes", wanted)
    for path in ("layer_9", "gemma_scope_2/../../foreign/sae_mlp"):
        with pytest.raises(ConfigError, match=rf"{path}: the repository has no such file"):
            import_foreign(f"hf:someone/saes/{path}", base=BASE, **ONE)


PUBLISHED = [
    "gemma_scope_2/resid_post/layer_2_width_4/config.json",
    "gemma_scope_2/resid_post/layer_2_width_4/params.safetensors",
    "gemma_scope_2/resid_post/layer_2_width_4/README.md",
    "SAE-Res-numbered-W1K-L0_2/layer1.sae.pt",
]


def test_a_vector_for_another_component(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones(32))
    options: dict[str, Any] = {"base": BASE, "layer": [1, 3]}
    made = import_foreign(tmp_path / "v.npy", component="attention_value_output", **options)
    assert [(e.layer, e.component, e.width) for e in made.manifest.edits] == [
        (1, "attention_value_output", 32),
        (3, "attention_value_output", 32),
    ]
    with pytest.raises(InvalidFile, match="has 32 numbers, but tiny is 16 wide"):
        import_foreign(tmp_path / "v.npy", component="mlp_output", **options)
    with pytest.raises(ConfigError, match=r"^component: 'mlp' is neither one of"):
        import_foreign(tmp_path / "v.npy", component="mlp", **options)
    path = "model.layers[1].mlp.up_proj.output"
    with pytest.raises(ConfigError, match=r"lies in layer 1, but a vector is that of layer 3"):
        import_foreign(tmp_path / "v.npy", component=path, **options)


def config_of(changes: dict[str, Any], **metadata: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(FILES / "sae_mlp", folder / "sae")
        config = json.loads((folder / "sae/cfg.json").read_text())
        config["metadata"] |= metadata
        (folder / "sae/cfg.json").write_text(json.dumps(config | changes))
        return folder / "sae"

    return make


def tensors_of(**tensors: torch.Tensor) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(own, folder / "v.safetensors")
        return folder / "v.safetensors"

    return make


def changed(name: str, file: str, changes: dict[str, Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(FILES / name, folder / Path(name).name)
        path = folder / Path(name).name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path.parent

    return make


def linear_at(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = {"decoder_linear.weight": torch.arange(64.0).reshape(16, 4), "k": torch.tensor(2)}
        torch.save(state, folder / name)
        return folder / name

    return make


def renamed(name: str, other: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(FILES / name, folder / other)
        return folder / other

    return make


def svec_of(directions: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "v.svec").write_text(json.dumps({"directions": directions}))
        return folder / "v.svec"

    return make


def own(folder: Path) -> Path:
    edit = Edit(1, "all", {"v": torch.ones(16)}, "steering")
    (folder / "v.safetensors").write_bytes(serialise(Intervention.build(BASE, [edit])))
    return folder / "v.safetensors"


ROW = torch.ones(16)
OLD: dict[str, Any] = {"metadata": {}, "hook_point": "blocks.3.hook_resid_post"}
BETWEEN = {"feature": 1, "component": "attention_output"}
ONE: dict[str, Any] = {"feature": 1}
GEMMA, SCOPE = "gemma_scope_2/resid_post/layer_2_width_4", "llama_scope/L1R-8x"
LEARNED, QWEN = "dictionary_learning/trainer_0", "SAE-Res-numbered-W1K-L0_2/layer1.sae.pt"
NORM = "model.layers[3].post_feedforward_layernorm.output"
NORMED = {"hf_hook_point_in": "model.layers.3.post_feedforward_layernorm.output"}
OTHER = {"trainer": {"layer": 1, "submodule_name": "attn_out_layer_1"}}
HF = {"hook_name": "model.layers.2", "model_class_name": "AutoModelForCausalLM"}


@pytest.mark.parametrize(
    ("make", "options", "place"),
    [
        (config_of(OLD), {"feature": 1}, (3, "block_output")),
        (config_of({}, **HF), {"feature": 1}, (2, "block_output")),
        (config_of({}, hook_name="blocks.1.hook_resid_mid"), ONE, (1, "attention_output")),
        (config_of({"normalize_activations": "layer_norm"}), {"feature": 1}, (1, "mlp_output")),
        (tensors_of(direction=ROW), {"layer": 2}, (2, "block_output")),
        (tensors_of(**{"3": ROW[None]}), {}, (3, "block_output")),
        (tensors_of(x=torch.eye(3, 16)), {"layer": 0, "feature": 1}, (0, "block_output")),
        (changed(GEMMA, "config.json", NORMED), ONE, (3, NORM)),
        (changed(LEARNED, "config.json", OTHER), ONE | BETWEEN, (1, "attention_output")),
        (renamed("sparsify/layers.2", "h.1.attn"), ONE, (1, "attention_output")),
        (linear_at("Llama-3.1-8B-Instruct-SAE-l3.pth"), ONE, (3, "block_output")),
    ],
)
def test_where_it_is_added(
    make: Callable[[Path], Path], options: Any, place: tuple[int, str], tmp_path: Path
) -> None:
    [edit] = import_foreign(make(tmp_path), base=BASE, **options).manifest.edits
    assert (edit.layer, edit.component) == place


REFUSED: list[tuple[Callable[[Path], Path], dict[str, Any], str]] = [
    (config_of({}), {}, r"^feature: .* has 0 to 3; say which"),
    (config_of({}), {"feature": 4}, r"^feature: 4; .* has 0 to 3"),
    (config_of({}), {"feature": -1}, r"^feature: -1; .* has 0 to 3"),
    (config_of({}), ONE | {"layer": 2}, r"^layer: .* is of blocks.1.hook_mlp_out; .* give 1"),
    (config_of({}), ONE | {"layer": [1, 2]}, r"^layer: only one is possible"),
    (config_of({"architecture": "transcoder"}), ONE, r"architecture 'transcoder' is not served"),
    (config_of({"normalize_activations": "expected_average_only_in"}), ONE, r"fold it into"),
    (config_of({"normalize_activations": "covariance_whitening"}), ONE, r"normalize_activations"),
    (config_of({}, hook_head_index=3), ONE, r"hook_head_index is '3'"),
    (config_of({}, hook_name=None), ONE, r"hook_name: missing"),
    (config_of({}, hook_name="hook_embed"), ONE, r"hook_name 'hook_embed' is in no block"),
    (config_of({}, hook_name="blocks.9.hook_mlp_out"), ONE, r"^layer: 9; tiny has 0 to 3"),
    (config_of({}, hook_name="blocks.1.attn.hook_q"), ONE, r"^component: .* give --component"),
    (config_of({"metadata": []}), ONE, r"metadata: must be an object"),
    (changed(GEMMA, "config.json", {"hf_hook_point_out": "x"}), ONE, r"as transcoders do"),
    (changed(GEMMA, "config.json", {"hf_hook_point_in": 2}), ONE, r"hf_hook_point_in: missing"),
    (changed(GEMMA, "config.json", {"hf_hook_point_in": "lm_head.input"}), ONE, r"in no block"),
    (changed(SCOPE, "hyperparams.json", {"hook_point_out": "x"}), ONE, r"as transcoders do"),
    (changed(SCOPE, "hyperparams.json", {"norm_activation": "x"}), ONE, r"must be 'dataset-wise'"),
    (changed("sparsify/layers.2", "cfg.json", {"transcode": True}), ONE, r"as transcoders do"),
    (renamed("sparsify/layers.2", "mine"), ONE, r"its folder is 'mine', but sparsify names it"),
    (changed(LEARNED, "config.json", {"trainer": []}), ONE, r"trainer: must be an object"),
    (changed(LEARNED, "config.json", OTHER), ONE, r"^component: .* is of layer 1 \(attn_out"),
    (lambda _: FILES / QWEN, {}, r"^feature: .* has many; say which"),
    (lambda _: FILES / QWEN, {"feature": 4}, r"W_dec has 0 to 3, and no 4"),
    (svec_of([1]), {}, r"directions: must be an object"),
    (svec_of({"x": [1]}), {}, r"directions: 'x' is no layer's number"),
    (svec_of({"1": [1]}), {}, r"directions.1 has 1 numbers, but tiny is 16 wide"),
    (svec_of({"1": ["a"]}), {}, r"directions.1: must be a list of numbers"),
    (svec_of({"1": [10**400] * 16}), {}, r"directions.1: holds infinite values"),
    (svec_of({"4": [1] * 16}), {}, r"has layer 4, but tiny has 0 to 3"),
    (svec_of({"1": [1] * 16}), {"layer": [1, 2]}, r"^layer: .* has none for 2, but for 1"),
    (tensors_of(a=ROW, b=ROW), {}, r"'a' is no layer's number"),
    (tensors_of(layer_1=ROW, **{"1": ROW}), {}, r"has layer 1 twice"),
    (tensors_of(x=torch.eye(3, 16)), {"layer": 0, "feature": 3}, r"^feature: 3; .* 3 x 16"),
    (tensors_of(layer_1=ROW), ONE, r"^feature: .* holds vectors by layer"),
    (own, {"layer": 1}, r"is an intervention file already"),
    (lambda _: FILES / "refusal", {"kind": "loreft"}, r"^kind: .* not 'loreft'"),
    (lambda _: FILES / "refusal", {"layer": 2}, r"^layer: an ablation is of all layers"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_is_refused(
    make: Callable[[Path], Path], options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReftError, match=message):
        import_foreign(make(tmp_path), base=BASE, **options)


@pytest.mark.parametrize("name", ["empty.gguf", "notes.txt"])
def test_a_file_of_no_known_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InvalidFile, match=rf"{name}: .* no other file that can be imported"):
        import_foreign(tmp_path / name, base=BASE)


def test_numbers_that_are_none_are_told_with_their_file(tmp_path: Path) -> None:
    for number in (np.nan, 1e300):
        np.save(tmp_path / "v.npy", np.full(16, number))
        with pytest.raises(InvalidFile, match=r"v.npy: holds NaN or infinite values for layer 2"):
            import_foreign(tmp_path / "v.npy", base=BASE, layer=2)


def test_other_architectures_norm_what_their_modules_give() -> None:
    gemma = BASE.model_copy(update={"architecture": "Gemma2ForCausalLM"})
    for source, options in (("sae_mlp", ONE), ("post_attention_layernorm.pt", {})):
        with pytest.raises(ConfigError, match=r"^component: .* a Gemma2ForCausalLM is"):
            import_foreign(FILES / source, base=gemma, **options)
    made = import_foreign(FILES / "sae_post", base=gemma, **ONE)
    assert made.manifest.edits[0].component == "block_output"


def test_files_that_are_cut_or_missing(tmp_path: Path) -> None:
    for name in ("missing.svec", "missing.safetensors"):
        with pytest.raises(ConfigError, match=rf"{name}: No such file"):
            import_foreign(tmp_path / name, base=BASE)
    np.savez(tmp_path / "v.npz", W_dec=np.ones((2, 16)))
    data = bytearray((tmp_path / "v.npz").read_bytes())
    data[data.rindex(b"PK\1\2") + 6] = 221  # the version of zip that it needs
    (tmp_path / "v.npz").write_bytes(data)
    with pytest.raises(InvalidFile, match=r"not readable as numpy's arrays"):
        import_foreign(tmp_path / "v.npz", base=BASE, layer=1, feature=1)
    (tmp_path / "cut.svec").write_text('{"directions": ')
    with pytest.raises(InvalidFile, match=r"cut.svec: not readable as JSON"):
        import_foreign(tmp_path / "cut.svec", base=BASE)
    folder = config_of({})(tmp_path)
    (folder / "sae_weights.safetensors").write_bytes(b"\1")
    with pytest.raises(InvalidFile, match=r"not readable as safetensors"):
        import_foreign(folder, base=BASE, feature=1)
    save_file(load_file(FILES / "saklas.safetensors"), folder / "sae_weights.safetensors")
    with pytest.raises(InvalidFile, match=r"has no W_dec"):
        import_foreign(folder, base=BASE, feature=1)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"sae_weights.safetensors: No such file"):
        import_foreign(folder, base=BASE, feature=1)


def test_the_class_of_steering_vectors_is_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pretender:
        def __init__(self, state: Any, *arguments: Any) -> None:
            self.state, self.arguments = state, arguments

        def __reduce__(self) -> Any:
            return SteeringVector, self.arguments, self.state

    SteeringVector = type("SteeringVector", (), {})
    SteeringVector.__module__ = "steering_vectors.steering_vector"
    module = type(os)("steering_vectors.steering_vector")
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "steering_vectors", type(os)("steering_vectors"))
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    fields = {"layer_activations": {1: ROW}, "layer_type": "mlp"}
    for pretender, message in (
        (Pretender({"layer_activations": {1: ROW}}), "not a SteeringVector of layer_type"),
        (Pretender(fields | {"more": 1}), "not a SteeringVector of layer_type"),
        (Pretender(fields | {"layer_activations": {"a": ROW}}), "not vectors by number"),
        (Pretender(fields | {"layer_activations": {1: "x"}}), "not a tensor"),
        (Pretender(fields | {"layer_type": "lm_head"}), "of lm_head, and what reads it"),
        (Pretender(fields, 1), "takes no arguments"),
        (Pretender(fields | {"layer_type": os.getcwd}), "asks for 'posix getcwd'"),
    ):
        torch.save(pretender, tmp_path / "v.pt")
        with pytest.raises((ReftError, ValueError, TypeError), match=message):
            import_foreign(tmp_path / "v.pt", base=BASE)
    torch.save(Pretender(fields), tmp_path / "v.pt")
    made = import_foreign(tmp_path / "v.pt", base=BASE)
    assert made.manifest.edits[0].component == "mlp_output"
