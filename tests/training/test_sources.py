"""Rows from everything that people have them in, and the columns that are taken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from reft_runtime.training.check import check
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.sources import file_for, read_records

BILLING = {"prompt": "Charged, twice", "completion": "billing", "label": "billing"}


def mapped(rows: Rows) -> list[dict[str, Any]]:
    return [{name: row.fields.get(name) for name in BILLING} for row in rows.rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'text,label\n"Charged, twice",billing\n'),
        ("x.csv", '\ufeffticket;category\r\n"Charged, twice"; billing \r\n'),
        ("x.csv", 'id,Sentence,Target\n1,"Charged, twice",billing\n'),
        ("x.tsv", "text\tlabel\nCharged, twice\tbilling\n"),
        ("x.json", '[\n{"question": "Charged, twice", "intent": "billing"}]\n'),
        ("x.json", '{"message": "Charged, twice", "class": "billing"}\n'),
        ("x.jsonl", '\ufeff{"review": "Charged, twice", "label": "billing"}\n'),
    ],
)
def test_files_with_columns_of_usual_names(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, newline="")
    rows = read_rows(tmp_path / name)
    assert mapped(rows) == [BILLING]
    assert "by the name; --text and --label name others" in rows.columns.note


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["Charged, twice"], "label": ["billing"]})
    parquet.write_table(table, path)
    rows = read_rows(path)
    assert mapped(rows) == [BILLING]
    assert rows.rows[0].where == "x.parquet, row 1"
    path.write_bytes(b"PAR?")
    with pytest.raises(ConfigError, match=r"x\.parquet: not Parquet"):
        read_rows(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'reft-server\[parquet\]'"):
        read_rows(path)


def test_named_columns_and_numbers() -> None:
    [row] = read_rows([{"a": "Hi", "b": 3, "text": "no"}], text="a", label="b").rows
    assert (row.text("prompt"), row.text("completion"), row.label) == ("Hi", "3", "3")
    answers = read_rows([{"instruction": "Hi", "output": " Ho "}])
    assert mapped(answers) == [{"prompt": "Hi", "completion": " Ho ", "label": None}]
    with pytest.raises(ConfigError, match="label: there is no column 'x'; there are a, b"):
        read_rows([{"a": "Hi", "b": "3"}], text="a", label="x")
    [row] = read_rows([{"ticket_body": "Hi", "queue": "3"}]).rows
    with pytest.raises(ConfigError, match=r"'prompt'; it has ticket_body, queue. Name .* --text"):
        row.text("prompt")


def test_a_label_that_is_no_text_is_a_wrong_row() -> None:
    (found,) = check([{"text": "Charged, twice", "label": ["billing"]}])
    assert [str(problem) for problem in found.problems] == [
        "error: 1 row is wrong: row 1: completion must be text, not list."
    ]


def test_rows_that_have_the_form_are_left_as_they_are() -> None:
    given = {"prompt": "a", "completion": " b c", "label": " b", "text": "d"}
    rows = read_rows([given])
    assert rows.rows[0].fields == given
    assert rows.columns.note == ""


def test_tables_in_memory() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["Charged, twice", "b"], "label": ["billing", None]})
    assert mapped(read_rows(frame))[0] == BILLING
    assert mapped(read_rows(frame))[1]["completion"] == ""
    assert mapped(read_rows(pandas.DataFrame({"text": ["a", "b"], "label": [1, None]})))[0] == {
        "prompt": "a", "completion": "1", "label": "1",
    }  # fmt: skip
    assert mapped(read_rows({"text": "Charged, twice", "label": "billing"} for _ in "a"))[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data: give a file's name, a list of rows.*not int"),
        ({"text": ["a"], "label": ["b"]}, "not dict; of a dict of columns pandas.DataFrame"),
        ([("a", "b")], "row 1 must be a dict .* not .'a', 'b'."),
        ([{1: "a"}], "row 1 must be a dict with text for keys"),
        (b"x.csv", "not bytes"),
    ],
)
def test_objects_that_hold_no_rows(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        read_rows(data)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        (
            "x.csv",
            'text,label\n"two\nlines",x\na,b,c\n"bad"y,z\nlast,x\n',
            ["x.csv, line 4: has 3 cells, the first line 2", "x.csv, line 5: not a row of a table"],
        ),
        ("x.csv", 'text,label\na,x\n"never ends,x\nb,y\n', ["x.csv, line 3: not a row"]),
        (
            "x.jsonl",
            '{"text": "a"}\n{\n[]\n',
            ["line 2: not JSON", "line 3: must be a JSON object"],
        ),
        (
            "x.json",
            '[\n{"text": "a"},\n3,\n\n}',
            ["line 3: must be", "line 5: not JSON"],
        ),
        ("x.json", '[{"text": "a"}\n{"text": "b"}]', ["line 2: not JSON: a comma"]),
        ("x.json", '[{"text": "a"}]\n]', ["line 1: there is something behind"]),
    ],
)
def test_every_wrong_line_is_kept(
    tmp_path: Path, name: str, content: str, wrong: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    found = read_rows(path, lenient=True)
    assert len(found.wrong) == len(wrong)
    assert all(part in message for part, message in zip(wrong, found.wrong, strict=True))
    more = "more lines are wrong; `reft check`" if len(wrong) > 1 else ""
    with pytest.raises(ConfigError, match=f"{wrong[0]}.*{more}"):
        read_rows(path)


def test_one_column_is_not_the_text_and_its_label() -> None:
    with pytest.raises(ConfigError, match="label: 'text' is the column of the texts, too"):
        read_rows([{"text": "a", "label": "b"}], text="text", label="text")


@pytest.mark.parametrize(
    "content",
    [
        "text;label\ra, b, c;x\rd, e;y\r",
        '"text";"label"\na, b, c;x\nd, e;y',
        "sep=;\r\ntext;label\r\na, b, c;x\r\nd, e;y\r\n",
        "\ufeffsep=;\ntext;label\na, b, c;x\nd, e;y\n",
        "sep=\t\ntext\tlabel\na, b, c\tx\nd, e\ty\n",
    ],
)
def test_the_separator_of_a_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode())
    found = read_records(str(path))
    assert not found.wrong
    assert [record for _, record in found.records] == [
        {"text": "a, b, c", "label": "x"},
        {"text": "d, e", "label": "y"},
    ]


def test_separators_in_quotes_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('"text, ""long"", or not";label\na;x\n')
    assert [record for _, record in read_records(str(path)).records] == [
        {'text, "long", or not': "a", "label": "x"}
    ]


def test_a_table_names_each_column_once(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(ConfigError, match=r"x\.csv, line 1: the first line must name each column"):
        read_rows(path)
    path.write_bytes("text,label\nä,b\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"not UTF-8 .*; save it as UTF-8"):
        read_rows(path)


class Table(list[dict[str, Any]]):
    """As the datasets library gives them: classes are numbers that have names."""

    column_names = ("text", "label")
    features = {"label": SimpleNamespace(names=["no", "billing"], int2str=None)}  # noqa: RUF012


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []
    known = {"glue": "sst2", "own/set": None, "own/glue": "sst2"}

    def load_dataset(name: str, config: str | None, split: str) -> Table:
        asked.append((name, config, split))
        if known.get(name, 0) != config or split == "none":
            raise FileNotFoundError(f"no {name} {config}\nmore")
        return Table([{"text": "Charged, twice", "label": 1}, {"text": "b", "label": -1}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows("hf:glue/sst2:validation")
    assert mapped(rows)[0] == BILLING
    assert (rows.name, rows.rows[0].where) == ("sst2", "hf:glue/sst2:validation, row 1")
    assert asked.pop() == ("glue", "sst2", "validation")
    read_rows("hf:own/set")
    assert asked.pop() == ("own/set", None, "train")
    read_rows("hf:own/glue/sst2")
    assert asked.pop() == ("own/glue", "sst2", "train")
    with pytest.raises(ConfigError, match=r"hf:own/set:none: cannot be read: no own/set None\. Ch"):
        read_rows("hf:own/set:none")
    with pytest.raises(ConfigError, match="write hf:NAME, hf:NAME/CONFIG"):
        read_rows("hf:a:b:c")
    assert read_rows(Table([{"text": "Charged, twice", "label": 1}])).rows[0].label == "billing"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'reft-server\[hf\]'"):
        read_rows("hf:glue/sst2")


def test_a_circle_of_links_has_a_name_like_others(tmp_path: Path) -> None:
    (tmp_path / "train.csv").symlink_to("train.csv")
    assert file_for(str(tmp_path / "train.csv")).suffix == ".safetensors"  # its rows are refused


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/Tickets 2.csv", "tickets-2"),
        ("sst2/train.jsonl", "sst2"),
        ("hf:own/Set:dev", "set"),
        ("Ü.csv", "trained"),
    ],
)
def test_a_file_is_named_as_its_data(source: str, name: str) -> None:
    assert str(file_for(source)) == f"{name}.safetensors"


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
@pytest.mark.parametrize("path", [b"caf\xe9.jsonl", b"caf\xe9/train.jsonl"])
def test_the_name_of_data_is_text_whatever_its_file_is_called(tmp_path: Path, path: bytes) -> None:
    file = tmp_path / os.fsdecode(path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert read_rows(file).name == "caf?"


def test_digests_are_of_what_was_read(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row, sort_keys=True))
    assert read_rows([row]).sha256 == read_rows(path).sha256 != read_rows([row, row]).sha256
