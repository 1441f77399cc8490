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
import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import agentflow
from agentflow import Child, Context, Field, Flow, Node, Park, Permanent, Registry, TryLater
from dotenv import find_dotenv, load_dotenv

# ── 1. Texts ─────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
BULLET = re.compile(r"\s*([-*•]|\d+[.)])\s+")
FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)  # what models like to put around JSON
PARSE = {"parse": Field("parse", "what to make of the answer: text (default), lines or json")}
agentflow.KINDS["parse"] = ("text, lines or json", ("text", "lines", "json").__contains__)


def as_text(value: Any) -> str:
    """A string as it is, any other value as its JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render(template: str, values: Mapping[str, Any], quote: Callable[[Any], str] = as_text) -> str:
    """The template with each {{name}} replaced once: what is put in is never scanned again."""
    if missing := [name for name in NAME.findall(template) if name not in values]:
        raise Permanent(f"{{{{{missing[0]}}}}} has no value in the context; give it as an input")
    return NAME.sub(lambda match: quote(values[match[1]]), template)


def parse(text: str, kind: str) -> Any:
    """The text itself, the list of its lines without bullets and numbers, or its JSON value."""
    if kind == "text":
        return text
    fenced = FENCE.fullmatch(text.strip())
    text = fenced[1] if fenced else text
    if kind == "lines":
        lines = [BULLET.sub("", line, count=1).strip() for line in text.splitlines()]
        return [line for line in lines if line]
    try:
        return agentflow.parse_json(text)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON ({error}): {text!r:.200}") from None


class Templated(Node):
    """A node with fields that are templates; its prep gives them rendered, by the field's name."""

    templates: ClassVar[tuple[str, ...]] = ("promptTemplate",)

    def names(self) -> list[str]:
        texts = [self.data.get(field) for field in self.templates]
        return list(dict.fromkeys(NAME.findall(as_text(texts))))

    async def prep(self, ctx: Context) -> Any:
        given = [field for field in self.templates if field in self.data]
        return {field: render(self.data[field], self.values(ctx)) for field in given}

    async def rehearse(self, prepared: Any) -> Any:
        text = f"made-up answer of {self.id}"
        like = {"text": text, "lines": [text], "json": {"answer": text}}
        return self.data.get("example", like[self.data.get("parse", "text")])


class Output(Node):
    """Renders a text, without a model."""

    fields: ClassVar[dict[str, Field]] = {
        "promptTemplate": Field("text", "the text, with {{name}} for each input", True),
        "outputKey": Field("id", "the context key of the text (final_output)"),
        "returnAction": Field("text", "the action that it answers (default)"),
    }

    def names(self) -> list[str]:
        return NAME.findall(self.data["promptTemplate"])

    def writes(self) -> set[str]:
        return {str(self.data.get("outputKey", "final_output"))}

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        for key in self.writes():
            ctx[key] = render(self.data["promptTemplate"], result)
        return str(self.data.get("returnAction", "default"))

    def check(self) -> Iterator[tuple[str, str]]:
        if self.data.get("returnAction", "default") not in {"default", *self.actions}:
            yield ".returnAction", "is on none of its edges; give one of them that action"


# ── 2. Choices ───────────────────────────────────────────────────────────────────────────────

OTHERWISE = {"otherwise": Field("text", "the action where no edge carries the answer")}
LIMIT = OTHERWISE | {"limit": Field("count", "past so many visits, take otherwise unasked")}


