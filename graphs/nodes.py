"""The node types that the graphs use; at the same time the lesson "how to add a node type".

That is a subclass of Node, a table of its fields (a kind of check.KINDS, use, required or not), and
a name in the registry. Simple ones first. Importing this reads no environment, nor imports openai.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar
from urllib.parse import quote
from weakref import WeakKeyDictionary

from agentflow import Child, Context, Flow, Node, Park, Permanent, Registry
from graphs import calls
from graphs.check import KINDS, Field, check_parts, parse_json

# ── 1. Texts ─────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"\{\{\s*([^{}\s][^{}]*?)\s*\}\}")
BULLET = re.compile(r"^\s*([-*•]|\d+[.)])\s+")
PARSE = {"parse": Field("parse", "what to make of the answer: text (default), lines or json")}
KINDS["parse"] = ("text, lines or json", ("text", "lines", "json").__contains__)


def as_text(value: Any) -> str:
    """A string as it is, any other value as its JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render(template: str, values: Mapping[str, Any], show: Callable[[Any], str] = as_text) -> str:
    """The template with each {{name}} replaced once: what is put in is never scanned again."""
    if missing := [name for name in NAME.findall(template) if name not in values]:
        raise Permanent(f"{{{{{missing[0]}}}}} has no value in the context; give it as an input")
    return NAME.sub(lambda match: show(values[match[1]]), template)


def parse(text: str, kind: str) -> Any:
    """The text itself, the list of its lines without bullets and numbers, or its JSON value."""
    if kind == "text":
        return text
    text = re.sub(r"^```[^\n]*\n|\s*```$", "", text.strip())  # models like to put it in a fence
    if kind == "lines":
        lines = [BULLET.sub("", line).strip() for line in text.splitlines()]
        return [line for line in lines if line]
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON ({error}): {text!r:.200}") from None


class Templated(Node):
    """A node with fields that are templates; its prep gives them rendered, by the field's name."""

    templates: tuple[str, ...] = ("promptTemplate",)

    def names(self) -> list[str]:
        texts = [as_text(self.data.get(field, "")) for field in self.templates]
        return sorted({*NAME.findall(" } { ".join(texts))})  # a {{name}} spans no two texts

    async def prep(self, ctx: Context) -> Any:
        given = [field for field in self.templates if field in self.data]
        return {field: render(self.data[field], self.values(ctx)) for field in given}

    async def rehearse(self, prepared: Any) -> Any:
        made_up = f"made-up answer of {self.id}"
        return self.data.get("example", [made_up] if "parse" in self.data else made_up)


class Output(Templated):
    """Renders a text, without a model."""

    fields: ClassVar[dict[str, Field]] = {
        "promptTemplate": Field("text", "the text, with {{name}} for each input", True),
        "outputKey": Field("id", "the context key of the text (final_output)"),
        "returnAction": Field("text", "the action that it answers (default)"),
    }
    rehearse = Node.rehearse  # as it calls nothing

    def check(self) -> Iterator[tuple[str, str]]:
        action = self.data.get("returnAction", "default")
        if action not in ("default", *self.actions):
            yield ".returnAction", f'no edge carries "{action}"'

    def writes(self) -> set[str]:
        return {str(self.data.get("outputKey", "final_output"))}

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str | None:
        for key in self.writes():
            ctx[key] = result["promptTemplate"]
        return self.data.get("returnAction")


# ── 2. Choices ───────────────────────────────────────────────────────────────────────────────

OTHERWISE = {"otherwise": Field("text", "the action where no edge carries the answer")}
LIMIT = OTHERWISE | {"limit": Field("count", "past so many visits, take otherwise unasked")}


def plain(answer: str) -> str:
    """An answer without case, and without quotes and punctuation around it; a sign may stay."""
    return re.sub(r"^((?!-\d)[\W_])+|[\W_]+$", "", answer).casefold() or answer


