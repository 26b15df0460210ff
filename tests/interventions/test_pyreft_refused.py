"""Checkpoints that are broken or hostile: refused with the reason, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_runtime.base.shape import read_base
from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.pyreft import checkpoint, import_pyreft, unpickle
from reft_runtime.interventions.pyreft.states import read_states
from reft_runtime.interventions.pyreft.unpickle import BASE as PARAMETRISED_BASE
from reft_runtime.interventions.pyreft.unpickle import ORIGINAL, read_state
from tests.helpers.pyreft import BASE, module, save

FILE = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
LOREFT = module("loreft").state_dict()
DIREFT = module("direft").state_dict()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    places = [(1, "block_output"), (2, "block_output")]
    return save(tmp_path_factory.mktemp("good"), places, [module("loreft"), module("loreft")])


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Evil:
    """What a hostile pickle holds: a call made while it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def rezipped(data: bytes, compression: int, **replaced: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            for name, instead in replaced.items():
                if entry.filename.endswith(f"data.{name}"):
                    content = instead
            new.writestr(entry.filename, content, compress_type=compression)
    return buffer.getvalue()


def loreft_with(**changes: Any) -> bytes:
    return saved({**LOREFT, **changes})


def without(state: dict[str, Tensor], key: str) -> bytes:
    return saved(OrderedDict((name, value) for name, value in state.items() if name != key))


MARK = "/tmp/reft-a-pickle-ran-code"
GOOD = saved(LOREFT)

# In these the file is refused before a kind is thought of.
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a file that torch.save writes"),
    "text": (b"hello", "not a file that torch.save writes"),
    "plain pickle": (pickle.dumps({"weight": 1}), "not a file that torch.save writes"),
    "legacy torch file": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "not a file that torch"),
    "cut off": (GOOD[: len(GOOD) // 2], "a damaged archive"),
    "only the magic": (b"PK\x03\x04", "a damaged archive"),
    "compressed": (rezipped(GOOD, zipfile.ZIP_DEFLATED), "a compressed archive"),
    "no pickle": (rezipped(GOOD, zipfile.ZIP_STORED, pkl=b""), "pickle exhausted"),
    "endless program": (
        rezipped(GOOD, zipfile.ZIP_STORED, pkl=b"N0" * (1 << 20)),
        "its pickle has 2097152 bytes, and at most 1048576 are read; save fewer tensors in it",
    ),
    "os.system": (saved({"weight": Evil(os.system, f"touch {MARK}")}), "posix system"),
    "eval": (saved({"weight": Evil(eval, f"open({MARK!r}, 'w')")}), "__builtin__ eval"),
    "exec": (saved({"weight": Evil(exec, f"open({MARK!r}, 'w')")}), "__builtin__ exec"),
    "getattr": (saved({"weight": Evil(getattr, 1, "real")}), "__builtin__ getattr"),
    "bytearray": (saved({"weight": Evil(bytearray, 1 << 40)}), "__builtin__ bytearray"),
    "torch.load": (saved({"weight": Evil(torch.load, MARK)}), "torch.serialization load"),
    "protocol 4": (
        rezipped(GOOD, zipfile.ZIP_STORED, pkl=pickle.dumps(Evil(os.system, "x"), 4)),
        "could run code",
    ),
    "extension code": (
        rezipped(GOOD, zipfile.ZIP_STORED, pkl=b"\x80\x02\x82\x01."),
        "could run code",
    ),
    "inst": (
        rezipped(GOOD, zipfile.ZIP_STORED, pkl=b"(iposix\nsystem\n."),
        "could run code",
    ),
    "a list": (saved([torch.ones(2)]), "not a state dict"),
    "an empty dict": (saved({}), "not a state dict"),
    "a number": (saved({"weight": 3}), "weight: not a tensor"),
    "a nested dict": (saved({"weight": LOREFT}), "weight: not a tensor"),
    "a key that is no text": (saved({2.5: torch.ones(2)}), "2.5: not a tensor"),
    "a view of 4 TB": (loreft_with(weight=torch.ones(1).expand(1 << 20, 1 << 20)), "too large"),
    "half a parametrised R": (without(DIREFT, PARAMETRISED_BASE), r"0\.base: missing"),
    "the other half": (without(DIREFT, ORIGINAL), r"original: missing"),
    "two Rs": (saved({**DIREFT, "rotate_layer": LOREFT["rotate_layer"]}), "stored twice"),
    "a base of another size": (
        saved({**DIREFT, PARAMETRISED_BASE: torch.eye(15)}),
        r"base: shape \[15, 15\]",
    ),
    "R as a row": (saved({**DIREFT, ORIGINAL: torch.ones(4, 16)}), r"original: shape \[4, 16\]"),
}

# Readable, and no intervention.
UNSOUND: dict[str, tuple[bytes, str]] = {
    "no W": (without(LOREFT, "weight"), r"1#0\.bin: W: missing"),
    "no R": (without(LOREFT, "rotate_layer"), r"1#0\.bin: R: missing"),
    "W of another width": (loreft_with(weight=torch.ones(4, 15)), r"W: shape \[4, 15\], .*d=16"),
    "W of another rank": (loreft_with(weight=torch.ones(3, 16)), r"R: shape \[16, 4\], .*r=3"),
    "R transposed": (
        loreft_with(rotate_layer=LOREFT["rotate_layer"].T.contiguous()),
        r"R: shape \[4, 16\]",
    ),
    "b of another rank": (loreft_with(bias=torch.ones(5)), r"b: shape \[5\]"),
    "NaN": (loreft_with(weight=torch.full((4, 16), torch.nan)), "W: holds NaN"),
    "infinite": (loreft_with(bias=torch.full((4,), torch.inf)), "b: holds NaN or infinite"),
    "R not orthonormal": (
        loreft_with(rotate_layer=1.1 * LOREFT["rotate_layer"]),
        "R: columns are not orthonormal",
    ),
    "numbers of int64": (loreft_with(weight=LOREFT["weight"].long()), "W: dtype int64"),
    "another tensor": (loreft_with(extra=torch.ones(1)), "extra: a loreft has no such tensor"),
    "parameters of an act": (
        saved({**LOREFT, "act_fn.weight": torch.ones(1)}),
        "act_fn has trained parameters",
    ),
    "a tensor": (saved(torch.ones(2)), "tensor: a loreft has no such tensor"),
    "tensors by number": (saved({3: torch.ones(2)}), "3: a loreft has no such tensor"),
    "another class's tensors": (saved(DIREFT), r"(W: missing|no such tensor)"),
}


def test_the_separate_process_refuses_and_runs_nothing(folder: Path) -> None:
    Path(MARK).unlink(missing_ok=True)
    for case in ("os.system", "a view of 4 TB"):  # before and after torch reads it
        data, message = UNREADABLE[case]
        (folder / FILE).write_bytes(data)
        with pytest.raises(InvalidFile, match=rf"1#0\.bin: .*{message}"):
            import_pyreft(folder, base=BASE, positions="l1", act="linear")
    assert not Path(MARK).exists()


def test_the_separate_process_reads_what_is_sound_and_imports_nothing_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "torch.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(folder)
    (state, other) = read_states(sorted(folder.glob("*.bin")))
    assert state.keys() == LOREFT.keys() == other.keys()
    for key, tensor in LOREFT.items():
        assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("case", UNREADABLE)
def test_hostile_pickles(case: str, tmp_path: Path) -> None:
    data, message = UNREADABLE[case]
    Path(MARK).unlink(missing_ok=True)
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(Exception, match=message):
        read_state(tmp_path / FILE)
    assert not Path(MARK).exists()


@pytest.mark.parametrize("cut", range(0, len(GOOD), len(GOOD) // 12))
def test_cut_anywhere(cut: int, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(GOOD[:cut])
    with pytest.raises((ValueError, RuntimeError)):
        read_state(tmp_path / FILE)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(ValueError, match="not a regular file"):
        read_state(tmp_path / FILE)


def test_a_file_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_bytes(GOOD)
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", len(GOOD) - 1)
    with pytest.raises(ValueError, match=f"more than {len(GOOD) - 1} bytes"):
        read_state(tmp_path / FILE)


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_states", lambda paths: [read_state(p) for p in paths])


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_tensors(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    data, message = UNSOUND[case]
    (folder / FILE).write_bytes(data)
    with pytest.raises(InvalidFile, match=message):
        import_pyreft(folder, base=BASE, positions="l1", act="linear")


Change = Callable[[dict[str, Any]], object]


def set_field(index: int, value: object) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["representations"][0][index] = value

    return change


CONFIGS: dict[str, tuple[Change, str]] = {
    "no representations": (lambda c: c.pop("representations"), "representations: missing"),
    "none of them": (lambda c: c.update(representations=[]), "representations: missing"),
    "a number": (lambda c: c.update(representations=3), "representations: missing"),
    "one too short": (lambda c: c["representations"][0].__delitem__(slice(1, None)), "2 to 14"),
    "one too long": (lambda c: c["representations"][0].extend([None]), "2 to 14"),
    "one a number": (lambda c: c["representations"].__setitem__(0, 3), "or an object"),
    "layer a text": (set_field(0, "1"), r"representations\.0, layer"),
    "layer negative": (set_field(0, -1), r"representations\.0, layer"),
    "layer true": (set_field(0, True), r"representations\.0, layer"),
    "layer without a file": (set_field(0, 3), r"layer_3_.*: missing, though config"),
    "component a number": (set_field(1, 3), "component: must be a string"),
    "another component": (set_field(1, "mlp_output"), r"mlp_output.*: missing, though config"),
    "heads": (set_field(2, "h.pos"), "unit: 'h.pos'; only `pos`"),
    "several units": (set_field(3, 2), r"nunit_2#0\.bin: missing"),
    "partition": (set_field(7, [[0, 1]]), "subspace_partition: .*cannot be served"),
    "linked": (set_field(9, 0), "intervention_link_key: .*cannot be served"),
    "expert": (set_field(10, 0), "moe_key: .*cannot be served"),
    "serial": (lambda c: c.update(mode="serial"), "mode: 'serial'"),
    "no classes": (lambda c: c.pop("intervention_types"), "intervention_types: must name"),
    "a class too few": (lambda c: c["intervention_types"].pop(), "intervention_types: must name"),
    "no class": (lambda c: c["intervention_types"].__setitem__(0, "x"), "'x' is no class"),
    "unknown class": (
        lambda c: c["intervention_types"].__setitem__(0, "<class 'mine.Magic'>"),
        "Magic cannot be served; known are Loreft",
    ),
    "source run": (
        lambda c: c["intervention_constant_sources"].__setitem__(0, False),
        "takes its values from the run of another prompt",
    ),
    "sources too few": (
        lambda c: c["intervention_constant_sources"].pop(),
        "intervention_constant_sources: must have one",
    ),
    "other dimensions": (
        lambda c: c["intervention_dimensions"].__setitem__(0, 17),
        "config.json says 17 dimensions, its tensors have 16",
    ),
    "a file not listed": (
        lambda c: [c[key].pop() for key in c if isinstance(c[key], list)],
        "layer_2_.*config.json does not list it",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    change, message = CONFIGS[case]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidFile, match=message):
        import_pyreft(folder, base=BASE, positions="l1", act="linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json: not readable"),
        ("[]", r"config\.json: must be a JSON object"),
        ("[" * 100_000, r"config\.json: not readable"),
        ("\udcff", r"config\.json: not readable"),
        ('{"a": "' + "x" * (4 << 20) + '"}', r"more than 4194304 bytes"),
    ],
)
def test_json_that_is_none(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidFile, match=message):
        import_pyreft(folder, base=BASE, positions="l1", act="linear")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"position": 3}, r"args\.json, position: must be a str"),
        ({"position": "x9"}, "positions: 'x9' is not understood"),
        ({"position": "l1", "share_weights": "yes"}, r"args\.json, share_weights: must be a bool"),
        ({"position": "l1", "act_fn": 7}, r"args\.json, act_fn: '7' is no act"),
        ({"position": "l1", "suffix_offset": True}, r"args\.json, suffix_offset"),
        ({"position": "l1", "suffix_offset": -1}, r"suffix_offset"),
    ],
)
def test_arguments(
    args: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    (folder / "args.json").write_text(json.dumps({"act_fn": None, **args}))
    with pytest.raises(InvalidFile, match=message):
        import_pyreft(folder, base=BASE)


def test_what_contradicts_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    given: dict[str, Any] = {"base": BASE, "act": "linear", "share_weights": False}
    with pytest.raises(InvalidFile, match=r"untied weights take fN\+lM"):
        import_pyreft(folder, positions="f1+l1+decode", **given)
    with pytest.raises(InvalidFile, match="a LoreftIntervention is loreft, not direft"):
        import_pyreft(folder, positions="l1", kind="direft", **given)
    shallow = BASE.model_copy(update={"num_layers": 2})
    with pytest.raises(InvalidFile, match="layer 2, but tiny has layers 0 to 1; check --base"):
        import_pyreft(folder, positions="l1", **{**given, "base": shallow})
    (folder / "config.json").unlink()
    with pytest.raises(InvalidFile, match=r"for the first tokens \(#0\)"):
        import_pyreft(folder, positions="f1+l1", **given)
    (folder / FILE).unlink()
    with pytest.raises(InvalidFile, match="1 interventions cannot be untied"):
        import_pyreft(folder, positions="f1+l1", **given)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="not a folder"):
        import_pyreft(tmp_path / "missing", base=BASE)
    with pytest.raises(InvalidFile, match="no intkey_"):
        import_pyreft(tmp_path, base=BASE)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidFile, match="another library's format"):
        import_pyreft(tmp_path, base=BASE)
    (tmp_path / "intkey_x.bin").write_bytes(GOOD)
    with pytest.raises(InvalidFile, match="not a name that pyvene gives"):
        import_pyreft(tmp_path, base=BASE)
    (tmp_path / "intkey_x.bin").unlink()
    for index in range(1025):
        (tmp_path / f"intkey_{index}.bin").touch()
    with pytest.raises(InvalidFile, match="1025 files; at most 1024"):
        import_pyreft(tmp_path, base=BASE)


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "vit"}'])
def test_what_is_no_base_model(config: str | None, folder: Path) -> None:
    base = folder / "base"
    base.mkdir()
    if config is not None:
        (base / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="base: "):
        read_base(str(base))
