from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from reft_runtime.errors import FileTooLarge, InvalidFile, WrongBaseModel
from reft_runtime.interventions import (
    Edit,
    Intervention,
    parse,
    read,
    read_header,
    serialise,
    write,
)
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.identity import is_whole
from reft_runtime.interventions.format.manifest import check_base
from tests.interventions.make import BASE, file_bytes, intervention, loreft_tensors

GOOD = file_bytes()
LENGTH = int.from_bytes(GOOD[:8], "little")
HEADER: dict[str, Any] = json.loads(GOOD[8 : 8 + LENGTH])
DATA = GOOD[8 + LENGTH :]


def assemble(header: str | bytes, data: bytes = DATA) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def with_manifest(change: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(HEADER["__metadata__"]["reft"])
    change(manifest)
    return with_manifest_text(json.dumps(manifest))


def with_manifest_text(text: str) -> bytes:
    return assemble(json.dumps({**HEADER, "__metadata__": {"reft": text}}))


def with_tensor(name: str, **fields: object) -> bytes:
    return assemble(json.dumps({**HEADER, name: {**HEADER.get(name, {}), **fields}}))


def with_data(index: int, value: int) -> bytes:
    changed = bytearray(GOOD)
    changed[8 + LENGTH + index] ^= value
    return bytes(changed)


def load(data: bytes) -> None:
    """All checks that a file passes before it is served."""
    parse(data).canonical()


def list_and_load(path: Path) -> None:
    """The same from disk, where what the header shows is refused without the data."""
    read_header(path)
    load(read(path))


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return buffer.getvalue()


def nan_data() -> bytes:
    tensors = {f"edits.0.{name}": tensor for name, tensor in loreft_tensors().items()}
    tensors["edits.0.W"][0, 0] = torch.nan
    return serialise(Intervention(intervention().manifest, tensors))


def test_round_trip(tmp_path: Path) -> None:
    made = Intervention.build(
        BASE,
        [Edit(1, "f2", loreft_tensors(1)), Edit(1, "l2", loreft_tensors(2))],
        template="<u>{prompt}</u>",
        description="tëst 🍎",
        license="Apache-2.0",
        metrics={"accuracy": 0.5, "by_task": {"a": [1, None]}},
        training={"steps": 100},
    )
    path = tmp_path / "x.safetensors"
    write(path, made)
    back = parse(read(path))
    assert back.manifest == made.manifest
    assert back.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
    header = read_header(path)
    assert header.manifest == made.manifest
    assert header.size_bytes == path.stat().st_size
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_digest_is_the_hash_of_the_header() -> None:
    digest = header_of(GOOD).digest
    assert digest == hashlib.sha256(GOOD[: 8 + LENGTH]).hexdigest()
    assert is_whole(GOOD, digest)
    assert not is_whole(GOOD[:-1], digest)
    assert not is_whole(file_bytes(seed=1), digest)


def test_equal_content_gives_equal_bytes_and_other_content_another_digest() -> None:
    assert serialise(intervention()) == GOOD == serialise(parse(GOOD))
    others = {
        header_of(data).digest
        for data in (
            file_bytes(seed=1),
            file_bytes(description="x"),
            serialise(intervention(positions="l2")),
        )
    }
    assert len({header_of(GOOD).digest, *others}) == 4


def test_newer_fields_are_written_only_where_they_say_something() -> None:
    fields = json.loads(HEADER["__metadata__"]["reft"])["edits"][0]
    assert fields.keys() == {"layer", "component", "kind", "positions", "dtype"}
    edit = Edit(
        1,
        "f1",
        loreft_tensors(d=24),
        component="mlp_activation",
        act="gelu",
        width=24,
        suffix_offset=1,
    )
    back = parse(serialise(Intervention.build(BASE, [edit]))).manifest.edits[0]
    assert (back.component, back.act, back.width, back.suffix_offset) == (
        "mlp_activation",
        "gelu",
        24,
        1,
    )


def test_reading_the_header_does_not_read_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_data(5, 1))
    assert read_header(path).digest == header_of(GOOD).digest
    with pytest.raises(InvalidFile, match="data_sha256"):
        parse(read(path))


