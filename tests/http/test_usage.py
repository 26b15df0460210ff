"""GET /v1/usage: the sum of what answers said, whatever became of the server."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
import time
from collections import Counter
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import ANY, MagicMock

import httpx
import jsonschema
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.settings import Settings
from server.tenants import usage
from server.tenants.meter import TELL_SECONDS, Meter
from server.tenants.tenant import Tenant
from server.tenants.usage import Counts, Query, Usage
from tests.helpers.serving import client_of
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine
from tests.http.tenants import key, use_tenants
from tests.http.test_lifecycle import running
from tests.http.test_tiny_model import tiny_engine

TEAMS = [Tenant("team-a"), Tenant("team-b", tokens_per_minute=10**9)]
Row = tuple[str, str]
FIELDS = Counts._fields

__all__ = ["tiny_engine"]


def said(usage: dict[str, Any]) -> Counter[str]:
    """What an answer's `usage` says, of either API."""
    prompt = "prompt_tokens" if "prompt_tokens" in usage else "input_tokens"
    made = "completion_tokens" if "prompt_tokens" in usage else "output_tokens"
    return Counter(
        requests=1,
        prompt_tokens=usage[prompt],
        cached_tokens=usage[f"{prompt}_details"]["cached_tokens"],
        completion_tokens=usage[made],
    )


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def rows(client: httpx.AsyncClient, **asked: str) -> list[dict[str, Any]]:
    response = await client.get("/v1/usage", params=asked)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


async def table(client: httpx.AsyncClient) -> dict[Row, Counter[str]]:
    """Counts by tenant and intervention."""
    found = await rows(client, group_by="tenant,intervention")
    return {
        (row["tenant"], row["intervention"]): Counter({name: row[name] for name in FIELDS})
        for row in found
    }


class Traffic:
    """Random requests of two tenants, and what their answers said."""

    def __init__(self, client: httpx.AsyncClient, base: str, names: list[str], seed: int) -> None:
        self.client, self.base, self.names = client, base, names
        self.random = random.Random(seed)
        self.said: dict[Row, Counter[str]] = {}

    async def ask(self) -> None:
        """One request of any kind."""
        draw, tenant = self.random, self.random.choice(TEAMS)
        prompts = ["you and the", "is it on?", "you"]
        name, applied = self._applied()
        fields: dict[str, Any] = {**applied, "max_tokens": draw.randint(1, 9), "temperature": 0}
        match draw.choice(["completions", "chat", "responses", "classify", "wrong"]):
            case "completions":
                path = "/v1/completions"
                fields |= {"prompt": draw.choices(prompts, k=draw.randint(1, 3))}
                fields |= {"n": draw.randint(1, 3), "stream": draw.random() < 0.5}
            case "chat":
                path = "/v1/chat/completions"
                fields |= {"messages": [{"role": "user", "content": draw.choice(prompts)}]}
                fields |= {"n": draw.randint(1, 3), "stream": draw.random() < 0.5}
            case "responses":
                path = "/v1/responses"
                fields |= {"input": draw.choice(prompts), "stream": draw.random() < 0.5}
                fields["max_output_tokens"] = fields.pop("max_tokens") + 16
            case "classify":
                path = "/v1/classify"
                fields = {**applied, "labels": ["on", "off"]}
                fields |= {"input": draw.choices(prompts, k=draw.randint(1, 3))}
            case _:
                path = "/v1/completions"
                fields |= {"prompt": "you"}
                field, value = draw.choice([("model", "none"), ("prompt", ""), ("n", 0)])
                fields[field] = value
        if fields.get("stream") and path != "/v1/responses":
            fields["stream_options"] = {"include_usage": True}
        response = await self.client.post(path, json=fields, headers=key(tenant))
        if response.status_code != 200:
            assert response.status_code in (400, 404, 503), response.text
            return
        if fields.get("stream"):
            last = events(response.text)[-1]
            counted = said(last.get("response", last)["usage"])
        else:
            counted = said(response.json()["usage"])
        self.said.setdefault((tenant.name, name), Counter()).update(counted)

    def _applied(self) -> tuple[str, dict[str, Any]]:
        """The row that counts it, and the fields that say what is applied."""
        names = self.random.choices(self.names, k=self.random.randint(0, 3))
        if not names:
            return "(base)", {"model": self.base}
        if len(names) == 1:
            return names[0], {"model": names[0]}
        uses = [{"name": name, "strength": 0.5} for name in names]
        return "+".join(dict.fromkeys(names)), {"model": self.base, "interventions": uses}

    def check(self, found: dict[Row, Counter[str]]) -> None:
        assert {row: +counts for row, counts in found.items()} == {
            row: +counts for row, counts in self.said.items()
        }


