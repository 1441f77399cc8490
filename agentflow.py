"""Run a graph of LLM steps: in this process, or over any number of workers that share a Redis.

    >>> class Greet(Node):
    ...     async def post(self, ctx, prepared, result):
    ...         ctx["final_output"] = "Hello " + ctx["name"]
    >>> Registry.add("greet", Greet)
    >>> graphs = Registry({"hello": {"nodes": [{"id": "greet", "type": "greet"}]}})
    >>> async def main():
    ...     run = await graphs["hello"].run({"name": "Ada"})
    ...     return await run.result()
    >>> asyncio.run(main())
    'Hello Ada'

The words, each with an example:

    flow      a graph of nodes and edges                       graphs["hello"], from hello.json
    node      one step: prep reads, exec works, post writes    {"id": "greet", "type": "greet"}
    edge      leads from node to node, for one action          {"source": "review", "action": "more", ...}
    action    what a node answers; the edges that carry it     "default", "more", "error"
    context   the run's data: string keys, JSON values         {"name": "Ada"}
    run       one execution of a flow                          "5f0c..."
    token     a mark at a node: it waits there, has come back  {"greet": "8d1f..."}
              to the head of a loop, or is active (its id)
    job       one activation of one node, run/node/token;      "5f0c.../greet/8d1f..."
              what the queue moves, and the idempotency key for the world outside
    visit     the how-many-th activation since the node's loop was entered; 1 outside of loops
    executor  where a flow runs: InMemoryExecutor, RedisExecutor, or your own

What holds, whatever is killed, whenever:

    I1  A node may execute more than once; its effect on the run commits exactly once.
    I2  Every active token of a running run is in exactly one place: the ready list, one
        worker's processing list, or parked.
    I3  A run that can move moves; a run that cannot says why. No job is dropped in silence.
    I4  Every executor gives the same context and commits the same (node, visit, action).
    I5  No key outlives its TTL; a finished run leaves nothing else behind.

The sections: 1 Context, 2 Node, 3 Flow and the rule, 4 Registry, 5 In memory,
6 Redis: keys and scripts, 7 Redis: starting and steering runs, 8 Redis: the worker.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import logging
import os
import random
import re
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

log = logging.getLogger("agentflow")

MAX_VALUE = 1024 * 1024  # characters of one value's JSON text
MAX_NODES = 2_000  # nodes, and as many edges five times, in one graph
MAX_STEPS = 10_000  # activations in one run; a loop that never ends, ends here
MAX_DEPTH = 16  # runs within runs
PATIENCE = 600.0  # seconds for which a server may ask us to come back later
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # ids become parts of Redis keys and of jobs


class GraphError(ValueError):
    """For who wrote a graph: every finding, a line each, with file, place and mend."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class RunError(Exception):
    """For who started a run: it cannot start, has failed or was cancelled; the text says why."""


class Permanent(Exception):
    """Raised by a node's exec: what went wrong cannot get better, so it is not tried again."""


class TryLater(Exception):
    """Raised by a node's exec: the other side is busy. Tried again after `after` seconds, or
    after the usual back-off, for ten minutes at most."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


# ── 1. Context ───────────────────────────────────────────────────────────────────────────────
# A run's data. Values are kept as JSON text everywhere, so that both executors are equally
# strict: reading decodes a fresh copy, writing encodes at once, and nobody shares an object.

encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any, what: str) -> str:
    """The JSON text of a value; ValueError, naming `what`, where it is not JSON or too large."""
    try:
        text = encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    if len(text) > MAX_VALUE:
        raise ValueError(f"{what} has {len(text):,} characters as JSON; {MAX_VALUE:,} are allowed")
    return text


@dataclass
class Context:
    """A node's view of its run: a snapshot of the data, and what the node writes itself.

    Only the keys that were written are committed, and only when the node has succeeded. A value
    that was read is a copy: changing it changes nothing until it is written back.
    """

    snapshot: dict[str, str]  # key: JSON text; shared with other nodes, therefore never written
    job: str = ""  # run/node/token: the same in every delivery, an idempotency key
    visit: int = 1
    dry_run: bool = False
    depth: int = 0  # of its run: 0 where a user started it, 1 for its children
    results: list[Any] | None = None  # what the node parked for: its children's, or an answer
    changes: dict[str, str] = field(default_factory=dict)  # what it wrote, as key: JSON text
    usage: dict[str, int] = field(default_factory=dict)  # model tokens that it used, by kind

    def __getitem__(self, path: str) -> Any:
        """The value at `key`, or inside it at `key/field/0`; KeyError where there is none."""
        key, *steps = path.split("/")
        text = self.changes.get(key) or self.snapshot.get(key)
        if text is None:
            raise KeyError(f"the context has no {key!r}")
        value = json.loads(text)
        try:
            for step in steps:
                value = value[int(step) if isinstance(value, list) else step]
        except (LookupError, TypeError, ValueError):
            raise KeyError(f"the context has nothing at {path!r}") from None
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if not key.isprintable() or not key or "/" in key:
            raise ValueError(f"a context key is printable and has no slash: not {key!r:.80}")
        self.changes[key] = to_json(value, f"the value of {key!r}")


# ── 2. Node ──────────────────────────────────────────────────────────────────────────────────
# One step of a graph. A node type is a subclass; a node is one instance a flow, so it keeps no
# state of an activation: that travels from prep to exec to post.

DEFAULT = "default"  # the action of a node that answers nothing else, and of a plain edge
ERROR = "error"  # the action of a node that has failed for good, where an edge carries it


class Field(NamedTuple):
    """A field in a graph file: what it must be (a key of KINDS), and what it is for."""

    kind: str
    about: str
    required: bool = False


@dataclass(frozen=True)
class Child:
    """A run to start for a node: of the flow with this id, with these inputs. What it gives is
    its `final_output` (or whole context), or an object of the keys in `gives`."""

    flow: str
    inputs: dict[str, Any]
    gives: list[str] | None = None
    values: dict[str, str] = field(default_factory=dict)  # its first context; execute fills it in


@dataclass(frozen=True)
class Park:
    """Returned by a prep that cannot go on before these children have ended, or a person has
    answered. The slot is freed; prep is called again, with `ctx.results`."""

    children: list[Child] = field(default_factory=list)
    question: str | None = None


class Node:
    """A step. Override `exec`, and `prep` and `post` where it reads or writes more than its
    inputs and its own id; then also say so in `reads` and `writes`."""

    fields: ClassVar[dict[str, Field]] = {}  # what `data` may hold, beside inputs and example
    backoff: ClassVar[float] = 0.5  # seconds before the first retry; doubled for each further one

    def __init__(self, flow: Flow, spec: Mapping[str, Any], actions: list[str]) -> None:
        config = spec.get("config") or {}
        self.flow = flow
        self.id = str(spec["id"])
        self.data: dict[str, Any] = spec.get("data") or {}
        self.retries: int = config.get("retries", 2)
        self.timeout: float = config.get("timeout", 120)
        self.actions = actions  # those of its edges, in file order
        named = self.data.get("inputs", {name: name for name in self.names()})
        self.inputs = {k: v if isinstance(v, list) else [v] for k, v in named.items()}

    async def prep(self, ctx: Context) -> Any:
        """Read what exec needs, by default the values of the inputs; or return a Park."""
        return self.values(ctx)

    async def exec(self, prepared: Any) -> Any:
        """Do the work: the only part that is retried, and it may run more than once (I1)."""
        return prepared

    async def rehearse(self, prepared: Any) -> Any:
        """Stand in for exec in a dry run; override it together with an exec that calls out."""
        return await self.exec(prepared)

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str | None:
        """Write the result, by default under the node's id, and return the action."""
        ctx[self.id] = result
        return DEFAULT

    def names(self) -> list[str]:
        """The names that its inputs must give; without `inputs`, each is its own key."""
        return []

    def reads(self) -> set[str]:
        """The context keys that it may read: by default those of its inputs."""
        return {path.split("/")[0] for paths in self.inputs.values() for path in paths}

    def writes(self) -> set[str]:
        """The context keys that it may write: by default its id."""
        return {self.id}

    def runs(self) -> dict[str, bool]:
        """The flows that it starts as children, and whether each is started in any case."""
        return {}

    def check(self) -> Iterator[Finding]:
        """What is wrong with its data beyond single fields, as (place, message)."""
        yield from ()

    def values(self, ctx: Context) -> dict[str, Any]:
        """Its inputs by name: of each the first path that has a value; absent where none has."""
        found: dict[str, Any] = {}
        for name, paths in self.inputs.items():
            for path in paths:
                try:
                    found[name] = ctx[path]
                    break
                except KeyError:
                    continue
        return found


class Outcome(NamedTuple):
    """What an activation came to: its action, the keys that it wrote, the tokens it used."""

    action: str
    changes: dict[str, str]  # key: JSON text
    usage: dict[str, int]
    seconds: float


Retrying = Callable[[str, float], Awaitable[None]]  # is told why a node waits, and how long


async def execute(node: Node, ctx: Context, failure: str, retrying: Retrying) -> Outcome | Park:
    """One activation of a node, the same in every executor; `failure` is that of a child.

    RunError when it has failed for good and none of its edges carries the action `error`.
    """
    started = time.monotonic()
    try:
        if failure:
            raise Permanent(failure)
        prepared = await node.prep(ctx)
        if isinstance(prepared, Park):
            if prepared.children and ctx.depth >= MAX_DEPTH:
                raise Permanent(f"runs are nested {MAX_DEPTH} deep already; does the flow recurse?")
            begun = [(c, node.flow.registry[c.flow].begin(c.inputs)) for c in prepared.children]
            return Park([replace(child, values=v) for child, v in begun], prepared.question)
        result = await _attempts(node, ctx, prepared, retrying)
        action = await node.post(ctx, prepared, result) or DEFAULT
        if action != DEFAULT and action not in node.actions:
            raise ValueError(f"its action {action!r:.80} is on none of its edges")
        return Outcome(action, ctx.changes, ctx.usage, time.monotonic() - started)
    except Exception as error:
        kind = "" if isinstance(error, (Permanent, TryLater)) else f"{type(error).__name__}: "
        text = f'node "{node.id}": {kind}{error}'[:2000]
        if ERROR not in node.actions:
            raise RunError(text) from error
        changes = {node.id: encode(text)}
        return Outcome(ERROR, changes, ctx.usage, time.monotonic() - started)


