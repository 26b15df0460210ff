"""The library's front door, on a tiny random model."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.caller import Caller
from reft_runtime.errors import (
    ConfigError,
    Draining,
    EngineDead,
    InvalidRequest,
    NotFound,
    Overloaded,
    ReftError,
)
from reft_runtime.front.streams import Stream
from reft_runtime.interventions import Intervention, Registry, serialise
from reft_runtime.outputs import EditAlong, Trace
from tests.helpers.models import MAX_LENGTH, generate, prompt, tiny_llama
from tests.helpers.reference import (
    Applied,
    RandomEdit,
    applied,
    generate_applied,
    log_ratios,
    logits,
)
from tests.helpers.tokenizer import tiny_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=10)

LOREFT = RandomEdit("loreft", "f2+l2", layer=1, rank=4, seed=1)
SECOND = RandomEdit("red", "l1+decode", layer=1, seed=2)
MIDDLE = RandomEdit("direft", "all", layer=2, component="mlp_output", seed=3, size=0.5)
STEERING = RandomEdit("steering", "decode", layer=0, seed=4)
EVERYWHERE = RandomEdit("consreft", "all", layer=2, rank=2, seed=5)
FILES: dict[str, tuple[RandomEdit, ...]] = {
    "loreft": (LOREFT,),
    "several": (LOREFT, SECOND, MIDDLE),
    "steering": (STEERING,),
    "q-and-a": (LOREFT,),
    "own-chat": (LOREFT,),
    "everywhere": (EVERYWHERE,),
}
TEMPLATES = {"q-and-a": "Q: {prompt} A:", "own-chat": "chat"}


@contextmanager
def opened(**settings: Any) -> Iterator[Engine]:
    """An engine on the tiny Llama with `FILES`, which must be empty at the end."""
    model = copy.deepcopy(tiny_llama()[0])
    with Engine(model, tokenizer=tiny_tokenizer(), **settings) as engine:
        for name, edits in FILES.items():
            built = Intervention.build(
                engine.registry.base,
                [edit.stored for edit in edits],
                template=TEMPLATES.get(name),
                description=name,
            )
            engine.registry.put(name, serialise(built))
        yield engine
        assert_empty(engine)


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with opened(max_running=8) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert_empty(shared)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama()[0]


def assert_empty(engine: Engine) -> None:
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    assert [entry.in_flight for entry in engine.registry.entries()] == [0] * len(FILES)


def expected(name: str, tokens: tuple[int, ...], strength: float = 1) -> list[int]:
    used = Applied(FILES[name], strength)
    return generate_applied(tiny_llama()[0], tokens, [used], 10)


def test_one_prompt_or_several(engine: Engine, model: PreTrainedModel) -> None:
    tokens = prompt(9)
    base = generate(model, tokens, 10)
    for prompts in (list(tokens), tokens, [tokens], [list(tokens)], (tokens,)):
        [answer] = engine.generate(prompts, GREEDY, progress=False)
        assert answer.tokens == base
        assert answer.prompt_tokens == list(tokens)
        assert answer.text == tiny_tokenizer().decode(base, skip_special_tokens=True)
        assert answer.choices[0].finish_reason == "length"
    text = "you and the"
    ids = tuple(tiny_tokenizer()(text)["input_ids"])
    chat = [{"role": "user", "content": text}]
    rendered: Any = tiny_tokenizer().apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    mixed = engine.generate([text, chat, ids], GREEDY, progress=False)
    assert [answer.prompt_tokens for answer in mixed] == [list(ids), rendered, list(ids)]
    assert mixed[0].tokens == mixed[2].tokens == generate(model, ids, 10)
    assert mixed[1].tokens == generate(model, rendered, 10)
    assert engine.generate(text, GREEDY, progress=False) == [mixed[0]]
    assert engine.generate(chat, GREEDY, progress=False) == [mixed[1]]


def test_what_applies_to_which_prompt(engine: Engine, model: PreTrainedModel) -> None:
    a, b = prompt(9), prompt(14)
    base = [generate(model, a, 10), generate(model, b, 10)]

    def run(intervention: Any) -> list[list[int]]:
        return [
            answer.tokens
            for answer in engine.generate([a, b], GREEDY, intervention=intervention, progress=False)
        ]

    loreft = [expected("loreft", a), expected("loreft", b)]
    assert run(None) == base
    assert run("loreft") == run(Use("loreft")) == run(("loreft",)) == run(["loreft"] * 2) == loreft
    digest = engine.registry.resolve("loreft").digest
    assert run(f"loreft@{digest[:8]}") == run(Use(engine.registry.resolve("loreft"))) == loreft
    assert run([None, "loreft"]) == [base[0], loreft[1]]
    assert run([Use("several", -0.5), None]) == [expected("several", a, -0.5), base[1]]
    composed = [
        generate_applied(model, each, [Applied((STEERING,), 2), Applied((LOREFT,), 0.5)], 10)
        for each in (a, b)
    ]
    both = (Use("steering", 2), Use("loreft", 0.5))
    assert run(both) == run([both, both]) == composed
    assert run([("steering", "loreft"), "loreft"])[1] == loreft[1]
    part = generate_applied(model, a, [Applied((LOREFT,), 1, (1, 3))], 10)
    assert run(Use("loreft", subspace=(1, 3)))[0] == part != loreft[0]
    assert run(Use("loreft", subspace=[3, 1]))[0] == part  # type: ignore[arg-type]
    assert run(Use("several", 0)) == base
    assert run(()) == base


def test_a_chat_takes_the_template_of_what_is_used(engine: Engine) -> None:
    chat = [{"role": "user", "content": "is it on?"}]

    def text(intervention: Any) -> str:
        [answer] = engine.generate(chat, GREEDY, intervention=intervention, progress=False)
        return str(tiny_tokenizer().decode(answer.prompt_tokens))

    assert text("q-and-a") == text(("loreft", "q-and-a")) == "Q: is it on? A:"
    assert text(None) == text("own-chat") == text("loreft")
    with pytest.raises(InvalidRequest, match="templates differ"):
        text(("own-chat", "q-and-a"))
    with pytest.raises(InvalidRequest, match="exactly one user message") as caught:
        engine.generate([*chat, *chat], GREEDY, intervention="q-and-a")
    assert caught.value.param == "messages"


async def test_inside_a_running_event_loop(engine: Engine, model: PreTrainedModel) -> None:
    [answer] = engine.generate(prompt(9), GREEDY, progress=False)
    assert answer.tokens == generate(model, prompt(9), 10)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar(
    engine: Engine,
    progress: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    engine.generate([prompt(5)] * 3, GREEDY, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3/3" in err and "prompt" in err) if progress else err == ""


def test_more_prompts_than_the_queue_takes() -> None:
    tokens = [prompt(5 + i % 3) for i in range(40)]
    with opened(max_running=8, max_queued=1) as engine:
        few = [answer.tokens for answer in engine.generate(tokens[:3], GREEDY, progress=False)]
        answers = engine.generate(tokens, GREEDY, intervention="loreft", progress=False)
        assert len(few) == 3
        assert [a.tokens for a in answers] == [expected("loreft", each) for each in tokens]
    with opened(max_running=8, max_queued_tokens=6) as engine:
        answers = engine.generate(tokens, GREEDY, intervention="loreft", progress=False)
        assert [a.tokens for a in answers] == [expected("loreft", each) for each in tokens]
        engine.begin_drain()
        with pytest.raises(Overloaded, match="shutting down"):
            engine.generate(tokens, GREEDY, progress=False)
    with pytest.raises(EngineDead):
        engine.generate(tokens, GREEDY, progress=False)


MESSAGE = {"role": "user", "content": "Hi"}
GOOD = [1, 2, 3]
INVALID: list[tuple[str, dict[str, Any], str, str]] = [
    ("float", {"prompts": 1.5}, "prompts: .* not 1.5", "prompts"),
    ("none", {"prompts": None}, "prompts: .* not None", "prompts"),
    ("dict", {"prompts": MESSAGE}, "prompts: .* a list of messages", "prompts"),
    ("tensor", {"prompts": torch.tensor(GOOD)}, "prompts: .* not tensor", "prompts"),
    ("bytes", {"prompts": b"Hi"}, "prompts: .* not b'Hi'", "prompts"),
    ("empty list", {"prompts": []}, r"prompts: .* not \[\]", "prompts"),
    ("empty text", {"prompts": ""}, "prompt: it has no tokens", "prompt"),
    ("empty tokens", {"prompts": [GOOD, []]}, "prompt: it has no tokens", "prompt"),
    ("float tokens", {"prompts": [1.5, 2.5]}, "prompt: .* not float", "prompt"),
    ("a float token", {"prompts": [1, 2.5]}, "prompt: token ids are whole", "prompt"),
    ("text tokens", {"prompts": [GOOD, [1, "a"]]}, "prompt: token ids are whole", "prompt"),
    ("truth tokens", {"prompts": [True, False]}, "prompt: token ids are whole", "prompt"),
    ("inner none", {"prompts": ["Hi", None]}, "prompt: .* not NoneType", "prompt"),
    ("inner bytes", {"prompts": ["Hi", b"Hi"]}, "prompt: .* not bytes", "prompt"),
    ("negative token", {"prompts": [1, -1]}, "prompt: token ids must be from 0", "prompt"),
    ("unknown token", {"prompts": [320]}, "token ids must be from 0 to 319", "prompt"),
    ("too long", {"prompts": [1] * MAX_LENGTH}, "maximum context length is 256", "prompt"),
    ("no role", {"prompts": [{"content": "Hi"}]}, "messages: each needs a role", "messages"),
    ("no content", {"prompts": [{"role": "user"}]}, "messages: each needs", "messages"),
    ("bad turn", {"prompts": [MESSAGE, "Hi"]}, "messages: each needs", "messages"),
    (
        "content parts",
        {"prompts": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages: each needs",
        "messages",
    ),
    ("bad role", {"prompts": [{"role": "x", "content": ""}]}, "unknown role x", "messages"),
    ("swapped", {"sampling": "loreft"}, "sampling: give SamplingParams", "sampling"),
    ("room", {"sampling": SamplingParams(max_tokens=300)}, "max_tokens", "max_tokens"),
    (
        "stop id",
        {"sampling": SamplingParams(stop_token_ids=(320,))},
        "stop_token_ids: .* 319",
        "stop_token_ids",
    ),
    ("count", {"intervention": ["loreft"]}, "intervention: 1 for 2 prompts", "intervention"),
    ("number", {"intervention": 5}, "intervention: .* not int", "intervention"),
    ("mapping", {"intervention": {"name": "x"}}, "intervention: .* not dict", "intervention"),
    (
        "composed list",
        {"intervention": [["loreft", "steering"], None]},
        "intervention: .* a tuple of them",
        "intervention",
    ),
    (
        "many",
        {"intervention": ("loreft",) * 17},
        "interventions: at most 16",
        "interventions",
    ),
    (
        "direction",
        {"intervention": ("steering", Use("loreft", subspace=(4,)))},
        "subspace: 4 is out of range; .* directions 0 to 3",
        "interventions.1.subspace",
    ),
    (
        "no directions",
        {"intervention": [None, Use("steering", subspace=(0,))]},
        "subspace: the edit of layer 0 has no directions",
        "interventions.0.subspace",
    ),
    (
        "one edit without",
        {"intervention": Use("several", subspace=(0,))},
        "subspace: the edit of layer 1 has no directions",
        "interventions.0.subspace",
    ),
    (
        "direction twice",
        {"intervention": Use("loreft", subspace=(0, 0))},
        "subspace: name each direction",
        "interventions.0.subspace",
    ),
    (
        "no direction",
        {"intervention": Use("loreft", subspace=())},
        "subspace: name each direction",
        "interventions.0.subspace",
    ),
]
NAME = "interventions.0.name"
WRONG: list[tuple[str, dict[str, Any], type[ReftError], str, str]] = [
    *((name, fields, InvalidRequest, message, param) for name, fields, message, param in INVALID),
    (
        "unknown",
        {"intervention": ["loreft", "nope"]},
        NotFound,
        "`nope` does not exist",
        "interventions.0.name",
    ),
    (
        "digest",
        {"intervention": "loreft@00000000"},
        NotFound,
        "loreft@00000000",
        "interventions.0.name",
    ),
]


@pytest.mark.parametrize(
    ("fields", "kind", "message", "param"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_mistakes_are_told_before_anything_runs(
    engine: Engine, fields: dict[str, Any], kind: type[ReftError], message: str, param: str
) -> None:
    steps = engine.stats().steps
    asked = {"prompts": [GOOD, GOOD], "sampling": GREEDY, "intervention": "loreft", **fields}
    if "prompts" in fields:
        asked["intervention"] = None if "messages" in param else "loreft"
    with pytest.raises(kind, match=message) as caught:
        engine.generate(**asked)
    assert caught.value.param == param
    assert engine.stats().steps == steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": math.nan}, "strength must be a finite number, not nan"),
        ({"strength": math.inf}, "strength must be a finite number, not inf"),
        ({"strength": 10**400}, "strength must be a finite number, not 1000"),
        ({"strength": "1"}, "strength must be a finite number, not '1'"),
        ({"subspace": (0.5,)}, r"subspace: .* by their numbers, such as \[0, 2\]"),
        ({"subspace": "01"}, "subspace: .* by their numbers"),
        ({"subspace": (True,)}, "subspace: .* by their numbers"),
        ({"subspace": 3}, "subspace: .* by their numbers"),
        ({"intervention": 5}, "intervention: give a name, or a version .*, not 5"),
        ({"intervention": None}, "intervention: give a name, .*, not None"),
        ({"intervention": b"loreft"}, "intervention: give a name, .*, not b'loreft'"),
    ],
)
def test_a_use_that_means_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Use(**{"intervention": "loreft", **fields})
    assert caught.value.param in fields


def divergence(tokens: list[int], *used: Applied) -> float:
    """KL(own || base) of the first token."""
    model = tiny_llama()[0]
    own = logits(model, tokens, len(tokens), used)[-1].double().log_softmax(-1)
    base = logits(model, tokens, len(tokens))[-1].double().log_softmax(-1)
    return float((own.exp() * (own - base)).sum())


def assert_trace(trace: Trace, tokens: list[int], made: list[int], *used: Applied) -> None:
    """Every edit of every row that was computed, once, in order, of the right size."""
    sizes: dict[tuple[int, int, int], float] = {}
    # The last token made is never computed.
    logits(tiny_llama()[0], [*tokens, *made[:-1]], len(tokens), used, sizes)
    got = {(e.intervention, e.edit, e.position): e.relative_size for e in trace.edits}
    assert len(got) == len(trace.edits)
    assert got == pytest.approx(sizes, rel=1e-3)
    order = [(e.position, e.intervention) for e in trace.edits]
    assert order == sorted(order)
    for entry in trace.edits:
        edit = used[entry.intervention].edits[entry.edit]
        assert (entry.layer, entry.component) == (edit.layer, edit.component)
    assert trace.kl == pytest.approx(divergence(tokens, *used), rel=1e-3, abs=1e-6)
    assert_ratio(trace.log_ratios[0], tokens, made, *used)


def assert_ratio(
    ratios: tuple[float, ...], tokens: list[int], made: list[int], *used: Applied
) -> None:
    """Those of one choice."""
    assert ratios == pytest.approx(log_ratios(tiny_llama()[0], tokens, made, used), abs=1e-4)


def test_compare(engine: Engine, model: PreTrainedModel) -> None:
    tokens = list(prompt(9))
    columns: dict[Any, Any] = {
        "loreft": Applied((LOREFT,)),
        Use("several", -0.5): Applied(FILES["several"], -0.5),
        ("steering", Use("loreft", 2)): (Applied((STEERING,)), Applied((LOREFT,), 2)),
        Use("loreft", subspace=(0,)): Applied((LOREFT,), 1, (0,)),
        Use("loreft", 0): (),
        None: (),
    }
    base, *others = engine.compare(tokens, list(columns), GREEDY)
    assert base.interventions == ()
    assert base.answer.tokens == generate(model, tokens, 10)
    assert base.trace == Trace((), 0.0, ((0.0,) * 10,))
    assert others[4].trace == others[5].trace == base.trace
    for got, wanted in zip(others, columns.values(), strict=True):
        used = wanted if isinstance(wanted, tuple) else (wanted,)
        assert got.answer.tokens == generate_applied(model, tokens, used, 10)
        assert_trace(got.trace, tokens, got.answer.tokens, *used)
    labels = [got.interventions for got in others]
    assert labels[:3] == [("loreft",), ("several",), ("steering", "loreft")]
    assert others[0].trace.kl > 0.01
    # Edits of generated tokens alone leave the first one's distribution to the base model.
    [_, late] = engine.compare(tokens, ["steering"], GREEDY)
    assert late.trace.kl == 0
    assert {edit.position for edit in late.trace.edits} == set(range(9, 18))


def test_rows_are_read_along_the_edits_directions(engine: Engine) -> None:
    tokens = list(prompt(9))
    columns: dict[Any, tuple[Applied, ...]] = {
        ("loreft", "steering", Use("loreft", -2)): (
            Applied((LOREFT,)), Applied((STEERING,)), Applied((LOREFT,), -2),
        ),
        Use("loreft", subspace=(3, 1)): (Applied((LOREFT,), 1, (1, 3)),),
        ("steering", Use("loreft", 0)): (Applied((STEERING,)), Applied((LOREFT,), 0)),
    }  # fmt: skip
    base, *others = engine.compare(tokens, list(columns), GREEDY, trace="along")
    assert base.trace == Trace((), 0.0, ((0.0,) * 10,))
    for got, used in zip(others, columns.values(), strict=True):
        rows: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        made = got.answer.tokens
        assert made == generate_applied(tiny_llama()[0], tokens, used, 10)
        logits(tiny_llama()[0], [*tokens, *made[:-1]], len(tokens), used, rows=rows)
        assert {(e.intervention, e.edit, e.position) for e in got.trace.edits} == rows.keys()
        for entry in got.trace.edits:
            assert isinstance(entry, EditAlong)
            applied = used[entry.intervention]
            edit = applied.edits[0]
            axes = edit.tensors["R"] if edit is LOREFT else edit.tensors["v"][:, None]
            axes = axes[:, list(applied.subspace or range(axes.shape[1]))]
            axes = axes / axes.norm(dim=0)
            wanted = [row @ axes for row in rows[entry.intervention, entry.edit, entry.position]]
            for coordinates, other in zip((entry.before, entry.after), wanted, strict=True):
                assert coordinates == pytest.approx(other.tolist(), abs=1e-3)
            assert (entry.before == entry.after) == (applied.strength == 0)
            assert bool(entry.relative_size) == bool(applied.strength)


def test_a_strength_of_0_reads_the_base_model(engine: Engine, model: PreTrainedModel) -> None:
    """The rows that transformers' own model has there, generated ones too; its tokens as well."""
    tokens = list(prompt(9))
    [base, read] = engine.compare(tokens, [Use("everywhere", 0)], GREEDY, trace="along")
    assert read.answer.tokens == base.answer.tokens
    assert (read.trace.kl, set(read.trace.log_ratios[0])) == (0, {0})
    with torch.no_grad():
        text = torch.tensor([[*tokens, *read.answer.tokens[:-1]]])
        states = model(input_ids=text, output_hidden_states=True).hidden_states
    wanted = states[EVERYWHERE.layer + 1][0] @ EVERYWHERE.tensors["R"]
    got = torch.tensor([e.before for e in read.trace.edits if isinstance(e, EditAlong)])
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    assert not engine.compare(tokens, [Use("everywhere", 0)], GREEDY)[1].trace.edits


