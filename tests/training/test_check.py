"""All that can be said of rows before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from reft_runtime.training import check
from tests.training.make import folder


def problems(rows: Any, **options: Any) -> list[str]:
    return [str(problem) for one in check(rows, **options) for problem in one.problems]


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in pairs]


GOOD = rows(("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"))


def test_good_rows() -> None:
    [found] = check(GOOD)
    assert str(found).splitlines() == [
        "rows: 4 rows, 2 labels: x 2, y 2",
        "  text from the column 'text' and label from the column 'label', by the name; --text and"
        " --label name others",
    ]
    found.raise_errors()


def test_every_problem_of_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("text,label\na,x\na,x\na,y\nb,\nc,xx\nd,e,f\n" + "\n".join(
        f"n{i},x" for i in range(20)
    ))  # fmt: skip
    [found] = check(path)
    said = [str(problem) for problem in found.problems]
    assert said == [
        "error: 1 row is wrong: bad.csv, line 7: has 3 cells, the first line 2; put quotes around"
        " text that holds the separator or a line's end.",
        "error: 1 row is without an answer (bad.csv, line 5)",
        "warning: 3 rows are with one text but different labels (bad.csv, line 2, bad.csv, line 3,"
        " bad.csv, line 4)",
        "warning: 2 rows are there before, word for word (bad.csv, line 3, bad.csv, line 4)",
        "warning: rare beside x with 22 rows (y 1, xx 1)",
        "warning: labels that begin another; an answer cut short reads as the other"
        " ('x' begins 'xx')",
    ]
    with pytest.raises(ConfigError, match=r"bad: 1 row is wrong: .*; 1 row is without an answer"):
        found.raise_errors()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(("a", "x"), ("b", "x")), "warning: there is one label only, 'x'"),
        (rows(*((f"{i}", f"l{i}") for i in range(30))), "warning: 30 labels for 30 rows; is that"),
        ([*GOOD, {"text": "e"}], "error: 1 row is wrong: row 5: there is no field 'completion'"),
        ([{"prompt": "a", "completion": " "}], "error: 1 row is without an answer (row 1)"),
        (
            [{"prompt": "a", "completion": "no", "label": "x"}],
            "error: 1 row is wrong: row 1: the completion does not begin with the label 'x'.",
        ),
        (
            [{"prompt": "a", "completion": "x", "label": "x"}, {"prompt": "b", "completion": "y"}],
            "warning: 1 row is without a label",
        ),
        ([{"prompt": 3, "completion": "x"}] * 7, "row 5: prompt must be text, not int. And 2 more"),
    ],
)
def test_problems(data: Any, message: str) -> None:
    assert any(message in problem for problem in problems(data))


def test_rows_without_labels_may_have_several_answers() -> None:
    answers = [{"prompt": "a", "completion": text} for text in ("x", "y", "y")]
    assert problems(answers) == ["warning: 2 rows are there before, word for word (row 2, row 3)"]


def test_rows_to_train_on_and_to_judge_by() -> None:
    held_out = rows(("a ", "x"), ("e", "z"))
    said = problems(GOOD, evaluation=held_out)
    assert said[-2:] == [
        "error: eval: the label 'z' never appears in the training rows, which have x, y",
        "warning: eval: 1 row is among the training's too; its figures will be too good (row 1)",
    ]


def test_the_same_text_is_one_but_for_blanks_and_capitals() -> None:
    """As where rows are held out: a text in other capitals would make the figures too good."""
    said = problems(
        [*GOOD, {"text": " C", "label": "x"}], evaluation=rows(("A  ", "x"), ("e", "y"))
    )
    assert said == [
        "warning: 1 row is there before, word for word (row 5)",
        "warning: eval: 1 row is among the training's too; its figures will be too good (row 1)",
    ]


def test_long_rows_are_found_with_a_tokenizer_and_no_weights(tmp_path: Path) -> None:
    base = folder(tmp_path / "model")
    (base / "model.safetensors").unlink()
    data = [*GOOD, {"text": "z" * 60, "label": "x"}]
    assert problems(data, model=base, max_length=20) == [
        "error: 1 row is longer than 20 tokens; shorten, or --truncate (row 5)"
    ]
    assert problems(data, model=base) == []
    with pytest.raises(ConfigError, match="model: there is no folder"):
        check(GOOD, model=tmp_path / "missing")