@pytest.mark.parametrize("seed", range(3))
async def test_usage_is_the_sum_of_what_answers_said(
    client: httpx.AsyncClient, app: FastAPI, seed: int
) -> None:
    use_tenants(app, *TEAMS)
    traffic = Traffic(client, "tiny", ["emoji", "pirate"], seed)
    for _ in range(15):
        await asyncio.gather(*(traffic.ask() for _ in range(6)))
    assert len(traffic.said) > 5
    traffic.check(await table(client))
    text = (await client.get("/metrics")).text
    for team in TEAMS:
        tokens = sum(
            counts["completion_tokens"]
            for (tenant, _), counts in traffic.said.items()
            if tenant == team.name
        )
        line = f'reft:tenant_generation_tokens_total{{tenant="{team.name}"}} {float(tokens)}'
        assert f"{line}\n" in text


async def test_usage_on_the_tiny_model(tiny_engine: Any) -> None:
    """Its prefix cache and its preemptions change what is cached, not the sum."""
    app = create_app(tiny_engine, Settings())
    use_tenants(app, *TEAMS)
    async with client_of(app) as client:
        traffic = Traffic(client, tiny_engine.info.model, ["task"], 0)
        for _ in range(10):
            await asyncio.gather(*(traffic.ask() for _ in range(3)))
        assert sum(counts["completion_tokens"] for counts in traffic.said.values()) > 100
        traffic.check(await table(client))


@pytest.mark.parametrize("end", ["leaves", "fails"])
async def test_an_answer_that_is_cut_off_counts_what_was_made(
    server_url: str, engine: FakeEngine, end: str
) -> None:
    engine.step_seconds = 0.01
    engine.fail_after = 5 if end == "fails" else None
    counted = 0
    asked = completion(
        max_tokens=60, stream=True, n=2, stream_options={"continuous_usage_stats": True}
    )
    async with httpx.AsyncClient(base_url=server_url) as client:
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and "usage" in line:
                    counted = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                if end == "leaves" and counted >= 10:
                    break
        while engine.running:
            await asyncio.sleep(0.01)
        [row] = await rows(client)
    assert (row["requests"], row["prompt_tokens"], row["cached_tokens"]) == (1, 2, 1)
    if end == "fails":
        assert row["completion_tokens"] == counted == 10
    else:
        assert counted <= row["completion_tokens"] < 120


def test_what_a_request_used_is_passed_on_now_and_then() -> None:
    """At the first step of each of its prompts, each `TELL_SECONDS`, and at its end."""
    quotas, counting, admitted = MagicMock(), Usage(None), MagicMock(tenant=TEAMS[0])
    meter = Meter(quotas, counting, admitted, ["x", "y"], [3, 4, 5])
    for prompt, cached, now, counted in (
        (0, 2, 10.0, Counts(1, 3, 2, 1)),
        (0, 2, 10.05, Counts(1, 3, 2, 1)),
        (1, 0, 10.06, Counts(1, 7, 2, 3)),
        (0, 2, 10.15, Counts(1, 7, 2, 3)),
        (0, 3, 10.15 + TELL_SECONDS, Counts(1, 7, 3, 5)),
        (1, 0, 10.2 + TELL_SECONDS, Counts(1, 7, 3, 5)),
    ):
        meter.step(prompt, cached, 1, now)
        assert meter.counts == counted
    meter.end()
    assert meter.counts == (1, 7, 3, 6)
    assert counting.find(query()).rows == [(ANY, meter.counts)]
    assert [row[1:] for row, _ in counting.find(query()).rows] == [("team-a", "x+y")]
    assert [call.args for call in quotas.spend.call_args_list] == [
        (TEAMS[0], made) for made in (1, 2, 2, 1)
    ]
    quotas.leave.assert_called_once_with(admitted, 5)