@pytest.mark.parametrize(
    ("name", "trace", "message"),
    [
        ("several", "along", "trace: the edit of layer 1 has no directions"),
        ("loreft", "around", "trace: give True, False or 'along', not 'around'"),
    ],
)
def test_what_cannot_be_traced(engine: Engine, name: str, trace: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.compare(list(prompt(9)), [name], GREEDY, trace=trace)
    assert caught.value.param == "trace"


def test_compare_twice_the_same_row(engine: Engine) -> None:
    tokens = list(prompt(9))
    composed: Any = ("loreft", Use("loreft", 0.5), "several")
    [_, twice] = engine.compare(tokens, [composed], GREEDY)
    used = (Applied((LOREFT,)), Applied((LOREFT,), 0.5), Applied(FILES["several"]))
    assert_trace(twice.trace, tokens, twice.answer.tokens, *used)
    first, second = ([e for e in twice.trace.edits if e.intervention == i] for i in (0, 1))
    assert [e.position for e in first] == [e.position for e in second] == [0, 1, 7, 8]
    assert all(a.relative_size != b.relative_size for a, b in zip(first, second, strict=True))


def test_compare_is_greedy_and_takes_chats(engine: Engine) -> None:
    chat = [{"role": "user", "content": "is it on?"}]
    base, task = engine.compare(chat, ["q-and-a"])
    again = engine.generate([chat], SamplingParams(temperature=0, max_tokens=64))
    assert base.answer.tokens == again[0].tokens
    # Each with its own template; the divergence is that of the edits and not of the templates.
    assert base.answer.prompt_tokens != task.answer.prompt_tokens
    assert_trace(task.trace, task.answer.prompt_tokens, task.answer.tokens, Applied((LOREFT,)))
    wrong: Any
    for wrong in ("loreft", ("loreft",), Use("loreft")):
        with pytest.raises(InvalidRequest, match="interventions: give a list"):
            engine.compare(chat, wrong)
    with pytest.raises(NotFound, match="nope"):
        engine.compare(chat, ["loreft", "nope"])
    none, also = engine.compare(chat, ["loreft"], SamplingParams(max_tokens=0))
    assert none.trace.kl == also.trace.kl == 0
    assert also.trace.log_ratios == ((),)
    assert also.trace.mean_log_ratio == 0
    assert len(also.trace.edits) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"max_running": 8},
        {"max_running": 2, "max_step_tokens": 2},
        {"max_running": 3, "max_step_tokens": 5},
        {"max_running": 8, "kv_tokens": MAX_LENGTH + 16},
    ],
    ids=["at once", "by 2", "by 5", "preempted"],
)
async def test_traces_of_several_choices(settings: dict[str, int]) -> None:
    sampling = SamplingParams(temperature=1, seed=3, n=3, max_tokens=40, ignore_eos=True)
    tokens = [list(prompt(40 + i)) for i in range(4)]
    with opened(**settings) as engine:
        uses = (Use("loreft", 0.5), Use("several", -0.25))
        used = (Applied((LOREFT,), 0.5), Applied(FILES["several"], -0.25))
        streams = [
            await engine.open(each, sampling, uses if i % 2 else (), trace=True)
            for i, each in enumerate(tokens)
        ]
        for i, stream in enumerate(streams):
            made: list[list[int]] = [[], [], []]
            async for deltas in stream:
                for delta in deltas:
                    made[delta.index].extend(delta.tokens)
            assert [len(each) for each in made] == [40] * 3
            # Its edits are those of the first choice.
            trace = await stream.trace()
            assert_trace(trace, tokens[i], made[0], *(used if i % 2 else ()))
            assert len(trace.log_ratios) == 3
            for ratios, answer in zip(trace.log_ratios, made, strict=True):
                assert_ratio(ratios, tokens[i], answer, *(used if i % 2 else ()))
        assert (engine.stats().preemptions > 0) == ("kv_tokens" in settings)


