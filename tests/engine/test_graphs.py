"""Decode steps from fixed addresses: the same tokens, whatever the numbers of rows and edits.

Without a CUDA device what would be captured is computed again at each replay: everything but the
capture itself is as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_runtime.base.model import LoadedModel
from reft_runtime.edits import editors, tables
from reft_runtime.edits.tables import PIECE_RANKS, EditTables
from reft_runtime.engine import core as engine_core
from reft_runtime.engine.graphs import Compute, DecodeGraphs, GraphCapture, buckets
from reft_runtime.engine.runner import Runner
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.kernels import staging
from reft_runtime.kv.choice import Places
from reft_runtime.kv.pages import PageStorage
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.budget import BlockBudget
from tests.helpers.models import (
    DEVICE,
    answers,
    generate,
    intervention,
    make_core,
    prompt,
    request,
    run,
    tiny,
    tiny_llama,
)
from tests.helpers.pages import graphs_for, pages_for, tables_for, triton_attention, triton_edits
from tests.helpers.reference import RandomEdit, applied

BUDGET = 256
"""Bytes: of two interventions in turn, one gives way to the other."""

Spy = list[tuple[int, bool]]
"""Of each decode step that went through a graph: rows in the graph, and whether it edits."""


@pytest.fixture(params=["torch"])
def replays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Cores with pages and graphs; notes what is replayed.

    With Triton's kernels on a device, and where `request.param` asks for them.
    """
    seen: Spy = []
    own = request.param == "triton"

    def storage(
        loaded: LoadedModel, budget: BlockBudget, max_running: int, places: Places | None
    ) -> PageStorage:
        kernel = triton_attention(loaded) if own else None
        return pages_for(loaded, budget, max_running, places, kernel)

    def edits(loaded: LoadedModel, max_running: int) -> EditTables:
        return tables_for(loaded, max_running, triton_edits() if own else None, budget=BUDGET)

    def decoder(runner: Runner, max_running: int) -> DecodeGraphs:
        graphs = graphs_for(runner, max_running)
        real = graphs._graph

        def graph(rows: int, *, edited: bool) -> Compute:
            seen.append((rows, edited))
            return real(rows, edited=edited)

        monkeypatch.setattr(graphs, "_graph", graph)
        return graphs

    monkeypatch.setattr(engine_core, "storage_for", storage)
    monkeypatch.setattr(engine_core, "tables_for", edits)
    monkeypatch.setattr(engine_core, "decoder_for", decoder)
    return seen


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(5) == [1, 2, 3, 4, 5]
    sizes = buckets(256)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 256
    assert all(b <= max(a + 1, 1.25 * a) for a, b in pairwise(sizes))
    assert len(sizes) < 32


def test_base_and_prompt_edits_take_the_plain_set(replays: Spy) -> None:
    model, _ = tiny_llama()
    asked = [
        request("base", prompt(9), max_tokens=5),
        request("long", prompt(20), max_tokens=8),
        request("edited", prompt(7), intervention(1), max_tokens=4),
    ]
    found = run(make_core(), asked)
    assert found["base"][0] == generate(model, prompt(9), 5)
    assert found["long"][0] == generate(model, prompt(20), 8)
    assert found["edited"][0] != generate(model, prompt(7), 4)
    assert {edited for _, edited in replays} == {False}
    # Three rows decode together, then fewer.
    assert [rows for rows, _ in replays[:7]] == [3, 3, 3, 2, 1, 1, 1]


DECODING = {
    "loreft": RandomEdit("loreft", "l1+decode", seed=1),
    "all": RandomEdit("direft", "all", seed=2, rank=1),
    "steering": RandomEdit("steering", "all", seed=3),
    "lobireft": RandomEdit("lobireft", "decode", seed=4, layer=2, size=3),
    "window": RandomEdit("loreft", "decode[1:3]", seed=8),
}
EAGER = {
    "act": RandomEdit("loreft", "decode", act="relu", seed=5),
    "input": RandomEdit("steering", "all", seed=6, component="block_input"),
    "scaled": RandomEdit("red", "decode", seed=7),
}