async def _attempts(node: Node, ctx: Context, prepared: Any, retrying: Retrying) -> Any:
    work = node.rehearse if ctx.dry_run else node.exec
    started = time.monotonic()
    failures = refusals = 0
    while True:
        delay = random.uniform(0.5, 1.5) * min(60.0, node.backoff * 2 ** (failures + refusals))
        try:
            async with asyncio.timeout(node.timeout) as limit:
                return await work(prepared)
        except Permanent:
            raise
        except TryLater as error:  # bounded by time, not by count
            refusals += 1
            delay = error.after or delay
            reason = str(error)
            if time.monotonic() - started + delay > PATIENCE:
                raise
        except Exception as error:
            failures += 1
            reason = f"{type(error).__name__}: {error}"
            if limit.expired():
                reason = f"no result within {node.timeout} seconds"
            if failures > node.retries:
                raise TimeoutError(reason) if limit.expired() else error
        await retrying(reason, delay)
        await asyncio.sleep(delay)


# ── 3. Flow ──────────────────────────────────────────────────────────────────────────────────
# The graph, and the one scheduling rule, which every executor calls:
#
#   A node runs when a token waits at it and no token is left upstream of it.
#   A loop's next round starts when its present round is over.
#
# So a join waits for exactly the branches that were taken. (In the literature: van der Aalst's
# synchronizing merge, BPMN's inclusive gateway.) Sets of nodes are bit masks, Python ints.

WAITING, RETURNED = "waiting", "returned"  # marks of tokens; any other mark is an active one's id
COLOURS = {"done": "#d5f5d5", "active": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}


class Loop(NamedTuple):
    """Nodes that can all reach one another: entered at the head, repeated by edges back to it."""

    head: str
    members: set[str]
    body: set[str]  # the members and their side work, which only they lead to while going on
    entries: set[tuple[str, str]]  # edges that lead into it elsewhere than to its head


class State(NamedTuple):
    """Where a run stands: what the rule reads and makes anew. `tokens` is node: mark, `visits` is
    node: activations since its loop was entered (nodes in loops only)."""

    tokens: dict[str, str]
    visits: dict[str, int]

    def visit(self, node: str) -> int:
        """The present visit of a node."""
        return self.visits.get(node, 1)


class Flow:
    """A graph of nodes, ready to run; made by a Registry. GraphError where it is not sound."""

    def __init__(self, id: str, graph: Mapping[str, Any], registry: Registry) -> None:
        self.id = id
        self.registry = registry
        self.description: str = graph.get("description", "")
        self.inputs: dict[str, Any] = graph.get("inputs") or {}
        self.targets: dict[str, dict[str, list[str]]] = {str(n["id"]): {} for n in graph["nodes"]}
        for edge in graph.get("edges") or []:
            by_action = self.targets[str(edge["source"])]
            targets = by_action.setdefault(edge.get("action") or DEFAULT, [])
            if str(edge["target"]) not in targets:
                targets.append(str(edge["target"]))
        self.nodes: dict[str, Node] = {}
        for spec in graph["nodes"]:
            node_id = str(spec["id"])
            self.nodes[node_id] = Registry.types[spec["type"]](self, spec, [*self.targets[node_id]])
        self._analyse()
        self.needs = self._find_needs()

    async def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        executor: Executor | None = None,
        dry_run: bool = False,
    ) -> Run:
        """Start a run with these inputs over the graph's own; in this process unless told
        otherwise. RunError where an input is missing or not JSON."""
        return await (executor or InMemoryExecutor()).run(self, inputs or {}, dry_run)

    def first(self, stamp: str) -> tuple[State, list[str]]:
        """The state of a new run, and its start nodes, active under the id `stamp`."""
        return self._activate({node: WAITING for node in self.starts}, {}, stamp)

    def advance(self, state: State, node: str, action: str, stamp: str) -> tuple[State, list[str]]:
        """The state after an active node has finished with an action, and the nodes that this
        made active, under the id `stamp`. Pure: the same in every executor, every time."""
        tokens = dict(state.tokens)
        del tokens[node]
        for target in self.targets[node].get(action, ()):
            if tokens.get(target, WAITING) not in (WAITING, RETURNED):
                raise RunError(f'node "{target}" was reached again while active; please report it')
            tokens[target] = RETURNED if (node, target) in self._back else WAITING
        state, ready = self._activate(tokens, state.visits, stamp)
        if state.tokens and all(mark in (WAITING, RETURNED) for mark in state.tokens.values()):
            raise RunError(f"every token waits ({state.tokens}) and none can run; please report it")
        return state, ready

    def _activate(
        self, tokens: dict[str, str], visits: dict[str, int], stamp: str
    ) -> tuple[State, list[str]]:
        busy = returned = 0
        for node, mark in tokens.items():
            if mark == RETURNED:
                returned |= self._bit[node]
            else:
                busy |= self._bit[node]
        ready: list[str] = []
        for node, mark in tokens.items():
            # A token that has come back belongs to the round that ends: those in its loop do not
            # wait for it, those behind the loop do.
            seen = busy | returned & ~self._heads[node]
            if mark == WAITING and not seen & self._upstream[node]:
                ready.append(node)
            elif mark == RETURNED and not seen & (self._upstream[node] | self._body[node]):
                ready.append(node)
        if self.loops and ready:
            visits = dict(visits)
        for node in ready:
            if tokens[node] == WAITING and node in self._body:  # its loop is entered from outside
                for inner in [n for n in visits if self._bit[n] & self._body[node]]:
                    del visits[inner]
            if self._heads[node]:
                visits[node] = visits.get(node, 0) + 1
            tokens[node] = stamp
        return State(tokens, visits), ready

    def _analyse(self) -> None:
        """Find start nodes, loops and what is upstream of what; once, when the flow is built."""
        self._bit = {node: 1 << i for i, node in enumerate(self.nodes)}
        edges = {
            (source, target): None  # a dict for its order
            for source, by_action in self.targets.items()
            for targets in by_action.values()
            for target in targets
        }
        reach = self.reach = self._upstream_along(edges)
        self.starts = [
            node
            for node, bit in self._bit.items()
            if reach[node] & (bit - 1) == 0  # none before it in the file leads to it ...
            and all(reach[other] & bit for other in self.members(reach[node]))  # ... but from it
        ]
        order = {node: i for i, node in enumerate(self.starts)}  # breadth-first, in file order
        queue = deque(order)
        while queue:
            for targets in self.targets[queue.popleft()].values():
                queue += (new := [target for target in targets if target not in order])
                order |= {target: len(order) + i for i, target in enumerate(new)}
        self.loops: list[Loop] = []
        self._back: set[tuple[str, str]] = set()
        ahead = edges = {edge: None for edge in sorted(edges, key=lambda edge: order[edge[0]])}
        # A loop nesting forest (Steensgaard): the head of a cycle is the member that is reached
        # first; without the edges back to the heads, the same again finds the loops inside.
        while loops := [*self._cycles(order, ahead)]:
            self.loops += loops
            self._back |= {(s, t.head) for t in loops for s in t.members if (s, t.head) in ahead}
            ahead = {edge: None for edge in ahead if edge not in self._back}
        self._body = {loop.head: self._mask(loop.body) for loop in self.loops}
        self._heads = {
            node: self._mask(loop.head for loop in self.loops if node in loop.body)
            for node in self.nodes
        }
        # Upstream of a node: without the edges back to the heads of the loops that it is in.
        self._upstream: dict[str, int] = {}
        for heads in set(self._heads.values()):
            kept = [e for e in edges if e not in self._back or not heads & self._bit[e[1]]]
            along = self._upstream_along(kept)
            self._upstream |= {n: along[n] for n in self.nodes if self._heads[n] == heads}

    def _upstream_along(self, edges: Iterable[tuple[str, str]]) -> dict[str, int]:
        """For each node, the mask of the nodes from which these edges lead to it."""
        upstream = dict.fromkeys(self.nodes, 0)
        before: dict[str, int] = {}
        while upstream != before:
            before = dict(upstream)
            for source, target in edges:
                upstream[target] |= upstream[source] | self._bit[source]
        return upstream

    def _cycles(self, order: Iterable[str], edges: Iterable[tuple[str, str]]) -> Iterator[Loop]:
        """The outermost loops along these edges."""
        reach = self._upstream_along(edges)
        seen: set[str] = set()
        for head in order:
            if head in seen or not reach[head] & self._bit[head]:
                continue
            members = {n for n in self.members(reach[head]) if reach[n] & self._bit[head]}
            seen |= members
            entries = {(s, t) for s, t in edges if s not in members and t in members - {head}}
            yield Loop(head, members, members | self._side_work(members), entries)

    def _side_work(self, members: set[str]) -> set[str]:
        """What is reached from a loop only by edges whose action goes on inside it too, and from
        nowhere else: a notification, a log."""
        side = set(self.nodes) - members - set(self.starts)
        while True:
            left = {
                target
                for source, by_action in self.targets.items()
                for targets in by_action.values()
                for target in targets
                if source not in members | side
                or source in members
                and not members.intersection(targets)
            }
            if not side & left:
                return side
            side -= left

    def _mask(self, nodes: Iterable[str]) -> int:
        return sum(self._bit[node] for node in nodes)

    def members(self, mask: int) -> list[str]:
        """The nodes in a bit mask, in file order."""
        return [node for node, bit in self._bit.items() if mask & bit]

    def one_token_in(self, loop: Loop) -> bool:
        """Whether only one token can ever be in a loop, which may then be entered anywhere."""
        leads = {*loop.members, *self.members(self.reach[loop.head])}
        forks = [ts for node in leads for ts in self.targets[node].values()]
        return len(self.starts) == 1 and not any(len(leads.intersection(ts)) > 1 for ts in forks)

    def begin(self, inputs: Mapping[str, Any]) -> dict[str, str]:
        """The values of a new run's context, as JSON texts: the inputs over the graph's own.
        RunError where one is missing or not JSON."""
        if missing := sorted(self.needs - self.inputs.keys() - inputs.keys()):
            mend = " ".join(f"--input {name}=..." for name in missing)
            raise RunError(f'flow "{self.id}" needs the input {", ".join(missing)}; add {mend}')
        ctx = Context({})
        try:
            for name, value in {**self.inputs, **inputs}.items():
                ctx[name] = value
        except ValueError as error:
            raise RunError(f'flow "{self.id}", inputs: {error}') from None
        return ctx.changes

    def children(self, certain: bool = False) -> set[str]:
        """The flows that it runs as children; only those that no choice can avoid if `certain`."""
        nodes = [*self.starts] if certain else [*self.nodes]
        for node in nodes if certain else ():
            if len(self.targets[node].keys() - {ERROR}) == 1:
                nodes += [t for ts in self.targets[node].values() for t in ts if t not in nodes]
        runs = [run for node in nodes for run in self.nodes[node].runs().items()]
        return {flow for flow, always in runs if always or not certain}

    def _find_needs(self) -> set[str]:
        """The context keys that only who starts a run can give: no node that leads to their
        reader writes them, and the graph's inputs lack them."""
        writes = {node: self.nodes[node].writes() for node in self.nodes}
        needs = set()
        for node, step in self.nodes.items():
            given = set(self.inputs).union(*(writes[n] for n in self.members(self.reach[node])))
            for paths in step.inputs.values():
                keys = [path.split("/")[0] for path in paths]
                if not given.intersection(keys):
                    needs.add(keys[0])
        return needs

    def may_overlap(self, one: str, other: str) -> bool:
        """Whether two nodes may run at the same time: neither is upstream of the other, and they
        do not hang on different actions of one node."""
        a, b = self._bit[one], self._bit[other]
        if a & self._upstream[other] or b & self._upstream[one]:
            return False
        return not any(self._chooses(node, one, other) for node in self.nodes)

    def _chooses(self, node: str, one: str, other: str) -> bool:
        """Whether each run of a node leads to at most one of two others."""
        if len(self.targets[node]) < 2 or node in (one, other):
            return False
        around = self._reached(self.starts, node)
        if one in around or other in around:
            return False
        reached = {a: self._reached(ts, node) for a, ts in self.targets[node].items()}
        # In a loop that one of the two is behind, an action that also goes on could be followed by
        # the other's action in the next round, while the first one's token still waits.
        for end in (one, other):
            if any(node in loop.body and end not in loop.body for loop in self.loops):
                if any(end in found and node in found for found in reached.values()):
                    return False
        return not any(one in found and other in found for found in reached.values())

    def _reached(self, sources: Iterable[str], without: str) -> set[str]:
        """The nodes that are reached from some, themselves included, not going on behind one."""
        found: set[str] = set()
        queue = [*sources]
        while queue:
            node = queue.pop()
            if node not in found:
                found.add(node)
                if node != without:
                    queue += [t for targets in self.targets[node].values() for t in targets]
        return found