def test_other_writers_metadata_and_tensor_order_are_accepted() -> None:
    header = {name: HEADER[name] for name in reversed(HEADER)}
    header["__metadata__"] = {"format": "pt", **HEADER["__metadata__"]}
    load(assemble(json.dumps(header)))


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Cut off: the file is empty"),
    "seven bytes": (GOOD[:7], "Cut off: 7 bytes"),
    "length only": (GOOD[:8], "Cut off inside the header"),
    "cut in the header": (GOOD[:60], "Cut off inside the header"),
    "cut in the data": (GOOD[:-1], "cut off or has something appended"),
    "no data": (GOOD[: 8 + LENGTH], "cut off or has something appended"),
    "appended": (GOOD + b"\0", "cut off or has something appended"),
    "huge header length": ((2**63).to_bytes(8, "little") + GOOD[8:], "Header length 92233720"),
    "zero header length": (bytes(8) + GOOD[8:], "Header length 0"),
    "pickle": (b"\x80\x02}q\x00X\x06\x00\x00\x00weight", "PyTorch or pickle"),
    "zip": (a_zip(), "PyTorch or pickle"),
    "text": (b"<!doctype html><html></html>", "but a web page"),
    "not JSON": (assemble("{nonsense}"), "header: not valid JSON"),
    "not UTF-8": (assemble(b'{"a\xff": 1}'), "header: not valid JSON"),
    "deep JSON": (assemble("[" * 50_000), "header: not valid JSON"),
    "long number": (assemble('{"a": ' + "9" * 5000 + "}"), "header: not valid JSON"),
    "a JSON list": (assemble("[1, 2]"), "header: must be a JSON object"),
    "a JSON NaN": (assemble('{"a": NaN}'), "NaN is not JSON"),
    "duplicate tensor": (
        assemble(
            json.dumps(HEADER)[:-1] + ', "edits.0.W": ' + json.dumps(HEADER["edits.0.W"]) + "}"
        ),
        "a key occurs twice",
    ),
    "lone surrogate": (assemble('{"\\ud800": 1}'), "header: not valid JSON"),
    "no metadata": (safetensors.torch.save(loreft_tensors()), "no manifest"),
    "foreign metadata": (safetensors.torch.save(loreft_tensors(), {"format": "pt"}), "no manifest"),
    "metadata is a list": (assemble('{"__metadata__": []}'), "no manifest"),
    "manifest not JSON": (with_manifest_text("{"), "manifest: not valid JSON"),
    "manifest twice a key": (with_manifest_text('{"a": 1, "a": 2}'), "a key occurs twice"),
    "manifest empty": (with_manifest_text("{}"), "data_sha256"),
    "wrong data hash": (with_manifest(lambda m: m.update(data_sha256="0" * 64)), "damaged file"),
    "no data hash": (with_manifest(lambda m: m.pop("data_sha256")), "data_sha256"),
    "newer schema": (with_manifest(lambda m: m.update(schema_version=2)), "schema_version"),
    "unknown field": (with_manifest(lambda m: m.update(extra=1)), "extra"),
    "number as text": (
        with_manifest(lambda m: m["base"].update(hidden_size="16")),
        r"base\.hidden_size",
    ),
    "no edits": (with_manifest(lambda m: m.update(edits=[])), "edits"),
    "edits no list": (with_manifest(lambda m: m.update(edits={"0": 1})), "edits"),
    "2000 edits": (with_manifest(lambda m: m.update(edits=m["edits"] * 2000)), "edits"),
    "negative layer": (with_manifest(lambda m: m["edits"][0].update(layer=-1)), r"edits\.0\.layer"),
    "boolean layer": (
        with_manifest(lambda m: m["edits"][0].update(layer=True)),
        r"edits\.0\.layer",
    ),
    "layer out of range": (
        with_manifest(lambda m: m["edits"][0].update(layer=4)),
        r"edits\.0\.layer is 4",
    ),
    "unknown component": (
        with_manifest(lambda m: m["edits"][0].update(component="mlp_outputs")),
        r"edits\.0: component: 'mlp_outputs' is neither",
    ),
    "component a number": (
        with_manifest(lambda m: m["edits"][0].update(component=3)),
        r"edits\.0\.component",
    ),
    "component that escapes": (
        with_manifest(lambda m: m["edits"][0].update(component="model.__class__().output")),
        r"edits\.0: component: .* is neither",
    ),
    "another way to write a component": (
        with_manifest(lambda m: m["edits"][0].update(component="model.layers[1].output")),
        r"edits\.0: component: .* is to be written as 'block_output' of layer 1",
    ),
    "path in another layer": (
        with_manifest(lambda m: m["edits"][0].update(component="model.layers[2].x.output")),
        r"edits\.0: component: .* of layer 1 is to be written as .* of layer 2",
    ),
    "unknown act": (
        with_manifest(lambda m: m["edits"][0].update(act="magic")),
        r"edits\.0\.act: unknown act 'magic'; known: gelu",
    ),
    "act a list": (with_manifest(lambda m: m["edits"][0].update(act=["relu"])), r"edits\.0\.act"),
    "act of a kind without": (
        with_manifest(lambda m: m["edits"][0].update(act="relu", kind="consreft")),
        r"edits\.0: act: a consreft edit has none",
    ),
    "wrong width": (
        with_manifest(lambda m: m["edits"][0].update(width=17)),
        r"edits\.0\.width is 17, but block_output has .* 16",
    ),
    "width that the tensors do not have": (
        with_manifest(lambda m: m["edits"][0].update(width=17, component="mlp_activation")),
        r"edits\.0\.W: shape \[3, 16\], expected \[r=3, d=17\]",
    ),
    "width zero": (with_manifest(lambda m: m["edits"][0].update(width=0)), r"edits\.0\.width"),
    "negative suffix offset": (
        with_manifest(lambda m: m["edits"][0].update(suffix_offset=-1)),
        r"edits\.0\.suffix_offset",
    ),
    "endless positions": (
        with_manifest(lambda m: m["edits"][0].update(positions=str([*range(5000)]))),
        r"edits\.0\.positions: a list may have at most 4096",
    ),
    "unknown kind": (with_manifest(lambda m: m["edits"][0].update(kind="x")), "unknown kind"),
    "kind no string": (with_manifest(lambda m: m["edits"][0].update(kind=[])), r"edits\.0\.kind"),
    "bad positions": (
        with_manifest(lambda m: m["edits"][0].update(positions="f1+f1")),
        r"edits\.0\.positions: .*twice",
    ),
    "positions no string": (
        with_manifest(lambda m: m["edits"][0].update(positions=3)),
        r"edits\.0\.positions",
    ),
    "other dtype": (
        with_manifest(lambda m: m["edits"][0].update(dtype="float16")),
        r"edits\.0\.W: dtype float32",
    ),
    "other hidden size": (
        with_manifest(lambda m: m["base"].update(hidden_size=32)),
        r"edits\.0\.W: shape \[3, 16\], expected \[r=3, d=32\]",
    ),
    "system without a text": (
        with_manifest(lambda m: m.update(system="drop", template="chat")),
        "template that is a text",
    ),
    "system without a template": (
        with_manifest(lambda m: m.update(system="drop")),
        "template that is a text",
    ),
    "unknown system": (
        with_manifest(lambda m: m.update(system="append", template="{prompt}")),
        "system",
    ),
    "template without field": (with_manifest(lambda m: m.update(template="x")), "template"),
    "infinite metric": (
        with_manifest_text(
            HEADER["__metadata__"]["reft"].replace('"metrics":{}', '"metrics":{"a":1e999}')
        ),
        "metrics: .*infinite",
    ),
    "deep metric": (
        with_manifest(lambda m: m.update(metrics=json.loads('{"a":' * 20 + "1" + "}" * 20))),
        "metrics: .*nested",
    ),
    "surrogate in text": (
        with_manifest(lambda m: m.update(description="\ud800")),
        "manifest: not valid JSON",
    ),
    "long description": (with_manifest(lambda m: m.update(description="x" * 5000)), "description"),
    "header too long": (with_manifest(lambda m: m.update(pad="x" * (1 << 20))), "Header length"),
    "tensor of no edit": (
        assemble(
            json.dumps({"edits.1.W" if k == "edits.0.W" else k: v for k, v in HEADER.items()})
        ),
        r"edits\.1\.W: no edit",
    ),
    "tensor renamed": (
        assemble(
            json.dumps({"edits.0.Q" if k == "edits.0.W" else k: v for k, v in HEADER.items()})
        ),
        r"edits\.0\.Q: a loreft edit has no such tensor",
    ),
    "integer tensor": (with_tensor("edits.0.W", dtype="I32"), r"edits\.0\.W: dtype I32"),
    "dtype a list": (with_tensor("edits.0.W", dtype=["F32"]), r"edits\.0\.W: dtype"),
    "extra tensor field": (with_tensor("edits.0.W", more=1), r"edits\.0\.W: must have"),
    "tensor a number": (assemble(json.dumps({**HEADER, "edits.0.W": 3})), "must have dtype"),
    "overflowing shape": (
        with_tensor("edits.0.W", shape=[2**32, 2**32]),
        r"edits\.0\.W: data_offsets do not fit",
    ),
    "many dimensions": (
        with_tensor("edits.0.W", shape=[3, 16, *[1] * 7]),
        r"edits\.0\.W: shape and data_offsets must be lists of natural numbers",
    ),
    "shape a number": (with_tensor("edits.0.W", shape=48), "natural numbers"),
    "negative shape": (with_tensor("edits.0.W", shape=[-3, -16]), "natural numbers"),
    "shape of booleans": (with_tensor("edits.0.W", shape=[True, True]), "natural numbers"),
    "offsets reversed": (with_tensor("edits.0.W", data_offsets=[192, 0]), "do not fit"),
    "offsets overlap": (with_tensor("edits.0.W", data_offsets=[0, 192]), "overlap"),
    "flipped data bit": (with_data(20, 1), "damaged file"),
    "NaN": (nan_data(), r"edits\.0\.W: holds NaN"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    data, message = CORRUPT[case]
    with pytest.raises(InvalidFile, match=message):
        load(data)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidFile, match=message):
        list_and_load(path)