async def ended(engine: Engine, **settings: Any) -> tuple[Stream, list[list[int]]]:
    """A traced stream of three choices at its end, and what they are."""
    sampling = SamplingParams(temperature=1, seed=3, n=3, **{"max_tokens": 10, **settings})
    stream = await engine.open(prompt(48), sampling, (Use("several"),), trace=True)
    made: list[list[int]] = [[], [], []]
    async for deltas in stream:
        for delta in deltas:
            made[delta.index].extend(delta.tokens)
    return stream, made


@pytest.mark.parametrize("cache", [True, False])
async def test_the_base_computes_the_prompt_of_a_trace_once(cache: bool) -> None:
    with opened(max_running=4, prefix_cache=cache) as engine:
        stream, made = await ended(engine, ignore_eos=True)
        trace = await stream.trace()
        # Two blocks of 16 tokens are reused; the last token of the third is scored from.
        each = 48 + 10 - (32 if cache else 0)
        assert engine.stats().prompt_tokens == 48 + 48 + 3 * each
        for ratios, answer in zip(trace.log_ratios, made, strict=True):
            assert_ratio(ratios, list(prompt(48)), answer, Applied(FILES["several"]))


async def test_answers_of_a_trace_that_end_early(engine: Engine) -> None:
    whole, made = await ended(engine, ignore_eos=True)
    stream, cut = await ended(engine, ignore_eos=True, stop_token_ids=(made[1][4],))
    assert len(cut[1]) <= 5
    lengths = [len(answer) for answer in cut]
    trace, other = await stream.trace(), await whole.trace()
    assert [len(ratios) for ratios in trace.log_ratios] == lengths
    assert trace.log_ratios[1] == pytest.approx(other.log_ratios[1][: lengths[1]], abs=1e-4)
    count = sum(lengths)
    assert trace.mean_log_ratio == pytest.approx(sum(map(sum, trace.log_ratios)) / count)


