"""Many interventions on one small engine: more than memory takes, and one that is replaced."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.errors import NotFound
from reft_runtime.interventions.format.canonical import memory_of
from reft_runtime.interventions.format.file import parse, serialise
from reft_runtime.interventions.format.intervention import Edit, Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from tests.helpers.models import prompt, tiny
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors

TOKENS = prompt(9)
GREEDY = SamplingParams(temperature=0, max_tokens=6)
COUNT = 24
ROOM = 4


def file(base: BaseShape, seed: int) -> bytes:
    tensors = loreft_tensors(seed, d=base.hidden_size, r=2)
    tensors["b"] *= 20  # so that few of them say the same
    return serialise(Intervention.build(base, [Edit(1, "all", tensors)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many")
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer()) as engine:
        for seed in range(COUNT):
            (path / f"t{seed}.safetensors").write_bytes(file(engine.registry.base, seed))
    return path


@contextmanager
def opened(folder: Path, room: float = COUNT) -> Iterator[Engine]:
    one = memory_of(parse((folder / "t0.safetensors").read_bytes()).canonical())
    with Engine(
        tiny("llama"),
        tokenizer=tiny_tokenizer(),
        interventions=folder,
        intervention_bytes=int(room * one),
        max_running=8,
    ) as engine:
        yield engine
        engine.check_integrity()
        assert engine.registry.waiting() == 0
        assert not any(entry.in_flight for entry in engine.registry.entries())
        assert engine.registry.held_bytes() <= room * one + sum(
            version.listed_bytes for version in engine.registry._catalog.uploads()
        )


NAMES = [f"t{seed}" for seed in range(COUNT)]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[list[int]]:
    """What each says, when memory takes them all."""
    with opened(folder) as engine:
        answers = engine.generate([TOKENS] * COUNT, GREEDY, intervention=NAMES, progress=False)
    tokens = [list(answer.choices[0].tokens) for answer in answers]
    assert len({tuple(each) for each in tokens}) > COUNT // 2
    return tokens


def test_a_list_whose_interventions_do_not_fit_together(
    folder: Path, wanted: list[list[int]]
) -> None:
    with opened(folder, ROOM) as engine:
        answers = engine.generate([TOKENS] * COUNT, GREEDY, intervention=NAMES, progress=False)
        assert [list(answer.choices[0].tokens) for answer in answers] == wanted
        steps = engine.stats().steps
        with pytest.raises(NotFound, match="`nobody` does not exist"):
            engine.generate(
                [TOKENS] * COUNT, GREEDY, intervention=[*NAMES[1:], "nobody"], progress=False
            )
        assert engine.stats().steps == steps  # nothing was computed
        compared = engine.compare(TOKENS, list(NAMES[: 2 * ROOM]), GREEDY)
        said = [list(each.answer.choices[0].tokens) for each in compared[1:]]
        assert said == wanted[: 2 * ROOM]


async def ask(engine: Engine, name: str) -> list[int]:
    made: list[int] = []
    async for deltas in await engine.open(TOKENS, GREEDY, [Use(name)]):
        made += [token for delta in deltas for token in delta.tokens]
    return made


async def test_streams_of_more_tasks_than_memory_takes(
    folder: Path, wanted: list[list[int]]
) -> None:
    """Some are hot, and keep nobody out; some leave while they wait."""
    with opened(folder, ROOM) as engine:
        order = [*range(COUNT), *([0, 1] * COUNT), *range(COUNT)]
        leaving = [asyncio.ensure_future(ask(engine, name)) for name in NAMES[:12]]
        asked = [asyncio.ensure_future(ask(engine, NAMES[each])) for each in order]
        await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        assert await asyncio.gather(*asked) == [wanted[each] for each in order]
        await asyncio.wait(leaving)
        async with asyncio.timeout(20):
            while engine.registry.waiting():
                await asyncio.sleep(0.005)


async def test_a_name_that_is_replaced_under_load(folder: Path, wanted: list[list[int]]) -> None:
    with opened(folder, 8) as engine:
        files = [(folder / f"t{seed}.safetensors").read_bytes() for seed in (0, 1)]
        engine.registry.put("r", files[0])
        done = asyncio.Event()
        made: list[list[int]] = []

        async def stream() -> None:
            while not done.is_set():
                made.append(await ask(engine, "r"))

        streams = [asyncio.ensure_future(stream()) for _ in range(8)]
        for data in itertools.islice(itertools.cycle(files[::-1]), 30):
            await asyncio.to_thread(engine.registry.put, "r", data)
        done.set()
        await asyncio.gather(*streams)
        assert all(each in wanted[:2] for each in made)
        async with asyncio.timeout(20):
            while engine.registry.entry("r").in_flight:
                await asyncio.sleep(0.005)
        assert len(engine.registry.versions_of("r")) == 2  # those that are kept
