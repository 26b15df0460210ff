"""Completions and chat, whole and streamed, as the official client and as plain HTTP see them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from reft_runtime.outputs import ChoiceDelta
from server.generation import Run, Step
from server.routes.completions import CompletionWriter
from tests.http.conftest import chat, completion
from tests.http.fake_engine import DIGEST, FakeEngine, FakeStream


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last must be [DONE]."""
    *lines, end = response.text.split("\n\n")
    assert end == ""
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_several_prompts_have_waited_until_the_first_of_them_began() -> None:
    """So a request never waited longer than its first token took."""
    streams = [SimpleNamespace(queue_seconds=seconds) for seconds in (None, 3.0, 0.5)]
    run: Any = SimpleNamespace(streams=streams)
    assert Run.queue_seconds.__get__(run) == 0.5
    run.streams = streams[:1]
    assert Run.queue_seconds.__get__(run) is None


async def test_completion(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    assert response.headers["x-prompt-tokens"] == "2"
    assert response.headers["x-queue-time"] == "250.0"
    assert "x-intervention" not in response.headers


async def test_completion_defaults_to_16_tokens(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"})
    assert response.json()["usage"]["completion_tokens"] == 16


async def test_chat_goes_on_to_the_models_length(client: httpx.AsyncClient) -> None:
    body = chat(max_tokens=None)
    response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["usage"]["total_tokens"] == 100


async def test_chat(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat(n=2))
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    message = {"role": "assistant", "content": "abcd", "refusal": None}
    assert body["choices"][0]["message"] == message
    assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hi", 1), (["Hi", "Ho!"], 2), ([72, 105], 1), ([[72], [72, 105]], 2)],
)
async def test_prompt_shapes(client: httpx.AsyncClient, prompt: Any, count: int) -> None:
    body = completion(prompt=prompt, n=3, echo=True)
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(3 * count))
    assert choices[0]["text"] == choices[1]["text"]
    assert choices[0]["text"].startswith("H")
    assert choices[0]["text"].endswith("abcd")


async def test_batch_streams_every_choice(client: httpx.AsyncClient) -> None:
    body = completion(
        prompt=["Hi", "Ho!"], n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = events(await client.post("/v1/completions", json=body))
    texts = ["", "", "", ""]
    for chunk in chunks:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["abcd"] * 4
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 16,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_echo_with_logprobs_and_no_new_token(client: httpx.AsyncClient) -> None:
    body = completion(echo=True, logprobs=1, max_tokens=0)
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice == {
        "index": 0,
        "text": "Hi",
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["H", "i"],
            "token_logprobs": [None, -0.5],
            "top_logprobs": [None, {"x": -0.25, "i": -0.5}],
            "text_offset": [0, 1],
        },
    }


async def test_streamed_logprobs_have_running_offsets(client: httpx.AsyncClient) -> None:
    body = completion(echo=True, logprobs=2, max_tokens=2, stream=True)
    chunks = events(await client.post("/v1/completions", json=body))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hia", "b"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2], [3]]
    assert choices[1]["logprobs"]["top_logprobs"] == [{"x": -0.25, "y": -9999.0, "b": -0.5}]


@pytest.mark.parametrize("scored", [False, True])
async def test_many_tokens_at_once_are_written_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    async def steps(self: FakeStream) -> AsyncIterator[list[ChoiceDelta]]:
        one = ChoiceDelta(0, "a", (97,), (self._logprob(97),) if scored else ())
        for count in (1, 10, 100, 5000):
            await asyncio.sleep(0.01)
            yield [one] * count
        yield [ChoiceDelta(0, "", finish_reason="length")]

    monkeypatch.setattr(FakeStream, "steps", steps)
    threads = []
    events = CompletionWriter.events

    def noted(writer: CompletionWriter, run: Run, step: Step) -> bytes:
        threads.append(threading.current_thread() is threading.main_thread())
        return events(writer, run, step)

    monkeypatch.setattr(CompletionWriter, "events", noted)
    body = completion(stream=True, logprobs=1 if scored else None)
    response = await client.post("/v1/completions", json=body)
    assert response.text.count('"text":"a"') == 5111
    beside = [not scored, True, not scored, False]
    assert threads[:4] == beside


@pytest.mark.parametrize("include", [False, True])
async def test_usage_in_every_chunk(client: httpx.AsyncClient, include: bool) -> None:
    options = {"include_usage": include, "continuous_usage_stats": True}
    for path, body in (("completions", completion()), ("chat/completions", chat())):
        asked = {**body, "n": 2, "stream": True, "stream_options": options}
        chunks = events(await client.post(f"/v1/{path}", json=asked))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (2, 8)
        assert (chunks[-1]["choices"] == []) is include


