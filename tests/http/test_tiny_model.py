"""The same routes on the real engine, with a tiny random model: where the two meet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine, SamplingParams
from reft_runtime.interventions import Intervention, parse, serialise
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import file_bytes


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer(), max_queued=4, max_running=4) as engine:
        engine.registry.put("task", make_file(engine))
        yield engine


def make_file(engine: Engine, seed: int = 0) -> bytes:
    """An intervention that fits the engine's model."""
    return file_bytes(seed, base=engine.registry.base)


@pytest.fixture
async def http(tiny_engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(tiny_engine, Settings())) as client:
        yield client
    tiny_engine.check_integrity()
    assert tiny_engine.stats().running == 0
    assert all(entry.in_flight == 0 for entry in tiny_engine.registry.entries())


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "you and the", "max_tokens": 12, "temperature": 0, **fields}


@pytest.fixture
def base(tiny_engine: Engine) -> str:
    return tiny_engine.info.model


@pytest.mark.parametrize("echo", [False, True])
async def test_stream_and_whole_agree(http: httpx.AsyncClient, base: str, echo: bool) -> None:
    for model in (base, "task"):
        asked = body(model=model, echo=echo, logprobs=2, n=2, prompt=["you", "is it on?"])
        whole = (await http.post("/v1/completions", json=asked)).json()
        response = await http.post("/v1/completions", json={**asked, "stream": True})
        merged: list[dict[str, Any]] = [
            {"text": "", "tokens": [], "token_logprobs": [], "text_offset": []} for _ in range(4)
        ]
        for line in response.text.split("\n\n")[:-2]:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                got = merged[choice["index"]]
                got["text"] += choice["text"]
                for key in ("tokens", "token_logprobs", "text_offset"):
                    got[key] += choice["logprobs"][key]
        for choice, got in zip(whole["choices"], merged, strict=True):
            assert got["text"] == choice["text"]
            assert got["tokens"] == choice["logprobs"]["tokens"]
            assert got["text_offset"] == choice["logprobs"]["text_offset"]
            expected = choice["logprobs"]["token_logprobs"]
            assert [v is None for v in got["token_logprobs"]] == [v is None for v in expected]
            numbers = [v for v in expected if v is not None]
            got_numbers = [v for v in got["token_logprobs"] if v is not None]
            assert got_numbers == pytest.approx(numbers, abs=1e-4)


