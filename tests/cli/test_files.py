"""The commands on files, as the console script runs them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config
from typer.testing import CliRunner

from reft_runtime import base_shape
from reft_runtime.errors import ConfigError, InvalidFile, NotFound, ReftError
from reft_runtime.interventions import Edit, Intervention, parse, read_header, write
from reft_runtime.interventions.pyreft import export_pyreft
from server.cli import main
from server.cli.files import app
from tests.helpers.models import HIDDEN
from tests.interventions.make import BASE, loreft_tensors
from tests.training import make


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    edits = [Edit(1, "f1+l2", loreft_tensors(seed)) for seed in range(2)]
    folder = tmp_path / "Checkpoint"
    export_pyreft(Intervention.build(BASE, edits), folder)
    (folder / "args.json").unlink()
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The configuration of a model, without its weights."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_what_a_file_holds_is_shown_without_the_base_models_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "x.safetensors",
        Intervention.build(BASE, [Edit(1, "f1+l2", loreft_tensors(0))]),
    )
    monkeypatch.setitem(sys.modules, "reft_runtime.base.shape", None)
    assert "f1+l2" in run("inspect", tmp_path / "x.safetensors")


def test_import_inspect_export(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "pirate.safetensors"
    options = ("--positions", "f1+l2", "--untied", "--act", "gelu", "--template", "Q: {prompt}")
    said = run("import", checkpoint, "--base", base, "--out", out, *options)
    assert said == (
        f"{out}: 2 edits, {out.stat().st_size:,} bytes\n"
        "1 loreft edit of block_output, layer 1, positions f1;"
        " 1 loreft edit of block_output, layer 1, positions l2\n"
    )
    found = json.loads(run("inspect", out, "--json", "--base", base))
    assert found["digest"] == read_header(out).digest
    assert found["size_bytes"] == out.stat().st_size
    assert found["parameters"] == 2 * (16 * 3 + 3 * 16 + 3)
    model = 64 * 16 + 4 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert found["share"] == found["parameters"] / model
    assert found["manifest"]["base"]["model"] == "tiny"
    assert found["manifest"]["template"] == "Q: {prompt}"
    edit = found["edits"][1]
    assert (edit["layer"], edit["positions"], edit["act"], edit["directions"]) == (
        1,
        "l2",
        "gelu",
        3,
    )
    assert 0 < edit["orthonormality_error"] < 1e-5
    assert edit["tensors"]["R"] == {"dtype": "float32", "shape": [16, 3]}
    assert (
        run("export", out, "--to", "pyreft", tmp_path / "back") == f"{tmp_path / 'back'}: written\n"
    )
    assert json.loads((tmp_path / "back" / "args.json").read_text()) == {
        "position": "f1+l2",
        "share_weights": False,
        "act_fn": "gelu",
    }


def test_the_table(tmp_path: Path) -> None:
    vector = loreft_tensors()["W"][0]
    edits = [Edit(1, "l1", loreft_tensors()), Edit(3, "all", {"v": vector}, "steering")]
    write(tmp_path / "x.safetensors", Intervention.build(BASE, edits))
    head, loreft, steering, *rest = run("inspect", tmp_path / "x.safetensors").splitlines()
    assert head.split()[3:6] == ["POSITIONS", "RANK", "ACT"]
    assert loreft.split()[:6] == ["1", "block_output", "loreft", "l1", "3", "-"]
    assert steering.split()[4:] == ["-", "-", "v[16]:float32", "16", "-"]
    assert "parameters  115" in rest
    assert any(line.startswith("digest ") for line in rest)


def test_the_table_says_which_prompt_tokens_do_not_count(tmp_path: Path) -> None:
    edits = [Edit(layer, "l1", loreft_tensors(), suffix_offset=layer) for layer in (0, 1)]
    write(tmp_path / "x.safetensors", Intervention.build(BASE, edits))
    _, counting, leaving_out, *_ = run("inspect", tmp_path / "x.safetensors").splitlines()
    assert counting.split()[3:5] == ["l1", "3"]
    assert leaving_out.split()[3:6] == ["l1", "suffix_offset=1", "3"]
    found = json.loads(run("inspect", tmp_path / "x.safetensors", "--json"))
    assert [edit["suffix_offset"] for edit in found["edits"]] == [0, 1]


def test_a_folder_takes_the_name_given_or_the_sources(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    options = ("--base", base, "--positions", "l1", "--act", "linear", "--out", tmp_path)
    run("import", checkpoint, *options)
    run("import", checkpoint, *options, "--name", "mine")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "checkpoint.safetensors",
        "mine.safetensors",
    ]
    written = parse((tmp_path / "mine.safetensors").read_bytes())
    assert {str(edit.positions) for edit in written.manifest.edits} == {"l1"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("inspect", "missing.safetensors"), NotFound, "^missing.safetensors: No such file"),
        (("export", "missing", "--to", "onnx", "x"), ConfigError, "unknown format 'onnx'"),
        (
            ("import", ".", "--base", "demo", "--out", "y.safetensors", "--name", "z"),
            ConfigError,
            "name: y.safetensors is not a folder",
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], error: type[ReftError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(*arguments)


def test_a_control_vector_is_imported_and_exported(base: Path, tmp_path: Path) -> None:
    file, vector = tmp_path / "x.safetensors", tmp_path / "Happy.gguf"
    edit = Edit(2, "all", {"v": torch.ones(16)}, "steering")
    write(file, Intervention.build(BASE, [edit]))
    assert run("export", file, "--to", "gguf", vector) == f"{vector}: written\n"
    run("import", vector, "--base", base, "--out", tmp_path)
    made = parse((tmp_path / "happy.safetensors").read_bytes())
    assert made.manifest.edits[0].layer == 2
    assert made.tensors["edits.0.v"].equal(torch.ones(16))
    options = ("--base", base, "--out", tmp_path)
    run("import", vector, *options, "--name", "first", "--positions", "f1")
    assert (
        str(parse((tmp_path / "first.safetensors").read_bytes()).manifest.edits[0].positions)
        == "f1"
    )
    for option in (("--act", "relu"), ("--untied",), ("--suffix-offset", "1")):
        with pytest.raises(ConfigError, match=": a control vector has none; leave it out"):
            run("import", vector, *options, *option, "--force")
    with pytest.raises(InvalidFile, match=r"but a control vector; `reft import` makes"):
        run("inspect", vector)
    with pytest.raises(ConfigError, match=r"^to: .* cannot be written: No such file"):
        run("export", file, "--to", "gguf", tmp_path / "missing" / "x.gguf")


def test_a_plain_vector_is_imported(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    vector, options = tmp_path / "Mean.diff.npy", ("--base", base, "--out", tmp_path)
    np.save(vector, np.ones(16))
    said = run("import", vector, *options, "--layer", "2", "--positions", "l1")
    assert said.startswith(f"{tmp_path / 'mean.diff.safetensors'}: 1 edit, ")
    made = parse((tmp_path / "mean.diff.safetensors").read_bytes())
    [edit] = made.manifest.edits
    assert (edit.layer, str(edit.positions)) == (2, "l1")
    assert made.tensors["edits.0.v"].equal(torch.ones(16))
    with pytest.raises(ConfigError, match=r"^out: .*diff\.safetensors is there already; --force"):
        run("import", vector, *options, "--layer", "3")
    assert parse((tmp_path / "mean.diff.safetensors").read_bytes()).manifest == made.manifest
    run("import", vector, *options, "--layer", "3", "--force")
    made = parse((tmp_path / "mean.diff.safetensors").read_bytes())
    assert made.manifest.edits[0].layer == 3
    (tmp_path / "mean.diff.safetensors").unlink()
    with pytest.raises(ConfigError, match="act: a vector has none; leave it out"):
        run("import", vector, *options, "--layer", "2", "--act", "relu")
    with pytest.raises(ConfigError, match="layer: a checkpoint of pyreft has none; leave it out"):
        run("import", checkpoint, *options, "--layer", "2")


def test_what_a_file_does_not_say_is_told(base: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.delta_vector.activation_bias"
    torch.save({name: torch.ones(1, 16)}, tmp_path / "delta_vector.pth")
    said = run("import", tmp_path, "--base", base, "--out", tmp_path / "x.safetensors").splitlines()
    assert said[1].startswith("1 red edit of model.layers[N].mlp.down_proj.output, layer 1, all")
    assert said[2].startswith("assumed: every token is edited, as RED does; of a file of BREP's")


def test_vectors_in_lengths_of_the_models_rows(tmp_path: Path) -> None:
    vector, out = tmp_path / "v.npy", tmp_path / "v.safetensors"
    options = ("--base", make.folder(tmp_path / "tiny"), "--out", out, "--layer", "2")
    np.save(vector, np.ones(HIDDEN))
    said = run("import", vector, *options, "--in-norms", "--scale", "-3")
    made = parse(out.read_bytes())
    length = float(made.tensors["edits.0.v"].norm())
    norms: Any = made.manifest.training["norms"]
    assert norms == [pytest.approx(length / 3, rel=1e-3)]
    assert made.tensors["edits.0.v"].max() < 0
    assert said.endswith(f"\nlength of the vectors: {length:.4g}\n")


def test_vectors_by_layer_are_imported_beside_themselves(base: Path, tmp_path: Path) -> None:
    source, options = tmp_path / "v.safetensors", ("--base", base, "--out", tmp_path)
    save_file({f"layer_{layer}": torch.full((16,), layer + 1.0) for layer in range(4)}, source)
    before = source.read_bytes()
    with pytest.raises(ConfigError, match=r"^out: .* is the source itself; give another name"):
        run("import", source, *options)
    assert source.read_bytes() == before
    said = run("import", source, *options, "--name", "all").splitlines()[1]
    assert said == "4 steering edits of block_output, layers 0 to 3, all positions"
    some = ("--name", "some", "--layer", "1", "--layer", "3", "--component", "mlp_output")
    said = run("import", source, *options, *some).splitlines()[1]
    assert said == "2 steering edits of mlp_output, layers 1, 3, all positions"
    with pytest.raises(InvalidFile, match="but vectors by layer; `reft import` makes"):
        run("inspect", source)


@pytest.mark.parametrize("out", [".", "out.safetensors"])
def test_a_circle_of_links_is_told(base: Path, tmp_path: Path, out: str) -> None:
    source = tmp_path / "circle.npy"
    source.symlink_to(source)
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        run("import", source, "--layer", "1", "--base", base, "--out", tmp_path / out)


def test_an_output_that_cannot_be_written(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    options = ("--base", base, "--positions", "l1", "--act", "relu")
    for out, why in (
        (checkpoint / "config.json/x.safetensors", r"^out: .*config.json cannot be made: "),
        (tmp_path / "missing/", r"^out: .*missing must end with .safetensors"),
        (tmp_path / "Mine.safetensors", r"^out: 'Mine' is no name for an intervention"),
    ):
        with pytest.raises(ConfigError, match=why):
            run("import", checkpoint, *options, "--out", out)
    with pytest.raises(ConfigError, match=r"^name: 'a b' is no name for an .*; give one"):
        run("import", checkpoint, *options, "--out", tmp_path, "--name", "a b")
    made = tmp_path / "missing/x.safetensors"
    run("import", checkpoint, *options, "--out", made)
    assert made.is_file()


def test_a_folder_of_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    out, taken = tmp_path / "x.safetensors", tmp_path / "taken"
    write(out, Intervention.build(BASE, [Edit(1, "l1", loreft_tensors())]))
    taken.touch()
    for folder, why in ((taken / "x", "Not a directory"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(ConfigError, match=f"^to: .* cannot be written: .*{why}"):
            run("export", out, "--to", "pyreft", folder)


@pytest.mark.parametrize("form", ["pyreft", "gguf"])
def test_an_export_on_a_full_disk_leaves_nothing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "x.safetensors", tmp_path / "out"
    write(source, Intervention.build(BASE, [Edit(1, "all", {"v": torch.ones(16)}, "steering")]))

    def full(*_: object) -> None:
        out.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(ConfigError, match=r"^to: .*out cannot be written: No space left"):
        run("export", source, "--to", form, out)
    assert not out.exists()


def test_a_checkpoint_whose_name_is_too_long(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^x+: File name too long"):
        run("import", "x" * 300, "--base", base, "--out", tmp_path, "--name", "x")


@pytest.mark.parametrize("command", [("inspect",), ("export", "--to", "pyreft", "x")])
def test_a_wrong_file_is_named_and_told(
    command: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    text, empty = tmp_path / "rows.csv", tmp_path / "empty"
    text.write_text("text,label\nHello,greeting\n")
    empty.touch()
    for path, message in (
        (text, "Not an intervention file but a table of texts"),
        (empty, "Cut off: the file is empty"),
        (next(checkpoint.glob("*.bin")), "of a checkpoint of pyreft the folder"),
        (checkpoint, "Not a regular file but a checkpoint of pyreft"),
    ):
        with pytest.raises(InvalidFile) as caught:
            run(command[0], path, *command[1:])
        assert caught.value.message.startswith(f"{path}: ")
        assert message in caught.value.message


def test_a_file_tells_a_terminal_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an error that quotes it, nor what it says of itself."""
    named = tmp_path / "named.safetensors"
    save_file({"\x1b]0;you\x07": torch.zeros(1)}, named, {"reft": _manifest(tmp_path)})
    monkeypatch.setattr(main, "_leave", lambda _: None)
    for file in (named, tmp_path / "whole.safetensors"):
        monkeypatch.setattr(sys, "argv", ["reft", "inspect", str(file)])
        main.main()
        said = "".join(capsys.readouterr())
        assert "you" in said
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "https://me:secret@host/x.safetensors"),
        ("check", "https://secret@host/x.jsonl"),
    ],
)
def test_no_password_of_a_url_is_told(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "_leave", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["reft", *arguments])
    main.main()
    said = "".join(capsys.readouterr())
    assert "host" in said
    assert "secret" not in said


