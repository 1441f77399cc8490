"""The node types that the graphs use; at the same time the lesson "how to add a node type".

A node type is a subclass of Node, a table of its fields, and a name in the registry:

    >>> class Shout(Templated):
    ...     fields = {"promptTemplate": Field("text", "what to shout", True)}
    ...     async def exec(self, prepared):
    ...         return prepared["promptTemplate"].upper()
    >>> Registry.add("shout", Shout)

Simple ones first. Importing this reads no environment and does not import openai.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import http.client
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit
from weakref import WeakKeyDictionary

import agentflow
from agentflow import Child, Context, Field, Flow, Node, Park, Permanent, Registry, TryLater
from dotenv import find_dotenv, load_dotenv

# ── 1. Texts ─────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
PARSE = {"parse": Field("parse", "what to make of the answer: text (default), lines or json")}
agentflow.KINDS["texts"] = (
    "an object of strings",
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
)
agentflow.KINDS["parse"] = ("text, lines or json", ("text", "lines", "json").__contains__)


def as_text(value: Any) -> str:
    """A string as it is, any other value as its JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render(template: str, values: Mapping[str, Any], quote: Callable[[Any], str] = as_text) -> str:
    """The template with each {{name}} replaced once: what is put in is never scanned again."""
    if missing := [name for name in NAME.findall(template) if name not in values]:
        raise Permanent(f"{{{{{missing[0]}}}}} has no value in the context; give it as an input")
    return NAME.sub(lambda match: quote(values[match[1]]), template)


