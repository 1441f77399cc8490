"""The node types that the graphs use; at the same time the lesson "how to add a node type".

A node type is a subclass of Node, a table of its fields, and a name in the registry:

    >>> class Shout(Templated):
    ...     fields = {"promptTemplate": Field("text", "what to shout", True)}
    ...     async def exec(self, prepared):
    ...         return prepared["promptTemplate"].upper()
    >>> Registry.add("shout", Shout)

Simple ones first: 1 texts, 2 choices, 3 other flows and people, 4 models, 5 HTTP. Importing this
reads no environment, connects to nothing and does not import openai.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import importlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, urljoin, urlsplit
from weakref import WeakKeyDictionary

from dotenv import find_dotenv, load_dotenv

from agentflow import DEFAULT, ERROR, KINDS, Child, Context, Field, Flow, Node, Park
from agentflow import Permanent, Registry, TryLater, check_parts, parse_json

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
KINDS["method"] = (f"one of {', '.join(METHODS)}", lambda value: value in METHODS)
KINDS["parse"] = ("text, lines or json", lambda value: value in ("text", "lines", "json"))
KINDS["texts"] = (
    "an object of strings",
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
)
KINDS["options"] = (
    "an object, without messages, stream and n, which are up to the node",
    lambda value: isinstance(value, dict) and not value.keys() & {"messages", "stream", "n"},
)

# ── 1. Texts ─────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


def as_text(value: Any) -> str:
    """A string as it is, any other value as its JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render(template: str, values: Mapping[str, Any], quote: Callable[[Any], str] = as_text) -> str:
    """The template with each {{name}} replaced once: what is put in is never scanned again."""
    if missing := [name for name in NAME.findall(template) if name not in values]:
        raise Permanent(f"{{{{{missing[0]}}}}} has no value in the context; give it as an input")
    return NAME.sub(lambda match: quote(values[match[1]]), template)


