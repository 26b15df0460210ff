"""A client of a running server: lists what it serves, uploads files and asks questions."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import httpx

from reft_runtime.apart import run_apart
from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.interventions.format.identity import is_whole
from reft_runtime.interventions.registry.paging import MAX_PAGE
from reft_runtime.interventions.registry.sources import NAME_RULE
from reft_runtime.progress import bar
from reft_runtime.reaching import NotServed, checked, reaching, reason_of, shown_address
from reft_runtime.sampling import MAX_CHOICES

if TYPE_CHECKING:
    from reft_runtime.interventions import Manifest

CONCURRENCY = 32
"""At most this many requests are under way at once; the server batches them."""

MOST_INPUTS = MAX_CHOICES
"""A server classifies at most so many texts in one request."""

SECONDS = 600.0

PART_BYTES = 1 << 16
"""Bytes of one part of an upload; progress is reported after each part."""

SECONDS_TO_REFUSE = 30.0
"""Seconds within which a server must say whether it would take a file."""

_NEVER = f'"{"0" * 64}"'
"""An ETag that no version has: no file has this digest."""

Body = dict[str, Any]
Asked = str | Sequence[Mapping[str, str]]
"""A text, or a chat's messages."""

Counted = Callable[[int], object]
"""A function that gets the number of bytes sent since its last call."""