class Templated(Node):
    """A node with fields that are templates; its prep gives them rendered, by the field's name."""

    templates: ClassVar[tuple[str, ...]] = ("promptTemplate",)

    def names(self) -> list[str]:
        texts = [self.data.get(field) for field in self.templates]
        return list(dict.fromkeys(NAME.findall(as_text(texts))))

    async def prep(self, ctx: Context) -> Any:
        given = [field for field in self.templates if field in self.data]
        return {field: render(self.data[field], self.values(ctx)) for field in given}

    def parse(self, text: str) -> Any:
        """A text as it is, as the list of its lines without bullets and numbers, or as JSON."""
        if self.data.get("parse", "text") == "text":
            return text
        text = re.sub(r"^```\w*\n(.*?)\n?```$", r"\1", text.strip(), flags=re.DOTALL)
        if self.data["parse"] == "json":
            return agentflow.parse_json(text)
        lines = [re.sub(r"^\s*([-*•]|\d+[.)])\s+", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line]

    def made_up(self) -> Any:
        """The answer in a dry run."""
        text = f"made-up answer of {self.id}"
        like = {"text": text, "lines": [text], "json": {"answer": text}}
        return self.data.get("example", like[self.data.get("parse", "text")])


class Output(Templated):
    """Renders a text, without a model."""

    fields: ClassVar[dict[str, Field]] = {
        "promptTemplate": Field("text", "the text, with {{name}} for each input", True),
        "outputKey": Field("id", "the context key of the text (final_output)"),
        "returnAction": Field("text", "the action that it answers (default)"),
    }

    def writes(self) -> set[str]:
        return {str(self.data.get("outputKey", "final_output"))}

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        for key in self.writes():
            ctx[key] = result["promptTemplate"]
        return str(self.data.get("returnAction", "default"))

    def check(self) -> Iterator[tuple[str, str]]:
        if self.data.get("returnAction", "default") not in {"default", *self.actions}:
            yield ".returnAction", "is on none of its edges; give one of them that action"


# ── 2. Choices ───────────────────────────────────────────────────────────────────────────────

OTHERWISE = {"otherwise": Field("text", "the action where no edge carries the answer")}
LIMIT = OTHERWISE | {"limit": Field("count", "past so many visits, take otherwise unasked")}


class Choice(Node):
    """A node whose answer chooses an action; its labels are the actions on its edges."""

    spoken: ClassVar[bool] = True  # whether the answer is a model's or a person's

    def labels(self) -> list[str]:
        """The answers that it can give."""
        return [action for action in self.actions if action not in ("default", "error")]

    def match(self, answer: Any) -> str | None:
        """The label that an answer is; a spoken one give or take case, quotes and punctuation
        around it. Never a part of it: "untrue" is not "true"."""
        text = as_text(answer)
        if text in self.labels() or not self.spoken:
            return text if text in self.labels() else None
        plain = {re.sub(r"^[\W_]+|[\W_]+$", "", la).casefold(): la for la in self.labels()}
        return plain.get(re.sub(r"^[\W_]+|[\W_]+$", "", text).casefold())

    def past_limit(self, ctx: Context) -> bool:
        """Whether it is to take `otherwise` without asking."""
        return ctx.visit > int(self.data.get("limit", ctx.visit))

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        label = self.match(result)
        ctx[self.id] = result if label is None else label
        if label in self.actions:
            return str(label)
        if "otherwise" in self.data or "default" in self.actions or not self.labels():
            return str(self.data.get("otherwise", "default"))
        raise ValueError(f"its answer {as_text(result)!r:.200} is on none of its edges")

    def check(self) -> Iterator[tuple[str, str]]:
        labels = {*self.labels()}
        if not labels or not ("default" in self.actions or labels <= {*self.actions}):
            yield "", "needs an edge for each answer, with the answer as its action"
        if "limit" in self.data and "otherwise" not in self.data:
            yield ".limit", 'needs "otherwise", the action to take past it'


class Switch(Choice):
    """Takes a value for its action, without a model."""

    fields = LIMIT
    spoken = False

    def names(self) -> list[str]:
        return ["value"]

    async def prep(self, ctx: Context) -> Any:
        values = self.values(ctx)
        if "value" not in values:
            raise Permanent('its input "value" has no value in the context')
        return self.data["otherwise"] if self.past_limit(ctx) else values["value"]


# ── 3. Other flows and people ────────────────────────────────────────────────────────────────
# These park: prep returns what it waits for, and is called again when ctx.results holds it.

FLOW = {"workflowId": Field("id", "the flow to run", True)}


class SubWorkflow(Node):
    """Runs another flow. Without inputs, this takes by name what it declares or needs."""

    fields = FLOW | {"outputs": Field("texts", "parent key: child key (id: final_output)")}

    @functools.cached_property
    def by_name(self) -> set[str]:
        """The keys that the child takes by name."""
        graph = self.flow.registry.graphs.get(str(self.data["workflowId"]))
        if (
            "inputs" in self.data
            or not isinstance(graph, dict)
            or any(agentflow.check_parts(graph))
        ):
            return set()
        child = Flow("", graph, self.flow.registry)  # unchecked: it may run this one
        return child.needs | child.inputs.keys()

    def values(self, ctx: Context) -> dict[str, Any]:
        return {k: ctx[k] for k in self.by_name & ctx.snapshot.keys()} | super().values(ctx)

    def reads(self) -> set[str]:
        return super().reads() | self.by_name

    def writes(self) -> set[str]:
        return set(self.data.get("outputs", {self.id}))

    def runs(self) -> dict[str, bool]:
        return {str(self.data["workflowId"]): True}

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        gives = [*self.data["outputs"].values()] if "outputs" in self.data else None
        return Park([Child(child, self.values(ctx), gives) for child in self.runs()])

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str | None:
        if "outputs" not in self.data:
            ctx[self.id] = result
        for key, child_key in self.data.get("outputs", {}).items():
            if child_key in result:  # a branch of the child that was not taken wrote nothing
                ctx[key] = result[child_key]
        return None


class Map(SubWorkflow):
    """Runs another flow for each item of a list, all at the same time."""

    fields = FLOW | {
        "over": Field("text", "the context key of the list, or a path to it", True),
        "as": Field("id", "the child key of the item", True),
    }

    def __init__(self, flow: Flow, spec: Mapping[str, Any], actions: list[str]) -> None:
        super().__init__(flow, spec, actions)
        self.inputs[str(self.data["as"])] = [self.data["over"]]

    def runs(self) -> dict[str, bool]:
        return {str(self.data["workflowId"]): False}  # not for an empty list

    async def prep(self, ctx: Context) -> Any:
        name, values = str(self.data["as"]), self.values(ctx)
        if not isinstance(items := values.get(name), list):
            raise Permanent(f'"{self.data["over"]}" must be a list, not {as_text(items):.80}')
        if ctx.results is not None or not items:
            return ctx.results or []
        return Park([Child(child, values | {name: i}) for i in items for child in self.runs()])


class Wait(Templated, Choice):
    """Asks a person; the answer is its result and, where an edge carries it, its action."""

    fields = OTHERWISE | {"question": Field("text", "with {{name}} for each input", True)}
    templates = ("question",)

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        question = (await super().prep(ctx))["question"]
        if ctx.dry_run:
            return self.data.get("example", [*self.labels(), "made-up answer"][0])
        return Park(question=question)

    def check(self) -> Iterator[tuple[str, str]]:
        yield from ()  # without labels the answer is only kept


# ── 4. Models ────────────────────────────────────────────────────────────────────────────────
# Any server that speaks OpenAI's chat completions. The engine retries, so the client does not.

OPENAI, MODEL = "https://api.openai.com/v1", "gpt-5.6-luna"
NO_KEY = "no key for the model: set OPENAI_API_KEY, in .env for instance, or use --dry-run"
HINTS = {
    401: "the key is refused; set OPENAI_API_KEY to a valid one",
    403: "the key may not use this model; set OPENAI_MODEL to another",
    404: "no such model or address; set OPENAI_MODEL, and look at OPENAI_BASE_URL",
}
PROMPT = {
    "promptTemplate": Field("text", "the prompt, with {{name}} for each input", True),
    "system": Field("text", "the system message, a template too"),
    "options": Field("object", "more for the chat-completions call: temperature, ..."),
}
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()


def settings() -> tuple[str, str, str]:
    """The model, its base URL and the key, from the environment and .env (here or above)."""
    load_dotenv(find_dotenv(usecwd=True))
    url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or ("" if url == OPENAI else "unused")
    return os.environ.get("OPENAI_MODEL") or MODEL, url, key


def model_status() -> str:
    """Which model will be asked, where, and whether a key is missing; without any secret."""
    model, url, key = settings()
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"model {model} at {shown}" + ("" if key else f"; {NO_KEY}")


def status_error(status: int, text: str, headers: Mapping[str, str]) -> Exception:
    """What to raise for an HTTP status that is no success."""
    if status in (429, 503):
        after = re.fullmatch(r"\d{1,9}(\.\d+)?", headers.get("Retry-After") or "")
        return TryLater(text, float(after[0]) if after else None)
    return RuntimeError(text) if status in (408, 425) or status >= 500 else Permanent(text)


def refused(error: BaseException | None) -> bool:
    """Whether, somewhere in the chain of causes, a connection was refused."""
    if error is None or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return error is not None
    return any(
        map(refused, (error.__cause__ or error.__context__, *getattr(error, "exceptions", ())))
    )


def model_error(error: Any, key: str) -> Exception:
    """What to raise for an error of the client: short, and without the key."""
    status = getattr(error, "status_code", 0)
    said = HINTS.get(status) or " ".join(error.message.replace(key, "(key)").split())
    text = f"the model's server: {said:.300}"
    if not status:
        return TryLater(f"{text} (refused)") if refused(error) else ConnectionError(text)
    if "insufficient_quota" in (error.code, error.type):
        return Permanent(text)
    return status_error(status, text, error.response.headers)


class Process(Templated):
    """Asks a model."""

    fields = PROMPT | PARSE
    templates = ("system", "promptTemplate")

    async def prep(self, ctx: Context) -> Any:
        texts = await super().prep(ctx)
        roles = {"system": "system", "promptTemplate": "user"}
        messages = [{"role": roles[field], "content": text} for field, text in texts.items()]
        return messages, ctx.usage

    async def ask(self, messages: list[dict[str, str]], usage: dict[str, int]) -> str:
        """The model's answer; its tokens are added to the usage, in failed attempts too."""
        model, url, key = settings()
        if not key:
            raise Permanent(NO_KEY)
        openai = await asyncio.to_thread(importlib.import_module, "openai")
        loop = asyncio.get_running_loop()
        if loop not in _clients:  # its connections belong to the loop
            _clients[loop] = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0)
        call = {"model": model, "messages": messages, "timeout": self.timeout}
        create = _clients[loop].chat.completions.create
        try:
            answer = await create(**call, extra_body=self.data.get("options"))
        except openai.APIError as error:
            raise model_error(error, key) from None
        for kind in ("prompt_tokens", "completion_tokens"):
            count = getattr(getattr(answer, "usage", None), kind, None) or 0
            usage[kind] = usage.get(kind, 0) + count
        try:
            text = str(answer.choices[0].message.content.strip())
        except (AttributeError, IndexError, TypeError):
            text = ""
        if not text:
            raise ValueError("the model's server sent no answer")
        return text

    async def exec(self, prepared: Any) -> Any:
        return self.parse(await self.ask(*prepared))

    async def rehearse(self, prepared: Any) -> Any:
        return self.made_up()