class Choice(Node):
    """A node whose answer chooses an action; its labels are the actions on its edges."""

    def labels(self) -> list[str]:
        """The answers that it can give."""
        return [action for action in self.actions if action not in ("default", "error")]

    def check(self) -> Iterator[tuple[str, str]]:
        if "limit" in self.data and "otherwise" not in self.data:
            yield ".limit", "needs `otherwise`: the action past the limit"

    def match(self, answer: Any) -> Any:
        """The one label that is meant, or the answer: "True." is "true", but "untrue" is not."""
        meant = [label for label in self.labels() if plain(label) == plain(as_text(answer))]
        return meant[0] if len(meant) == 1 and answer not in self.labels() else answer

    async def prep(self, ctx: Context) -> Any:
        limit = self.data.get("limit")
        if limit is not None and ctx.visit > limit:
            return self.data.get("otherwise", "default")  # a string: the answer, without asking
        return await super().prep(ctx)

    async def rehearse(self, prepared: Any) -> Any:
        made_up = self.data.get("example", [*self.labels(), "made-up answer"][0])
        return prepared if isinstance(prepared, str) else self.match(made_up)

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        ctx[self.id] = result
        if result in self.labels() and result in self.actions:
            return str(result)
        if self.labels() and "otherwise" not in self.data and "default" not in self.actions:
            raise Permanent(f"{as_text(result)!r:.200} is none of: {', '.join(self.labels())}")
        return str(self.data.get("otherwise", "default"))


class Switch(Choice):
    """Takes a value for its action, without a model."""

    fields = LIMIT
    rehearse = Node.rehearse

    def names(self) -> list[str]:
        return ["value"]

    async def exec(self, prepared: Any) -> str:
        return prepared if isinstance(prepared, str) else render("{{value}}", prepared)


# ── 3. Other flows and people ────────────────────────────────────────────────────────────────
# These park: prep returns what it waits for, and is called again when ctx.results holds it.

FLOW = {"workflowId": Field("id", "the flow to run", True)}
TAKEN = WeakKeyDictionary[Registry, dict[Any, tuple[set[str], set[str]]]]()  # what takes found


class SubWorkflow(Node):
    """Runs another flow. Without inputs, this gets by name what it declares or needs."""

    fields = FLOW | {"outputs": Field("keys", "parent key: child key (id: final_output)")}
    child = property(lambda self: str(self.data["workflowId"]))

    def names(self) -> list[str]:
        return [] if "inputs" in self.data else sorted(self.takes()[1])

    def takes(self) -> tuple[set[str], set[str]]:
        """The inputs that the child needs; and these with all that have defaults there or below."""
        # Building the child makes its own sub-workflows ask the same. So the flow built here has
        # for its id the way that led to it ("a/b"): one that runs itself is looked into only once.
        registry, id, above = self.flow.registry, self.child, self.flow.id.split("/")[1:]
        known, key = TAKEN.setdefault(registry, {}), (id, frozenset(above))
        if key not in known:
            known[key], graph = (set[str](), set[str]()), registry.graphs.get(id)
            if id not in above and isinstance(graph, dict) and not any(check_parts(graph)):
                child = Flow(f"{self.flow.id}/{id}", graph, registry)
                more = [node.optional() for node in child.nodes.values()]
                known[key] = child.needs, child.needs.union(child.inputs, *more)
        return known[key]  # what is wrong with the child is told where it is checked

    def optional(self) -> set[str]:
        return {n for n in self.takes()[1] - self.takes()[0] if self.inputs.get(n) == [n]}

    def writes(self) -> set[str]:
        return set(self.data.get("outputs", {self.id}))

    def check(self) -> Iterator[tuple[str, str]]:
        for name in sorted(self.takes()[0] - self.inputs.keys()):
            yield ".inputs", f'"{self.child}" needs "{name}"; give it'

    def runs(self) -> dict[str, bool]:
        return {self.child: True}

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results[0]
        gives = [str(key) for key in self.data.get("outputs", {}).values()]
        return Park([Child(self.child, self.values(ctx), gives or None)])

    async def post(self, ctx: Context, prepared: Any, result: Any) -> None:
        if "outputs" not in self.data:
            ctx[self.id] = result
        for key, child_key in self.data.get("outputs", {}).items():
            if child_key in result:  # a branch of the child that was not taken wrote nothing
                ctx[key] = result[child_key]


class Map(SubWorkflow):
    """Runs another flow for each item of a list, all at the same time."""

    fields = FLOW | {
        "over": Field("path", "the context key of the list, or a path to it", True),
        "as": Field("id", "the child key of the item", True),
    }

    def __init__(self, flow: Flow, spec: Mapping[str, Any]) -> None:
        super().__init__(flow, spec)
        self.inputs[str(self.data["as"])] = [self.data["over"]]

    def runs(self) -> dict[str, bool]:
        return {self.child: False}  # not for an empty list

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return ctx.results
        name, values = str(self.data["as"]), self.values(ctx)
        if not isinstance(items := values.get(name), list):
            raise Permanent(f'"{self.data["over"]}" must be a list, not {as_text(items):.80}')
        children = [Child(self.child, values | {name: item}) for item in items]
        return Park(children) if children else []