async def test_a_trace_is_not_refused_at_its_end() -> None:
    with opened(max_running=1, max_queued=1) as engine:
        stream, _ = await ended(engine)
        engine.begin_drain()
        with pytest.raises(Draining):
            await engine.open(prompt(9), GREEDY)
        assert len((await stream.trace()).log_ratios) == 3


async def test_who_leaves_a_trace_leaves_nothing(engine: Engine) -> None:
    stream, _ = await ended(engine)
    explaining = asyncio.ensure_future(stream.trace())
    await asyncio.sleep(0)
    explaining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await explaining
    assert not engine._sinks
    assert engine.registry.entry("several").in_flight == 0
    engine.check_integrity()


async def test_no_trace_unless_asked(engine: Engine) -> None:
    stream = await engine.open(prompt(9), GREEDY, (Use("several"),))
    async for _ in stream:
        pass
    with pytest.raises(RuntimeError, match="not traced"):
        await stream.trace()


async def test_abort_mid_way(engine: Engine) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, n=2)
    other = await engine.open(prompt(12), GREEDY, (Use("several"),))
    stream = await engine.open(prompt(9), sampling, (Use("several"), Use("loreft")), trace=True)
    assert [version.split("@")[0] for version in stream.versions] == ["several", "loreft"]
    made: list[int] = []
    async with aclosing(aiter_of(stream)) as items:
        async for deltas in items:
            made += [t for delta in deltas if delta.index == 0 for t in delta.tokens]
            if len(made) >= 3:
                break
    assert engine.registry.entry("loreft").in_flight == 1
    stream.abort()
    stream.abort()
    assert engine.registry.entry("loreft").in_flight == 0
    rest = [deltas async for deltas in stream]
    assert len(rest) <= 1  # what had come before, unread
    assert len(made) < 200
    used = [applied(*FILES["several"]), applied(LOREFT)]
    assert made == generate_applied(tiny_llama()[0], prompt(9), used, len(made))
    tokens = [t async for deltas in other for delta in deltas for t in delta.tokens]
    assert tokens == expected("several", prompt(12))
    await engine.drained()