class Router(Process, Choice):
    """Lets a model choose one of the labels on its edges."""

    fields = PROMPT | LIMIT

    async def prep(self, ctx: Context) -> Any:
        return self.data["otherwise"] if self.past_limit(ctx) else await super().prep(ctx)

    async def exec(self, prepared: Any) -> Any:
        if isinstance(prepared, str):
            return prepared
        messages, usage = prepared
        answer = await self.ask(messages, usage)
        if self.match(answer):
            return answer
        again = f"Answer with one of these and nothing else: {', '.join(self.labels())}"
        said = [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
        return await self.ask(messages + said, usage)

    async def rehearse(self, prepared: Any) -> Any:
        made_up = self.data.get("example", self.labels()[0])
        return prepared if isinstance(prepared, str) else made_up


class Condition(Router):
    """Lets a model say whether something is true or false."""

    fields = PROMPT

    def labels(self) -> list[str]:
        return ["true", "false"]


# ── 5. HTTP ──────────────────────────────────────────────────────────────────────────────────
# On asyncio's streams: unlike a call in a thread it really ends when the node's time is up.

MAX_BODY = 1024 * 1024  # bytes
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
agentflow.KINDS["method"] = (f"one of {', '.join(METHODS)}", METHODS.__contains__)


class HttpRequest(Templated):
    """Calls an API; follows no redirects. Other than GET, it sends the job as Idempotency-Key."""

    fields = PARSE | {
        "url": Field("text", "a template; values are URL-encoded", True),
        "method": Field("method", f"{', '.join(METHODS)} (GET)"),
        "headers": Field("texts", "templates, by the header's name"),
        "body": Field("text", "a template of JSON; values are JSON-encoded"),
    }
    templates = ("url", "headers", "body")

    async def prep(self, ctx: Context) -> Any:
        values, method = self.values(ctx), self.data.get("method", "GET")
        url = render(self.data["url"], values, lambda value: quote(as_text(value), safe=""))
        body = render(self.data.get("body", ""), values, json.dumps).encode()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise Permanent("its url must be like http://host/path or https://host/path")
        headers = {"User-Agent": "agentflow", "Content-Type": "application/json"}
        headers |= {} if method == "GET" else {"Idempotency-Key": ctx.job}
        for name, template in self.data.get("headers", {}).items():
            headers[name.title()] = render(template, values)
        headers |= {"Host": parts.netloc, "Connection": "close", "Content-Length": str(len(body))}
        path = url.partition(parts.netloc)[2].partition("#")[0]
        head = [f"{method} {path if path[:1] == '/' else '/' + path} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        if not all(line.isascii() and line.isprintable() for line in head):
            raise Permanent("its url and headers must be of printable ASCII characters")
        return parts, "\r\n".join([*head, "", ""]).encode() + body

    async def exec(self, prepared: Any) -> Any:
        parts, request = prepared
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls or None)
        except OSError as error:
            raise TryLater(f"{parts.netloc} refuses to connect") if refused(error) else error
        try:
            writer.write(request)
            await reader.readexactly(MAX_BODY)
            raise Permanent(f"the response of {parts.netloc} has more than {MAX_BODY} bytes")
        except asyncio.IncompleteReadError as end:
            raw = end.partial
        finally:
            writer.transport.abort()
        as_socket: Any = SimpleNamespace(makefile=lambda mode: io.BytesIO(raw))
        response: Any = http.client.HTTPResponse(as_socket)
        response.begin()
        text = response.read().decode(response.headers.get_content_charset("utf-8"), "replace")
        if response.status >= 300:
            said = f"{parts.netloc} answered with {response.status} {response.reason:.80}"
            raise status_error(response.status, said, response.headers)
        return self.parse(text)

    async def rehearse(self, prepared: Any) -> Any:
        return self.made_up()


Registry.add("sub-workflow", SubWorkflow)
Registry.add("map", Map)
Registry.add("wait", Wait)
Registry.add("llm-process", Process)
Registry.add("llm-condition", Condition)
Registry.add("llm-router", Router)
Registry.add("switch", Switch)
Registry.add("http-request", HttpRequest)
Registry.add("output", Output)