async def test_echo_alone_scores_the_prompt(http: httpx.AsyncClient, base: str) -> None:
    asked = body(model=base, echo=True, logprobs=0, max_tokens=0)
    answer = (await http.post("/v1/completions", json=asked)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("you and the", "length")
    assert "".join(choice["logprobs"]["tokens"]) == "you and the"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ("a\u65e5b\U0001f600\u672c", None, [0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4]),
        ([64, 2, 65], "ab", [0, 1, 1]),
        ("a<|im_end|>b", None, [0, 1, 11]),
        ([2, 1], "", [0, 0]),
    ],
)
async def test_offsets_count_the_text(
    http: httpx.AsyncClient,
    base: str,
    prompt: Any,
    text: str | None,
    offsets: list[int],
    stream: bool,
) -> None:
    """Characters of what is shown: not of a token's name, nor of its bytes written out."""
    if isinstance(prompt, list):
        names = [tiny_tokenizer().encode(letter)[0] for letter in "ab"]
        prompt = [{64: names[0], 65: names[1]}.get(token, token) for token in prompt]
    text = prompt if text is None else text
    asked = body(model=base, prompt=prompt, echo=True, logprobs=0, max_tokens=1, stream=stream)
    # A token whose text is known: " the".
    (the,) = tiny_tokenizer().encode(" the")
    asked["logit_bias"] = {str(the): 100}
    response = await http.post("/v1/completions", json=asked)
    if stream:
        first = response.text.split("\n\n")[0]
        choice = json.loads(first.removeprefix("data: "))["choices"][0]
    else:
        choice = response.json()["choices"][0]
    assert choice["text"] == text + " the"
    assert choice["logprobs"]["text_offset"] == [*offsets, len(text)]
    assert len(choice["logprobs"]["tokens"]) == len(offsets) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_what_ends_an_answer_is_no_part_of_its_text(
    http: httpx.AsyncClient, base: str, include: bool, stream: bool
) -> None:
    (the,) = tiny_tokenizer().encode(" the")
    common = {"logit_bias": {str(the): 100}, "return_token_ids": True, "stream": stream}
    for stop, text in (({"stop_token_ids": [the]}, ""), ({"stop": "th"}, " ")):
        asked = body(model=base, include_stop_str_in_output=include, **common, **stop)
        response = await http.post("/v1/completions", json=asked)
        chunks = (
            [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
            if stream
            else [response.json()]
        )
        choices = [chunk["choices"][0] for chunk in chunks]
        shown = "".join(choice["text"] for choice in choices)
        whole = " the" if "stop_token_ids" in stop else " th"
        assert shown == (whole if include else text)
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["token_ids"] == [the]


@pytest.mark.parametrize("skip", [True, False])
async def test_special_tokens_in_the_text(http: httpx.AsyncClient, base: str, skip: bool) -> None:
    asked = body(model=base, logit_bias={"1": 100}, max_tokens=2, skip_special_tokens=skip)
    asked |= {"echo": True, "prompt": [2], "logprobs": 0}
    choice = (await http.post("/v1/completions", json=asked)).json()["choices"][0]
    names = ["<|im_end|>", "<|im_start|>", "<|im_start|>"]
    assert choice["logprobs"]["tokens"] == names
    assert choice["text"] == ("" if skip else "".join(names))
    assert choice["logprobs"]["text_offset"] == ([0, 0, 0] if skip else [0, 10, 22])


async def test_behind_a_prompt_that_is_too_long_none_is_read(
    http: httpx.AsyncClient, tiny_engine: Engine, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body has room for millions of tokens, which others would have to wait for."""
    encode, read = tiny_engine.tokenizer.encode, list[str]()

    def watched(text: str, **options: Any) -> list[int]:
        read.append(text)
        return encode(text, **options)

    monkeypatch.setattr(tiny_engine.tokenizer, "encode", watched)
    asked = {"model": base, "prompt": ["you", "x" * 300, "y" * 300]}
    response = await http.post("/v1/completions", json=asked)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert read == ["you", "x" * 300]


async def test_detokenize_is_the_inverse_of_tokenize(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "is it?"}]
    asked = {"messages": messages, "return_token_strs": True}
    tokens = (await http.post("/tokenize", json=asked)).json()
    text = (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()["prompt"]
    assert text.startswith("<|im_start|>user\nis it?<|im_end|>")
    again = (await http.post("/tokenize", json={"prompt": text})).json()
    assert again["tokens"] == tokens["tokens"]
    assert tokens["token_strs"][0] == "<|im_start|>"
    plain = {"tokens": tokens["tokens"], "skip_special_tokens": True}
    assert (await http.post("/detokenize", json=plain)).json()["prompt"].startswith("user\nis it?")
    continued = [*messages, {"role": "assistant", "content": "it is"}]
    asked = {"messages": continued, "add_generation_prompt": False, "continue_final_message": True}
    tokens = (await http.post("/tokenize", json=asked)).json()
    text = (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nit is")


async def test_tokenizer_info(http: httpx.AsyncClient) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]


async def test_a_template_that_fails_is_the_requests_fault(
    http: httpx.AsyncClient, base: str, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tiny_engine.tokenizer._tokenizer
    monkeypatch.setattr(inner, "chat_template", "{{ 1 + messages }}")
    messages = [{"role": "user", "content": "Hi"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        response = await http.post(path, json={"model": base, "messages": messages})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "messages"
        assert "chat template does not take them" in error["message"]


async def test_an_intervention_changes_the_answer(http: httpx.AsyncClient, base: str) -> None:
    plain = (await http.post("/v1/completions", json=body(model=base))).json()
    response = await http.post("/v1/completions", json=body(model="task"))
    assert response.json()["choices"][0]["text"] != plain["choices"][0]["text"]
    entry = (await http.get("/v1/interventions/task")).json()
    assert response.headers["x-intervention"] == f"task@{entry['digest']}"
    off = body(model=base, interventions=[{"name": "task", "strength": 0}])
    answer = (await http.post("/v1/completions", json=off)).json()
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]


async def test_chat(http: httpx.AsyncClient, base: str) -> None:
    messages = [{"role": "developer", "content": "on"}, {"role": "user", "content": "is it?"}]
    asked = {"model": base, "messages": messages, "max_tokens": 5, "logprobs": True}
    answer = (await http.post("/v1/chat/completions", json={**asked, "top_logprobs": 3})).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    count = (await http.post("/tokenize", json={"messages": messages})).json()["count"]
    assert answer["usage"]["prompt_tokens"] == count


async def test_a_repeated_prompt_is_reused(
    http: httpx.AsyncClient, base: str, tiny_engine: Engine
) -> None:
    words = [5 + i for i in range(40)]
    cached, texts = [], []
    for stream in (False, False, True):
        asked = body(model=base, prompt=[words, words[:-1]], stream=stream)
        if stream:
            asked["stream_options"] = {"include_usage": True}
        text = (await http.post("/v1/completions", json=asked)).text
        if stream:
            answer = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
        else:
            answer = json.loads(text)
            texts.append([choice["text"] for choice in answer["choices"]])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [32, 64, 64]
    assert texts[0] == texts[1]
    stats = tiny_engine.stats().prefix_cache
    assert stats is not None
    lines = (await http.get("/metrics")).text
    assert f'reft:prefix_cache_hits_total{{kind="base"}} {stats.hits["base"]:.1f}\n' in lines


@pytest.mark.parametrize(
    ("system", "answer"), [(None, 200), ("prepend", 200), ("drop", 200), ("refuse", 400)]
)
async def test_a_system_turn_on_a_text_template(
    http: httpx.AsyncClient, tiny_engine: Engine, system: Any, answer: int
) -> None:
    plain = parse(make_file(tiny_engine))
    fields = {"template": "Q: {prompt} A:", "system": system}
    manifest = plain.manifest.model_copy(update=fields)
    tiny_engine.registry.put("text", serialise(Intervention(manifest, plain.tensors)))
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "who"}]
    asked = {"model": "text", "messages": messages, "max_tokens": 1, "return_token_ids": True}
    response = await http.post("/v1/chat/completions", json=asked)
    assert response.status_code == answer, response.text
    counted = await http.post("/tokenize", json={"model": "text", "messages": messages})
    if answer == 400:
        for refused in (response, counted):
            assert refused.json()["error"]["param"] == "messages"
            assert "takes no system turn" in refused.json()["error"]["message"]
        messages = messages[1:]
        response = await http.post("/v1/chat/completions", json={**asked, "messages": messages})
        assert response.status_code == 200
    else:
        text = "Q: who A:" if system == "drop" else "Q: be kind\n\nwho A:"
        tokens = response.json()["prompt_token_ids"]
        assert tiny_engine.tokenizer.decode(tokens) == text
        assert counted.json()["tokens"] == tokens
        library = tiny_engine.generate(
            [[{"role": "system", "content": "be kind"}, messages[1]]],
            SamplingParams(max_tokens=1),
            intervention="text",
            progress=False,
        )
        assert library[0].prompt_tokens == tokens
    tiny_engine.registry.remove("text")


async def test_texts_that_differ_on_system_turns_do_not_go_together(
    http: httpx.AsyncClient, tiny_engine: Engine, base: str
) -> None:
    plain = parse(make_file(tiny_engine))
    for name in ("drop", "refuse"):
        fields = {"template": "{prompt}", "system": name}
        manifest = plain.manifest.model_copy(update=fields)
        tiny_engine.registry.put(name, serialise(Intervention(manifest, plain.tensors)))
    messages = [{"role": "user", "content": "who"}]
    uses = [{"name": "drop"}, {"name": "refuse"}]
    asked = {"model": base, "messages": messages, "interventions": uses, "max_tokens": 1}
    assert (await http.post("/v1/chat/completions", json=asked)).status_code == 200
    asked["messages"] = [{"role": "system", "content": "Be brief."}, *messages]
    response = await http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "interventions"
    for name in ("drop", "refuse"):
        tiny_engine.registry.remove(name)


async def test_upload_replace_and_remove(http: httpx.AsyncClient, tiny_engine: Engine) -> None:
    url = "/v1/interventions/new"
    assert (await http.put(url, content=make_file(tiny_engine, 1))).status_code == 201
    first = (await http.post("/v1/completions", json=body(model="new"))).json()
    digest = (await http.get(url)).json()["digest"]
    assert (await http.put(url, content=make_file(tiny_engine, 2))).status_code == 200
    again = await http.post("/v1/completions", json=body(model=f"new@{digest[:8]}"))
    assert again.json()["choices"] == first["choices"]
    assert (await http.delete(url)).status_code == 200
    assert (await http.post("/v1/completions", json=body(model="new"))).status_code == 404


@pytest.mark.parametrize(
    ("name", "data", "status", "code"),
    [
        ("Bad", b"x", 400, None),
        ("a" * 65, b"x", 400, None),
        ("new", b"", 400, "invalid_file"),
        ("new", b"PK\x03\x04" + b"x" * 100, 400, "invalid_file"),
        ("new", file_bytes(), 409, "wrong_base_model"),
    ],
)
async def test_bad_upload(
    http: httpx.AsyncClient, name: str, data: bytes, status: int, code: str | None
) -> None:
    response = await http.put(f"/v1/interventions/{name}", content=data)
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


async def test_wrong_checksum(http: httpx.AsyncClient, tiny_engine: Engine) -> None:
    headers = {"x-sha256": "0" * 64}
    data = make_file(tiny_engine, 3)
    response = await http.put("/v1/interventions/new", content=data, headers=headers)
    assert response.status_code == 400
    assert "SHA-256" in response.json()["error"]["message"]
    assert (await http.get("/v1/interventions/new")).status_code == 404


async def test_token_ids_of_the_model(http: httpx.AsyncClient, base: str) -> None:
    for prompt in ([320], [[1], [320]], ["a", ""]):
        response = await http.post("/v1/completions", json=body(model=base, prompt=prompt))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"


async def test_more_requests_than_places(http: httpx.AsyncClient, base: str) -> None:
    asked = body(model=base, max_tokens=100, ignore_eos=True)
    posts = [http.post("/v1/completions", json=asked) for _ in range(30)]
    responses = await asyncio.gather(*posts)
    assert {response.status_code for response in responses} <= {200, 503}
    good = [response.json()["choices"][0]["text"] for response in responses if response.is_success]
    assert len(good) >= 4
    assert len(set(good)) == 1
    for response in responses:
        assert ("retry-after" in response.headers) is (response.status_code == 503)


async def test_a_rollback_brings_the_old_answers_back(
    http: httpx.AsyncClient, tiny_engine: Engine
) -> None:
    async def answer(model: str = "versioned") -> str:
        response = await http.post("/v1/completions", json=body(model=model, logprobs=0))
        return json.dumps(response.json()["choices"])

    path = "/v1/interventions/versioned"
    answers = []
    for seed in (1, 2):
        await http.put(path, content=make_file(tiny_engine, seed))
        answers.append(await answer())
    assert answers[0] != answers[1]
    version = tiny_engine.registry.resolve("versioned")
    assert (await http.post(f"{path}/rollback")).status_code == 200
    assert [await answer(), await answer(f"versioned@{version.digest}")] == answers
    file = (await http.get(f"{path}/file")).content
    assert file == make_file(tiny_engine, 1)
    await http.delete(path)


async def test_stats_count_what_the_engine_did(
    http: httpx.AsyncClient, tiny_engine: Engine
) -> None:
    before = (await http.get("/v1/stats")).json()
    usage = (await http.post("/v1/completions", json=body(model="task", n=2))).json()["usage"]
    after = (await http.get("/v1/stats")).json()
    grown = after["generation_tokens"] - before["generation_tokens"]
    assert grown == usage["completion_tokens"]
    assert sum(after["finished"].values()) == sum(before["finished"].values()) + 2
    assert after["tokens_per_second"]["generation"] > 0
    assert after["interventions"]["bytes"] == tiny_engine.registry.held_bytes() > 0
    text = (await http.get("/metrics")).text
    assert f"reft:generation_tokens_total {float(after['generation_tokens'])}\n" in text
