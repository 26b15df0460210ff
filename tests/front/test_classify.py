"""Classification without decoding, from Python: labels, their tokens, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest

from reft_runtime import Engine, Use
from reft_runtime.errors import ContextLengthExceeded, InvalidFile, InvalidRequest, NotFound
from reft_runtime.front.labels import LabelTokens
from reft_runtime.interventions import Intervention, parse, serialise
from reft_runtime.interventions.format.labels import MAX_LABEL_CHARS, MOST_LABELS
from reft_runtime.outputs import Classification
from reft_runtime.schedule.labels import END, LabelTree
from reft_runtime.text import Tokenizer
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.rows import Row
from tests.helpers.models import tiny
from tests.helpers.reference import RandomEdit, applied, logits
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import EOS

MODEL = tiny("llama", eos_token_id=2)
L7 = RandomEdit("loreft", "l7", seed=1)
DECODE = RandomEdit("loreft", "l1+decode", seed=2)
LABELS = ("the", "and", "you is", "you")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(
        copy.deepcopy(MODEL), tokenizer=tiny_tokenizer(), dtype="float32", max_running=4
    ) as engine:
        files: list[tuple[str, RandomEdit, dict[str, Any]]] = [
            ("l7", L7, {"labels": LABELS}),
            ("decode", DECODE, {"labels": LABELS, "completion_prefix": " "}),
            ("chat", L7, {"labels": LABELS, "template": "chat", "texts": "message"}),
            ("others", L7, {"labels": ["is", "on"]}),
            ("none", L7, {}),
        ]
        for name, edit, said in files:
            made = Intervention.build(engine.registry.base, [edit.stored], **said)
            engine.registry.put(name, serialise(made))
        yield engine
        engine.check_integrity()


def truth(
    engine: Engine, asked: list[int], tree: LabelTree, edits: list[RandomEdit]
) -> list[float]:
    found = []
    for label in tree.labels:
        text = [*asked, *(token for token in label if token != END)]
        rows = logits(MODEL, text, len(asked), [applied(edit) for edit in edits])
        rows = rows.double().log_softmax(-1)[len(asked) - 1 :]
        ends = [2 if token == END else token for token in label]
        found.append(sum(float(row[token]) for row, token in zip(rows, ends, strict=False)))
    return found


@pytest.mark.parametrize(("name", "edits"), [("l7", [L7]), ("decode", [DECODE]), (None, [])])
def test_scores_are_those_of_the_edited_model(
    engine: Engine, name: str | None, edits: list[RandomEdit]
) -> None:
    asked = ["is it on? on", "the other one and the"]
    given = None if name else LABELS
    for prompt, found in zip(asked, engine.classify(asked, given, intervention=name), strict=True):
        [prepared] = engine.admission.prepare_labels([prompt], given, [Use(name)] if name else [])
        prepared.release()
        tree = prepared.request.labels
        assert tree is not None
        wanted = truth(engine, found.prompt_tokens, tree, edits)
        assert found.logprobs == pytest.approx(wanted, abs=1e-3)
        assert sum(found.probs) == pytest.approx(1)
        assert found.label == LABELS[wanted.index(max(wanted))]


def test_one_call_may_mix_interventions_and_prompts(engine: Engine) -> None:
    chat = [{"role": "user", "content": "you and the"}]
    prompts: list[Any] = ["you and the", [5, 6, 7], chat, "you and the"]
    uses: list[Any] = ["l7", None, "chat", ("l7", Use("decode", 0.5))]
    together = engine.classify(prompts, LABELS, intervention=uses, progress=False)
    alone = [
        engine.classify("you and the", LABELS, intervention="l7")[0],
        engine.classify([5, 6, 7], LABELS)[0],
        engine.classify("you and the", intervention="chat")[0],
        engine.classify("you and the", intervention=("l7", Use("decode", 0.5)))[0],
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.prompt_tokens == other.prompt_tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert engine.stats().generation_tokens == 0


@pytest.mark.parametrize("template", [None, "Is it {prompt}:", "chat", "{prompt}\n"])
@pytest.mark.parametrize("prefix", ["", " "])
def test_labels_have_the_tokens_that_training_taught(template: str | None, prefix: Any) -> None:
    words = Tokenizer(tiny_tokenizer(), 256)
    for asked in ("good on", "bad.", "is it?"):
        rows = [
            Row("row", {"prompt": asked, "completion": f" {label}", "label": label})
            for label in LABELS
        ]
        formatter = Formatter(Layout(template, rows[0]), words, EOS, completion_prefix=prefix)
        learned = [formatter.example(row) for row in rows]
        tree = LabelTokens(words, EOS).tree(
            LABELS, formatter.prompt(rows[0]), prefix, chat=template == "chat" or not prefix
        )
        ended = [2 if token == END else token for token in tree.labels[3]]
        assert [*tree.labels[:3]] == [example.completion[:-1] for example in learned[:3]]
        assert tuple(ended) == learned[3].completion  # "you is" begins with it


def test_a_blank_stands_before_labels_where_the_tokenizer_wants_one(engine: Engine) -> None:
    def first(prompt: Any, *names: str) -> list[tuple[int, ...]]:
        uses = [Use(name) for name in names]
        [prepared] = engine.admission.prepare_labels([prompt], ["the", "and"], uses)
        prepared.release()
        assert prepared.request.labels is not None
        return list(prepared.request.labels.labels)

    encode = engine.tokenizer.encode
    blank = [tuple(encode(f" {label}")) for label in ("the", "and")]
    bare = [tuple(encode(label)) for label in ("the", "and")]
    assert first("Is it:") == first(encode("Is it:")) == first("Is it: ", "decode") == blank
    chat = [{"role": "user", "content": "Is it:"}]
    assert first("Is it:\n") == first("Is it: ") == first(chat) == first("Is it:", "chat") == bare


def test_labels_are_those_given_or_those_of_the_files(engine: Engine) -> None:
    assert engine.classify("on", intervention="l7")[0].labels == LABELS
    assert engine.classify("on", [" is", "on "], intervention="l7")[0].labels == (" is", "on ")
    both = engine.classify("on", intervention=("l7", "decode", "none"))[0]
    assert both.labels == LABELS
    for uses, why in (
        (None, "the base model has none of its own"),
        ("none", "none: no labels stand in the file"),
        (("l7", "others"), "l7 and others name different ones"),
    ):
        with pytest.raises(InvalidRequest, match=f"labels: {why}; give the answers") as caught:
            engine.classify("on", intervention=uses)
        assert caught.value.param == "labels"


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([], "give 2 to 1000 labels, not 0"),
        (["one"], "give 2 to 1000 labels, not 1"),
        ([str(i) for i in range(MOST_LABELS + 1)], "not 1001"),
        (["a", " "], "number 1 is empty"),
        (["a", "b", " a"], "'a' stands there twice, as numbers 0 and 2"),
        (["a", "b" * (MAX_LABEL_CHARS + 1)], "number 1 has 257 characters"),
        ("ab", "give a list of texts"),
        (["a", 1], "give a list of texts"),
    ],
)
def test_labels_that_are_refused(engine: Engine, labels: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        engine.classify("on", labels)
    assert caught.value.param == "labels"


def test_a_label_that_begins_another_needs_a_model_that_can_end() -> None:
    words = tiny_tokenizer()
    words.eos_token = None
    with Engine(tiny("llama"), tokenizer=words, dtype="float32") as endless:
        assert endless.classify("on", ["is", "you is"])
        with pytest.raises(InvalidRequest, match="'you' is the beginning of 'you is'") as caught:
            endless.classify("on", ["is", "you is", "you"])
        assert caught.value.param == "labels"
        assert endless.classify("on", ["is", "you is"])


def test_prompts_that_are_refused(engine: Engine) -> None:
    longest = engine.info.max_model_len
    assert engine.classify([5] * (longest - 1), ["!", "?"])
    with pytest.raises(ContextLengthExceeded, match="for the longest label") as caught:
        engine.classify([5] * (longest - 1), ["!", "the and"])
    assert caught.value.param == "labels"
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.classify([5] * longest, ["!", "?"])
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="it has no tokens"):
        engine.classify("", ["a", "b"])
    with pytest.raises(NotFound):
        engine.classify("on", ["a", "b"], intervention="nowhere")
    many = [f"{i} {'x' * 240}" for i in range(MOST_LABELS)]
    with pytest.raises(InvalidRequest, match="tokens to score, and one request gets at most"):
        engine.classify("on", many)


def test_what_a_classification_shows() -> None:
    found = Classification(("no", "yes"), (math.log(0.1), math.log(0.3)), [1, 2])
    assert found.label == "yes"
    assert found.probs == pytest.approx((0.25, 0.75))
    assert found.prob == pytest.approx(0.75)
    assert repr(found) == "Classification('yes': 0.750, 'no': 0.250)"
    html = found._repr_html_()
    assert html.index("yes") < html.index("0.750") < html.index("no") < html.index("0.250")
    five = Classification(tuple("abcde"), (0.0,) * 5, [1])
    assert repr(five).endswith("'e': 0.200)")
    many = Classification(tuple("abcdefg"), tuple(map(float, range(7))), [1])
    assert repr(many).startswith("Classification('g': ")
    assert repr(many).endswith(", ...)")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["a"], "labels: give 2 to 1000 labels, not 1"),
        (["a", "a"], "labels: 'a' stands there twice"),
        (["a", ""], "labels: number 1 is empty"),
        (["a", " b"], "labels: write ' b' without the blanks around it"),
        (["a", 1], "labels.1"),
    ],
)
def test_labels_that_a_file_cannot_have(engine: Engine, labels: Any, why: str) -> None:
    with pytest.raises(InvalidFile, match=why):
        Intervention.build(engine.registry.base, [L7.stored], labels=labels)


def test_a_file_keeps_its_labels_and_one_without_says_nothing_of_them(engine: Engine) -> None:
    made = Intervention.build(engine.registry.base, [L7.stored], labels=["b", "a"])
    assert parse(serialise(made)).manifest.labels == ("b", "a")
    without = serialise(Intervention.build(engine.registry.base, [L7.stored]))
    assert b"labels" not in without