# ── 4. Registry ──────────────────────────────────────────────────────────────────────────────
# Which node types there are, and which graphs. A graph is checked before it can run, every
# finding at once, each with its file, place and mend.

Finding = tuple[str, str]  # the place in the file, and what is wrong there


def _texts(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(text, str) and text for text in values)


def _number(value: Any, most: float, *types: type) -> bool:
    return type(value) in types and 0 <= value <= most


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a string that is not empty", lambda value: isinstance(value, str) and value != ""),
    "id": (
        "1 to 128 letters, digits, dots, dashes or underscores",
        lambda value: type(value) in (str, int) and bool(SAFE_ID.fullmatch(str(value))),
    ),
    "inputs": (
        "an object of name: key, or name: list of keys",
        lambda value: isinstance(value, dict) and all(map(_texts, value.values())),
    ),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "count": ("a whole number from 0 to 1000", lambda value: _number(value, 1000, int)),
    "seconds": ("seconds, at most 86400", lambda value: _number(value, 86400, int, float)),
    "any": ("a JSON value", lambda value: True),
}
GRAPH = {
    "description": Field("text", "one line, for --list"),
    "inputs": Field("object", "default inputs, which whoever starts a run may override"),
    "nodes": Field("list", "the steps", True),
    "edges": Field("list", "what follows on what"),
}
NODE = {
    "id": Field("id", "unique in the graph; the key of its result", True),
    "type": Field("text", "a name in the registry", True),
    "data": Field("object", "the fields of its type"),
    "config": Field("object", "retries and timeout"),
}
CONFIG = {
    "retries": Field("count", "how often a failed exec is tried again (2)"),
    "timeout": Field("seconds", "how long one exec may take (120)"),
}
DATA = {
    "inputs": Field(
        "inputs", "name: context key, path into it, or list, of which the first counts"
    ),
    "example": Field("any", "the answer in a dry run"),
}
EDGE = {
    "source": Field("id", "the node that it leaves", True),
    "target": Field("id", "the node that it leads to", True),
    "action": Field("text", "the action that it is for (default)"),
}


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint for a name that is unknown: the nearest one, else all that there are."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, 1)
    return f'did you mean "{near[0]}"?' if near else f"there is {', '.join(names) or 'none'}"


def check_fields(place: str, given: Any, fields: Mapping[str, Field]) -> Iterator[Finding]:
    """What is wrong with an object in a graph file, by the table of its fields."""
    if not isinstance(given, dict):
        yield place, f"must be an object, not {encode(given):.80}"
        return
    for name in given.keys() - fields.keys():
        yield f"{place}.{name:.80}", f"is not a field here; {nearest(name, fields)}"
    for name, (kind, _, required) in fields.items():
        what, fits = KINDS[kind]
        if name in given and not fits(given[name]):
            yield f"{place}.{name}", f"must be {what}, not {encode(given[name]):.80}"
        elif required and name not in given:
            yield f"{place}.{name}", f"is missing; it must be {what}"


def check_parts(graph: Any) -> Iterator[Finding]:
    """What is wrong with a graph's parts, each by itself; a Flow can be built where nothing is."""
    yield from (findings := [*check_fields("$", graph, GRAPH)])
    if findings:
        return
    nodes, edges = graph["nodes"], graph.get("edges", [])
    if not 1 <= len(nodes) <= MAX_NODES or len(edges) > 5 * MAX_NODES:
        yield "$.nodes", f"must be 1 to {MAX_NODES} nodes, with at most {5 * MAX_NODES} edges"
    seen: set[str] = set()
    for i, node in enumerate(nodes):
        place = f"$.nodes[{i}]"
        yield from (findings := [*check_fields(place, node, NODE)])
        if findings:
            continue
        if str(node["id"]) in seen:
            yield f"{place}.id", f'"{node["id"]}" is the id of another node too; give it its own'
        seen.add(str(node["id"]))
        yield from check_fields(f"{place}.config", node.get("config", {}), CONFIG)
        if node["type"] in Registry.types:
            fields = DATA | Registry.types[node["type"]].fields
            yield from check_fields(f"{place}.data", node.get("data", {}), fields)
        else:
            hint = nearest(node["type"], Registry.types)
            yield f"{place}.type", f'no node type "{node["type"]:.80}"; {hint}; --import adds more'
    for i, edge in enumerate(edges):
        place = f"$.edges[{i}]"
        yield from (findings := [*check_fields(place, edge, EDGE)])
        for end in () if findings else ("source", "target"):
            if str(edge[end]) not in seen:
                yield f"{place}.{end}", f'"{edge[end]}" is not a node; {nearest(edge[end], seen)}'