def parse(text: str, how: str) -> Any:
    """A text as it is, as the list of its lines without bullets and numbers, or as JSON."""
    if how == "text":
        return text
    text = re.sub(r"^```\w*\n(.*?)\n?```$", r"\1", text.strip(), flags=re.DOTALL)
    if how == "json":
        return parse_json(text)
    lines = [re.sub(r"^\s*([-*•]|\d+[.)])\s+", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


class Templated(Node):
    """A node with fields that are templates; its prep gives them rendered, by the field's name."""

    templates: ClassVar[tuple[str, ...]] = ("promptTemplate",)

    def names(self) -> list[str]:
        texts = [self.data.get(field) for field in self.templates]
        return list(dict.fromkeys(NAME.findall(as_text(texts))))

    async def prep(self, ctx: Context) -> Any:
        given = [field for field in self.templates if field in self.data]
        return {field: render(self.data[field], self.values(ctx)) for field in given}


class Output(Templated):
    """Renders a text, without a model."""

    fields = {
        "promptTemplate": Field("text", "the text, with {{name}} for each input", True),
        "outputKey": Field("id", "the context key of the text (final_output)"),
        "returnAction": Field("text", "the action that it answers (default)"),
    }

    def writes(self) -> set[str]:
        return {str(self.data.get("outputKey", "final_output"))}

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        for key in self.writes():
            ctx[key] = result["promptTemplate"]
        return str(self.data.get("returnAction", DEFAULT))


# ── 2. Choices ───────────────────────────────────────────────────────────────────────────────

OTHERWISE = {"otherwise": Field("text", "the action where no edge carries the answer")}
LIMIT = OTHERWISE | {"limit": Field("count", "past so many visits, take otherwise unasked")}


def match_label(answer: Any, labels: list[str], spoken: bool = True) -> str | None:
    """The label that an answer is; one that is spoken, by a model or a person, give or take case,
    quotes and punctuation around it. Never a part of it: "untrue" is not "true"."""

    def plain(text: str) -> str:
        return re.sub(r"^[\W_]+|[\W_]+$", "", text).casefold() or text.strip()

    text = as_text(answer)
    alike = [label for label in labels if label == text or spoken and plain(label) == plain(text)]
    return text if text in alike else next(iter(alike), None)


class Choice(Node):
    """A node whose answer chooses an action; its labels are the actions on its edges."""

    spoken: ClassVar[bool] = True

    def labels(self) -> list[str]:
        """The answers that it can give."""
        return [action for action in self.actions if action not in (DEFAULT, ERROR)]

    def past_limit(self, ctx: Context) -> bool:
        """Whether it is to take `otherwise` without asking."""
        return ctx.visit > int(self.data.get("limit", ctx.visit))

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        label = match_label(result, self.labels(), self.spoken)
        ctx[self.id] = result if label is None else label
        if label in self.actions:
            return str(label)
        if "otherwise" in self.data or DEFAULT in self.actions or not self.labels():
            return str(self.data.get("otherwise", DEFAULT))
        raise ValueError(f"its answer {as_text(result)!r:.200} is on none of its edges")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.labels():
            yield "", "no edge carries an action; give each answer an edge with that action"
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
    """Runs another flow. Without inputs, it takes by name what it declares or needs."""

    fields = FLOW | {"outputs": Field("texts", "parent key: child key (id: final_output)")}
    _by_name: set[str] | None = None

    def by_name(self) -> set[str]:
        """The keys that the child takes by name."""
        graph = self.flow.registry.graphs.get(str(self.data["workflowId"]))
        if self._by_name is None:
            self._by_name = set()
            if "inputs" not in self.data and isinstance(graph, dict) and not [*check_parts(graph)]:
                child = Flow("", graph, self.flow.registry)  # unchecked: it may run this one
                self._by_name = child.needs | child.inputs.keys()
        return self._by_name

    def values(self, ctx: Context) -> dict[str, Any]:
        return {k: ctx[k] for k in self.by_name() & ctx.snapshot.keys()} | super().values(ctx)

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        gives = [*self.data["outputs"].values()] if "outputs" in self.data else None
        return Park([Child(str(self.data["workflowId"]), self.values(ctx), gives)])

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        given = {key: result.get(child) for key, child in self.data.get("outputs", {}).items()}
        for key, value in (given if "outputs" in self.data else {self.id: result}).items():
            ctx[key] = value
        return DEFAULT

    def reads(self) -> set[str]:
        return super().reads() | self.by_name()

    def writes(self) -> set[str]:
        return set(self.data.get("outputs", {self.id}))

    def runs(self) -> dict[str, bool]:
        return {str(self.data["workflowId"]): True}


class Map(SubWorkflow):
    """Runs another flow for each item of a list, all at the same time."""

    fields = FLOW | {
        "over": Field("text", "the context key of the list, or a path to it", True),
        "as": Field("id", "the child key of the item", True),
    }

    def __init__(self, flow: Flow, spec: Mapping[str, Any], actions: list[str]) -> None:
        super().__init__(flow, spec, actions)
        self.inputs[str(self.data["as"])] = [self.data["over"]]

    async def prep(self, ctx: Context) -> Any:
        name, values = str(self.data["as"]), self.values(ctx)
        items = values.get(name)
        if not isinstance(items, list):
            raise Permanent(f'"{self.data["over"]}" must be a list, not {as_text(items):.80}')
        if ctx.results is not None or not items:
            return ctx.results or []
        return Park([Child(str(self.data["workflowId"]), values | {name: i}) for i in items])

    def runs(self) -> dict[str, bool]:
        return dict.fromkeys(super().runs(), False)  # none for an empty list


class Wait(Templated, Choice):
    """Asks a person; the answer is its result and, where an edge carries it, its action."""

    fields = OTHERWISE | {"question": Field("text", "with {{name}} for each input", True)}
    templates = ("question",)

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        question = (await super().prep(ctx))["question"]
        if ctx.dry_run:
            return self.data.get("example", [*self.labels(), "an answer"][0])
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


class Answer(NamedTuple):
    """What a model said, and the tokens that it took, by kind."""

    value: Any
    usage: dict[str, int]


async def ask(messages: list[dict[str, str]], options: dict[str, Any], timeout: float) -> Answer:
    """A model's answer; Permanent, TryLater or an ordinary exception where there is none."""
    model, url, key = settings()
    if not key:
        raise Permanent(NO_KEY)
    openai = await asyncio.to_thread(importlib.import_module, "openai")
    loop = asyncio.get_running_loop()
    if loop not in _clients:  # its connections belong to the loop
        _clients[loop] = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0)
    create = _clients[loop].chat.completions.create
    try:
        reply = await create(model=model, messages=messages, extra_body=options, timeout=timeout)
    except openai.APIError as error:
        raise model_error(error, key) from None
    try:
        text = reply.choices[0].message.content.strip()
    except (AttributeError, IndexError, TypeError):
        text = ""
    if not text:
        raise ValueError("the model's server sent no answer")
    kinds = ("prompt_tokens", "completion_tokens")
    return Answer(text, {kind: getattr(reply.usage, kind, 0) for kind in kinds})


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


def status_error(status: int, text: str, headers: Mapping[str, str]) -> Exception:
    """What to raise for an HTTP status that is no success."""
    if status in (429, 503):
        after = re.fullmatch(r"\s*(\d{1,9}(\.\d*)?)\s*", headers.get("Retry-After") or "")
        return TryLater(text, float(after[1]) if after else None)
    return RuntimeError(text) if status in (408, 425) or status >= 500 else Permanent(text)


def refused(error: BaseException | None) -> bool:
    """Whether, somewhere in the chain of causes, a connection was refused."""
    if error is None or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return error is not None
    return any(
        map(refused, (error.__cause__, error.__context__, *getattr(error, "exceptions", ())))
    )


PROMPT = {
    "promptTemplate": Field("text", "the prompt, with {{name}} for each input", True),
    "system": Field("text", "the system message, a template too"),
    "options": Field("options", "more for the chat-completions call: temperature, ..."),
}
PARSE = {"parse": Field("parse", "what to make of the answer: text (default), lines or json")}


class Process(Templated):
    """Asks a model."""

    fields = PROMPT | PARSE
    templates = ("system", "promptTemplate")

    async def prep(self, ctx: Context) -> Any:
        texts = await super().prep(ctx)
        roles = {"system": "system", "promptTemplate": "user"}
        return [{"role": roles[field], "content": text} for field, text in texts.items()]

    async def ask(self, messages: list[dict[str, str]]) -> Answer:
        """A model's answer, within the node's timeout."""
        return await ask(messages, self.data.get("options", {}), self.timeout)

    async def exec(self, prepared: Any) -> Any:
        answer = await self.ask(prepared)
        return Answer(parse(answer.value, self.data.get("parse", "text")), answer.usage)

    async def rehearse(self, prepared: Any) -> Any:
        text = f"made-up answer of {self.id}"
        made_up = {"text": text, "lines": [text], "json": {"answer": text}}
        return Answer(self.data.get("example", made_up[self.data.get("parse", "text")]), {})

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str | None:
        ctx.usage.update(result.usage)
        return await super().post(ctx, prepared, result.value)


class Router(Process, Choice):
    """Lets a model choose one of the labels on its edges."""

    fields = PROMPT | LIMIT

    async def prep(self, ctx: Context) -> Any:
        messages = await super().prep(ctx)
        return Answer(self.data["otherwise"], {}) if self.past_limit(ctx) else messages

    async def exec(self, prepared: Any) -> Any:
        if isinstance(prepared, Answer):
            return prepared
        first = await self.ask(prepared)
        if match_label(first.value, self.labels()):
            return first
        again = f"Answer with one of these and nothing else: {', '.join(self.labels())}"
        said = [{"role": "assistant", "content": first.value}, {"role": "user", "content": again}]
        second = await self.ask([*prepared, *said])
        return Answer(second.value, {k: n + first.usage[k] for k, n in second.usage.items()})

    async def rehearse(self, prepared: Any) -> Any:
        made_up = Answer(self.data.get("example", self.labels()[0]), {})
        return prepared if isinstance(prepared, Answer) else made_up


class Condition(Router):
    """Lets a model say whether something is true or false."""

    fields = PROMPT

    def labels(self) -> list[str]:
        return ["true", "false"]

    def check(self) -> Iterator[tuple[str, str]]:
        if DEFAULT not in self.actions and not {"true", "false"} <= {*self.actions}:
            yield "", "needs edges with the actions true and false, or a plain edge"


# ── 5. HTTP ──────────────────────────────────────────────────────────────────────────────────
# On asyncio's streams: unlike a call in a thread it really ends when the node's time is up.

MAX_BODY = 1024 * 1024  # bytes
USUAL = {"User-Agent": "agentflow", "Accept": "*/*"}


async def call(method: str, url: str, headers: Mapping[str, str], body: str) -> tuple[Any, str]:
    """One HTTP call; the response, and its body as text. Redirects are not followed."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise Permanent("its address must be like http://host/path or https://host/path")
    ours = {"Host": parts.netloc, "Connection": "close", "Content-Length": len(body.encode())}
    path = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
    head = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in {**headers, **ours}.items())]
    if not all(line.isascii() and line.isprintable() for line in head):
        raise Permanent("its address and headers must be of printable ASCII characters")
    port = {"http": 80, "https": 443}[parts.scheme]
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port or port, ssl=port == 443 or None
        )
    except OSError as error:
        raise TryLater(f"{parts.netloc} refuses to connect") if refused(error) else error
    try:
        writer.write("\r\n".join([*head, "", body]).encode())
        await reader.readexactly(2 * MAX_BODY)
        raise Permanent(f"the response has more than {MAX_BODY} bytes")
    except asyncio.IncompleteReadError as end:
        return received(method, end.partial)
    finally:
        writer.transport.abort()


def received(method: str, raw: bytes) -> tuple[Any, str]:
    """What was received as a response, and its body as text."""

    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(raw)

    socket: Any = Socket()
    response = http.client.HTTPResponse(socket, method=method)
    response.begin()
    content = response.read()
    if len(content) > MAX_BODY:
        raise Permanent(f"the response has more than {MAX_BODY} bytes")
    return response, content.decode(response.headers.get_content_charset("utf-8"), "replace")


class HttpRequest(Templated):
    """Calls an API. A call other than GET carries the job as its Idempotency-Key."""

    fields = PARSE | {
        "url": Field("text", "a template; values are URL-encoded", True),
        "method": Field("method", "GET (default), POST, PUT, PATCH or DELETE"),
        "headers": Field("texts", "templates, by the header's name"),
        "body": Field("text", "a template of JSON; values are JSON-encoded"),
    }
    templates = ("url", "headers", "body")

    async def prep(self, ctx: Context) -> Any:
        values, method = self.values(ctx), self.data.get("method", "GET")
        url = render(self.data["url"], values, lambda value: quote(as_text(value), safe=""))
        body = render(self.data.get("body", ""), values, json.dumps)
        more = {} if method == "GET" else {"Idempotency-Key": ctx.job}
        more |= {"Content-Type": "application/json"} if body else {}
        for name, template in self.data.get("headers", {}).items():
            more[name.title()] = render(template, values)
        return method, url, USUAL | more, body

    async def exec(self, prepared: Any) -> Any:
        method, url, headers, body = prepared
        for _ in range(6):
            response, text = await call(method, url, headers, body)
            new = urljoin(url, response.headers.get("Location", url))
            if response.status // 100 != 3 or method != "GET" or new == url:
                break
            headers = headers if urlsplit(new)[:2] == urlsplit(url)[:2] else USUAL
            url = new
        if response.status >= 300:
            said = f"{method} {url.partition('?')[0]} was answered with {response.status}"
            raise status_error(response.status, said, response.headers)
        return parse(text, self.data.get("parse", "text"))

    async def rehearse(self, prepared: Any) -> Any:
        made_up = {"text": "made-up", "lines": ["made-up"], "json": {}}
        return self.data.get("example", made_up[self.data.get("parse", "text")])


for _name, _type in {
    "sub-workflow": SubWorkflow,
    "map": Map,
    "wait": Wait,
    "llm-process": Process,
    "llm-condition": Condition,
    "llm-router": Router,
    "switch": Switch,
    "http-request": HttpRequest,
    "output": Output,
}.items():
    Registry.add(_name, _type)