def plain(answer: str) -> str:
    """What a person or a model means: without case, and quotes and punctuation around it."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", answer).casefold() or answer


class Choice(Node):
    """A node whose answer chooses an action; its labels are the actions on its edges."""

    def labels(self) -> list[str]:
        """The answers that it can give."""
        return [action for action in self.actions if action not in ("default", "error")]

    def match(self, answer: Any) -> str | None:
        """The label that an answer is, never one that is only in it: "untrue" is not "true"."""
        labels = {plain(label): label for label in self.labels()}
        return answer if answer in labels.values() else labels.get(plain(as_text(answer)))

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
        raise Permanent(f"its answer {as_text(result)!r:.200} is on none of its edges")

    def check(self) -> Iterator[tuple[str, str]]:
        labels = {*self.labels()}
        if not labels or not ("default" in self.actions or labels <= {*self.actions}):
            yield "", "needs an edge for each answer, with the answer as its action"
        if "limit" in self.data and "otherwise" not in self.data:
            yield ".limit", 'needs "otherwise", the action to take past it'


class Switch(Choice):
    """Takes a value for its action, without a model."""

    fields = LIMIT

    def names(self) -> list[str]:
        return ["value"]

    def match(self, answer: Any) -> str | None:
        text = as_text(answer)
        return text if text in self.labels() else None

    async def prep(self, ctx: Context) -> Any:
        if self.past_limit(ctx):
            return self.data["otherwise"]
        return (await super().prep(ctx)).get("value")


# ── 3. Other flows and people ────────────────────────────────────────────────────────────────
# These park: prep returns what it waits for, and is called again when ctx.results holds it.

FLOW = {"workflowId": Field("id", "the flow to run", True)}


class SubWorkflow(Node):
    """Runs another flow."""

    fields = FLOW | {"outputs": Field("object", "parent key: child key (id: final_output)")}

    @property
    def child(self) -> str:
        """The id of the flow that it runs."""
        return str(self.data["workflowId"])

    def names(self) -> list[str]:
        """Without inputs: all that the child declares or needs."""
        graph = self.flow.registry.graphs.get(self.child)
        building = self.flow.id.split("/")  # a flow may run itself: look into each only once
        if "inputs" in self.data or self.child in building or not isinstance(graph, dict):
            return []
        if any(agentflow.check_parts(graph)):  # which is reported for the child
            return []
        child = Flow(f"{self.flow.id}/{self.child}", graph, self.flow.registry)
        return [*child.needs, *child.inputs]

    def writes(self) -> set[str]:
        return set(self.data.get("outputs", {self.id}))

    def runs(self) -> dict[str, bool]:
        return {self.child: True}

    def check(self) -> Iterator[tuple[str, str]]:
        if not all(isinstance(key, str) for key in self.data.get("outputs", {}).values()):
            yield ".outputs", "must be an object of parent key: child key"

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        gives = [*self.data["outputs"].values()] if "outputs" in self.data else None
        return Park([Child(self.child, self.values(ctx), gives)])

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
        return {self.child: False}  # not for an empty list

    async def prep(self, ctx: Context) -> Any:
        name, values = str(self.data["as"]), self.values(ctx)
        if not isinstance(items := values.get(name), list):
            raise Permanent(f'"{self.data["over"]}" must be a list, not {as_text(items):.80}')
        if ctx.results is not None or not items:
            return ctx.results or []
        return Park([Child(self.child, values | {name: item}) for item in items])


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
# Any server that speaks OpenAI's chat completions. The engine retries and keeps the time, so the
# client does neither.

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


def settings() -> tuple[str, str, str]:
    """The model, its base URL and the key, from the environment and .env (here or above)."""
    load_dotenv(find_dotenv(usecwd=True))
    url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or ("" if url == OPENAI else "unused")
    return os.environ.get("OPENAI_MODEL") or MODEL, url, key


def model_status() -> str:
    """Which model will be asked, where, and whether a key is missing; without any secret."""
    model, url, key = settings()
    shown = re.sub(r"(?<=//)[^/]*@|\?.*", "", url)
    return f"model {model} at {shown}" + ("" if key else f"; {NO_KEY}")


@functools.cache
def libraries() -> tuple[Any, Any, Any]:
    """openai, the httpx2 that comes with it, and TLS settings; this takes a second, once."""
    httpx2 = importlib.import_module("httpx2")
    return importlib.import_module("openai"), httpx2, httpx2.create_ssl_context()


async def connect() -> tuple[Any, Any, Any]:
    """openai, httpx2 and an HTTP client for one call: so no cookie gets into another one."""
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
    if response.status_code in (429, 503):
        after = response.headers.get("Retry-After", "")
        return TryLater(text, float(after) if after.isdecimal() else None)
    return RuntimeError(text) if response.status_code >= 500 else Permanent(text)


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
        openai, _, http = await connect()
        api = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=http)
        options = self.data.get("options")
        try:
            async with api:
                call = api.chat.completions.create
                answer = await call(model=model, messages=messages, extra_body=options)
        except openai.APIError as error:
            said = HINTS.get(getattr(error, "status_code", 0)) or error.message.replace(key, "***")
            text = f"{model_status()}: {' '.join(said.split()):.300}"
            out_of_money = error.code == "insufficient_quota"  # which is a 429, but not for long
            raise (Permanent(text) if out_of_money else problem(error, text)) from None
        for kind in ("prompt_tokens", "completion_tokens"):
            count = getattr(getattr(answer, "usage", None), kind, None) or 0
            usage[kind] = usage.get(kind, 0) + count
        try:
            return str(answer.choices[0].message.content.strip())
        except (AttributeError, IndexError, TypeError):
            raise ValueError(f"{model_status()} sent no answer") from None

    async def exec(self, prepared: Any) -> Any:
        return parse(await self.ask(*prepared), self.data.get("parse", "text"))


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

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
agentflow.KINDS["method"] = (f"one of {', '.join(METHODS)}", METHODS.__contains__)


class HttpRequest(Templated):
    """Calls an API; follows no redirects. Other than GET, it sends the job as Idempotency-Key."""

    fields = PARSE | {
        "url": Field("text", "a template; values are URL-encoded", True),
        "method": Field("method", f"{', '.join(METHODS)} (GET)"),
        "headers": Field("object", "templates, by the header's name"),
        "body": Field("text", "a template of JSON; values are JSON-encoded"),
    }
    templates = ("url", "headers", "body")

    async def prep(self, ctx: Context) -> Any:
        values, method = self.values(ctx), self.data.get("method", "GET")
        url = render(self.data["url"], values, lambda value: quote(as_text(value), safe=""))
        body = render(self.data.get("body", ""), values, json.dumps)
        headers = {"User-Agent": "agentflow", "Content-Type": "application/json"}
        if method != "GET":
            headers["Idempotency-Key"] = ctx.job
        for name, template in self.data.get("headers", {}).items():
            headers[name.title()] = render(as_text(template), values)
        if not re.match(r"https?://[^/?#]", url):
            raise Permanent("its url must be like http://host/path or https://host/path")
        sent = "".join([url, *headers, *headers.values()])
        if not sent.isascii() or not sent.isprintable():
            raise Permanent("its url and headers must be of printable ASCII characters")
        return {"method": method, "url": url, "headers": headers, "content": body}

    async def exec(self, prepared: Any) -> Any:
        host = urlsplit(prepared["url"]).hostname
        _, httpx2, http = await connect()
        text = ""
        try:
            async with http, http.stream(**prepared) as response:
                response.raise_for_status()
                async for chunk in response.aiter_text():
                    text += chunk
                    if len(text) > agentflow.MAX_VALUE:
                        raise Permanent(
                            f"{host} answers with more than {agentflow.MAX_VALUE} characters"
                        )
        except httpx2.HTTPStatusError as error:
            said = f"{error.response.status_code} {error.response.reason_phrase:.80}"
            raise problem(error, f"{host} answers {said}") from None
        except httpx2.HTTPError as error:
            raise problem(error, f"{host}: {error}") from None
        return parse(text, self.data.get("parse", "text"))


Registry.add("sub-workflow", SubWorkflow)
Registry.add("map", Map)
Registry.add("wait", Wait)
Registry.add("llm-process", Process)
Registry.add("llm-condition", Condition)
Registry.add("llm-router", Router)
Registry.add("switch", Switch)
Registry.add("http-request", HttpRequest)
Registry.add("output", Output)