def _manifest(folder: Path) -> str:
    """The manifest of a file, which is written, whose description has control characters."""
    edits = [Edit(1, "l1", loreft_tensors())]
    file = folder / "whole.safetensors"
    write(file, Intervention.build(BASE, edits, description="\x9b1myou\x07"))
    with safe_open(file, "pt") as opened:
        return str(opened.metadata()["reft"])


def test_a_file_that_is_not_there_says_which_may_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("interventions/pirate", "interventions/formal", "here/formol"):
        file = Path(f"{path}.safetensors")
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for given, meant in (
        ("pirate", " Did you mean interventions/pirate.safetensors?"),
        ("here/priate.safetensors", " Did you mean interventions/pirate.safetensors?"),
        (
            "here/formul",
            " Did you mean here/formol.safetensors or interventions/formal.safetensors?",
        ),
        ("nothing.like", ""),
        ("x" * 300, ""),
    ):
        with pytest.raises(NotFound) as caught:
            run("inspect", given)
        assert caught.value.message.endswith(f".{meant}")
        assert caught.value.message.startswith(f"{given}: ")


def test_the_shape_of_a_base(base: Path, tmp_path: Path) -> None:
    shape = base_shape(base)
    assert shape == base_shape(str(base))
    assert (shape.model, shape.architecture) == ("tiny", "LlamaForCausalLM")
    assert (shape.hidden_size, shape.num_layers, shape.vocab_size) == (16, 4, 64)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    unnamed = shape.model_copy(update={"model": "LlamaForCausalLM"})
    assert base_shape(model) == unnamed
    encoder = tmp_path / "encoder"
    T5Config().save_pretrained(encoder)
    for wrong, message in (
        (tmp_path / "none", "model: there is no folder"),
        (encoder, "no causal language model"),
        (5, "model: give demo, a folder, a hub id or a transformers model, not int"),
    ):
        with pytest.raises(ConfigError, match=message):
            base_shape(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^base: there is no folder"):
        run("inspect", "x", "--base", tmp_path / "none")