async def test_token_ids(client: httpx.AsyncClient) -> None:
    asked = completion(prompt=["Hi", "Ho!"], return_token_ids=True)
    choices = (await client.post("/v1/completions", json=asked)).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[72, 105], [72, 111, 33]]
    assert [choice["token_ids"] for choice in choices] == [[97, 98, 99, 100]] * 2
    chunks = events(await client.post("/v1/completions", json={**asked, "stream": True}))
    ids: dict[int, list[int]] = {0: [], 1: []}
    prompts: dict[int, list[int]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            ids[choice["index"]] += choice["token_ids"]
            prompts.setdefault(choice["index"], choice["prompt_token_ids"])
    assert ids == {0: [97, 98, 99, 100], 1: [97, 98, 99, 100]}
    assert prompts == {0: [72, 105], 1: [72, 111, 33]}
    plain = (await client.post("/v1/completions", json=completion())).json()
    assert plain["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}


async def test_token_ids_of_a_chat(client: httpx.AsyncClient) -> None:
    asked = chat(return_token_ids=True)
    body = (await client.post("/v1/chat/completions", json=asked)).json()
    assert bytes(body["prompt_token_ids"]) == b"<user>Hi"
    assert body["choices"][0]["token_ids"] == [97, 98, 99, 100]
    first, *others = events(
        await client.post("/v1/chat/completions", json={**asked, "stream": True})
    )
    assert bytes(first["prompt_token_ids"]) == b"<user>Hi"
    assert not any("prompt_token_ids" in chunk for chunk in others)
    ids = [token for chunk in others for token in chunk["choices"][0]["token_ids"]]
    assert ids == [97, 98, 99, 100]


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    asked = completion(prompt_logprobs=1, echo=True, logprobs=0, max_tokens=1)
    choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
    scored = {
        "105": {"logprob": -0.5, "rank": None, "decoded_token": "i"},
        "120": {"logprob": -0.25, "rank": 1, "decoded_token": "x"},
    }
    assert choice["prompt_logprobs"] == [None, scored]
    assert choice["logprobs"]["top_logprobs"] == [None, {"i": -0.5}, {"a": -0.5}]
    body = (await client.post("/v1/chat/completions", json=chat(prompt_logprobs=1))).json()
    assert len(body["prompt_logprobs"]) == len("<user>Hi")
    assert body["prompt_logprobs"][-1] == scored
    streamed = completion(prompt_logprobs=0, stream=True)
    response = await client.post("/v1/completions", json=streamed)
    assert response.json()["error"]["param"] == "prompt_logprobs"


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    body = chat(logprobs=True, top_logprobs=1, max_tokens=1)
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    top = [{"token": "x", "logprob": -0.25, "bytes": [120]}]
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}
    assert choice["logprobs"] == {"content": [token], "refusal": None}


@pytest.mark.parametrize(
    ("model", "refs"),
    [
        ("tiny", []),
        ("emoji", [(f"emoji@{DIGEST}", 1.0)]),
        ("tiny:emoji", [(f"emoji@{DIGEST}", 1.0)]),
        (f"emoji@{DIGEST[:8]}", [(f"emoji@{DIGEST}", 1.0)]),
    ],
)
async def test_model_names(
    client: httpx.AsyncClient, engine: FakeEngine, model: str, refs: list[Any]
) -> None:
    response = await client.post("/v1/completions", json=completion(model=model))
    assert response.json()["model"] == model
    assert engine.streams[-1].interventions == refs


async def test_interventions_win_over_model(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    uses = [{"name": "pirate", "strength": 0.5}, {"name": "emoji"}]
    response = await client.post("/v1/completions", json=completion(interventions=uses))
    refs = [(f"pirate@{'e2' * 32}", 0.5), (f"emoji@{DIGEST}", 1.0)]
    assert engine.streams[-1].interventions == refs
    assert response.headers["x-intervention"] == ", ".join(ref for ref, _ in refs)


async def test_chat_uses_the_interventions_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/v1/chat/completions", json=chat(model="pirate"))
    assert bytes(engine.streams[-1].prompt) == b"Q: Hi A:"
    await client.post("/v1/chat/completions", json=chat(model="emoji"))
    assert bytes(engine.streams[-1].prompt) == b"<user>Hi"


async def test_text_parts_and_developer_role(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    await client.post("/v1/chat/completions", json=chat(messages=messages))
    assert bytes(engine.streams[-1].prompt) == b"<system>x<user>ab"


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(
        "/v1/completions",
        json=completion(
            temperature=0.5,
            top_p=0.9,
            top_k=-1,
            min_p=0.1,
            seed=7,
            stop="x",
            stop_token_ids=[9],
            logit_bias={"5": -100},
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            min_tokens=2,
            ignore_eos=True,
        ),
    )
    sampling = engine.streams[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_p, sampling.seed, sampling.stop) == (0.1, 7, ("x",))
    assert (sampling.stop_token_ids, sampling.logit_bias) == ((9,), {5: -100})
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.5, 2)
    assert sampling.ignore_eos


def test_official_client(server_url: str) -> None:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(
            model="emoji", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
        assert whole.choices[0].message.content == "abc"
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            extra_body={"interventions": [{"name": "emoji"}]},
        )
        *chunks, last = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abc"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert last.usage is not None
        assert last.usage.completion_tokens == 3
        text = client.completions.create(model="tiny", prompt="Hi", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in text) == "abc"
        with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
            client.completions.create(model="nobody", prompt="Hi")
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "emoji", "formal", "pirate"]
        assert client.models.retrieve("emoji").id == "emoji"


def test_official_client_sees_a_late_failure(server_url: str, engine: FakeEngine) -> None:
    engine.fail_after = 2
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="Hi", stream=True)
        assert next(stream).choices[0].text == "a"
        assert next(stream).choices[0].text == "b"
        with pytest.raises(openai.APIError, match="failed to answer"):
            next(stream)