async def aiter_of(stream: Any) -> Any:
    async for deltas in stream:
        yield deltas


async def test_open_holds_nothing_where_it_refuses(engine: Engine) -> None:
    for uses in (
        (Use("loreft"), Use("nope")),
        (Use("loreft"), Use("loreft", subspace=(9,))),
        (Use("loreft"),) * 17,
    ):
        with pytest.raises(ReftError):
            await engine.open(prompt(9), GREEDY, uses)
    with pytest.raises(InvalidRequest):
        await engine.open([], GREEDY, (Use("loreft"),))


@pytest.mark.parametrize("priority", ["high", None, 1.5], ids=str)
async def test_a_priority_that_is_no_number_is_refused(engine: Engine, priority: Any) -> None:
    """Before anything else is done, such as to look at a prompt that is too long."""
    with pytest.raises(InvalidRequest, match="priority must be a whole number") as refused:
        await engine.open(prompt(9999), GREEDY, [Use("loreft")], priority=priority)
    assert refused.value.param == "priority"


@pytest.mark.parametrize(
    "fields",
    [{"weight": 0.0}, {"weight": -1.0}, {"weight": math.nan}, {"weight": None}, {"salt": "text"}],
    ids=str,
)
def test_a_caller_that_nobody_can_be(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(InvalidRequest, match=f"{name} must be"):
        Caller(**fields)


async def test_open_cancelled_while_it_prepares_holds_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = engine.admission.prepare
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        try:
            return prepare(*args, **kwargs)
        finally:
            done.set()

    monkeypatch.setattr(engine.admission, "prepare", slow)
    opening = asyncio.ensure_future(engine.open(prompt(9), GREEDY, (Use("loreft"),)))
    assert await asyncio.to_thread(begun.wait, 30)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()
    assert await asyncio.to_thread(done.wait, 30)
    for _ in range(100):
        if engine.registry.entry("loreft").in_flight == 0:
            break
        await asyncio.sleep(0.01)
    assert engine.registry.entry("loreft").in_flight == 0
    assert engine.registry.entry("loreft").requests > 0


def test_a_stop_string_counts_from_min_tokens_on(engine: Engine) -> None:
    free = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    [whole] = engine.generate(prompt(9), free, progress=False)
    stop = dataclasses.replace(free, stop=(whole.text[0],))
    [stopped] = engine.generate(prompt(9), stop, progress=False)
    assert (stopped.text, stopped.choices[0].stop_reason) == ("", whole.text[0])
    assert len(stopped.tokens) < 10
    later = dataclasses.replace(stop, min_tokens=10)
    [full] = engine.generate(prompt(9), later, progress=False)
    assert full.tokens == whole.tokens
    assert full.text.startswith(whole.text[0])


def test_numbers_of_numpy_are_numbers(engine: Engine) -> None:
    plain = SamplingParams(max_tokens=5, temperature=0.5, top_k=40, seed=3, n=2, logprobs=1)
    given: dict[str, Any] = {
        "max_tokens": np.int64(5),
        "temperature": np.float32(0.5),
        "top_k": np.int32(40),
        "seed": np.int64(3),
        "n": np.int64(2),
        "logprobs": np.int64(1),
    }
    assert engine.generate(prompt(9), SamplingParams(**given), progress=False) == engine.generate(
        prompt(9), plain, progress=False
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_running": 0}, "max_running must be at least 1, not 0"),
        ({"max_running": -1}, "max_running must be at least 1, not -1"),
        ({"max_running": 1.5}, r"max_running must be a whole number, not 1\.5"),
        ({"max_step_tokens": 0}, "max_step_tokens must be at least 1, not 0"),
        ({"max_queued": 0}, "max_queued must be at least 1, not 0"),
        ({"max_queued_tokens": "5"}, "max_queued_tokens must be a whole number, not '5'"),
        ({"max_model_len": 1.5}, r"max_model_len must be a whole number, not 1\.5"),
        ({"threads": 1.5}, r"threads must be a whole number, not 1\.5"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, not 0"),
        ({"kv_tokens": 300.5}, r"kv_tokens must be a whole number, not 300\.5"),
        ({"kv_tokens": 10**13}, "kv_tokens: .* more than this system lets a process have"),
        ({"kv_tokens": 10**30}, "kv_tokens: .* more than this system lets a process have"),
    ],
    ids=str,
)
def test_limits_that_nothing_could_run_with_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Engine(copy.deepcopy(tiny_llama()[0]), tokenizer=tiny_tokenizer(), **given).close()
    assert refused.value.param in given


def test_a_version_of_another_models_registry_ends_nobody_else(engine: Engine) -> None:
    deep = engine.registry.base.model_copy(update={"num_layers": 40})
    other = Registry(deep)
    edit = dataclasses.replace(LOREFT, layer=30)
    other.put("deep", serialise(Intervention.build(deep, [edit.stored])))
    with pytest.raises(InvalidRequest, match=r"deep@.* was resolved by another registry") as told:
        engine.generate(prompt(9), GREEDY, intervention=Use(other.resolve("deep")), progress=False)
    assert told.value.param == "interventions"
    assert engine.alive
    other.close()