def check_flow(flow: Flow, graph: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with a flow as a whole."""
    places = {node: f"$.nodes[{i}]" for i, node in enumerate(flow.nodes)}
    for node in flow.nodes.values():
        data = f"{places[node.id]}.data"
        for name in node.names():
            if name not in node.inputs:
                yield data, f'"{name}" is not among its inputs; {nearest(name, node.inputs)}'
        for action in {str(node.data.get("otherwise", DEFAULT))} - {DEFAULT, *node.actions}:
            yield (
                f"{data}.otherwise",
                f'no edge carries "{action}"; {nearest(action, node.actions)}',
            )
        for child in node.runs():
            if child not in flow.registry:
                yield f"{data}.workflowId", f'no flow "{child}"; {nearest(child, flow.registry)}'
        yield from ((f"{data}{place}", text) for place, text in node.check())
    for loop in flow.loops:
        inside = [ts for node in loop.members for ts in flow.targets[node].values()]
        plain = all(DEFAULT in flow.targets[node] for node in loop.members)
        if plain and all(loop.members.intersection(targets) for targets in inside):
            yield places[loop.head], f'the loop of "{loop.head}" has no way out; give it one'
        for i, edge in enumerate(graph.get("edges", [])):
            ends = (str(edge["source"]), str(edge["target"]))
            if ends in loop.entries and not flow.one_token_in(loop):
                head = f'the loop of "{loop.head}" elsewhere than at its head'
                mend = f'a second node like "{ends[1]}", outside of the loop'
                yield f"$.edges[{i}]", f'"{ends[0]}" leads into {head}; use {mend}'
    for writer in flow.nodes.values():
        for node in flow.nodes.values():
            keys = writer.writes() & (node.reads() | node.writes())
            if keys and node is not writer and flow.may_overlap(writer.id, node.id):
                both = f'"{writer.id}" writes {sorted(keys)}, which "{node.id}" uses'
                yield places[node.id], f"{both}, and both may run at the same time; use other keys"


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError also for NaN, a key that stands twice, and nesting too deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {max(names, key=names.count)!r:.80} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Registry(Mapping[str, Flow]):
    """Flows by id, each built and checked, together with its sub-flows, when it is asked for.

    GraphError, with every finding, from `registry[id]` where a flow cannot run.
    """

    types: ClassVar[dict[str, type[Node]]] = {}

    @classmethod
    def add(cls, name: str, node_type: type[Node]) -> None:
        """Let graphs use a node type by this name."""
        cls.types[name] = node_type

    @classmethod
    def load(cls, folder: str | Path) -> Registry:
        """The graphs in a folder; a file's stem is its flow's id. GraphError without a folder."""
        if not Path(folder).is_dir():
            raise GraphError([f"{folder}: $: is not a folder; name the one with the graphs"])
        graphs: dict[str, Any] = {}
        for file in sorted(Path(folder).glob("*.json")):
            try:
                graphs[file.stem] = parse_json(file.read_text("utf-8"))
            except (ValueError, OSError) as error:
                graphs[file.stem] = error  # a finding, once somebody asks for this flow
        return cls(graphs, f"{folder}/")

    def __init__(self, graphs: Mapping[str, Any], folder: str = "") -> None:
        self.graphs = graphs
        self.folder = folder
        self._flows: dict[str, Flow] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.graphs)

    def __len__(self) -> int:
        return len(self.graphs)

    def __contains__(self, id: object) -> bool:
        return id in self.graphs

    def __getitem__(self, id: str) -> Flow:
        if id in self._flows:
            return self._flows[id]
        findings: list[str] = []
        flows: dict[str, Flow] = {}
        wanted = [id]
        for flow_id in wanted:
            for place, text in self._build(flow_id, flows):
                findings.append(f"{self.folder}{flow_id}.json: {place}: {text}")
            if flow_id in flows:
                children = sorted(flows[flow_id].children() & self.graphs.keys())
                wanted += [child for child in children if child not in wanted]
        for flow_id in flows:
            certain = [flow_id]
            for child in certain:
                found = flows[child].children(certain=True) if child in flows else ()
                certain += [c for c in found if c not in certain[1:]]
            if flow_id in certain[1:]:
                text = "runs itself as a sub-workflow, for ever; let a node choose"
                findings.append(f"{self.folder}{flow_id}.json: $: {text}")
        if findings:
            raise GraphError(findings)
        self._flows |= flows
        return flows[id]

    def _build(self, id: str, flows: dict[str, Flow]) -> Iterator[Finding]:
        graph = self.graphs.get(id, KeyError(f"there is no such file; {nearest(id, self)}"))
        if isinstance(graph, Exception):
            yield "$", f"cannot be read as JSON: {graph}"
            return
        yield from (findings := [*check_parts(graph)])
        if findings:
            return
        flow = flows[id] = Flow(id, graph, self)
        yield from check_flow(flow, graph)

    def bundle(self, id: str) -> tuple[str, str]:
        """What a run carries: a SHA-256, and the JSON of a flow's graph and its sub-flows'."""
        wanted = [id]
        for flow_id in wanted:
            wanted += [c for c in sorted(self[flow_id].children()) if c not in wanted]
        text = encode({flow_id: self.graphs[flow_id] for flow_id in sorted(wanted)})
        return hashlib.sha256(text.encode()).hexdigest(), text


# ── 5. In memory ─────────────────────────────────────────────────────────────────────────────
# What running a flow means, with nothing in the way. Sections 7 and 8 must agree with it.

RUNNING, COMPLETED, FAILED, CANCELLED = "running", "completed", "failed", "cancelled"
Event = dict[str, Any]  # what happened: "event", "run", "flow", and what belongs to it


@dataclass
class Status:
    """Where a run stands. `result` is its final_output, or its whole context without one."""

    run: str
    flow: str
    status: str
    result: Any = None
    context: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    usage: dict[str, int] = field(default_factory=dict)  # model tokens, by kind
    tokens: dict[str, str] = field(default_factory=dict)  # node: mark


class Run:
    """One execution of a flow; an executor gives it a way to follow it."""

    id: str

    def events(self) -> AsyncIterator[Event]:
        """What has happened, from the start, and then what happens, until the run has ended."""
        raise NotImplementedError

    async def status(self) -> Status:
        """Where the run stands now."""
        raise NotImplementedError

    async def result(self) -> Any:
        """Wait for the end and give the result; RunError where the run failed or was cancelled."""
        async for _ in self.events():
            pass
        status = await self.status()
        if status.status != COMPLETED:
            raise RunError(failure_of(self.id, status.flow, status.status, status.error))
        return status.result


class Executor(Protocol):
    """Where flows run."""

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> Run:
        """Start a run. RunError where an input is missing or not JSON."""


def new_id() -> str:
    """A random id: of a run, of a worker, of a run's version and the tokens made with it."""
    return secrets.token_hex(8)


def child_id(job: str, index: int) -> str:
    """The id of a job's child run: the same each time, so that starting it twice starts it once."""
    return hashlib.sha256(f"{job}/{index}".encode()).hexdigest()[:32]


def result_of(values: Mapping[str, str], gives: list[str] | None = None) -> str:
    """The JSON text of what a run with this context gives (see Child)."""
    if gives is None and "final_output" in values:
        return values["final_output"]
    keys = sorted(values) if gives is None else [key for key in gives if key in values]
    return "{" + ",".join(f"{encode(key)}:{values[key]}" for key in keys) + "}"


def failure_of(id: str, flow: str, status: str, error: str) -> str:
    """What is said of a run that has not completed, to its parent and to whoever waits for it."""
    return f'run {id} of "{flow}" {status}: {error}'


class InMemoryExecutor:
    """Runs flows in this process, this many nodes at the same time."""

    def __init__(self, concurrency: int = 10) -> None:
        self._slots = asyncio.Semaphore(concurrency)

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> MemoryRun:
        """Start a run, which goes on as long as the event loop does."""
        return MemoryRun(new_id(), flow, flow.begin(inputs), dry_run, self._slots)


class MemoryRun(Run):
    """A run in this process, or a child of one."""

    def __init__(
        self,
        id: str,
        flow: Flow,
        values: dict[str, str],
        dry_run: bool,
        slots: asyncio.Semaphore,
        parent: MemoryRun | None = None,
    ) -> None:
        self.id = id
        self._flow, self._values, self._dry_run, self._slots = flow, values, dry_run, slots
        self._status, self._error, self._steps = RUNNING, "", 0
        self._depth: int = parent._depth + 1 if parent else 0
        self._root: MemoryRun = parent._root if parent else self
        self._usage: dict[str, int] = {}  # of the children, too, where this is the root
        self._log: list[Event] = []  # likewise
        self._news = asyncio.Event()  # set, and replaced, whenever something has happened
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions: dict[str, asyncio.Future[Any]] = {}  # by the node that asks
        self._state, ready = flow.first(new_id())
        self._tell("started")
        self._queue(ready)

    async def events(self) -> AsyncIterator[Event]:
        """What has happened, from the start, and then what happens, until the run has ended."""
        seen = 0
        while self._status == RUNNING or seen < len(self._log):
            news = self._news
            if seen == len(self._log):
                await news.wait()
            for event in self._log[seen:]:
                seen += 1
                yield event

    async def status(self) -> Status:
        """Where the run stands now."""
        return Status(
            self.id,
            self._flow.id,
            self._status,
            json.loads(result_of(self._values)) if self._status == COMPLETED else None,
            {key: json.loads(text) for key, text in self._values.items()},
            self._error,
            self._usage,
            self._state.tokens,
        )

    async def answer(self, node: str, value: Any) -> None:
        """Answer what a node asks; RunError where it asks nothing. The first answer wins."""
        if node not in self._questions:
            raise RunError(f'run {self.id}: the node "{node}" does not wait for an answer')
        self._questions.pop(node).set_result(value)

    def _queue(self, nodes: list[str]) -> None:
        for node in nodes:
            task = asyncio.create_task(self._activate(node))
            self._tasks.add(task)  # the loop itself keeps only weak references
            task.add_done_callback(self._tasks.discard)

    async def _activate(self, id: str) -> None:
        node, visit = self._flow.nodes[id], self._state.visit(id)
        job = f"{self.id}/{id}/{self._state.tokens[id]}"
        results: list[Any] | None = None
        failure = ""

        async def retrying(reason: str, delay: float) -> None:
            self._tell("retrying", node=id, error=reason, delay=delay)

        try:
            while True:
                ctx = Context(self._values, job, visit, self._dry_run, self._depth, results)
                async with self._slots:
                    outcome = await execute(node, ctx, failure, retrying)
                if not isinstance(outcome, Park):
                    break
                self._tell("parked", node=id, question=outcome.question)
                try:
                    results = await self._wait_for(job, id, outcome)
                except RunError as error:
                    failure = str(error)
            self._commit(id, visit, outcome)
        except RunError as error:
            self._end(FAILED, str(error))

    async def _wait_for(self, job: str, node: str, park: Park) -> list[Any]:
        if park.question is not None:
            self._questions[node] = asyncio.get_running_loop().create_future()
            return [await self._questions[node]]
        runs = [
            MemoryRun(
                child_id(job, i),
                self._flow.registry[child.flow],
                child.values,
                self._dry_run,
                self._slots,
                self,
            )
            for i, child in enumerate(park.children)
        ]
        await asyncio.gather(*(run._ended() for run in runs))  # until one has failed, at most
        gives = [child.gives for child in park.children]
        return [json.loads(result_of(run._values, g)) for run, g in zip(runs, gives, strict=True)]

    async def _ended(self) -> None:
        while self._status == RUNNING:
            await self._news.wait()
        if self._status != COMPLETED:
            raise RunError(failure_of(self.id, self._flow.id, self._status, self._error))

    def _commit(self, node: str, visit: int, outcome: Outcome) -> None:
        if self._steps >= MAX_STEPS:
            raise RunError(too_many_steps(node))
        self._state, ready = self._flow.advance(self._state, node, outcome.action, new_id())
        self._steps += 1
        self._values = {**self._values, **outcome.changes}
        for kind, count in outcome.usage.items():
            self._root._usage[kind] = self._root._usage.get(kind, 0) + count
        self._tell("done", **done_event(node, visit, outcome))
        if not self._state.tokens:
            self._end(COMPLETED)
        elif self._status == RUNNING:  # a failed run keeps what its other nodes still finish
            self._queue(ready)

    def _end(self, status: str, error: str = "") -> None:
        if self._status == RUNNING:
            self._status, self._error = status, error
            self._tell(status, **({"error": error} if error else {}))

    def _tell(self, event: str, **more: Any) -> None:
        record = {"event": event, "run": self.id, "flow": self._flow.id, **more}
        self._root._log.append(record)
        for run in {self, self._root}:
            run._news.set()
            run._news = asyncio.Event()


def done_event(node: str, visit: int, outcome: Outcome) -> Event:
    """What the event of a commit says."""
    event = {"node": node, "visit": visit, "action": outcome.action}
    return {**event, "seconds": round(outcome.seconds, 3)} | (
        {"usage": outcome.usage} if outcome.usage else {}
    )


def too_many_steps(node: str) -> str:
    """What is said of a run that seems to go on for ever."""
    return f'node "{node}": the run has taken {MAX_STEPS} steps; does a loop lack a limit?'


# ── 6. Redis: keys and scripts ───────────────────────────────────────────────────────────────
# All that several processes must agree on. A step that takes more than one command is a script,
# which Redis runs as a whole: it checks first and writes last, for there is no roll-back.
#
#   key                    type        holds
#   ready                  list        jobs that any worker may take: LPUSH in, BLMOVE RIGHT LEFT out
#   processing:<worker>    list        what this worker has taken and not yet given back
#   workers                sorted set  who exists, by the time of joining
#   buried                 sorted set  who was found dead, by the time of that; for a day
#   worker:<worker>        string      there while the worker lives (a TTL): what it is doing
#   runs                   sorted set  runs that a user started, by the time of starting
#   run:<id>               hash        origin, status, version, tokens, visits, steps, error, usage
#   run:<id>:context       hash        one field a context key: its value as JSON text
#   run:<id>:parked        hash        what parked jobs wait for, and what has come of it
#   run:<id>:events        stream      what happened to a root run and its children, capped
#   graph:<sha256>         string      the graph that a run was started with, and its sub-flows
#
# A job's life, in which it is always in some list, so that no worker's death can lose it:
#
#   ready --BLMOVE--> processing:<worker> --CLAIM--> prep, exec, post --COMMIT--> gone, its
#     '<--REAP, GIVE_BACK--'                                      successors are in ready


class Job(NamedTuple):
    """One activation of one node; as text run/node/token."""

    run: str
    node: str
    token: str

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True)
class Origin:
    """What never changes in a run: written at its start."""

    flow: str
    graph: str  # SHA-256 of its graph and sub-flows
    root: str  # the run that a user started
    dry_run: bool = False
    depth: int = 0
    parent: str = ""  # of a child: the job that waits for it
    index: int = 0  # of a child: which of that job's
    gives: list[str] | None = None