@pytest.mark.parametrize("cut", range(0, len(GOOD), len(GOOD) // 20))
def test_cut_anywhere(cut: int) -> None:
    with pytest.raises(InvalidFile):
        load(GOOD[:cut])


@pytest.mark.parametrize("index", range(0, 8 + LENGTH, 7))
def test_a_flipped_header_byte_is_refused_or_changes_the_digest(index: int) -> None:
    changed = bytearray(GOOD)
    changed[index] ^= 0x21
    try:
        load(bytes(changed))
    except InvalidFile:
        return
    assert header_of(bytes(changed)).digest != header_of(GOOD).digest


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    assert read(path, len(GOOD)) == GOOD
    with pytest.raises(FileTooLarge, match=f"{len(GOOD)} bytes; .* at most {len(GOOD) - 1}"):
        read(path, len(GOOD) - 1)
    with pytest.raises(FileTooLarge):
        read_header(path, len(GOOD) - 1)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    fifo, link, folder = tmp_path / "fifo", tmp_path / "link", tmp_path / "folder"
    os.mkfifo(fifo)
    (tmp_path / "good").write_bytes(GOOD)
    link.symlink_to(tmp_path / "good")
    folder.mkdir()
    for path in (fifo, link, folder, Path("/dev/zero")):
        with pytest.raises(InvalidFile, match="Not a regular file"):
            read(path)
        with pytest.raises(InvalidFile, match="Not a regular file"):
            read_header(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, intervention())

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write(path, intervention(seed=1))
    assert path.read_bytes() == GOOD
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_could_not_be_read_again_is_not_written() -> None:
    made = Intervention.build(
        BASE, [Edit(0, "l1", loreft_tensors())], training={"log": "x" * (1 << 20)}
    )
    with pytest.raises(InvalidFile, match="Header length"):
        serialise(made)


def test_base_model_fingerprint() -> None:
    manifest = intervention().manifest
    check_base(manifest, BASE.model_copy(update={"model": "a mirror of tiny"}))
    resized = BASE.model_copy(update={"vocab_size": 99, "architecture": "Other"})
    check_base(manifest, resized, manifest.base.model[:2] + "*")
    for pattern, other in (
        ("another-*", resized),
        ("*", BASE.model_copy(update={"hidden_size": 99})),
        ("*", BASE.model_copy(update={"num_layers": 1})),
    ):
        with pytest.raises(WrongBaseModel):
            check_base(manifest, other, pattern)
    for field, value in (
        ("architecture", "GPT2LMHeadModel"),
        ("hidden_size", 17),
        ("num_layers", 5),
        ("vocab_size", 65),
    ):
        with pytest.raises(WrongBaseModel, match=rf"{field} \w+ \(loaded: {value}\)"):
            check_base(manifest, BASE.model_copy(update={field: value}))


@pytest.mark.parametrize("system", [None, "prepend", "drop", "refuse"])
def test_a_file_says_what_its_text_does_with_a_system_turn(system: Any) -> None:
    edit = Edit(1, "l1", loreft_tensors())
    made = Intervention.build(BASE, [edit], template="{prompt} ->", system=system)
    data = serialise(made)
    found = parse(data).manifest
    assert found.system == system
    assert found.system_turn == (system or "prepend")
    # What says nothing is written as before the field was there: it keeps its digest.
    assert (b"system" in data) is (system is not None)


@pytest.mark.parametrize("prefix", [None, "", " "])
def test_a_file_says_how_a_completion_begins(prefix: Any) -> None:
    edit = Edit(1, "l1", loreft_tensors())
    made = Intervention.build(BASE, [edit], completion_prefix=prefix)
    data = serialise(made)
    assert parse(data).manifest.completion_prefix == prefix
    # What says nothing is written as before the field was there: it keeps its digest.
    assert (b"completion_prefix" in data) is (prefix is not None)
    with pytest.raises(InvalidFile, match="completion_prefix"):
        Intervention.build(BASE, [edit], completion_prefix="\n")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**5000, "metrics: .*too large"),
        (["a", {"b": "\ud800"}], "metrics: .*surrogate"),
        (math.inf, "metrics: .*infinite"),
    ],
    ids=["integer", "surrogate", "infinity"],
)
def test_what_could_not_be_written_is_refused_when_it_is_built(value: Any, message: str) -> None:
    edits = [Edit(1, "l1", loreft_tensors())]
    with pytest.raises(InvalidFile, match=message):
        Intervention.build(BASE, edits, metrics={"a": value})
    with pytest.raises(InvalidFile, match=message.replace("metrics", "training")):
        Intervention.build(BASE, edits, training={"a": value})