class Wait(Choice, Templated):
    """Asks a person; the answer is its result and, where an edge carries it, its action."""

    fields = OTHERWISE | {"question": Field("text", "with {{name}} for each input", True)}
    templates = ("question",)

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is not None:
            return self.match(ctx.results[0])
        texts = await super().prep(ctx)
        return texts if ctx.dry_run else Park(question=texts["question"])


# ── 4. HTTP and models ───────────────────────────────────────────────────────────────────────
# How a call is made, and which errors are tried again, is in calls.py.

PROMPT = {
    "promptTemplate": Field("text", "the prompt, with {{name}} for each input", True),
    "system": Field("text", "the system message, a template too"),
    "options": Field("object", "more for the chat-completions call: temperature, ..."),
}


class HttpRequest(Templated):
    """Calls an API; follows no redirects. Other than GET, it sends the job as Idempotency-Key."""

    fields = PARSE | {
        "url": Field("text", "a template; values are URL-encoded", True),
        "method": Field("text", "POST, PUT, ... (GET)"),
        "headers": Field("object", "templates, by the header's name"),
        "body": Field("text", "a template of JSON; values are JSON-encoded"),
    }
    templates = ("url", "headers", "body")

    async def prep(self, ctx: Context) -> Any:
        values, method = self.values(ctx), str(self.data.get("method", "GET")).upper()
        url = render(self.data["url"], values, lambda value: quote(as_text(value), safe=""))
        body = render(self.data.get("body", ""), values, json.dumps)
        headers = {"User-Agent": "agentflow", "Content-Type": "application/json"}
        headers |= {} if method == "GET" else {"Idempotency-Key": ctx.job}
        for name, template in self.data.get("headers", {}).items():
            headers[name.title()] = render(as_text(template), values).strip(" ")
        sent = "".join([method, *headers, *headers.values()])
        if not re.match("https?://[^/?#]", url) or not (url + sent).isprintable():
            raise Permanent("it takes http(s)://host/... and headers without control characters")
        if not sent.isascii():
            raise Permanent("it takes a method and headers of ASCII characters")
        return {"method": method, "url": url, "headers": headers, "content": body}

    async def exec(self, prepared: Any) -> Any:
        return parse(await calls.fetch(prepared), self.data.get("parse", "text"))


class Process(Templated):
    """Asks a model."""

    fields = PROMPT | PARSE
    templates = ("system", "promptTemplate")

    async def prep(self, ctx: Context) -> Any:
        roles = {"system": "system", "promptTemplate": "user"}
        texts = await super().prep(ctx)
        messages = [{"role": roles[field], "content": text} for field, text in texts.items()]
        return messages, ctx.usage  # into which exec counts, as it has no ctx

    async def ask(self, messages: list[dict[str, str]], usage: dict[str, int]) -> str:
        """The model's answer."""
        return await calls.complete(messages, self.data.get("options"), usage)

    async def exec(self, prepared: Any) -> Any:
        return parse(await self.ask(*prepared), self.data.get("parse", "text"))


class Router(Choice, Process):
    """Lets a model choose one of the labels on its edges."""

    fields = PROMPT | LIMIT

    async def exec(self, prepared: Any) -> Any:
        if isinstance(prepared, str):
            return prepared
        messages, usage = prepared
        answer = await self.ask(messages, usage)
        if self.match(answer) in self.labels():
            return self.match(answer)
        again = f"Answer with one of these and nothing else: {', '.join(self.labels())}"
        said = [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
        return self.match(await self.ask(messages + said, usage))

    def check(self) -> Iterator[tuple[str, str]]:
        yield from super().check()
        labels = {*self.labels()}
        if not labels or not ("default" in self.actions or labels <= {*self.actions}):
            yield "", "needs an edge for each answer, with the answer as its action"


class Condition(Router):
    """Lets a model say whether something is true or false."""

    fields = PROMPT

    def labels(self) -> list[str]:
        return ["true", "false"]


Registry.add("sub-workflow", SubWorkflow)
Registry.add("map", Map)
Registry.add("wait", Wait)
Registry.add("llm-process", Process)
Registry.add("llm-condition", Condition)
Registry.add("llm-router", Router)
Registry.add("switch", Switch)
Registry.add("http-request", HttpRequest)
Registry.add("output", Output)