class Keys:
    """Names of keys; they share a hash tag, and so a slot of a Redis Cluster."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def __call__(self, *parts: str) -> str:
        return f"{{{self.namespace}}}:{':'.join(parts)}"

    def of(self, run: str, origin: Origin, *more: str) -> list[str]:
        """KEYS of the scripts that change a run, as they are named in SHARED."""
        parent = origin.parent.partition("/")[0] or run
        names = [(run,), (run, "context"), (run, "parked"), (origin.root, "events"), (origin.root,)]
        names += [(parent,), (parent, "parked")]
        return [*(self("run", *name) for name in names), self("ready"), *more]


# What the scripts share. Their arguments are one JSON object, `a`; context keys and values follow
# it as they are, for Lua would make {} of [] and round integers.
SHARED = """
local run, context, parked, events, root, parent, parents_parked, ready, mine = unpack(KEYS)
local call, a = redis.call, cjson.decode(ARGV[1])

local function push(list, jobs)
  for _, job in ipairs(jobs) do call('LPUSH', list, job) end
end
local function note(texts)
  for _, text in ipairs(texts) do call('XADD', events, 'MAXLEN', '~', 10000, '*', 'event', text) end
end
local function put_context()
  for i = 2, #ARGV, 2 do call('HSET', context, ARGV[i], ARGV[i + 1]) end
end
local function live(days)
  for _, key in ipairs({run, context, parked, events}) do call('EXPIRE', key, days * 86400) end
end
local function active(run, job)  -- whether a job's run is running, and its token still there
  local node, token = string.match(job, '/(.*)/(.*)')
  local found = call('HMGET', run, 'status', 'tokens')
  return found[1] == 'running' and cjson.decode(found[2])[node] == token
end

-- What a job waits for, noted once, before the first child that will give it: whoever cancels the
-- run must find the children.
local function expect(parked, job, count, question)
  if call('HSETNX', parked, job, question) == 1 then
    call('HSET', parked, job .. ' count', count, job .. ' left', count)
    call('EXPIRE', parked, 30 * 86400)
  end
end
-- A child's end, or a person's answer: noted once. It queues the job, if that is parked and now
-- has something to read: all that it waits for, or a failure.
local function tell(run, parked, job, index, status, result)
  if call('EXISTS', run) == 0 or call('HSETNX', parked, job .. ' ' .. index, result) == 0 then
    return 0
  end
  call('HSET', run, 'version', a.version)
  local left = call('HINCRBY', parked, job .. ' left', -1)
  if status ~= 'completed' then call('HINCRBY', parked, job .. ' bad', 1) end
  if (left == 0 or status ~= 'completed') and call('HGET', run, 'status') == 'running'
     and call('HDEL', parked, job .. ' is parked') == 1 then
    push(ready, {job})
  end
  return 1
end
local function finish(status)
  call('HSET', run, 'status', status, 'version', a.version)
  if a.error then call('HSET', run, 'error', a.error) end
  note({a.ending})
  if a.parent then tell(parent, parents_parked, a.parent, a.index, status, a.told) end
end
"""


class Script:
    """A Lua script, and the digest by which Redis knows it."""

    def __init__(self, text: str) -> None:
        self.text = SHARED + text
        self.digest = hashlib.sha1(self.text.encode()).hexdigest()

    def __call__(
        self, keys: list[str], values: Mapping[str, str] | None = None, **named: Any
    ) -> tuple[Any, ...]:
        """The command that runs it with these arguments and context values."""
        a = encode({name: value for name, value in named.items() if value is not None})
        flat = [text for pair in (values or {}).items() for text in pair]
        return ("EVALSHA", self.digest, len(keys), *keys, a, *flat)


# START makes a run and queues its start nodes; once, and for a parent only while its job is active.
#   KEYS: as in SHARED, graph, runs      a: id version origin tokens visits jobs ending graph parent
#                                        count; and the context
START = Script("""
if call('EXISTS', run) == 1 or (a.parent and not active(parent, a.parent)) then return 0 end
local now = call('TIME')[1]
call('HSET', run, 'status', 'running', 'version', a.version, 'origin', a.origin, 'created', now,
     'tokens', a.tokens, 'visits', a.visits, 'steps', 0)
put_context()
push(ready, a.jobs)
note({a.started})
live(30)
if a.parent then
  expect(parents_parked, a.parent, a.count, '')
else
  call('SET', mine, a.graph, 'EX', 30 * 86400)
  call('ZADD', KEYS[10], now, a.id)
end
return 1
""")

# CLAIM reads what is needed to run jobs of one run.
#   KEYS: run, context, parked           a: jobs
#   gives [version, status, tokens, visits, steps, origin], context, each job's crashes, parked
CLAIM = Script("""
local found = call('HMGET', run, 'version', 'status', 'tokens', 'visits', 'steps', 'origin')
local crashes, waits = {}, {}
for i, job in ipairs(a.jobs) do
  crashes[i] = call('HGET', run, 'crashes ' .. job) or '0'
  if call('HEXISTS', parked, job) == 1 then waits = call('HGETALL', parked) end
end
return {found, call('HGETALL', context), crashes, waits}
""")

# COMMIT is the only way in which a run moves: all of it if the run's version is still the one that
# the decision was made from, else nothing (I1). It needs no custody: the token is the fence, and
# who commits it first wins. A failed run keeps what its jobs still finish, and queues nothing.
#   KEYS: as in SHARED, processing       a: from version done tokens visits steps usage events keep
#                                        push; ended ending parent index told; and the context
#   gives [status], or as CLAIM does what stands there instead
COMMIT = Script("""
local found = call('HMGET', run, 'version', 'status', 'tokens', 'visits', 'steps', 'origin')
if found[1] ~= a.from then return {found, call('HGETALL', context)} end
for _, job in ipairs(a.done) do call('LREM', mine, 1, job) end
put_context()
for kind, count in pairs(a.usage) do call('HINCRBY', root, 'usage ' .. kind, count) end
call('HSET', run, 'version', a.version, 'tokens', a.tokens, 'visits', a.visits, 'steps', a.steps)
note(a.events)
if found[2] ~= 'running' then return {found[2]} end
push(mine, a.keep)
push(ready, a.push)
if a.ended then
  finish('completed')
  call('DEL', parked)
end
live(a.ended and 7 or 30)
return {found[2]}
""")

# FAIL ends a run, whose tokens stay. Only a job's custodian may: a worker that was taken for dead
# must not fail what another one is doing.
#   KEYS: as in SHARED, processing       a: job version error ending parent index told
#   gives 1 if the job was in custody
FAIL = Script("""
if call('LREM', mine, 1, a.job) == 0 then return 0 end
local status = call('HGET', run, 'status')
if status == 'running' then finish('failed') elseif status == 'failed' then note({a.ending}) end
return 1
""")

# PARK ends the custody of a job until there is something for it to read; if there is already, it
# goes back to ready. A job of a cancelled run stays: its worker cancels the children first.
#   KEYS: as in SHARED, processing       a: job version count question event
#   gives the run's status
PARK = Script("""
local status = call('HGET', run, 'status')
if not status or status == 'cancelled' then return status end
if call('LREM', mine, 1, a.job) == 0 or status ~= 'running' then return status end
expect(parked, a.job, a.count, a.question)
call('HSET', run, 'version', a.version)
local found = call('HMGET', parked, a.job .. ' left', a.job .. ' bad')
if tonumber(found[1]) <= 0 or tonumber(found[2] or 0) > 0 then
  push(ready, {a.job})
else
  call('HSET', parked, a.job .. ' is parked', 1)
  note({a.event})
end
return status
""")

# GIVE_BACK returns a job to where it is taken next.
#   KEYS: processing, ready, run         a: job crashed
#   gives 1 if it was in custody
GIVE_BACK = Script("""
if call('LREM', KEYS[1], 1, a.job) == 0 then return 0 end
if a.crashed and call('EXISTS', KEYS[3]) == 1 then
  call('HINCRBY', KEYS[3], 'crashes ' .. a.job, 1)