async def test_a_request_that_never_had_a_token_is_not_counted(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after = 0
    assert (await client.post("/v1/completions", json=completion())).status_code == 500
    assert await rows(client) == []


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of `server.tenants.usage`, in days since 1970: the first item of the list."""
    now = [20_000.5]

    class Clock:
        @staticmethod
        def time() -> float:
            return 86400 * now[0]

    monkeypatch.setattr(usage, "time", Clock)
    return now


def query(**fields: Any) -> Query:
    return Query(date(2000, 1, 1), date(2100, 1, 1), **fields)


async def test_what_can_be_asked_for(
    client: httpx.AsyncClient, app: FastAPI, days: list[float]
) -> None:
    counting: Usage = app.state.context.usage
    days[0] = 20_001 - 1 / 86400  # a day's last second, and another's first
    for tenant, name in (("a", "x"), ("a", "y"), ("b", "x"), ("b", "x+y")):
        counting.add(tenant, name, Counts(1, 10, 5, 2))
    days[0] = 20_001
    counting.add("a", "x", Counts(2, 20, 10, 4))
    span = {"from": "2024-10-04", "to": "2024-10-05"}
    body = (await client.get("/v1/usage", params=span)).json()
    assert {**body, "data": None, "since": None} == {
        "object": "usage", **span, "since": None, "kept": False, "problem": None, "data": None,
        "total": {
            "requests": 6, "prompt_tokens": 60, "cached_tokens": 30, "completion_tokens": 12,
        },
    }  # fmt: skip
    assert len(body["data"]) == 5
    assert body["data"][0] == {
        "day": "2024-10-04", "tenant": "a", "intervention": "x",
        "requests": 1, "prompt_tokens": 10, "cached_tokens": 5, "completion_tokens": 2,
    }  # fmt: skip
    for asked, groups in (
        ({"group_by": "day"}, [("2024-10-04", 4), ("2024-10-05", 2)]),
        ({"group_by": "tenant"}, [("a", 4), ("b", 2)]),
        ({"group_by": "intervention"}, [("x", 4), ("x+y", 1), ("y", 1)]),
        ({"group_by": "tenant", "intervention": "x"}, [("a", 3), ("b", 1)]),
        ({"group_by": "intervention", "tenant": "b"}, [("x", 1), ("x+y", 1)]),
        ({"group_by": "day", "from": "2024-10-05"}, [("2024-10-05", 2)]),
        ({"group_by": "day", "to": "2024-10-04"}, [("2024-10-04", 4)]),
        ({"group_by": "day", "tenant": "nobody"}, []),
    ):
        found = await rows(client, **{**span, **asked})
        assert [(row[asked["group_by"]], row["requests"]) for row in found] == groups
    assert await rows(client) == []  # the last 31 days, by the real clock
    assert await rows(client, to="0001-01-05") == []  # of which not all exist


@pytest.mark.parametrize("asking", [TEAMS[0], Tenant("team-a", "admin", ("x", "y"))])
async def test_a_tenant_is_told_its_own_usage_alone(
    client: httpx.AsyncClient, app: FastAPI, asking: Tenant
) -> None:
    use_tenants(app, asking)
    counting: Usage = app.state.context.usage
    for tenant, name in (("team-a", "x"), ("team-b", "x"), ("team-b", "team-b.secret")):
        counting.add(tenant, name, Counts(1, 10, 5, 2))
    everything = {"from": "0001-01-01", "to": "9999-12-31"}
    own = {"requests": 1, "prompt_tokens": 10, "cached_tokens": 5, "completion_tokens": 2}
    for params, groups in (
        ({}, {"tenant": "team-a", "intervention": "x"}),
        ({"tenant": "team-a", "group_by": "tenant"}, {"tenant": "team-a"}),
        ({"group_by": "intervention"}, {"intervention": "x"}),
        ({"group_by": "tenant,intervention", "intervention": "x"}, {"tenant": "team-a"}),
    ):
        answer = await client.get("/v1/usage", params=everything | params, headers=key(asking))
        told = answer.json()
        [row] = told["data"]
        assert row.items() >= (groups | own).items()
        assert told["total"] == own
        assert "team-b" not in answer.text
    hidden = {"intervention": "team-b.secret"}
    told = (await client.get("/v1/usage", params=hidden, headers=key(asking))).json()
    assert (told["data"], set(told["total"].values())) == ([], {0})
    # Another's is refused, whether there is such a tenant or not.
    refused = [
        await client.get("/v1/usage", params={"tenant": other}, headers=key(asking))
        for other in ("team-b", "team-c", "(owner)", "")
    ]
    assert {answer.status_code for answer in refused} == {403}
    assert {answer.json()["error"]["message"] for answer in refused} == {
        "The tenant `team-a` is told its own usage alone; leave `tenant` out."
    }


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"from": "yesterday"}, "from", "YYYY-MM-DD"),
        ({"from": "2026-W05-6"}, "from", "YYYY-MM-DD"),
        ({"from": ""}, "from", "YYYY-MM-DD"),
        ({"to": "2026-02-30"}, "to", "YYYY-MM-DD"),
        ({"from": "2026-02-02", "to": "2026-02-01"}, "from", "after the last day, 2026-02-01"),
        ({"group_by": "hour"}, "group_by", "day, tenant and intervention"),
        ({"group_by": ""}, "group_by", "day, tenant and intervention"),
        ({"since": "2026-02-02"}, "since", "from, to, tenant, intervention, group_by"),
    ],
)
async def test_what_cannot_be_asked_for(
    client: httpx.AsyncClient, asked: dict[str, str], param: str, message: str
) -> None:
    response = await client.get("/v1/usage", params=asked)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("from", ["", "yesterday", "2026-W05-6"], "2026-01-31"),
        ("to", ["2026-02-30", "20260131"], "2026-01-31"),
        ("group_by", ["", "hour", "day,"], "day,tenant"),
    ],
)
async def test_the_schema_says_what_can_be_asked_for(
    client: httpx.AsyncClient, name: str, wrong: list[str], right: str
) -> None:
    told = (await client.get("/openapi.json")).json()["paths"]["/v1/usage"]["get"]["parameters"]
    [schema] = [one["schema"] for one in told if one["name"] == name]
    fits = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    assert not any(map(fits.is_valid, wrong))
    assert fits.is_valid(right)


async def test_a_bill_is_never_cut_off(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.usage.MAX_ROWS", 2)
    for name in "xyz":
        app.state.context.usage.add("a", name, Counts(1))
    response = await client.get("/v1/usage")
    assert response.status_code == 400
    assert "more than 2 rows" in response.json()["error"]["message"]
    assert len(await rows(client, group_by="tenant")) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_MEMORY_ROWS", 3)
    counting = Usage(None)
    for number in range(5):
        counting.add("a", f"n{number}", Counts(1))
    found = counting.find(query(groups=("intervention",))).rows
    names = [(names, counts.requests) for names, counts in found]
    assert names == [(("(other)",), 2), (("n0",), 1), (("n1",), 1), (("n2",), 1)]


def total(counting: Usage) -> int:
    found = counting.find(query(groups=("tenant",)))
    return sum(counts.requests for _, counts in found.rows)


def kept(folder: Path) -> int:
    """What a later server finds."""
    with closing(Usage(folder)) as counting:
        return total(counting)


def test_servers_add_to_what_is_there(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        counting = Usage(tmp_path)
        counting.start()
        counting.add("a", "x", Counts(1))
        counting.close()
        assert [file.name for file in tmp_path.iterdir()] == [usage.FILE]  # and no journal
        assert kept(tmp_path) == expected
    with closing(Usage(tmp_path)) as counting:
        first = counting.find(query()).since
    assert time.time() - 60 < first < time.time()


def test_a_damaged_file_is_told_and_counts_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / usage.FILE
    file.write_bytes(b"no database" * 1000)
    counting = Usage(tmp_path)
    counting.add("a", "x", Counts(1))
    for expected in (1, 2):
        assert total(counting) == expected
        assert counting.problem == "usage is counted in memory: its file cannot be used"
        counting.add("a", "x", Counts(1))
        assert caplog.text.count("counted in memory") == 1
    file.unlink()
    assert total(counting) == 3  # in the file now
    assert counting.problem is None
    counting.close()
    assert kept(tmp_path) == 3


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "another" / "state"
    counting = Usage(folder)
    counting.add("a", "x", Counts(1))
    assert total(counting) == 1
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    counting.add("a", "x", Counts(1))
    assert total(counting) == 1
    counting.close()
    assert kept(folder) == 1


def test_a_journal_that_was_removed_loses_nothing(tmp_path: Path) -> None:
    """Somebody tidies up: the journal has what is not yet in the file itself."""
    counting = Usage(tmp_path)
    for number in (1, 2, 3):
        counting.add("a", "x", Counts(1))
        assert total(counting) == number
        for file in tmp_path.glob(f"{usage.FILE}-*"):
            file.unlink()
    assert total(counting) == 3
    # What a process leaves that is killed now: the files, by their names.
    assert kept(copied(tmp_path)) == 3
    counting.close()
    assert kept(tmp_path) == 3


def copied(folder: Path) -> Path:
    target = folder / "copy"
    target.mkdir()
    for file in folder.glob(f"{usage.FILE}*"):
        shutil.copy(file, target)
    return target


async def test_a_server_whose_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / usage.FILE).mkdir()  # no file can be made there, whoever runs the test
    async with client_of(create_app(FakeEngine(), Settings(state_dir=str(tmp_path)))) as client:
        assert (await client.post("/v1/completions", json=completion())).status_code == 200
        body = (await client.get("/v1/usage")).json()
        assert body["total"]["requests"] == 1
        assert body["kept"]
        assert "counted in memory" in body["problem"]
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ok")
        assert ready.json()["problems"] == [body["problem"]]
        assert str(tmp_path) not in ready.text
        assert "reft:problems 1.0" in (await client.get("/metrics")).text.splitlines()


def test_a_failed_write_is_not_counted_twice(tmp_path: Path) -> None:
    counting = Usage(tmp_path)
    counting.add("a", "x", Counts(1))
    assert total(counting) == 1
    with closing(sqlite3.connect(tmp_path / usage.FILE)) as other:
        other.execute(
            "CREATE TRIGGER broken AFTER INSERT ON usage WHEN NEW.intervention = 'y'"
            " BEGIN SELECT RAISE(ABORT, 'broken'); END"
        )
    counting.add("a", "y", Counts(1))
    counting.add("a", "x", Counts(1))
    assert total(counting) == 2  # that of memory: what is in the file cannot be told
    with closing(sqlite3.connect(tmp_path / usage.FILE)) as other:
        other.execute("DROP TRIGGER broken")
    assert total(counting) == 3
    counting.close()


def test_a_file_that_another_program_has_locked_is_read_at_once(tmp_path: Path) -> None:
    counting = Usage(tmp_path)
    counting.add("a", "x", Counts(1))
    assert total(counting) == 1
    with closing(sqlite3.connect(tmp_path / usage.FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        counting.add("a", "x", Counts(1))
        begun = time.monotonic()
        assert total(counting) == 2
        assert time.monotonic() - begun < 2
        assert counting.problem == (
            "usage is counted in memory: another program has locked its file"
        )
        other.execute("COMMIT")
    assert total(counting) == 2
    assert counting.problem is None
    counting.close()
    assert kept(tmp_path) == 2


def written(folder: Path) -> tuple[int, int]:
    """Requests and generated tokens of the only row in the file of a server that has ended."""
    with closing(sqlite3.connect(folder / usage.FILE)) as file:
        [row] = file.execute("SELECT requests, completion_tokens FROM usage")
    return row[0], row[1]


async def test_a_server_that_stops_loses_nothing(tmp_path: Path) -> None:
    async with client_of(create_app(FakeEngine(), Settings(state_dir=str(tmp_path)))) as client:
        await client.post("/v1/completions", json=completion(max_tokens=97))
    assert written(tmp_path) == (1, 97)


async def test_a_killed_server_loses_its_last_second(tmp_path: Path) -> None:
    seen: list[float] = []
    with running({"step_seconds": 0.01}, state_dir=str(tmp_path)) as server:

        async def ask(client: httpx.AsyncClient) -> None:
            asked = completion(max_tokens=97, stream=True)
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        seen.append(time.monotonic())

        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            asking = [asyncio.ensure_future(ask(client)) for _ in range(4)]
            while len(seen) < 4 or time.monotonic() < seen[3] + 1.2:
                await asyncio.sleep(0.01)
            killed = time.monotonic()
            server.process.kill()
            await asyncio.gather(*asking, return_exceptions=True)
    requests, made = written(tmp_path)
    assert requests == 4
    assert 4 <= sum(at <= killed - 1 for at in seen) <= made <= 4 * 97
