"""A running server as seen by training: put a file on it, and ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from reft_runtime.errors import ConfigError, NotFound
from reft_runtime.interventions.intervention import validate_manifest
from reft_runtime.interventions.manifest import Manifest

CONCURRENCY = 32
"""Requests under way at once; the server batches them."""

SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Question:
    """One request: text or the messages of a chat, to the base model (None) or an intervention."""

    asked: str | Sequence[Mapping[str, str]]
    intervention: str | None
    max_tokens: int
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text, and whether it ended by itself, not because of its length."""

    text: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible reft server at `url`, such as http://127.0.0.1:8000."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def push(self, file: Path, name: str) -> bool:
        """Put a file on the server under a name; True where the name is new."""
        with self._client() as client:
            response = _call(client, "PUT", f"/v1/interventions/{name}", content=file.read_bytes())
        return response.status_code == 201

    def models(self) -> list[str]:
        """The base model's name, then the interventions'."""
        with self._client() as client:
            found = _call(client, "GET", "/v1/models").json()["data"]
        return [model["id"] for model in found]

    def has_model(self, model: str) -> bool:
        """Whether a request may name this model, such as NAME@DIGEST."""
        with self._client() as client:
            try:
                _call(client, "GET", f"/v1/models/{model}")
            except NotFound:
                return False
        return True

    def manifest(self, name: str) -> Manifest:
        """What the file of an intervention says about itself."""
        with self._client() as client:
            found = _call(client, "GET", f"/v1/interventions/{name}").json()
        return validate_manifest(found["manifest"])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens texts have."""
        with self._client() as client:
            return [
                _call(client, "POST", "/tokenize", json={"prompt": text}).json()["count"]
                for text in texts
            ]

    def answers(self, questions: Sequence[Question], *, progress: bool) -> list[Answer]:
        """Greedy answers, in order."""
        base = self.models()[0]
        return asyncio.run(self._answers(questions, base, progress=progress))

    async def _answers(
        self, questions: Sequence[Question], base: str, *, progress: bool
    ) -> list[Answer]:
        limit = asyncio.Semaphore(CONCURRENCY)
        async with httpx.AsyncClient(**self._options()) as client:
            with tqdm(total=len(questions), desc="Answers", disable=not progress) as bar:

                async def answer(question: Question) -> Answer:
                    async with limit:
                        path, body = _request(question, base)
                        try:
                            response = await client.post(path, json=body)
                        except httpx.HTTPError as error:
                            raise _unreachable(client.base_url, error) from None
                    bar.update()
                    choice = _checked(response).json()["choices"][0]
                    text = choice["text"] if "text" in choice else choice["message"]["content"]
                    return Answer(str(text), choice["finish_reason"] == "stop")

                return list(await asyncio.gather(*map(answer, questions)))

    def _client(self) -> httpx.Client:
        return httpx.Client(**self._options())

    def _options(self) -> dict[str, Any]:
        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        url = self.url.rstrip("/").removesuffix("/v1")
        return {"base_url": url, "headers": headers, "timeout": SECONDS}


def _request(question: Question, base: str) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": question.intervention or base,
        "temperature": 0,
        "max_tokens": question.max_tokens,
    }
    if question.strength != 1:
        use = {"name": question.intervention, "strength": question.strength}
        body |= {"model": base, "interventions": [use]}
    if isinstance(question.asked, str):
        return "/v1/completions", {**body, "prompt": question.asked}
    return "/v1/chat/completions", {**body, "messages": list(question.asked)}


def _call(client: httpx.Client, method: str, path: str, **content: Any) -> httpx.Response:
    try:
        return _checked(client.request(method, path, **content))
    except httpx.HTTPError as error:
        raise _unreachable(client.base_url, error) from None


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    kind = NotFound if response.status_code == 404 else ConfigError
    raise kind(f"url: the server answered {response.status_code}: {message}", param="url")


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> ConfigError:
    return ConfigError(f"url: no answer from {url}: {error or type(error).__name__}.", param="url")