end
call('RPUSH', KEYS[2], a.job)
return 1
""")

# REAP gives back what a dead worker had taken, a crash counted for each, and buries the worker.
#   KEYS: heartbeat, processing, workers, buried, ready, each job's run      a: worker jobs
#   gives how many jobs it gave back
REAP = Script("""
if call('EXISTS', KEYS[1]) == 1 then return 0 end
local moved = 0
for i, job in ipairs(a.jobs) do
  if call('LREM', KEYS[2], 1, job) == 1 then
    moved = moved + 1
    if call('EXISTS', KEYS[5 + i]) == 1 then call('HINCRBY', KEYS[5 + i], 'crashes ' .. job, 1) end
    call('RPUSH', KEYS[5], job)
  end
end
if call('ZREM', KEYS[3], a.worker) == 1 then
  call('ZADD', KEYS[4], call('TIME')[1], a.worker)
end
return moved
""")

# BEAT keeps a worker alive; with PEXPIRE, which works at maxmemory, where SET does not. A key that
# is gone while the worker is still in `workers` means that Redis was away: it is set again.
#   KEYS: heartbeat, workers             a: worker lease doing born
#   gives 0 if the worker was buried
BEAT = Script("""
if a.born then call('ZADD', KEYS[2], call('TIME')[1], a.worker) end
if call('PEXPIRE', KEYS[1], a.lease) == 0 and not call('ZSCORE', KEYS[2], a.worker) then return 0 end
redis.pcall('SET', KEYS[1], a.doing, 'PX', a.lease)
return 1
""")

# CANCEL ends a run for good, and queues what waits for children: who takes it cancels those.
#   KEYS: as in SHARED                   a: version error ending parent index told
#   gives the status that it found
CANCEL = Script("""
local status = call('HGET', run, 'status')
if status ~= 'running' and status ~= 'failed' then return status end
finish('cancelled')
for _, name in ipairs(call('HKEYS', parked)) do
  local job = string.match(name, '^(.*) count$')
  if job then
    call('HDEL', parked, job .. ' is parked')
    push(ready, {job})
  end
end
live(7)
return status
""")

# RESUME queues each active token of a failed run anew, crashes forgotten. A child takes back what
# it told its parent, which then waits for it again.
#   KEYS: as in SHARED                   a: id version event parent index; and the context
#   gives the status that it found
RESUME = Script("""
local found = call('HMGET', run, 'status', 'tokens')
if found[1] ~= 'failed' then return found[1] end
for _, name in ipairs(call('HKEYS', run)) do
  if string.match(name, '^crashes ') or name == 'error' then call('HDEL', run, name) end
end
call('HSET', run, 'status', 'running', 'version', a.version, 'steps', 0)
put_context()
if a.parent and call('HDEL', parents_parked, a.parent .. ' ' .. a.index) == 1 then
  call('HINCRBY', parents_parked, a.parent .. ' left', 1)
  call('HINCRBY', parents_parked, a.parent .. ' bad', -1)
end
for node, mark in pairs(cjson.decode(found[2])) do
  if mark ~= 'waiting' and mark ~= 'returned' then
    local job = a.id .. '/' .. node .. '/' .. mark
    call('HDEL', parked, job .. ' is parked')
    push(ready, {job})
  end
end
note({a.event})
live(30)
return found[1]
""")

# ANSWER gives a person's answer to the job that asked; the first one wins.
#   KEYS: as in SHARED                   a: job version told event
#   gives 1 if the job waited for it
ANSWER = Script("""
if not active(run, a.job) or (call('HGET', parked, a.job) or '') == '' then return 0 end
if tell(run, parked, a.job, 0, 'completed', a.told) == 0 then return 0 end
note({a.event})
return 1
""")

# NOTE records an event of a run that is still there.
#   KEYS: as in SHARED                   a: event
NOTE = Script("""
if call('EXISTS', run) == 1 then note({a.event}) end
return 1
""")

SCRIPTS = {s.digest: s for s in [*globals().values()] if isinstance(s, Script)}


# ── 7. Redis: starting and steering runs ─────────────────────────────────────────────────────
# What a client does. A run carries its graph, so a worker needs node types, but no graph files.

BUSY = ("OOM", "READONLY", "LOADING", "BUSY", "MASTERDOWN", "UNBLOCKED", "CLUSTERDOWN", "TRYAGAIN",
        "NOREPLICAS", "MISCONF")  # fmt: skip


def transient(error: BaseException) -> bool:
    """Whether Redis may well answer when it is asked again."""
    if isinstance(error, AuthenticationError):
        return False  # although redis-py calls it a connection error
    if isinstance(error, ResponseError):
        return str(error).startswith(BUSY)
    return isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)


def connect(url: str) -> redis.asyncio.Redis:
    """A client that never sends a command again by itself: with BLMOVE that would lose a job."""
    never = Retry(NoBackoff(), 0)
    return redis.asyncio.Redis.from_url(
        url, decode_responses=True, socket_timeout=5, socket_connect_timeout=5, retry=never
    )


class Link:
    """A way to Redis on which what is ready together travels together. All that is sent here may
    be sent twice without harm, so it outlasts any outage, and says so once."""

    def __init__(self, url: str) -> None:
        self.client = connect(url)
        self.back_since = 0.0  # when Redis was last back, by time.monotonic
        self._queue: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """The reply, some time; ResponseError where Redis refuses the command for good."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((command, reply))
        if not self._flushing:
            self._flushing = asyncio.create_task(self._flush())
        return reply

    async def _flush(self) -> None:
        delay = 0.0
        while self._queue:
            batch, self._queue = self._queue, []
            held_up = await self._exchange(batch)
            if held_up and not delay:
                log.warning("redis is away; waiting for it")
            if held_up:
                self._queue = held_up + self._queue
                delay = min(1.0, 2 * delay or 0.05)
                await asyncio.sleep(delay)
            elif delay:
                log.warning("redis is back")
                delay, self.back_since = 0.0, time.monotonic()
        self._flushing = None

    async def _exchange(self, batch: list[Any]) -> list[Any]:
        """Send, and hand out the replies; gives back what must be sent again."""
        try:
            async with self.client.pipeline(transaction=False) as pipe:
                for command, _ in batch:
                    pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
            if any(isinstance(reply, NoScriptError) for reply in replies):  # the others were run
                for script in SCRIPTS.values():
                    await self.client.script_load(script.text)
        except Exception as error:
            replies = [error] * len(batch)
        held_up = []
        for (command, future), reply in zip(batch, replies, strict=True):
            if (
                isinstance(reply, NoScriptError)
                or isinstance(reply, Exception)
                and transient(reply)
            ):
                held_up.append((command, future))
            elif isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        return held_up


def event_text(event: str, run: str, flow: str, **more: Any) -> str:
    """An event as it is recorded."""
    return encode({"event": event, "run": run, "flow": flow, **more})


def pairs(flat: Any) -> dict[str, str]:
    """A hash, from whatever form Redis replied it in."""
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


class RedisExecutor:
    """Starts runs for the workers on a Redis; a run then needs the process no more."""

    def __init__(self, url: str = "redis://localhost:6379", namespace: str = "agentflow") -> None:
        self.link = Link(url)
        self.key = Keys(namespace)

    async def open(self) -> None:
        """Find out whether Redis is there and will do; RedisError where not."""
        probe = self.key("ready:probe")
        await self.link.client.execute_command("LMOVE", probe, probe, "RIGHT", "LEFT")

    async def close(self) -> None:
        """Close the connections."""
        await self.link.client.aclose()

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> RedisRun:
        """Queue the start nodes of a new run. RunError where an input is missing or not JSON."""
        digest, graph = flow.registry.bundle(flow.id)
        id = new_id()
        origin = Origin(flow.id, digest, id, dry_run)
        await self.start(id, origin, flow, flow.begin(inputs), graph=graph)
        return RedisRun(self, id, origin)

    def start(
        self, id: str, origin: Origin, flow: Flow, values: dict[str, str], **more: Any
    ) -> asyncio.Future[Any]:
        """Make a run: with `graph` that of a user, with `count` one of a job's children."""
        version = new_id()
        state, ready = flow.first(version)
        keys = self.key.of(id, origin, self.key("graph", origin.graph), self.key("runs"))
        return self.link.send(
            *START(
                keys, values, id=id, version=version, origin=encode(vars(origin)),
                tokens=encode(state.tokens), visits=encode(state.visits),
                jobs=[str(Job(id, node, version)) for node in ready],
                started=event_text("started", id, flow.id), parent=origin.parent or None, **more,
            )
        )  # fmt: skip

    async def find(self, id: str) -> RedisRun:
        """A run that exists; RunError where it does not."""
        origin = SAFE_ID.fullmatch(id) and await self.link.send(
            "HGET", self.key("run", id), "origin"
        )
        if not origin:
            raise RunError(f"there is no run {id!r:.140} on this Redis; it may have expired")
        return RedisRun(self, id, Origin(**json.loads(origin)))


