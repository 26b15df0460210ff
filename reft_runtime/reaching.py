"""What is said where a server cannot be reached, or refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from reft_runtime.errors import ConfigError, InvalidRequest, NotFound

_UNKNOWN = "not_found", "model_not_found"
"""Codes of the server's own 404 for a name that it does not have."""

_TYPES = "application/json", "text/event-stream", "application/octet-stream"
"""What the server's answers to `reft` and to clients are."""


class NotServed(NotFound):
    """The server has no such intervention or version."""


class Unreachable(ConfigError):
    """No server answers at this address."""


class KeyRefused(ConfigError):
    """The server wants a valid key."""


def shown_address(url: httpx.URL | str) -> str:
    """A server's URL as messages may show it: without user, password, query and fragment.

    One that is no valid URL, as with an @ in its password, may lose more.
    """
    text = str(url)
    scheme, mark, rest = text.partition("://") if "://" in text else ("", "", text)
    return f"{scheme}{mark}{re.split('[?#]', rest.rpartition('@')[2])[0]}".rstrip("/")


def why_unreachable(error: Exception, url: httpx.URL | str) -> str:
    """What an error of httpx says; of a URL with a password, that it is not valid, no more."""
    if isinstance(error, httpx.InvalidURL) and "@" in str(url):
        return "it is no valid URL; in a user or password write /, ?, # and @ percent-encoded"
    return str(error) or type(error).__name__


def checked(response: httpx.Response) -> httpx.Response:
    """Return an answer that is no refusal.

    Raises `NotServed` for a name that the server does not have, and `ConfigError` for every other
    refusal, and for what no reft-server answers.
    """
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    if response.is_success and kind in _TYPES:
        return response
    if response.is_success:
        raise _elsewhere(f"with {kind or 'nothing that could be read'}.")
    message = reason_of(response)
    if response.status_code == httpx.codes.NOT_FOUND:
        if _code_of(response) in _UNKNOWN:
            raise NotServed(message)
        raise _elsewhere(f"404: {message}")
    if response.status_code == httpx.codes.UNAUTHORIZED:
        server = f"{response.url.scheme}://{response.url.netloc.decode()}"
        raise KeyRefused(
            f"api_key: {server} needs a valid key; give it as --api-key or REFT_API_KEY.",
            param="api_key",
        )
    if response.status_code == httpx.codes.FORBIDDEN:
        raise ConfigError(f"api_key: this key may not do that. {message}", param="api_key")
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise ConfigError(f"api_key: {message}", param="api_key")
    raise ConfigError(f"the server answered {response.status_code}: {message}", param="url")


def _elsewhere(answer: str) -> ConfigError:
    return ConfigError(
        f"url: no reft-server is there, or one of another version: it answered {answer}",
        param="url",
    )


def reason_of(response: httpx.Response) -> str:
    """The reason that a refusal gives, on one line."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        page = "html" in response.headers.get("content-type", "")
        text = "" if page else " ".join(response.text[:200].split())
        return text or response.reason_phrase


def _code_of(response: httpx.Response) -> object:
    try:
        return response.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def reaching(url: httpx.URL | str) -> Iterator[None]:
    """Raise `Unreachable` if the server at `url` cannot be reached within the block.

    What cannot be sent, because it is no text, raises `InvalidRequest`.
    """
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest("What was given is not UTF-8, and cannot be sent.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(
            f"url: no answer from {shown_address(url)}: {why_unreachable(error, url)}."
            " `reft serve` starts a server; --url says where one is.",
            param="url",
        ) from None
