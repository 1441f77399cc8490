"""Calls to the world outside: HTTP, and models behind the chat-completions protocol.

The engine retries, and ends what takes too long by cancelling it, so the clients here do neither.
They say which errors can pass (TryLater) and which cannot (Permanent). Importing this reads no
environment and does not import openai.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import re
from typing import Any
from urllib.parse import urlsplit

from dotenv import find_dotenv, load_dotenv

from agentflow import MAX_VALUE, Permanent, TryLater

OPENAI, MODEL = "https://api.openai.com/v1", "gpt-5.6-luna"
NO_KEY = "no key for the model: set OPENAI_API_KEY, in .env for instance, or use --dry-run"
HINTS = {
    401: "; is OPENAI_API_KEY right?",
    404: "; is OPENAI_BASE_URL right (most end in /v1), and OPENAI_MODEL a model there?",
}


@functools.cache
def libraries() -> tuple[Any, Any, Any]:
    """openai, the httpx2 that it brings, and TLS settings: a second's work, so done once."""
    httpx2 = importlib.import_module("httpx2")
    return importlib.import_module("openai"), httpx2, httpx2.create_ssl_context()


async def connect() -> tuple[Any, Any, Any]:
    """openai, httpx2 and an HTTP client for one call, so that no cookie gets into another."""
    openai, httpx2, tls = await asyncio.to_thread(libraries)
    client = openai.DefaultAsyncHttpxClient(verify=tls, timeout=None, follow_redirects=False)
    return openai, httpx2, client


def refused(error: BaseException) -> bool:
    """Whether a connection was refused, somewhere in the chain of causes."""
    causes = [error.__cause__ or error.__context__, *getattr(error, "exceptions", ())]
    return isinstance(error, ConnectionRefusedError) or any(refused(c) for c in causes if c)


def problem(error: Any, text: str) -> Exception:
    """What to raise for an error of httpx2 or openai: it says whether trying again can help."""
    response = getattr(error, "response", None)
    if response is None:
        return TryLater(f"{text} (refused)") if refused(error) else ConnectionError(text)
    if getattr(error, "code", "") == "insufficient_quota":  # a 429 that does not pass
        return Permanent(text)
    if response.status_code in (429, 503):
        after = response.headers.get("Retry-After", "")
        if after.isdecimal():
            return TryLater(f"{text} (Retry-After: {after} seconds)", float(after))
        return TryLater(text)
    return RuntimeError(text) if response.status_code >= 500 else Permanent(text)


def settings() -> tuple[str, str, str]:
    """The model, its base URL and the key, from the environment and .env (here or above)."""
    load_dotenv(find_dotenv(usecwd=True))
    url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or ("" if url == OPENAI else "unused")
    return os.environ.get("OPENAI_MODEL") or MODEL, url, key


def model_status() -> str:
    """Which model will be asked, where, and whether a key is missing; without any secret."""
    model, url, key = settings()
    shown = re.sub(r"^(\w+://)?.*@", r"\1", url.partition("?")[0])
    return f"model {model} at {shown}" + ("" if key else f"; {NO_KEY}")


async def fetch(request: dict[str, Any]) -> str:
    """The text that an HTTP request gets: `method`, `url`, `headers` and `content`."""
    try:
        parts = urlsplit(request["url"])
        host, _ = parts.hostname, parts.port
    except ValueError:  # which the port raises, for instance; its text may hold a password
        raise Permanent("that is not the URL of a server: see its host and its port") from None
    text = ""
    _, httpx2, client = await connect()
    try:
        async with client, client.stream(**request) as response:
            response.raise_for_status()
            async for chunk in response.aiter_text():
                text += chunk
                if len(text) > MAX_VALUE:
                    raise Permanent(f"{host} answers with more than 1 MiB")
    except httpx2.HTTPError as error:
        raise problem(error, f"{host}: {str(error).partition(' for url')[0]}") from None
    return text


async def complete(
    messages: list[dict[str, str]], options: dict[str, Any] | None, usage: dict[str, int]
) -> str:
    """A model's answer; its tokens are added to the usage, in attempts that fail, too."""
    model, url, key = settings()
    if not key:
        raise Permanent(NO_KEY)
    if not key.isascii():
        raise Permanent("OPENAI_API_KEY has characters that no key has; is it copied well?")
    openai, _, client = await connect()
    server = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=client)
    try:
        async with server:
            answer = await server.chat.completions.create(
                model=model, messages=messages, extra_body=options
            )
    except (openai.APIError, ValueError) as error:
        said = " ".join(f"{error} {error.__cause__ or ''}".replace(key, "***").split())
        hint = HINTS.get(getattr(error, "status_code", 0), "")
        raise problem(error, f"{model_status()}: {said:.300}{hint}") from None
    for kind in ("prompt_tokens", "completion_tokens"):
        count = getattr(getattr(answer, "usage", None), kind, None)
        usage[kind] = usage.get(kind, 0) + (count if type(count) is int else 0)
    choices = getattr(answer, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(first, "message", None), "content", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{model_status()}: it sent no answer")
    return text.strip()