class RedisRun(Run):
    """A run on a Redis, from outside."""

    def __init__(self, executor: RedisExecutor, id: str, origin: Origin) -> None:
        self.id = id
        self.origin = origin
        self.executor = executor
        self.send = executor.link.send
        self.keys = executor.key.of(id, origin)

    async def status(self) -> Status:
        """Where the run stands now. RunError where it is no more."""
        replies = await asyncio.gather(*(self.send("HGETALL", key) for key in self.keys[:2]))
        run, values = map(pairs, replies)
        if not run:
            raise RunError(f"run {self.id} is not on this Redis any more")
        return Status(
            self.id,
            self.origin.flow,
            run["status"],
            json.loads(result_of(values)) if run["status"] == COMPLETED else None,
            {key: json.loads(text) for key, text in values.items()},
            run.get("error", ""),
            {name[6:]: int(count) for name, count in run.items() if name.startswith("usage ")},
            json.loads(run["tokens"]),
        )

    async def events(self) -> AsyncIterator[Event]:
        """What has happened, from the start, and then what happens, until the run has ended."""
        last = "-"
        while True:
            status = await self.send("HGET", self.keys[0], "status")
            found = await self.send("XRANGE", self.keys[3], last, "+", "COUNT", 1000)
            for id, fields in found:
                last = f"({id}"
                yield json.loads(pairs(fields)["event"])
            if not found and status != RUNNING:
                return
            if not found:
                await asyncio.sleep(0.1)

    async def cancel(self) -> None:
        """End the run for good: its nodes and its children, too, within about a second. RunError
        where it has ended."""
        found = await self.send(
            *CANCEL(self.keys, **ending(self.id, self.origin, CANCELLED, "by request"))
        )
        if found not in (RUNNING, FAILED):
            raise RunError(f"run {self.id} is {found} already")

    async def resume(self, inputs: Mapping[str, Any] | None = None) -> None:
        """Go on from exactly where the run and its children failed, with these inputs over its
        context. RunError where it has not failed."""
        ctx = Context({})
        for name, value in (inputs or {}).items():
            ctx[name] = value
        status, parked = await asyncio.gather(self.status(), self.send("HGETALL", self.keys[2]))
        if status.status == FAILED:
            for name, told in pairs(parked).items():
                job, _, index = name.partition(" ")
                if index.isdecimal() and json.loads(told)[0] == FAILED:
                    child = await self.executor.find(child_id(job, int(index)))
                    await child.resume()
        found = await self.send(
            *RESUME(
                self.keys, ctx.changes, id=self.id, version=new_id(), index=self.origin.index,
                parent=self.origin.parent or None, event=event_text("resumed", self.id, self.origin.flow),
            )
        )  # fmt: skip
        if found != FAILED:
            raise RunError(f"run {self.id} is {found}; only a failed run can be resumed")

    async def answer(self, node: str, value: Any) -> None:
        """Answer what a node asks; RunError where it asks nothing. The first answer wins."""
        token = (await self.status()).tokens.get(node, "")
        given = await self.send(
            *ANSWER(
                self.keys, job=str(Job(self.id, node, token)), version=new_id(),
                told=to_json([COMPLETED, value], "the answer"),
                event=event_text("answered", self.id, self.origin.flow, node=node),
            )
        )  # fmt: skip
        if not given:
            raise RunError(f'run {self.id}: the node "{node}" does not wait for an answer')


def ending(
    run: str, origin: Origin, status: str, error: str = "", result: str = ""
) -> dict[str, Any]:
    """The arguments for a script that ends a run: among them what its parent is told."""
    told = result or encode(failure_of(run, origin.flow, status, error))
    more = {"error": error} if error else {}
    return {
        "version": new_id(),
        "ending": event_text(status, run, origin.flow, **more),
        "parent": origin.parent or None,
        "index": origin.index,
        "told": f'["{status}",{told}]',
        **more,
    }


# ── 8. Redis: the worker ─────────────────────────────────────────────────────────────────────
# Takes jobs, runs them, commits what came of them; and once a second shows that it lives and
# looks for jobs that somebody lost. Nothing is ever cancelled but a node's own work, which does
# not talk to Redis: safety comes from the processing list, not from `finally`.

CRASHES = 5  # how often a job may be with a worker that dies before its run fails


@dataclass
class View:
    """What a worker knows of a run: a version, and the state and context that belong to it."""

    id: str
    origin: Origin
    flow: Flow
    status: str = RUNNING
    version: str = ""
    state: State = State({}, {})
    steps: int = 0
    context: dict[str, str] = field(default_factory=dict)
    outbox: list[tuple[Job, Outcome]] = field(default_factory=list)  # to be committed
    committing: bool = False

    def update(self, run: list[str], context: Any) -> None:
        """Take over what stands in Redis."""
        self.version, self.status, self.context = run[0], run[1], pairs(context)
        self.state, self.steps = State(json.loads(run[2]), json.loads(run[3])), int(run[4])