@pytest.mark.parametrize("name", DECODING)
def test_edits_of_decoded_tokens_come_from_tables(replays: Spy, name: str) -> None:
    own = applied(DECODING[name], strength=0.7).intervention
    asked = [
        request("edited", prompt(9), own, max_tokens=5),
        request("base", prompt(11), max_tokens=5),
    ]
    found = run(make_core(), asked)
    assert {edited for _, edited in replays} == {True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
        assert run(make_core(), asked) == found
    assert found["base"][0] == generate(tiny_llama()[0], prompt(11), 5)


@pytest.mark.parametrize("name", EAGER)
def test_what_tables_cannot_hold_is_computed_eagerly(replays: Spy, name: str) -> None:
    own = applied(EAGER[name]).intervention
    asked = [
        request("edited", prompt(9), own, max_tokens=5),
        request("base", prompt(11), max_tokens=7),
    ]
    found = run(make_core(), asked)
    assert [edited for _, edited in replays] == [False] * 2  # once the edited one has ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
        assert run(make_core(), asked) == found


def test_more_interventions_than_memory(replays: Spy) -> None:
    asked = [
        request(
            f"{seed}",
            prompt(9),
            applied(RandomEdit("steering", "all", seed=seed)).intervention,
            max_tokens=4,
        )
        for seed in range(5)
    ]
    wanted = {each.id: run(make_core(), [each])[each.id] for each in asked}
    replays.clear()
    # Two at once: what they use stays, and the least recently used gives way.
    core = make_core(max_running=2)
    held = core.runner.tables
    assert held is not None
    assert run(core, asked) == wanted
    for each in (*asked, *asked):
        assert run(core, [each])[each.id] == wanted[each.id]
        assert len(held._held) <= 2
        assert len(held._held) + len(held._free) == tables.ENTRIES - 1
    assert {edited for _, edited in replays} == {True}


def test_edits_for_which_the_table_has_no_entry_are_applied_all_the_same(
    replays: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        request(
            f"{seed}",
            prompt(9),
            applied(RandomEdit("steering", "all", seed=seed)).intervention,
            max_tokens=4,
        )
        for seed in range(3)
    ]
    wanted = run(make_core(), asked)
    monkeypatch.setattr(tables, "ENTRIES", 2)  # one, beside the first, which changes nothing
    core = make_core()
    assert run(core, asked) == wanted
    held = core.runner.tables
    assert held is not None
    assert (len(held._held), len(held._free)) == (1, 0)


def test_memory_that_runs_out_while_edits_are_copied_costs_the_newest_alone(
    replays: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = applied(DECODING["loreft"]).intervention
    asked = [request("x", prompt(9), own, max_tokens=5), request("y", prompt(11), own)]
    wanted = run(make_core(), asked)
    real, calls = staging.send, iter(range(99))

    def send_once_less(*args: Any) -> Tensor:
        if next(calls) == 0:  # the edits are there, and the table does not say so yet
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(tables, "send", send_once_less)
    core = make_core()
    found = answers(core, asked)
    assert found["y"].failed == OUT_OF_MEMORY
    assert found["x"].tokens == wanted["x"]
    assert run(core, asked) == wanted
    held = core.runner.tables
    assert held is not None
    parts = sum(each.lent for each in held._held.values())
    assert bool(parts) != bool(held._arena._free)  # what was taken in vain was given back


@pytest.mark.parametrize("replays", ["triton"], indirect=True)
def test_tables_and_pages_by_triton(replays: Spy) -> None:
    loaded = adopt_model(tiny("llama", num_hidden_layers=2).to(DEVICE))  # type: ignore[arg-type]
    own = applied(DECODING["loreft"]).intervention
    asked = [
        request("edited", prompt(5), own, max_tokens=3),
        request("base", prompt(3), max_tokens=5),
    ]
    found = run(make_core(loaded), asked)
    assert {edited for _, edited in replays} == {True, False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "storage_for", pages_for)
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
        assert run(make_core(loaded), asked) == found


TOGETHER = {
    "two positions": RandomEdit("loreft", "f2+l1", seed=1, layer=1),
    "another layer": RandomEdit("direft", "l3", seed=2, layer=2, rank=1),
    "the same rows": RandomEdit("loreft", "l2", seed=3, layer=1),
    "an offset": RandomEdit("steering", "all", seed=4, layer=1),
    "rows scaled": RandomEdit("red", "l2", seed=5, layer=1),
}


def test_prompts_are_edited_from_tables(replays: Spy) -> None:
    every = list(TOGETHER.values())
    files = {name: [applied(edit).intervention] for name, edit in TOGETHER.items()}
    files["one file"] = [applied(*every[:3]).intervention]
    files["composed"] = [applied(edit, strength=0.6).intervention for edit in every[:3]]
    files["turned"] = files["composed"][::-1]
    files["of both kinds"] = [applied(*every).intervention]
    files["long"] = [applied(RandomEdit("loreft", "all", seed=6, layer=1)).intervention]
    wide = RandomEdit("loreft", "all", seed=7, rank=PIECE_RANKS + 1, size=0.2)
    files["long and wide"] = [applied(wide).intervention]
    asked = [
        request(name, prompt(60 if "long" in name else 9), *own, max_tokens=3)
        for name, own in files.items()
    ]
    edited: list[int] = []
    real = editors.PackedRows.add

    def add(self: editors.PackedRows, *args: Any) -> bool:
        taken = real(self, *args)
        edited.append(taken)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editors.PackedRows, "add", add)
        found = run(make_core(), asked)
    assert set(edited) == {True, False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "tables_for", lambda *_: None)
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
        assert run(make_core(), asked) == found
    assert found["composed"] != found["turned"]


def test_one_core_after_another_in_any_company(replays: Spy) -> None:
    core = make_core(max_running=5)
    asked = [
        request(f"{n}", prompt(3 + 5 * n), *([intervention(n)] if n % 2 else []), max_tokens=3 + n)
        for n in range(9)
    ]
    together = run(core, asked)
    assert max(rows for rows, _ in replays) == 5
    assert together == {each.id: run(core, [each])[each.id] for each in asked}


def test_warming_up_captures_both_sets_and_leaves_no_trace(replays: Spy) -> None:
    core = make_core(max_running=6)
    graphs = core.runner.decoder
    assert isinstance(graphs, DecodeGraphs)
    graphs.warm_up(progress=False)
    assert replays == [(rows, edited) for rows in (6, 5, 4, 3, 2, 1) for edited in (False, True)]
    assert run(core, [request("a", prompt(9))])["a"][0] == generate(tiny_llama()[0], prompt(9), 8)
    core.check_integrity()


@pytest.mark.parametrize("longest", [16, 48])
def test_warming_up_where_answers_are_short(replays: Spy, longest: int) -> None:
    loaded = adopt_model(tiny("llama").to(DEVICE), longest)  # type: ignore[arg-type]
    core = make_core(loaded, max_running=2)
    graphs = core.runner.decoder
    assert isinstance(graphs, DecodeGraphs)
    graphs.warm_up(progress=False)  # a prompt as long as an answer has no more pages


class Stream:
    """One of torch.cuda's; `after` are those that it waits for, in order."""

    def __init__(self) -> None:
        self.after: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.after.append(other)


class Streams:
    """What a capture uses of torch.cuda, without a device."""

    def __init__(self) -> None:
        self.usual = self.now = Stream()

    def current_stream(self) -> Stream:
        return self.now

    def set_stream(self, stream: Stream) -> None:
        self.now = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: Any, *, stream: Stream, **_: Any) -> Iterator[None]:
        """As torch's own: the end of a capture that failed raises before the stream is changed."""
        before, self.now = self.now, stream
        yield
        self.now = before

    class CUDAGraph:
        def replay(self) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    for name in ("current_stream", "set_stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
    return made


@pytest.mark.parametrize("fails_at", [0, 1, 2, None])
def test_a_capture_leaves_the_thread_on_its_stream(streams: Streams, fails_at: int | None) -> None:
    runs: list[Stream] = []

    def compute() -> None:
        runs.append(streams.now)
        if len(runs) - 1 == fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")

    capture = GraphCapture()
    if fails_at is None:
        capture(compute)
    else:
        with pytest.raises(RuntimeError, match="capturing"):
            capture(compute)
    assert streams.now is streams.usual
    (own,) = set(runs)
    assert own is not streams.usual
    assert own.after == [streams.usual]
    assert streams.usual.after == [own]


def test_another_engine_may_wait_while_one_captures(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's mode in which waiting raises is that of the process."""
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    GraphCapture()(lambda: None)
    assert modes == []