Change = Literal["added", "replaced", "unchanged"]
"""What an upload did to a name: it is new, got another file, or has the same file as before."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: a text or a chat's messages, to the base model (None) or an intervention."""

    asked: Asked
    intervention: str | None
    max_tokens: int
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text, and whether it ended by itself instead of at its length limit."""

    text: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """The probabilities of the labels of one text, by label in their order."""

    probs: Mapping[str, float]

    @property
    def label(self) -> str:
        """The likeliest label; the first of several that are equally likely."""
        return max(self.probs, key=lambda label: self.probs[label])


@dataclass(frozen=True, slots=True)
class Server:
    """A reft server at `url`, such as http://127.0.0.1:8000.

    All methods raise `Unreachable` if no server answers, `NotServed` for what the server does not
    have, and `ConfigError` for what it refuses.
    """

    url: str
    api_key: str | None = None

    def __repr__(self) -> str:
        """Without what may be secret."""
        return f"Server({self.shown!r})"

    @property
    def root(self) -> str:
        """The address that all routes begin with: `url` without a `/v1` at its end."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def shown(self) -> str:
        """The address as messages may show it: without user, password, query and fragment."""
        return shown_address(self.root)

    def refusal(self, name: str, data: bytes) -> str | None:
        """Why the server would refuse a file under a name; None if it would take it.

        The file is sent with a condition that is never true: that the name stands for a version
        that cannot exist. So the server checks the key, the name and the file. If all are well, it
        answers that the condition does not hold, and changes nothing. Raises `httpx.HTTPError` if
        no answer comes.
        """
        with self._client() as client:
            response = client.put(
                _path(name),
                content=data,
                headers={"if-match": _NEVER},
                timeout=SECONDS_TO_REFUSE,
            )
        if response.status_code == httpx.codes.PRECONDITION_FAILED:
            return None
        return f"it answered {response.status_code}: {reason_of(response)}"

    def upload(self, name: str, data: bytes, sent: Counted = lambda _: None) -> tuple[Body, Change]:
        """Put a file's bytes on the server under a name; return its entry and what that changed."""

        def parts() -> Iterator[bytes]:
            for start in range(0, len(data), PART_BYTES):
                part = data[start : start + PART_BYTES]
                yield part
                sent(len(part))

        try:
            before = self.entry(name)["digest"]
        except NotServed:
            before = None
        headers = {
            "content-length": str(len(data)),
            "x-sha256": hashlib.sha256(data).hexdigest(),
        }
        response = self._call("PUT", _path(name), content=parts(), headers=headers)
        entry: Body = response.json()
        if response.status_code == httpx.codes.CREATED:
            return entry, "added"
        return entry, "unchanged" if entry["digest"] == before else "replaced"

    def download(self, reference: str) -> tuple[bytes, str]:
        """The file of NAME or NAME@DIGEST, and its digest.

        Raises `ConfigError` if it does not arrive whole.
        """
        response = self._call("GET", f"{_path(reference, version=True)}/file")
        data, digest = response.content, response.headers["etag"].strip('"')
        if not is_whole(data, digest):
            raise ConfigError(f"the file of {reference} was damaged on its way; try again.")
        return data, digest

    def listing(self, query: str = "", sort: str = "name") -> Iterator[Body]:
        """All interventions whose name or description contains `query`, fetched page by page."""
        asked: dict[str, str | int] = {"limit": MAX_PAGE, "q": query, "sort": sort}
        while True:
            page = self._call("GET", "/v1/interventions", params=asked).json()
            yield from page["data"]
            if page["next"] is None:
                return
            asked["after"] = page["next"]

    def entry(self, name: str) -> Body:
        """What a server says of one intervention."""
        found: Body = self._call("GET", _path(name)).json()
        return found

    def versions(self, name: str) -> list[Body]:
        """All versions of an intervention that can be asked for."""
        found: list[Body] = self._call("GET", f"{_path(name)}/versions").json()["data"]
        return found

    def remove(self, name: str) -> Body:
        """Remove an intervention, so that the server no longer serves it; return the answer."""
        removed: Body = self._call("DELETE", _path(name)).json()
        return removed

    def rollback(self, name: str, digest: str | None) -> Body:
        """Serve a kept version again, by default the previous one; return its entry."""
        body = {} if digest is None else {"digest": digest}
        found: Body = self._call("POST", f"{_path(name)}/rollback", json=body).json()
        return found

    def pin(self, name: str) -> Body:
        """Keep an intervention's tensors in memory; return its entry."""
        return self._changed(name, "pin")

    def unpin(self, name: str) -> Body:
        """Let an intervention's tensors be evicted again; return its entry."""
        return self._changed(name, "unpin")

    def warm(self, name: str) -> Body:
        """Read an intervention's tensors into memory; return its entry."""
        return self._changed(name, "warm")

    def stats(self) -> Body:
        """The server's statistics."""
        found: Body = self._call("GET", "/v1/stats").json()
        return found

    def usage(self, **asked: str) -> Body:
        """What tenants have used, as `GET /v1/usage` answers to these parameters."""
        found: Body = self._call("GET", "/v1/usage", params=asked).json()
        return found

    def me(self) -> Body:
        """Who the key's tenant is, what it may do and use, and the base model."""
        found: Body = self._call("GET", "/v1/me").json()
        return found

    def at_once(self) -> int:
        """How many requests may be under way at once, with regard to the tenant's quota."""
        return min(CONCURRENCY, self.me()["concurrent_requests"] or CONCURRENCY)

    def base_model(self) -> str:
        """The base model's name."""
        return str(self.me()["model"])

    def names(self) -> list[str]:
        """The names of all interventions."""
        _, *names = (model["id"] for model in self._call("GET", "/v1/models").json()["data"])
        return names

    def has_model(self, model: str) -> bool:
        """Whether a request may name this model, such as NAME@DIGEST."""
        try:
            self.check_model(model)
        except NotServed:
            return False
        return True

    def check_model(self, model: str) -> None:
        """Raise `NotServed` if no request may name this model, such as NAME@DIGEST."""
        self._call("GET", f"/v1/models/{_quoted(model)}")

    def answers_at_all(self) -> bool:
        """Whether a server that is alive answers within a second."""
        try:
            return self._call("GET", "/livez", timeout=1.0).is_success
        except ReftError:
            return False

    def manifest(self, name: str) -> Manifest:
        """What the file of an intervention says about itself."""
        from reft_runtime.interventions.format.intervention import validate_manifest  # loads torch

        return validate_manifest(self.entry(name)["manifest"])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        with self._client() as client:
            return [
                _call(client, "POST", "/tokenize", json={"prompt": text}).json()["count"]
                for text in texts
            ]

    def answers(self, questions: Sequence[Question], *, progress: bool) -> list[Answer]:
        """Greedy answers to questions, in their order."""
        base = self.base_model()
        answers = []
        for whole in self.ask([_request(q, base) for q in questions], progress=progress):
            choice = whole["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
            answers.append(Answer(str(text), choice["finish_reason"] == "stop"))
        return answers

    def classify(
        self, asked: Sequence[Asked], labels: Sequence[str] | None, applied: Body
    ) -> list[Labelled]:
        """The labels of texts and chats, in their order; without `labels` those of the files.

        `applied` are the fields of a body that say what is applied: `model`, `interventions`.
        """
        common = applied if labels is None else {**applied, "labels": list(labels)}
        bodies: list[Body] = []
        for one in asked:
            if not isinstance(one, str):
                bodies.append({**common, "messages": list(one)})
            elif bodies and len(bodies[-1].get("input", ())) in range(1, MOST_INPUTS):
                bodies[-1]["input"].append(one)
            else:
                bodies.append({**common, "input": [one]})
        return [
            Labelled(dict(zip(whole["labels"], entry["probs"], strict=True)))
            for whole in self.ask([("/v1/classify", body) for body in bodies])
            for entry in whole["data"]
        ]

    def ask(self, requests: Sequence[tuple[str, Body]], *, progress: bool = False) -> list[Body]:
        """Whole answers to requests, sent together; a request is a path and its body.

        No more are under way than the tenant's quota has room for.

        The answers come in the order of the requests. What ends this early, such as Ctrl-C or a
        refusal, ends the requests that are under way, too.
        """
        at_once = self.at_once() if len(requests) > 1 else 1
        return run_apart(self._ask(requests, at_once, progress=progress))

    async def _ask(
        self, requests: Sequence[tuple[str, Body]], at_once: int, *, progress: bool
    ) -> list[Body]:
        under_way = asyncio.Semaphore(at_once)

        async def answer(path: str, body: Body) -> Body:
            async with under_way:
                with reaching(self.root):
                    whole: Body = checked(await client.post(path, json=body)).json()
                    return whole

        async with self.async_client() as client:
            asked = [asyncio.ensure_future(answer(*request)) for request in requests]
            try:
                return [await one for one in bar(asked, desc="Answers", disable=not progress)]
            finally:
                for one in asked:
                    one.cancel()
                await asyncio.gather(*asked, return_exceptions=True)

    def stream(self, path: str, body: Body) -> Iterator[Body]:
        """The events of a streamed answer; closing the iterator ends the request."""
        with (
            self._client() as client,
            reaching(client.base_url),
            client.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            if not response.is_success:
                response.read()
            for line in checked(response).iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event: Body = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ConfigError(f"the server said: {event['error']['message']}")
                yield event

    def _call(self, method: str, path: str, **content: Any) -> httpx.Response:
        with self._client() as client:
            return _call(client, method, path, **content)

    def _changed(self, name: str, change: str) -> Body:
        found: Body = self._call("POST", f"{_path(name)}/{change}").json()
        return found

    def async_client(self) -> httpx.AsyncClient:
        """A client for an event loop; `reaching` and `checked` name what goes wrong with it."""
        with reaching(self.root):
            return httpx.AsyncClient(**self._connection())

    def _client(self) -> httpx.Client:
        with reaching(self.root):
            return httpx.Client(**self._connection())

    def _connection(self) -> dict[str, Any]:
        if not re.match("https?://[^/]", self.url, re.IGNORECASE):
            meant = "http://HOST:PORT"
            if "://" not in self.url:
                meant = f"it with its scheme, http://{self.shown or 'HOST:PORT'}"
            raise ConfigError(f"url: write {meant}, not {self.shown!r}.", param="url")
        key = self.api_key
        if key is not None and (key == "" or key != key.strip() or not key.isprintable()):
            raise ConfigError(
                "api_key: it is empty, has a space or a line break at an end, or a character that"
                " no header can have.",
                param="api_key",
            )
        headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
        return {"base_url": self.root, "headers": headers, "timeout": SECONDS}


def _path(name: str, *, version: bool = False) -> str:
    """The path of a name or, with `version`, of NAME@DIGEST."""
    own, at, digest = name.partition("@")
    if at and not version:
        raise ConfigError(
            f"name: {name!r} is a version, and this takes a name. `reft show {own}` lists its"
            f" versions, `reft pull {name}` fetches the file of this one, and"
            f" `reft rollback {own} {digest}` serves it.",
            param="name",
        )
    if name in ("", ".", "..") or "/" in name:  # the path of another route, or of none
        raise ConfigError(f"name: {name!r} is no intervention's name: {NAME_RULE}.", param="name")
    return f"/v1/interventions/{_quoted(name)}"


def _quoted(name: str) -> str:
    """A name as part of a path; bytes that are no text, of an argument, are no name's either."""
    return quote(name, safe="@", errors="replace")


def _request(question: Question, base: str) -> tuple[str, Body]:
    body: Body = {
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
    with reaching(client.base_url):
        return checked(client.request(method, path, **content))