class Worker:
    """Runs jobs until it is told to stop."""

    def __init__(
        self,
        url: str = "redis://localhost:6379",
        namespace: str = "agentflow",
        concurrency: int = 10,
        grace: float = 30.0,
        lease: float = 6.0,
        beat: float = 1.0,
    ) -> None:
        self.executor = RedisExecutor(url, namespace)
        self.key, self.send = self.executor.key, self.executor.link.send
        self.fetch = connect(url)  # BLMOVE waits on a connection of its own
        self.concurrency, self.grace, self.lease, self.beat = concurrency, grace, lease, beat
        self.stopping = False
        self.counts = dict.fromkeys(("done", "refused", "audited", "reaped", "buried"), 0)
        self._graphs: dict[str, Registry] = {}
        self._views: dict[str, View] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._freed = asyncio.Event()
        self._be_born()

    def _be_born(self) -> None:
        self.id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
        self.processing = self.key("processing", self.id)
        self.held: dict[
            Job, asyncio.Task[Any] | None
        ] = {}  # in custody; the task while it executes
        self._suspects: list[tuple[View, Job, list[Any] | None, str]] = []  # have crashed before
        self._alone = False
        self._strange: set[str] = set()  # in our list, but not held, at the last audit

    async def run(self) -> None:
        """Work until `stop` is called. RedisError where Redis is not there or will not do."""
        await self.executor.open()
        await self._beat(born=True)
        self.executor.link.back_since = time.monotonic()
        tick = self._spawn(self._tick())
        while not self.stopping:
            self._freed.clear()
            if self._room() > 0:
                await self._take(self._room())
            else:
                await self._freed.wait()
        await self._leave()
        await tick
        await self.fetch.aclose()
        await self.executor.close()

    def stop(self) -> None:
        """Take nothing more, and end when what is held has ended, or after the grace period."""
        self.stopping = True
        self._freed.set()

    def _room(self) -> int:
        return 0 if self._suspects or self._alone else self.concurrency - len(self.held)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._landed)
        return task

    def _landed(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("this should not happen; the audit will give the job back", exc_info=error)

    async def _take(self, room: int) -> None:
        """Take up to this many jobs; without any, return after a second."""
        processing, taken = self.processing, []
        move = (self.key("ready"), processing, "RIGHT", "LEFT")
        try:
            taken += [await self.fetch.execute_command("BLMOVE", *move, 1)]
            if taken[0] and room > 1:
                async with self.fetch.pipeline(transaction=False) as pipe:
                    for _ in range(room - 1):
                        pipe.execute_command("LMOVE", *move)
                    taken += await pipe.execute()
        except Exception as error:  # what was moved without our hearing of it, the audit finds
            if not transient(error):
                raise
            await asyncio.sleep(0.2)
        by_run: dict[str, list[Job]] = {}
        for job in [Job(*text.split("/")) for text in taken if text]:
            if processing != self.processing:  # we were buried meanwhile
                await self._give_back(job, processing)
                continue
            self.held[job] = None
            by_run.setdefault(job.run, []).append(job)
        for run, jobs in by_run.items():
            self._spawn(self._claim(run, jobs))

    async def _claim(self, run: str, jobs: list[Job]) -> None:
        """Read what these jobs of one run need, and begin them."""
        keys = [
            self.key("run", run),
            self.key("run", run, "context"),
            self.key("run", run, "parked"),
        ]
        found, context, crashes, parked = await self.send(
            *CLAIM(keys, jobs=[str(job) for job in jobs])
        )
        if not found[0]:
            log.warning("run %s is gone; dropping its jobs %s", run, jobs)
            return await self._drop(jobs)
        origin = Origin(**json.loads(found[5]))
        try:
            view = self._views.get(run) or View(run, origin, await self._flow(origin))
        except GraphError as error:
            text = f"this worker lacks something: {error}; start one with --import, then --resume"
            for job in jobs:
                await self._fail(job, origin, text)
            return
        self._views[run] = view
        view.update(found, context)
        for job, count in zip(jobs, crashes, strict=True):
            await self._admit(view, job, int(count), pairs(parked))

    async def _flow(self, origin: Origin) -> Flow:
        if origin.graph not in self._graphs:
            graph = await self.send("GET", self.key("graph", origin.graph))
            self._graphs = dict([*self._graphs.items()][-99:])
            self._graphs[origin.graph] = Registry(json.loads(graph or "{}"))
        return self._graphs[origin.graph][origin.flow]

    async def _admit(self, view: View, job: Job, crashes: int, parked: dict[str, str]) -> None:
        """Begin a claimed job, unless it must not run, or not now."""
        if view.status == CANCELLED:
            return await self._drop_cancelled(view, [job])
        if view.status != RUNNING or view.state.tokens.get(job.node) != job.token:
            return await self._drop([job])  # a resume queues it anew; or it was committed already
        node = view.flow.nodes[job.node]
        if crashes >= (CRASHES if node.retries else 1):
            text = f'node "{job.node}": {crashes} workers died running it; --resume tries again'
            return await self._fail(job, view.origin, text)
        told = [json.loads(parked[f"{job} {i}"]) for i in range(int(parked.get(f"{job} count", 0)))
                if f"{job} {i}" in parked]  # fmt: skip
        failure = next((text for status, text in told if status != COMPLETED), "")
        complete = bool(told) and len(told) == int(parked[f"{job} count"])
        work = (view, job, [text for _, text in told] if complete else None, failure)
        if crashes:
            self._suspects.append(work)
            self._spawn(self._try_suspect())
        else:
            self._begin(*work)

    async def _try_suspect(self) -> None:
        """Run a job that has crashed by itself, so that it takes no other down; give back the rest."""
        if self._alone or not self._suspects or len(self.held) > len(self._suspects):
            return
        self._alone = True
        first, *others = self._suspects
        self._suspects = []
        for _, job, _, _ in others:
            await self._give_back(job, self.processing)
        self._begin(*first)

    def _begin(
        self, view: View, job: Job, results: list[Any] | None = None, failure: str = ""
    ) -> None:
        node, visit = view.flow.nodes[job.node], view.state.visit(job.node)
        origin = view.origin
        ctx = Context(view.context, str(job), visit, origin.dry_run, origin.depth, results)

        async def retrying(reason: str, delay: float) -> None:
            event = event_text(
                "retrying", view.id, origin.flow, node=job.node, error=reason, delay=delay
            )
            self.send(*NOTE(self.key.of(view.id, origin), event=event))

        task = self.held[job] = asyncio.create_task(execute(node, ctx, failure, retrying))
        task.add_done_callback(lambda task: self._executed(view, job, task))

    def _executed(self, view: View, job: Job, task: asyncio.Task[Outcome | Park]) -> None:
        if self.held.get(job) is not task:
            return  # cancelled, or given back
        error = (
            asyncio.CancelledError("it cancelled itself") if task.cancelled() else task.exception()
        )
        if error is not None:
            text = str(error) if isinstance(error, RunError) else f'node "{job.node}": {error!r}'
            self._spawn(self._fail(job, view.origin, text))
        elif isinstance(outcome := task.result(), Park):
            self._spawn(self._park(view, job, outcome))
        else:
            view.outbox.append((job, outcome))
            if not view.committing:
                view.committing = True
                self._spawn(self._commit_all(view))

    async def _commit_all(self, view: View) -> None:
        try:
            while view.outbox:
                await asyncio.sleep(0)  # what ends in the same instant shares a commit
                batch, view.outbox = view.outbox, []
                while batch and not await self._commit(view, batch):
                    pass
        finally:
            view.committing = False

    async def _commit(self, view: View, batch: list[tuple[Job, Outcome]]) -> bool:
        """Decide what the ends of these jobs lead to, and record it; False where the run had
        moved on meanwhile, so that it must be decided again."""
        state, steps, version = view.state, view.steps, new_id()
        ready: list[str] = []
        changes: dict[str, str] = {}
        usage: dict[str, int] = {}
        events: list[str] = []
        done: list[Job] = []
        for job, outcome in [*batch]:
            if state.tokens.get(job.node) != job.token or view.status == CANCELLED:
                batch.remove((job, outcome))
                self.counts["refused"] += 1
                await (
                    self._drop_cancelled(view, [job])
                    if view.status == CANCELLED
                    else self._drop([job])
                )
                continue
            try:
                if steps >= MAX_STEPS:
                    raise RunError(too_many_steps(job.node))
                visit = state.visit(job.node)
                state, new = view.flow.advance(state, job.node, outcome.action, version)
            except RunError as error:
                batch.remove((job, outcome))
                await self._fail(job, view.origin, str(error))
                continue
            steps += 1
            done.append(job)
            ready += new
            changes |= outcome.changes
            for kind, count in outcome.usage.items():
                usage[kind] = usage.get(kind, 0) + count
            events.append(
                event_text(
                    "done", view.id, view.origin.flow, **done_event(job.node, visit, outcome)
                )
            )
        if not done:
            return True
        jobs = [Job(view.id, node, version) for node in ready]
        room = 0 if self.stopping else max(1, self._room() + len(done))
        processing = self.processing
        context = view.context | changes
        ended: dict[str, Any] = {}
        if not state.tokens:
            ended = ending(
                view.id, view.origin, COMPLETED, result=result_of(context, view.origin.gives)
            )
            ended |= {"ended": True}
        reply = await self.send(
            *COMMIT(
                self.key.of(view.id, view.origin, processing), changes,
                **{
                    **ended, "from": view.version, "version": version, "tokens": encode(state.tokens),
                    "visits": encode(state.visits), "steps": steps, "usage": usage, "events": events,
                    "done": [str(job) for job in done],
                    "keep": [str(job) for job in jobs[:room]], "push": [str(job) for job in jobs[room:]],
                },
            )
        )  # fmt: skip
        if len(reply) > 1 and reply[0][0]:
            view.update(*reply)
            return False
        view.version, view.state, view.steps, view.context = version, state, steps, context
        self.counts["done"] += len(done)
        for job, outcome in batch:
            log.info("done %s in %.3f s", job, outcome.seconds)
        if reply[0] == RUNNING:
            for job in jobs[:room]:
                if processing == self.processing:
                    self._begin(view, job)
                else:
                    await self._give_back(job, processing)
        self._release(done)
        return True

    def _release(self, jobs: Iterable[Job]) -> None:
        """Forget jobs that are no longer in custody."""
        for job in jobs:
            self.held.pop(job, None)
            if job.run in self._views and not any(held.run == job.run for held in self.held):
                del self._views[job.run]
        if len(self.held) <= len(self._suspects):
            self._alone = False
            if self._suspects:
                self._spawn(self._try_suspect())
        self._freed.set()

    async def _drop(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            await self.send("LREM", self.processing, 1, str(job))
        self._release(jobs)

    async def _fail(self, job: Job, origin: Origin, text: str) -> None:
        log.warning("failed %s: %s", job, text.partition(":")[0])
        args = ending(job.run, origin, FAILED, text)
        keys = self.key.of(job.run, origin, self.processing)
        if not await self.send(*FAIL(keys, job=str(job), **args)):
            self.counts["refused"] += 1
        self._release([job])

    async def _give_back(self, job: Job, processing: str, crashed: bool = False) -> None:
        keys = [processing, self.key("ready"), self.key("run", job.run)]
        await self.send(*GIVE_BACK(keys, job=str(job), crashed=crashed))
        self._release([job])

    async def _park(self, view: View, job: Job, park: Park) -> None:
        """Start the children, and free the slot until they have ended, or a person has answered."""
        count = len(park.children) or 1
        origin = replace(view.origin, depth=view.origin.depth + 1, parent=str(job))
        starts = [
            self.executor.start(
                child_id(str(job), i), replace(origin, flow=child.flow, index=i, gives=child.gives),
                view.flow.registry[child.flow], child.values, count=count,
            )
            for i, child in enumerate(park.children)
        ]  # fmt: skip
        await asyncio.gather(*starts)
        event = event_text(
            "parked", view.id, view.origin.flow, node=job.node, question=park.question
        )
        status = await self.send(
            *PARK(
                self.key.of(view.id, view.origin, self.processing), job=str(job), version=new_id(),
                count=count, question=park.question or "", event=event,
            )
        )  # fmt: skip
        if status == CANCELLED:
            return await self._drop_cancelled(view, [job])
        self._release([job])

    async def _drop_cancelled(self, view: View, jobs: list[Job]) -> None:
        """Cancel the children of a cancelled run's jobs, and only then let go of the jobs."""
        for job in jobs:
            task = self.held.get(job)
            self.held[job] = None
            if task:
                task.cancel()
            count = await self.send("HGET", self.key("run", view.id, "parked"), f"{job} count")
            for i in range(int(count or 0)):
                child = await self.executor.find(child_id(str(job), i))
                try:
                    await child.cancel()
                except RunError:
                    pass
        await self._drop(jobs)

    # Once a second.

    async def _beat(self, born: bool = False) -> bool:
        doing = encode({str(job): bool(task) for job, task in self.held.items()})
        keys = [self.key("worker", self.id), self.key("workers")]
        lease = int(self.lease * 1000)
        return bool(
            await self.send(
                *BEAT(keys, worker=self.id, lease=lease, doing=doing, born=born or None)
            )
        )

    async def _tick(self) -> None:
        while not self.stopping or self.held:
            began = time.monotonic()
            await asyncio.sleep(self.beat)
            late = time.monotonic() - began - self.beat
            if late > self.beat:
                log.warning(
                    "a node blocked the event loop for %.1f s; one of %s",
                    late,
                    [str(job) for job in self.held],
                )
            if not await self._beat():
                await self._rise_again()
                continue
            await self._audit()
            await self._watch_runs()
            if time.monotonic() - self.executor.link.back_since > self.lease:
                await self._reap()

    async def _rise_again(self) -> None:
        """We were taken for dead: give back what is ours, and go on under a new name."""
        self.counts["buried"] += 1
        log.warning("%s was taken for dead; going on under another name", self.id)
        processing, held = self.processing, self.held
        self._be_born()
        await self._beat(born=True)
        for task in held.values():
            if task:
                task.cancel()
        for text in await self.send("LRANGE", processing, 0, -1):
            await self._give_back(Job(*text.split("/")), processing)

    async def _audit(self) -> None:
        """Give back what is in our list without our knowledge: a reply was lost."""
        listed = await self.send("LRANGE", self.processing, 0, -1)
        strange = {text for text in listed if Job(*text.split("/")) not in self.held}
        for text in strange & self._strange:
            self.counts["audited"] += 1
            log.warning("found %s, which we did not know of; giving it back", text)
            await self._give_back(Job(*text.split("/")), self.processing)
        self._strange = strange - self._strange

    async def _watch_runs(self) -> None:
        """End the work on runs that were cancelled."""
        for run, view in [*self._views.items()]:
            status = await self.send("HGET", self.key("run", run), "status")
            if status == CANCELLED:
                await self._drop_cancelled(view, [job for job in self.held if job.run == run])

    async def _reap(self) -> None:
        """Give back what dead workers had taken."""
        workers = await self.send("ZRANGE", self.key("workers"), 0, -1)
        buried = await self.send("ZRANGE", self.key("buried"), 0, -1)
        for worker in [*workers, *buried]:
            if worker == self.id or await self.send("EXISTS", self.key("worker", worker)):
                continue
            processing = self.key("processing", worker)
            jobs = await self.send("LRANGE", processing, 0, 999)
            if worker in buried and not jobs:
                continue
            keys = [
                self.key("worker", worker),
                processing,
                self.key("workers"),
                self.key("buried"),
                self.key("ready"),
            ]
            keys += [self.key("run", text.split("/")[0]) for text in jobs]
            moved = await self.send(*REAP(keys, worker=worker, jobs=jobs))
            self.counts["reaped"] += moved
            log.warning("worker %s is dead; gave back its %d jobs", worker, moved)

    async def _leave(self) -> None:
        """Finish what ends within the grace period, and give back the rest."""
        deadline = time.monotonic() + self.grace
        while self.held and time.monotonic() < deadline:
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                break
        for job, task in [*self.held.items()]:
            self.held[job] = None
            if task:
                task.cancel()
            await self._give_back(job, self.processing)
        for text in await self.send("LRANGE", self.processing, 0, -1):
            await self._give_back(Job(*text.split("/")), self.processing)
        await self.send("ZREM", self.key("workers"), self.id)
        await self.send("DEL", self.key("worker", self.id))
