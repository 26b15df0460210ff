"""What a report says of outcomes: figures by label, confusions, and what to try next."""

from __future__ import annotations

import json

import pytest

from reft_runtime.client import Answer
from reft_runtime.training import Report, Score
from reft_runtime.training.advice import advise
from reft_runtime.training.outcomes import Confusion, LabelFigures, Outcome
from reft_runtime.training.scoring import given_label
from reft_runtime.training.tasks import read_tasks


def score(
    *pairs: tuple[str, str | None, int], name: str = "it", trained_rows: int | None = None
) -> Score:
    """A score of (wanted, given, how often), given None for an answer that begins with no label."""
    outcomes = tuple(
        Outcome(
            f"row {number}", "a text", wanted, "Hm, well" if given is None else given,
            wanted == given, given,
        )
        for number, (wanted, given) in enumerate(
            ((wanted, given) for wanted, given, count in pairs for _ in range(count)), 1
        )
    )  # fmt: skip
    value = sum(outcome.right for outcome in outcomes) / len(outcomes)
    return Score(name, "rows", "accuracy", value, len(outcomes), outcomes, trained_rows)


MIXED = score(("a", "a", 6), ("a", "b", 2), ("b", "b", 3), ("b", None, 1), ("c", "a", 4))


def test_figures_by_label() -> None:
    assert MIXED.labels == (
        LabelFigures("c", None, 0, 4, 0),
        LabelFigures("a", 6 / 10, 6 / 8, 8, 10),
        LabelFigures("b", 3 / 5, 3 / 4, 4, 5),
    )
    assert MIXED.majority == ("a", 0.5)
    assert MIXED.confusions == (
        Confusion("c", "a", 4, "a"),
        Confusion("a", "b", 2, "b"),
        Confusion("b", None, 1, "Hm, well"),
    )
    assert [outcome.where for outcome in MIXED.wrong][:2] == ["row 7", "row 8"]


def test_the_text() -> None:
    base = score(("a", None, 8), ("b", None, 4), ("c", "c", 4), name="base")
    text = Report((base, MIXED)).details()
    assert text.splitlines()[0] == (
        "it on rows: 56.2% of 16 rows right, base 25.0%, always a 50.0%"
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["c", "-", "0.0%", "4"] in lines
    assert ["b", "60.0%", "75.0%", "4"] in lines
    assert "       4  c -> a\n       2  a -> b\n       1  b -> other, such as 'Hm, well'\n" in text
    assert "  wrong rows, 3 of 7\n    row 7: a text\n      wanted 'a', answered 'b'\n" in text
    assert "  to try next\n    This is no better than always answering a: check" in text
    assert "went on" not in text
    alone = Report((MIXED,)).details()
    assert alone.splitlines()[0].endswith("rows right, always a 50.0%")


def test_many_labels() -> None:
    many = score(*((f"l{i:02}", f"l{i:02}" if i % 2 else "l01", 2) for i in range(30)))
    text = Report((many,)).details()
    assert "    l00  " in text
    assert "    l29  " not in text
    assert "    and 10 more, which are better" in text
    assert len(many.confusions) == 5


def test_right_answers_that_run_on_are_counted() -> None:
    outcome = Outcome("row 1", "a text", "a", "a, because", True, "a", runs_on=True)
    text = Report((Score("it", "rows", "accuracy", 1, 1, (outcome,)),)).details()
    assert "  1 of 1 right answers went on after what was wanted\n" in text
    assert "wrong rows" not in text
    assert "to try next" not in text


def test_exact_and_perplexity() -> None:
    exact = Score("it", "rows", "exact", 0, 1, (Outcome("row 1", "q", "yes", "no", False),))
    text = Report((exact, Score("it", "more", "perplexity", 8.5, 3))).details()
    assert text == (
        "it on rows: 0.0% of 1 rows right\n\n  wrong rows, 1 of 1\n    row 1: q\n"
        "      wanted 'yes', answered 'no'"
    )
    assert advise(exact) == []


def test_json_has_every_rows_outcome() -> None:
    [found] = json.loads(json.dumps(Report((MIXED,)).as_json()))
    assert found["right"] == list(MIXED.right)
    assert found["outcomes"][15] == {
        "where": "row 16", "text": "a text", "wanted": "c", "answered": "a", "right": False,
        "given": "a", "runs_on": False,
    }  # fmt: skip
    assert found["labels"][0] == {
        "label": "c", "precision": None, "recall": 0, "rows": 4, "given": 0,
    }  # fmt: skip
    assert found["confusions"][0] == {"wanted": "c", "given": "a", "count": 4, "example": "a"}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (score(("a", "a", 48), ("b", "b", 50), ("b", "a", 2)), []),
        (score(("a", "a", 8), ("a", None, 3)), ["3 of 11 answers begin with no label of these"]),
        (score(("a", None, 40), ("b", None, 9), ("b", "b", 1)), ["49 of 50 answers begin with no"]),
        (
            score(("a", "a", 50), ("b", "a", 50)),
            [
                "This is no better than always answering a",
                "Never given: b. Look whether the training rows have enough of it",
                "b is taken for a in 50 of 50 rows",
            ],
        ),
        (
            score(("a", "a", 40), ("b", "b", 30), ("b", "a", 10), trained_rows=12),
            ["b is taken for a in 10 of 40 rows", "It was trained on 12 rows, about 6 a label"],
        ),
        (score(("a", "a", 99), ("b", "b", 99), trained_rows=12), []),
        (
            score(
                *((f"l{i}", f"l{i}", 7) for i in range(9)),
                *((f"l{i}", f"l{(i + by) % 9}", 1) for i in range(9) for by in (1, 2, 3)),
            ),
            ["More rows help most; then more passes"],
        ),
    ],
)  # fmt: skip
def test_what_to_try_next(found: Score, says: list[str]) -> None:
    advice = advise(found)
    assert len(advice) == len(says), advice
    for sentence, begins in zip(advice, says, strict=True):
        assert sentence.startswith(begins)


def test_a_right_answer_gives_what_was_wanted() -> None:
    """Also where labels count by their letters, and a longer one begins the answer too."""
    rows = [{"prompt": "x", "completion": "10", "label": label} for label in ("1", "10")]
    [task] = read_tasks([rows], None, template=None, prefixes=True, text=None, label=None)
    first, second = (
        task.outcome(row, task.layout, wanted, Answer("10", ended=True))
        for row, wanted in zip(task.rows.rows, ("1", "10"), strict=True)
    )
    assert (first.right, first.given, first.runs_on) == (True, "1", False)
    assert (second.right, second.given, second.runs_on) == (True, "10", False)


def test_the_base_may_be_the_bar() -> None:
    good = score(("a", "a", 40), ("b", "b", 40), name="base")
    [first, *_] = advise(score(("a", "a", 40), ("b", "b", 36), ("b", "a", 4)), good)
    assert first.startswith("This is no better than the base model: check that the labels follow")
    assert advise(good, good) == [], "all are right"


@pytest.mark.parametrize(
    ("answer", "prefixes", "given"),
    [
        ("New York, of course", False, "New York"), (" New", False, "New"), ("10", False, None),
        ("10", True, "1"), ("Newark", False, None), ("Newark", True, "New"), ("", False, None),
    ],
)  # fmt: skip
def test_the_label_that_is_given(answer: str, prefixes: bool, given: str | None) -> None:
    assert given_label(answer, {"New", "New York", "1"}, prefixes=prefixes) == given
