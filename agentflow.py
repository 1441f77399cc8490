"""Run a graph of LLM steps: in this process, or over any number of workers that share a Redis.

    >>> class Greet(Node):
    ...     async def exec(self, prepared):
    ...         return "Hello " + prepared["name"]
    >>> Registry.add("greet", Greet)
    >>> node = {"id": "hello", "type": "greet", "data": {"inputs": {"name": "name"}}}
    >>> flows = Registry({"demo": {"nodes": [node]}})
    >>> async def main():
    ...     run = await flows["demo"].run({"name": "Ada"})  # or executor=RedisExecutor(url)
    ...     return await run.result()
    >>> asyncio.run(main())
    {'hello': 'Hello Ada', 'name': 'Ada'}

The words, each with an example:

    flow      a graph of nodes and edges                        flows["demo"]
    node      one step: prep reads, exec works, post writes     "hello"
    edge      leads from a node to the next, for one action     review --more--> plan
    action    what post returns; it chooses the edges           "default", "more", "error"
    context   a run's data: string keys, JSON values            {"name": "Ada"}
    run       one execution of a flow                           "5f0c1a..."
    token     stands at a node, at most one at each;            {"hello": "8d1f03..."}
              marked "waiting", "returned" (to a loop's head) or, of an active node, by a random id
    job       an active node's work, named run/node/mark;       "5f0c1a.../hello/8d1f03..."
              what the queue moves; a key by which others can tell a repetition (idempotency key)
    visit     which activation of its node this is since its loop was entered; 1 outside of loops
    child     a run that a node has started, and waits for; the root is the run that a user started
    parked    a job that waits for its children, for a person, or for a resume: no worker has it
    custody   a worker has it of the jobs in its list, until they end, are parked or given back
    heartbeat a key with a TTL (the lease) by which a worker shows that it lives
    delivery  a job's coming to a worker; if that worker dies, there will be another
    executor  where a flow runs: InMemoryExecutor, RedisExecutor, or one of your own

What holds, whatever is killed, whenever; each is named where it is upheld:

    I1  A node may execute more than once; its effect on the run commits at most once, and exactly
        once in a run that completes.
    I2  The job of each active token of a running or failed run is in exactly one place: the ready
        list, one worker's processing list, or parked.
    I3  A run that can move moves; one that cannot says why. No job is dropped in silence.
    I4  With deterministic nodes, executors agree in the context and in each (node, visit, action).
    I5  Every key of a run has a TTL. Besides, a run leaves only its entry in the list of runs.

Not promised: that a node executes only once; that a job with which five workers have died is run
once more; what Redis itself loses; an order between runs.

Sections: 1 Context, 2 Node, 3 Flow and the one rule, 4 Registry, 5 In memory,
6 Redis: keys and scripts, 7 Redis: starting and steering runs, 8 Redis: the worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakValueDictionary

import hiredis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger("agentflow")

MAX_VALUE = 1024 * 1024  # characters of one value's JSON text
MAX_STEPS = 10_000  # activations in a run since it was started or resumed: a loop must end
MAX_DEPTH = 16  # runs within runs
MAX_COUNT = 2**53  # of model tokens: Lua, in Redis, has only floats, exact up to here
PATIENCE = 600.0  # seconds for which an overloaded server is asked again
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # ids become parts of jobs and of Redis keys


class GraphError(ValueError):
    """For whoever wrote a graph: every finding, a line each, with file, place and what would do."""


class RunError(Exception):
    """For whoever started a run: why it cannot start, has failed, or refuses what it is told."""


class Permanent(Exception):
    """Raised in a node: what went wrong cannot get better, so exec is not tried again."""


class TryLater(Exception):
    """Raised in exec: the other side is overloaded. Tried again after `after` seconds, or the
    usual back-off, for ten minutes at most."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = max(0.0, float(after or 0))  # 0: the usual back-off


# ── 1. Context ───────────────────────────────────────────────────────────────────────────────
# A run's data, as JSON text everywhere: so both executors are equally strict, and share no object.

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


def as_unicode(text: str) -> str:
    """The text, lone surrogates escaped: they are no Unicode, and Redis' JSON refuses them."""
    return text.encode(errors="backslashreplace").decode()


@dataclass
class Context:
    """A node's view of its run. What it writes is committed only when it has succeeded; a value
    that it has read is a copy: changing it changes nothing until it is written back."""

    snapshot: dict[str, str]  # key: JSON text; shared with other nodes, therefore never written
    job: str = ""  # run/node/mark: the same in every delivery, an idempotency key
    visit: int = 1
    dry_run: bool = False
    depth: int = 0  # of its run: 0 where a user started it, 1 for its children
    results: list[Any] | None = None  # what the node parked for: its children's, or one answer
    failure: str = ""  # of a child that it parked for: with it the node has failed, too
    changes: dict[str, str] = field(default_factory=dict)  # what it wrote, as key: JSON text
    usage: dict[str, int] = field(default_factory=dict)  # model tokens that it used, by kind

    def __getitem__(self, path: str) -> Any:
        """The value at `key`, or inside it at `key/field/0`; KeyError where there is none."""
        key, *steps = path.split("/")
        try:
            value = json.loads(self.changes.get(key) or self.snapshot[key])
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
# One step of a graph. A node type is a subclass. A flow has one instance of each node, for all its
# activations at once, so it keeps no state of one: that travels from prep to exec to post.

DEFAULT = "default"  # the action of a node that answers nothing else, and of a plain edge
ERROR = "error"  # the action of a node that has failed for good, where an edge carries it
Record = Callable[..., None]  # records an event: its name, and what belongs to it


@dataclass
class Child:
    """A run to start for a node. Its result is the value of its context key `final_output`, or
    without that its whole context; if `gives` names keys, an object of these."""

    flow: str
    inputs: dict[str, Any]
    gives: list[str] | None = None
    context: dict[str, str] = field(default_factory=dict)  # made from the inputs


@dataclass(frozen=True)
class Park:
    """Returned by a prep that must wait: for these children, at least one, to end, or for a person
    to answer this question. Other jobs run meanwhile; then prep is called again, with
    `ctx.results`, and parks no more. If a child fails, the node fails, without another prep; the
    other children go on. A prep that a crash has interrupted must return the same Park again."""

    children: list[Child] = field(default_factory=list)
    question: str = ""


class Node:
    """A step. Override `exec`, and `prep` and `post` where it reads or writes more than its
    inputs and its own id; then also say so in `reads` and `writes`."""

    fields: ClassVar[dict[str, Any]] = {}  # what `data` may hold: see graphs/check.py
    backoff: ClassVar[float] = 0.5  # seconds, about, before the first retry; then doubled, up to 60

    def __init__(self, flow: Flow, spec: Mapping[str, Any]) -> None:
        self.flow = flow
        self.id = str(spec["id"])
        self.actions = [*flow.targets[self.id]]  # those of its edges, in file order
        self.data: dict[str, Any] = spec.get("data", {})
        config = spec.get("config", {})
        self.retries: int = config.get("retries", 2)
        self.timeout: float = config.get("timeout", 120)
        named = self.data.get("inputs", {name: name for name in self.names()})
        self.inputs = {k: v if isinstance(v, list) else [v] for k, v in named.items()}

    async def prep(self, ctx: Context) -> Any:
        """Read what exec needs, by default the values of the inputs; or return a Park."""
        return self.values(ctx)

    async def exec(self, prepared: Any) -> Any:
        """Do the work: the only part that is retried; after a crash all three run again (I1)."""
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

    def optional(self) -> set[str]:
        """The names of those inputs that it can do without."""
        return set()

    def reads(self) -> set[str]:
        """The context keys that it may read: by default those of its inputs."""
        return {path.split("/")[0] for paths in self.inputs.values() for path in paths}

    def writes(self) -> set[str]:
        """The context keys that it may write: by default its id."""
        return {self.id}

    def runs(self) -> dict[str, bool]:
        """The flows that it starts as children, and whether each is always started."""
        return {}

    def check(self) -> Iterator[tuple[str, str]]:
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
    """What an activation came to: its action, the keys that it wrote, the model tokens it used."""

    action: str
    changes: dict[str, str]  # key: JSON text
    usage: dict[str, int]
    event: dict[str, Any]  # what is recorded of it


def is_usage(kind: Any, number: Any) -> bool:
    """Whether so many model tokens of this kind can be added to a run's usage."""
    named = isinstance(kind, str) and kind.isprintable()
    return named and type(number) is int and abs(number) <= MAX_COUNT


async def execute(node: Node, ctx: Context, record: Record) -> Outcome | Park:
    """One activation of a node, the same in every executor (I4). RunError when it has failed for
    good and none of its edges carries the action `error`."""
    started = time.monotonic()
    try:
        if ctx.failure:
            raise Permanent(ctx.failure)
        # In a task of its own: else a node that cancels its task would cancel what we do after it.
        action = await asyncio.create_task(_steps(node, ctx, record))
        if isinstance(action, Park):
            return action
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            error = Permanent("it has cancelled itself")
        kind = "" if isinstance(error, (Permanent, TryLater)) else f"{type(error).__name__}: "
        text = as_unicode(f'node "{node.id}": {kind}{error}'[:2000])
        if ERROR not in node.actions:
            raise RunError(text) from error
        action, ctx.changes = ERROR, {node.id: encode(text)}
    finally:
        if (task := asyncio.current_task()) and task.cancelling():
            raise asyncio.CancelledError  # we are told to stop, whatever the node makes of it
    usage = {kind: n for kind, n in ctx.usage.items() if is_usage(kind, n)}
    event = {"node": node.id, "visit": ctx.visit, "action": action, "usage": usage}
    event["seconds"] = round(time.monotonic() - started, 3)
    return Outcome(action, ctx.changes, usage, event)


async def _steps(node: Node, ctx: Context, record: Record) -> str | Park:
    """Prep, exec and post: the action that they come to, or what prep wants to wait for."""
    try:
        prepared = await node.prep(ctx)
        if isinstance(prepared, Park):
            return _admit(node, ctx, prepared)
        result = await _attempts(node, ctx, prepared, record)
        action = await node.post(ctx, prepared, result) or DEFAULT
    except (SystemExit, GeneratorExit) as error:  # which would end more than the node
        raise Permanent(f"it raises {error!r}") from None
    if action not in (DEFAULT, *node.actions):
        raise ValueError(f"its action {action!r:.80} is on none of its edges")
    if odd := [each for each in ctx.usage.items() if not is_usage(*each)]:
        raise ValueError(f"its usage is whole tokens by kind, not {odd[0]!r:.80}")
    return action


def _admit(node: Node, ctx: Context, park: Park) -> Park:
    """What a prep wants to wait for, with the contexts of its children; Permanent if it may not."""
    park = replace(park, children=[*park.children], question=as_unicode(park.question))
    if bool(park.children) == bool(park.question):
        raise Permanent("it parks for either children or a question that is not empty")
    if ctx.results is not None:
        raise Permanent("it parks again, although it has what it parked for")
    if park.children and ctx.depth >= MAX_DEPTH:
        raise Permanent(f"runs are nested {MAX_DEPTH} deep already; does the flow recurse?")
    for child in park.children:
        if child.flow not in node.runs():
            raise Permanent(f'it starts "{child.flow}", which its runs() does not name')
        child.gives = None if child.gives is None else [*map(str, child.gives)]  # for JSON
        child.context = node.flow.registry[child.flow].new_context(child.inputs)
    return park


async def _attempts(node: Node, ctx: Context, prepared: Any, record: Record) -> Any:
    work = node.rehearse if ctx.dry_run else node.exec
    started, failures, backoff = time.monotonic(), 0, node.backoff
    while True:
        delay = random.uniform(0.5, 1.5) * min(60.0, backoff)
        backoff *= 2
        try:
            async with asyncio.timeout(node.timeout) as limit:
                return await work(prepared)
        except Permanent:
            raise
        except TryLater as error:  # bounded by time, not by count
            reason, delay = str(error), error.after or delay
            if time.monotonic() - started + delay > PATIENCE:
                raise
        except Exception as error:
            late = TimeoutError(f"no result within {node.timeout} seconds")
            cause = late if limit.expired() else error
            failures += 1
            if failures > node.retries:
                raise cause from None
            reason = f"{type(cause).__name__}: {cause}"
        record("retrying", node=node.id, error=reason[:2000], delay=round(delay, 3))
        await asyncio.sleep(delay)


# ── 3. Flow ──────────────────────────────────────────────────────────────────────────────────
# The graph, and the one scheduling rule, which every executor calls:
#
#   A node runs when a token waits at it and no token is left upstream of it.
#   A loop's next round starts when its present round is over.
#
# So a join waits for exactly the branches that were taken. (In the literature: van der Aalst's
# synchronizing merge, BPMN's inclusive gateway.) Sets of nodes are bit masks: Python ints.

WAITING, RETURNED = IDLE = "waiting", "returned"  # any other mark is that of an active token


class State(NamedTuple):
    """All of a run that the rule reads, and makes anew."""

    tokens: dict[str, str]  # node: mark
    visits: dict[str, int]  # node in a loop: its activations since the loop was entered
    steps: int = 0  # activations that have ended since the run was started or resumed


class Loop(NamedTuple):
    """Nodes that can all reach one another: entered at the head, and repeated by edges to it."""

    head: str
    members: set[str]
    body: set[str]  # the members and their side work: a notification, a log


class Flow:
    """A graph of nodes, ready to run; made by a Registry."""

    def __init__(self, id: str, graph: Mapping[str, Any], registry: Registry) -> None:
        self.id, self.graph, self.registry = id, graph, registry
        self.inputs: dict[str, Any] = graph.get("inputs", {})
        self.targets = {str(spec["id"]): dict[str, list[str]]() for spec in graph["nodes"]}
        if not self.targets or not all(map(SAFE_ID.fullmatch, self.targets)):
            raise GraphError(f'flow "{id}" needs nodes, with ids of letters, digits and ._- only')
        for edge in graph.get("edges", []):
            by_action = self.targets[str(edge["source"])]
            by_action.setdefault(edge.get("action", DEFAULT), []).append(str(edge["target"]))
        nodes = [Registry.types[spec["type"]](self, spec) for spec in graph["nodes"]]
        self.nodes = {node.id: node for node in nodes}
        self._analyse()

    async def run(
        self, inputs: dict[str, Any] = {}, executor: Executor | None = None, dry_run: bool = False
    ) -> Run:
        """Start a run with these inputs over the graph's own, in this process unless told
        otherwise. RunError where an input is missing or not JSON."""
        return await (executor or InMemoryExecutor()).run(self, inputs, dry_run)

    def new_context(self, inputs: Mapping[str, Any]) -> dict[str, str]:
        """A new run's context, as JSON texts. RunError where an input is missing or not JSON."""
        if missing := sorted(self.needs - inputs.keys()):
            mend = " ".join(f"--input {name}=..." for name in missing)
            raise RunError(f'flow "{self.id}" lacks an input: {", ".join(missing)}; give {mend}')
        ctx = Context({})
        try:
            for name, value in {**self.inputs, **inputs}.items():
                ctx[name] = value
        except ValueError as error:
            raise RunError(f'flow "{self.id}": input: {error}') from None
        return ctx.changes

    # The rule. What it reads (starts, upstream, _back, _body, _heads) is made in _analyse, below.

    def first(self, mark: str) -> tuple[State, list[str]]:
        """The state of a new run, and its start nodes, active with this mark."""
        return self._activate(State(dict.fromkeys(self.starts, WAITING), {}), mark)

    def advance(self, state: State, node: str, action: str, mark: str) -> tuple[State, list[str]]:
        """The state after an active node has ended with an action, and the nodes that this made
        active, with this mark. Pure: every executor gets the same (I4). RunError where the run
        seems to go on for ever; any other RunError would be a bug."""
        if state.steps >= MAX_STEPS:
            why = f"the run has taken {MAX_STEPS} steps; does a loop lack a limit?"
            raise RunError(f'node "{node}": {why}')
        tokens = dict(state.tokens)
        del tokens[node]
        for target in self.targets[node].get(action, ()):
            if tokens.get(target, WAITING) not in IDLE:
                raise RunError(f'node "{target}" was reached while active; please report this')
            tokens[target] = RETURNED if (node, target) in self._back else WAITING
        state, ready = self._activate(State(tokens, state.visits, state.steps + 1), mark)
        if state.tokens and {*state.tokens.values()} <= {*IDLE}:
            raise RunError(f"all tokens wait, {tokens}, and none may run; please report this")
        return state, ready

    def _activate(self, state: State, mark: str) -> tuple[State, list[str]]:
        tokens, visits = dict(state.tokens), state.visits
        ready = [node for node, others in self.blockers(tokens).items() if not others]
        for node in ready:
            if tokens[node] == WAITING and node in self._body:  # a head, entered from outside
                inside = self._body[node]
                visits = {n: count for n, count in visits.items() if not self.bit[n] & inside}
            if self._heads[node]:
                visits = {**visits, node: visits.get(node, 0) + 1}
            tokens[node] = mark
        return State(tokens, visits, state.steps), ready

    def blockers(self, tokens: Mapping[str, str]) -> dict[str, int]:
        """For each node where a token waits, the mask of the nodes whose tokens it waits for: those
        upstream of it; and if its token has returned to the head of a loop, also those in the
        loop's body, for the round is not over. A returned token stands for the next round: nodes
        in the body do not wait for it, nodes behind the loop do."""
        everywhere = self._mask(tokens)
        returned = self._mask(node for node, mark in tokens.items() if mark == RETURNED)
        found: dict[str, int] = {}
        for node, mark in tokens.items():
            if mark in IDLE:
                own_loop = self._body[node] if mark == RETURNED else 0
                next_round = returned & self._heads[node]
                found[node] = everywhere & (self.upstream[node] | own_loop) & ~next_round
        return found

    # What the rule reads, found once, when the flow is built.

    def _analyse(self) -> None:
        self.bit = {node: 1 << i for i, node in enumerate(self.nodes)}
        edges = [(node, target) for node in self.nodes for target in self.leads_to(node)]
        self.ancestors = self._ancestors_along(edges)
        # Of nodes that only they themselves lead to, the first in the file; bit - 1: all before it.
        self.starts = [
            node
            for node, bit in self.bit.items()
            if not self.ancestors[node] & (bit - 1)
            and all(self.ancestors[n] & bit for n in self.nodes_in(self.ancestors[node]))
        ]
        for node in (order := [*self.starts]):  # which grows meanwhile: breadth-first
            order += [target for target in self.leads_to(node) if target not in order]
        edges = [(n, target) for n in order for target in self.leads_to(n)]  # so: fewer passes
        # Loops within loops (Steensgaard 1993): the nodes of a loop have the same ancestors; its
        # head comes first in `order`. Without the edges to the head, look for loops inside it.
        self.loops, self._back = list[Loop](), set[tuple[str, str]]()
        ancestors = self.ancestors
        while cyclic := [node for node in order if ancestors[node] & self.bit[node]]:
            head = cyclic[0]
            members = {node for node in cyclic if ancestors[node] == ancestors[head]}
            self.loops.append(Loop(head, members, members | self._side_work(head, members)))
            self._back |= {(node, head) for node in members}
            ancestors = self._ancestors_along([e for e in edges if e not in self._back])
        self._body = {loop.head: self._mask(loop.body) for loop in self.loops}  # by head
        self._heads = {  # of the loops that a node is in
            node: self._mask(loop.head for loop in self.loops if node in loop.body)
            for node in self.nodes
        }
        # Upstream of a node: what leads to it without an edge back to the head of a loop it is in.
        self.upstream: dict[str, int] = {}
        for heads in set(self._heads.values()):
            kept = [e for e in edges if e not in self._back or not heads & self.bit[e[1]]]
            upstream = self._ancestors_along(kept)
            self.upstream |= {n: upstream[n] for n in self.nodes if self._heads[n] == heads}

    def writes(self, node: str) -> set[str]:
        """The context keys that a node may write, that of its error's text among them."""
        return self.nodes[node].writes() | ({node} if ERROR in self.targets[node] else set())

    def leads_to(self, node: str) -> list[str]:
        """The targets of a node's edges, each once."""
        return [*dict.fromkeys(t for targets in self.targets[node].values() for t in targets)]

    def nodes_in(self, mask: int) -> list[str]:
        """The nodes of a bit mask, in file order."""
        return [node for node, bit in self.bit.items() if mask & bit]

    def _mask(self, nodes: Iterable[str]) -> int:
        return sum(self.bit[node] for node in nodes)

    def _ancestors_along(self, edges: list[tuple[str, str]]) -> dict[str, int]:
        """For each node the mask of those from which these edges lead to it."""
        ancestors = dict.fromkeys(self.nodes, 0)
        before: dict[str, int] = {}
        while ancestors != before:
            before = dict(ancestors)
            for source, target in edges:
                ancestors[target] |= ancestors[source] | self.bit[source]
        return ancestors

    def _side_work(self, head: str, members: set[str]) -> set[str]:
        """Nodes outside a loop for which its next round waits: no way leads from them into the
        loop, and they are reached only from one another, or by an action of a member that leads
        to a member, too. Found by taking from all nodes those that are reached otherwise."""
        others = {*self.starts, *self.nodes_in(self.ancestors[head])}
        for node in (queue := [*others]):  # which grows meanwhile
            for targets in self.targets[node].values():
                if node not in members or members.isdisjoint(targets):
                    queue += {*targets} - others
                    others.update(targets)
        return self.nodes.keys() - others

    # What starting a run takes.

    @cached_property
    def needs(self) -> set[str]:
        """The keys that must be given at the start: the first key of each input that its node
        cannot do without, if none of the input's keys has a default or is written before it."""
        writes = {node: self.writes(node) for node in self.nodes}
        needs: set[str] = set()
        for id, node in self.nodes.items():
            before = self.nodes_in(self.ancestors[id])
            given = set(self.inputs).union(*(writes[n] for n in before))
            for name in node.inputs.keys() - node.optional():
                keys = [path.partition("/")[0] for path in node.inputs[name]]
                if given.isdisjoint(keys):
                    needs.add(keys[0])
        return needs

    @cached_property
    def bundle(self) -> tuple[str, str]:
        """What a run carries: (SHA-256, JSON) of its graph and its sub-flows'."""
        for id in (wanted := [self.id]):  # which grows meanwhile
            for node in self.registry[id].nodes.values():
                wanted += [child for child in node.runs() if child not in wanted]
        text = encode({id: self.registry[id].graph for id in wanted})
        return hashlib.sha256(text.encode()).hexdigest(), text


# ── 4. Registry ──────────────────────────────────────────────────────────────────────────────
# Which node types there are, and which graphs. What may stand in a graph file, and that no two
# nodes of a graph can get into each other's way (I4), is checked by graphs/check.py, as soon as
# that, or graphs/nodes.py, is imported.


class Registry:
    """Flows by id, each checked and built when it is first asked for; GraphError, with every
    finding, if a flow, or one that it runs as a child, cannot run."""

    types: ClassVar[dict[str, type[Node]]] = {}
    checks: ClassVar[list[Callable[[Registry, str], list[str]]]] = []  # each gives its findings

    @classmethod
    def add(cls, name: str, node_type: type[Node]) -> None:
        """Let graphs use a node type by this name."""
        cls.types[name] = node_type

    def __init__(self, graphs: Mapping[str, Any], folder: str = "") -> None:
        self.graphs, self.folder = graphs, folder  # folder: for findings
        self._flows: dict[str, Flow] = {}

    def __getitem__(self, id: str) -> Flow:
        if id not in self._flows:
            if findings := [text for check in self.checks for text in check(self, id)]:
                raise GraphError("\n".join(findings))
            try:
                graph = json.loads(encode(self.graphs[id]))  # a copy, such as a worker gets
            except (TypeError, ValueError, RecursionError) as error:
                raise GraphError(f'flow "{id}" is not JSON: {error}') from None
            self._flows[id] = Flow(id, graph, self)
        return self._flows[id]


# ── 5. In memory ─────────────────────────────────────────────────────────────────────────────
# What running a flow means, with nothing in the way. Sections 7 and 8 must agree with it.

RUNNING, COMPLETED, FAILED, CANCELLED = "running", "completed", "failed", "cancelled"
Event = dict[str, Any]  # "at" (seconds since 1970), "event", "run", "flow", and what belongs to it


@dataclass
class Status:
    """What is known of a run. `status`, a Run's `phase`, is one of the four words above; on Redis a
    failed run can be resumed. `result`: see Child."""

    run: str
    flow: str
    status: str
    result: Any
    context: dict[str, Any]
    error: str
    usage: dict[str, int]  # model tokens of what has been committed, by kind
    tokens: dict[str, str]  # node: mark

    @classmethod
    def of(cls, run: Run, flow: str, status: str, values: Mapping[str, str], **more: Any) -> Status:
        """From a context as JSON texts."""
        context = {key: json.loads(text) for key, text in values.items()}
        result = json.loads(result_of(values)) if status == COMPLETED else None
        return cls(run.id, flow, status, result, context, **more)


class Run(Protocol):
    """One execution of a flow, from outside."""

    id: str

    def events(self, follow: bool = True) -> AsyncIterator[Event]:
        """What has happened, from the start; to follow it, also what happens until the end."""

    async def status(self) -> Status:
        """Where the run stands now."""

    async def result(self) -> Any:
        """Wait for the end and give the result; RunError where the run failed or was cancelled."""
        while (end := await self.status()).status == RUNNING:  # still, or again
            async for _ in self.events():
                pass
        if end.status != COMPLETED:
            raise RunError(failure_of(self.id, end.flow, end.status, end.error))
        return end.result


class Executor(Protocol):
    """Where flows run."""

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> Run:
        """Start a run. RunError where an input is missing or not JSON."""


def new_id() -> str:
    """A random id: a run's; or a change's, which becomes the run's version (see COMMIT, section 6)
    and the mark of the tokens that this change makes active."""
    return secrets.token_hex(8)


def child_id(job: str, index: int) -> str:
    """The id of a job's child run: always the same, so that starting it twice starts it once."""
    return hashlib.sha256(f"{job}/{index}".encode()).hexdigest()[:32]


def result_of(values: Mapping[str, str], gives: list[str] | None = None) -> str:
    """The JSON text of what a run with this context gives (see Child)."""
    if gives is None and "final_output" in values:
        return values["final_output"]
    keys = sorted(values) if gives is None else [key for key in gives if key in values]
    return "{" + ",".join(f"{encode(key)}:{values[key]}" for key in keys) + "}"


def failure_of(id: str, flow: str, status: str, error: str) -> str:
    """What is said of a run that has not completed: to its parent, and to who waits for it."""
    return f'run {id} of "{flow}" {status}: {error}'


def event_of(event: str, id: str, flow: str, **more: Any) -> Event:
    """An event of a run; what is empty or zero is left out."""
    found = {"event": event, "run": id, "flow": flow, **more}
    return {name: value for name, value in found.items() if value}


class InMemoryExecutor:
    """Runs flows in this process, in one event loop, this many nodes at the same time."""

    def __init__(self, concurrency: int = 10) -> None:
        self._slots = asyncio.Semaphore(concurrency)

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> MemoryRun:
        """Start a run, which goes on as long as the event loop does."""
        return MemoryRun(new_id(), flow, flow.new_context(inputs), dry_run, self._slots)


class MemoryRun(Run):
    """A run in this process, or a child of one; it runs as soon as it is made."""

    def __init__(
        self, id: str, flow: Flow, context: dict[str, str], dry_run: bool,
        slots: asyncio.Semaphore, parent: MemoryRun | None = None,
    ) -> None:  # fmt: skip
        self.id, self.flow, self.context = id, flow, context
        self.dry_run, self.slots = dry_run, slots
        self.phase, self.error, self.over = RUNNING, "", asyncio.Event()
        self.depth: int = parent.depth + 1 if parent else 0
        self.root: MemoryRun = parent.root if parent else self  # which has what its children share:
        self.usage, self.history, self.news = Counter[str](), list[str](), asyncio.Event()
        self.questions: dict[str, asyncio.Future[Any]] = {}  # by run/node
        self.state, ready = flow.first(new_id())
        self._record("started")
        self.tasks = [asyncio.create_task(self._branch(ready))]  # else the event loop forgets them

    async def events(self, follow: bool = True) -> AsyncIterator[Event]:
        """What has happened, from the start; to follow it, also what happens until the end."""
        seen = 0
        while (follow and self.phase == RUNNING) or seen < len(self.history):
            if seen == len(self.history):
                await self.news.wait()
            yield json.loads(self.history[seen])
            seen += 1

    async def status(self) -> Status:
        """Where the run stands now."""
        more = {"error": self.error, "usage": dict(self.usage), "tokens": {**self.state.tokens}}
        return Status.of(self, self.flow.id, self.phase, self.context, **more)

    async def answer(self, node: str, value: Any, child: str = "") -> None:
        """Answer what a node, or one of a child run, asks. The first answer wins. RunError if it
        asks nothing, ValueError if the answer is not JSON."""
        text = to_json(value, "the answer")
        if not (asked := self.questions.pop(f"{child or self.id}/{node}", None)):
            raise RunError(f'run {self.id}: the node "{node}" does not wait for an answer')
        asked.set_result(json.loads(text))

    async def _branch(self, ready: list[str]) -> None:
        """Run the first of these nodes, and on from there; the others in tasks of their own."""
        try:
            while ready:
                self.tasks += [asyncio.create_task(self._branch([node])) for node in ready[1:]]
                outcome = await self._execute(ready[0])
                ready = self._commit(ready[0], outcome) if outcome else []
        except RunError as error:
            self._end(FAILED, str(error))
        except Exception as error:  # a bug here, or an error whose str() fails
            self._end(FAILED, f"{type(error).__name__}, as the log shows")
            raise

    async def _execute(self, name: str) -> Outcome | None:
        """What a node came to, also if it parks; None if its run fails before."""
        node, visit = self.flow.nodes[name], self.state.visits.get(name, 1)
        job, failure, results = f"{self.id}/{name}/{self.state.tokens[name]}", "", None
        while True:
            ctx = Context(self.context, job, visit, self.dry_run, self.depth, results, failure)
            async with self.slots:
                if self.phase != RUNNING:  # a failed run begins nothing more
                    return None
                outcome = await execute(node, ctx, self._record)
            if not isinstance(outcome, Park):
                return outcome
            if self.phase == RUNNING:
                self._record("parked", node=name, question=outcome.question)
                try:
                    results = await self._wait_for(job, name, outcome)
                except RunError as error:
                    failure = str(error)

    async def _wait_for(self, job: str, node: str, park: Park) -> list[Any]:
        if park.question:
            self.root.questions[f"{self.id}/{node}"] = asked = asyncio.Future[Any]()
            answer = await asked
            self._record("answered", node=node)
            return [answer]
        ids = [child_id(job, i) for i in range(len(park.children))]
        return await asyncio.gather(*map(self._child, ids, park.children))  # or the first failure

    async def _child(self, id: str, child: Child) -> Any:
        flow = self.flow.registry[child.flow]
        run = MemoryRun(id, flow, child.context, self.dry_run, self.slots, self)
        await run.over.wait()
        if run.phase != COMPLETED:
            raise RunError(failure_of(id, flow.id, run.phase, run.error))
        return json.loads(result_of(run.context, child.gives))

    def _commit(self, node: str, outcome: Outcome) -> list[str]:
        self.state, ready = self.flow.advance(self.state, node, outcome.action, new_id())
        self.context = self.context | outcome.changes
        self.root.usage.update(outcome.usage)
        self._record("done", **outcome.event)
        if not self.state.tokens:
            self._end(COMPLETED)
        return ready

    def _end(self, phase: str, error: str = "") -> None:
        self._record(phase, error=error)  # every failure; the first one counts
        if self.phase == RUNNING:
            self.phase, self.error = phase, error
            for asked in [key for key in self.root.questions if key.startswith(f"{self.id}/")]:
                self.root.questions.pop(asked).cancel()  # an answer would be lost
            self.over.set()

    def _record(self, event: str, **more: Any) -> None:
        found = event_of(event, self.id, self.flow.id, at=time.time(), **more)
        self.root.history.append(encode(found))
        self.root.news.set()  # wakes who waits now,
        self.root.news.clear()  # and nobody later


# ── 6. Redis: keys and scripts ───────────────────────────────────────────────────────────────
# What several processes must agree on. A step that takes more than one command is a script, which
# Redis runs as a whole, but does not undo when it fails. So nothing in it may fail after its first
# write. (For want of memory, Redis refuses only a script that has not yet written.)
#
#   key                   type        holds
#   ready                 list        jobs for any worker: LPUSH in, BLMOVE RIGHT LEFT out
#   processing:<worker>   list        the jobs in this worker's custody
#   workers               sorted set  who exists, by when they were last heard of
#   worker:<worker>       string      its heartbeat, with a TTL: what it does
#   runs                  sorted set  runs that a user started, by the time of starting
#   run:<id>              hash        origin, status, version, state, steered, crashes, error, usage
#   run:<id>:context      hash        for each context key, its value as JSON text
#   run:<id>:parked       hash        what parked jobs wait for, and what has come of it
#   run:<id>:events       stream      what happened to a root run and its children, capped
#   graph:<sha256>        string      the graph that a run was started with, and its sub-flows
#
# LPUSH puts into a list on the left. BLMOVE waits for a job on the right of `ready` and moves it
# into another list, in one step: so no worker's death can lose a job (I2).
#
#   ready --BLMOVE, TAKE--> processing:<worker> --READ--> prep, exec, post --COMMIT--> gone
#     '<------RELEASE------------'
#
# COMMIT puts the successors into ready or, as many as its worker has room for, into that worker's
# own list: these it keeps, and they need no READ.
#
# Fields of run:<id>:parked, by job: "<job>" its question, or ''; "... count" its children, or 1;
# "... missing" those not started; "... left" results to come, <= 0 if it may go on (a failure
# takes off the count); "... <i>" the end of child i, or the answer: '["completed", result]', or
# another status and a text; "... is parked": there while no list has the job.


@dataclass(frozen=True)
class Origin:
    """What never changes in a run: written at its start."""

    flow: str
    graph: str  # SHA-256 of its graph and sub-flows
    root: str  # the run that a user started
    dry_run: bool = False
    depth: int = 0
    parent: str = ""  # of a child: the job that waits for it,
    index: int = 0  # and its place among that job's children, from 0
    gives: list[str] | None = None


# What scripts share. KEYS have this order: all, but to READ, and to RELEASE of a job that is not to
# wait, only those up to `heartbeat`; TAKE and BEAT, about no run, have their own. ARGV: a JSON
# object, `a`; what is listed after a comma is given in some cases only. Then context keys and
# values as text, since Lua would make {} of [] and round integers. A state is a text in `a`: only
# Python makes one.
RUN, PARKED, EVENTS = 0, 2, 6  # where in a run's keys these are
SHARED = """
local run, context, parked, ready, mine, heartbeat, events, root, graph, parents_run,
  parents_parked, runs, copy = unpack(KEYS)
local call, a = redis.call, cjson.decode(ARGV[1])

local function push(list, jobs)
  for _, job in ipairs(jobs) do call('LPUSH', list, job) end
end
local function record(text)
  if call('EXISTS', root) == 0 then return end  -- a child may outlive its root (I5)
  call('XADD', events, 'MAXLEN', '~', 10000, '*', 'event', text)
end
local function put_context()
  for i = 2, #ARGV, 2 do call('HSET', context, ARGV[i], ARGV[i + 1]) end
end
local function expire(days)  -- ends every script that may have made one of these keys (I5)
  for _, key in ipairs({run, context, parked}) do call('EXPIRE', key, days * 86400) end
  if run == root then call('EXPIRE', events, days * 86400) end  -- a child's are its root's
  call('EXPIRE', graph, 30 * 86400)  -- which other runs share
end
local function status_of(run, job)  -- or false, if the job's token is gone
  local node, mark = string.match(job, '/(.*)/(.*)')
  local found = call('HMGET', run, 'status', 'state')
  return found[2] and cjson.decode(found[2]).tokens[node] == mark and found[1]
end
local function park(jobs)
  for _, job in ipairs(jobs) do call('HSET', parked, job .. ' is parked', 1) end
end
-- What a job waits for is written once, and before its first child is made: whoever cancels the run
-- looks there for the children.
local function expect(parked, job)
  local question = a.question or ''
  if call('HSETNX', parked, job, question) == 1 then
    call('HSET', parked, job .. ' count', a.count, job .. ' left', a.count,
         job .. ' missing', question == '' and a.count or 0)
    call('EXPIRE', parked, 30 * 86400)  -- in START the parent's, which expire() leaves out
  end
  return tonumber(call('HGET', parked, job .. ' count'))
end
local function waits(job)  -- else it has news, or children to start
  local left, missing = unpack(call('HMGET', parked, job .. ' left', job .. ' missing'))
  return tonumber(left or 0) > 0 and tonumber(missing) <= 0
end
-- A child's end, or a person's answer, is written once; but a failed child may yet be cancelled.
-- When all have come, or one failure, which takes as much off `left` as all, the job is queued, if
-- it is parked and its run is running.
local function tell(run, parked, job, index, status)
  if call('EXISTS', run) == 0 or call('HEXISTS', parked, job) == 0 then return 0 end
  if call('HSETNX', parked, job .. ' ' .. index, a.told) == 0 then
    if status == 'cancelled' then call('HSET', parked, job .. ' ' .. index, a.told) end
    return 0
  end
  local weight = status == 'completed' and 1 or call('HGET', parked, job .. ' count')
  local left = call('HINCRBY', parked, job .. ' left', -weight)
  if left <= 0 and call('HGET', run, 'status') == 'running'
     and call('HDEL', parked, job .. ' is parked') == 1 then
    push(ready, {job})
  end
  return 1
end
local function is_repeat()  -- a user's command sent again; `steered` is the last one's version
  return call('HGET', run, 'steered') == a.version
end
local function finish()
  call('HSET', run, 'status', a.status, 'version', a.version, 'error', a.error)
  record(a.event)
  if a.parent ~= '' then tell(parents_run, parents_parked, a.parent, a.index, a.status) end
  expire(a.status == 'failed' and 30 or 7)
end
"""


class Script:
    """A Lua script, and the digest by which Redis knows it."""

    def __init__(self, text: str) -> None:
        self.text = SHARED + text
        self.digest = hashlib.sha1(self.text.encode()).hexdigest()

    def on(self, keys: list[str], values: Mapping[str, str] = {}, **a: Any) -> tuple[Any, ...]:
        """The command that runs it with these keys, context values and arguments."""
        flat = [text for pair in values.items() for text in pair]
        return ("EVALSHA", self.digest, len(keys), *keys, encode(a), *flat)


# START makes a run and queues its start nodes: once; a child only while its parent is running, with
# the job active and not yet told of this child (I1). The first START settles how many there are.
#   a     run version origin state jobs event parent, text or, of a child, index count
START = Script("""
if call('EXISTS', run) == 1 then return end
if a.parent ~= '' then
  if status_of(parents_run, a.parent) ~= 'running' then return end
  if a.index >= expect(parents_parked, a.parent) then return end
  if call('HEXISTS', parents_parked, a.parent .. ' ' .. a.index) == 1 then return end
  call('HINCRBY', parents_parked, a.parent .. ' missing', -1)
end
call('HSET', run, 'status', 'running', 'version', a.version, 'state', a.state, 'origin', a.origin)
put_context()
push(ready, a.jobs)
record(a.event)
if a.parent == '' then
  local now = call('TIME')[1]
  call('SET', graph, a.text)
  call('ZADD', runs, now, a.run)
  call('ZREMRANGEBYSCORE', runs, '-inf', now - 30 * 86400)
end
expire(30)
""")

# TAKE fills a worker's list up to so many jobs, at once, each as BLMOVE moves one (I2).
#   KEYS  ready, mine
#   a     size
#   gives the jobs that it has moved
TAKE = Script("""
local jobs = {}
for i = 1, a.size - call('LLEN', KEYS[2]) do
  local job = call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT')
  if not job then break end
  jobs[i] = job
end
return jobs
""")

# READ gives a run as it is at one instant: fields, context, what one job was told, and that job's
# place in the worker's list: none if a reaper has taken it before BLMOVE's reply came.
#   a     job
READ = Script("""
local told = {}
for i = 1, call('HGET', parked, a.job .. ' count') or 0 do
  told[i] = call('HGET', parked, a.job .. ' ' .. (i - 1)) or 'null'
end
return {call('HGETALL', run), call('HGETALL', context), told, call('LPOS', mine, a.job)}
""")

# COMMIT is the only way in which a run moves: it records what came of one or more of its jobs, if
# the run's version is still the one that the decision was made from, else nothing (I1). It asks for
# no custody: of two workers that did one job the first to commit wins; the other finds the version
# changed and, deciding anew, its token gone. The version changes with status or state; it is
# random, as a Redis that lost a second would repeat a number. A failed run keeps what others still
# finish; what follows waits for a resume.
#   a     seen version jobs state usage done keep queue, status error event parent index told
#   gives nothing, or the fields and the context that stand there instead
COMMIT = Script("""
if call('HGET', run, 'version') ~= a.seen then
  return {call('HGETALL', run), call('HGETALL', context)}
end
call('EXPIRE', run, 30 * 86400)  -- a full Redis allows this, and then the rest
for kind, count in pairs(call('EXISTS', root) == 1 and a.usage or {}) do
  call('HINCRBY', root, 'usage ' .. kind, count)
end
for _, job in ipairs(a.jobs) do call('LREM', mine, 0, job) end
put_context()
call('HSET', run, 'version', a.version, 'state', a.state)
for _, event in ipairs(a.done) do record(event) end
push(mine, a.keep)
if call('HGET', run, 'status') == 'running' then push(ready, a.queue) else park(a.queue) end
if a.status then
  finish()
  if run == root then  -- a stream has a block of 4 KiB; a copy has no more than it needs
    call('COPY', events, copy, 'REPLACE')
    call('RENAME', copy, events)
  end
else
  expire(30)
end
""")

# END ends a run: without a job as cancelled, for good; with one as failed, until a resume. A run is
# failed only by a worker that has the job in custody, and while the job's token is there: neither
# may a worker that was taken for dead fail what another now runs, nor what is done (I1). A resume
# counts the job's crashes anew, and asks its question again: the answer may be what it failed of.
#   a     job version status error event parent index told
#   gives the status that it found, 'running' to a repeat, or nothing without custody
END = Script("""
if is_repeat() then return 'running' end
if a.job and call('LREM', mine, 0, a.job) == 0 then return end
local status = call('HGET', run, 'status')
local there = not a.job or status_of(run, a.job)
if there and (status == 'running' or status == 'failed') then
  if a.job then
    park({a.job})
    call('HDEL', run, 'crashes ' .. a.job)
    if call('HGET', parked, a.job) ~= '' then call('HDEL', parked, a.job, a.job .. ' 0') end
  else
    call('EXPIRE', run, 30 * 86400)  -- as in COMMIT
    call('HSET', run, 'steered', a.version)
  end
  if a.job and status == 'failed' then record(a.event) else finish() end
end
return status
""")

# RELEASE takes a job from a worker's list (I2). If its run is running, the job is next in `ready`
# or, if it waits, parked: for what was noted of it before or, the first time, for `count`. If its
# run has failed, it is parked; if it is done or its run cancelled, dropped. `dead`: all this only
# while the worker's heartbeat is missing. `crashed` adds 1 to the job's crashes, unless it had only
# to be parked; but from the second on a job is only run alone, so if the list had others `beside`
# it, it waited, and one of these was to blame.
#   a     job dead crashed beside, count question event
#   gives 1 if it was in custody, -1 if it would wait for a child that nobody starts any more
RELEASE = Script("""
if a.dead and call('EXISTS', heartbeat) == 1 then return 0 end
local status = status_of(run, a.job)
local count, missing = unpack(call('HMGET', parked, a.job .. ' count', a.job .. ' missing'))
if status == 'running' and a.count and a.count < tonumber(count or 0) and tonumber(missing) > 0 then
  return -1
end
if call('LREM', mine, 0, a.job) == 0 then return 0 end
local crashes = tonumber(call('HGET', run, 'crashes ' .. a.job) or 0)
if status and a.crashed and not waits(a.job) and not (a.beside and crashes > 1) then
  call('HSET', run, 'crashes ' .. a.job, crashes + 1)
end
if status == 'running' and a.count then
  expect(parked, a.job)
  record(a.event)
end
local aside = status == 'failed' or status == 'running' and waits(a.job)
if aside then park({a.job}) elseif status == 'running' then call('RPUSH', ready, a.job) end
return 1
""")

# BEAT keeps a worker alive, also at maxmemory: PEXPIRE works there, where SET alone would not.
#   KEYS  heartbeat, workers
#   a     worker lease doing
#   gives 0 if its heartbeat had expired
BEAT = Script("""
local lived = call('PEXPIRE', KEYS[1], a.lease)
call('SET', KEYS[1], a.doing, 'PX', a.lease)
call('ZADD', KEYS[2], call('TIME')[1], a.worker)
return lived
""")

# RESUME lets a failed run go on, if its version is still the one that was read: its parked jobs are
# queued, but for those that still wait for an end or an answer. A child takes back what it told its
# parent, which then waits for it again.
#   a     seen version state jobs event parent index
#   gives 1 if it did
RESUME = Script("""
if is_repeat() then return 1 end
if call('HGET', run, 'version') ~= a.seen then return 0 end
call('HDEL', run, 'error')
call('HSET', run, 'status', 'running', 'version', a.version, 'steered', a.version, 'state', a.state)
put_context()
if a.parent ~= '' and call('HDEL', parents_parked, a.parent .. ' ' .. a.index) == 1 then
  local count = call('HGET', parents_parked, a.parent .. ' count')
  call('HINCRBY', parents_parked, a.parent .. ' left', count)
end
for _, job in ipairs(a.jobs) do
  if not waits(job) and call('HDEL', parked, job .. ' is parked') == 1 then push(ready, {job}) end
end
record(a.event)
expire(30)
return 1
""")

# ANSWER gives a person's answer to the job that asked.
#   a     job version told event
#   gives 1 if it was the first answer to a question
ANSWER = Script("""
if is_repeat() then return 1 end
if status_of(run, a.job) ~= 'running' then return 0 end
if (call('HGET', parked, a.job) or '') == '' then return 0 end
if tell(run, parked, a.job, 0, 'completed') == 0 then return 0 end
call('HSET', run, 'steered', a.version)
record(a.event)
return 1
""")

SCRIPTS = [START, TAKE, READ, COMMIT, END, RELEASE, BEAT, RESUME, ANSWER]


# ── 7. Redis: starting and steering runs ─────────────────────────────────────────────────────
# What a client does, and what a worker shares with it. A run carries its graph, so a worker needs
# node types, but no graph files.

PASSING = re.compile(  # errors that pass, by code; in a script's error a dash is before it
    r"(^|-)(ASK|BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|MOVED|NOREPLICAS|NOSCRIPT|OOM|READONLY"
    r"|TRYAGAIN|UNBLOCKED)|max number of clients"
)
# Of these, an outage, as if the connection were lost: what refuses reads, too, and what a new
# connection mends, for it may lead to our keys' new master, and loads the scripts.
OUTAGE = re.compile(r"\b(CLUSTERDOWN|MASTERDOWN|MOVED|NOSCRIPT|READONLY)\b")


def transient(error: BaseException) -> bool:
    """Whether Redis may well answer when it is asked again."""
    if isinstance(error, exceptions.ResponseError):
        return PASSING.search(f"{error.status_code or ''} {error}".strip()) is not None
    if isinstance(error, exceptions.AuthenticationError):
        return False  # although redis-py calls a wrong password a connection error
    lost = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
    return isinstance(error, (*lost, exceptions.InvalidResponse))  # as from a proxy before Redis


class Link:
    """Commands that are given in one pass of the event loop travel together, on a connection of
    their own. After an outage, which is logged once, they are sent again; so each must do no harm
    twice. (BLMOVE, which waits, goes by `client`, on another connection.)"""

    def __init__(self, url: str) -> None:
        # This sends no command again by itself: a BLMOVE whose reply was lost has moved a job, and
        # another would move one more.
        never = Retry(NoBackoff(), 0)
        self.client = redis.asyncio.Redis.from_url(
            url, decode_responses=True, retry=never, socket_timeout=3, socket_connect_timeout=3
        )
        pool: Any = self.client.connection_pool
        self._connection = pool.make_connection()
        self._connection.socket_timeout = None  # there is one for a whole batch, in _exchange
        self.settled_at = time.monotonic()  # after an outage: when all others are back, too
        self._queue: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.disconnect(nowait=True)
        with suppress(exceptions.TimeoutError):  # of a Redis that hangs
            await self.client.aclose()

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """A future of the reply; ResponseError where Redis refuses the command for good."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((command, reply))
        if not self._flushing or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return reply

    async def _flush(self) -> None:
        delay = 0.0  # before the next try; 0 as long as there is no outage
        while batch := [each for each in self._queue if not each[1].cancelled()]:
            self._queue = []
            wait = 0.1  # short, if Redis refuses only some, being full: the rest waits with them
            try:  # with more patience in an outage: perhaps it is only a reply that takes long
                replies = await self._exchange([command for command, _ in batch], 3 + 10 * delay)
            except Exception as error:
                replies, wait = [error] * len(batch), min(1.0, 2 * delay or 0.05)
                self.settled_at = time.monotonic() + 10  # others may yet wait so long
            again = []
            for (command, future), reply in zip(batch, replies, strict=True):
                if future.cancelled():
                    continue  # nobody waits for it
                if not isinstance(reply, Exception):
                    future.set_result(reply)
                elif transient(reply):
                    again.append((command, future))
                else:
                    future.set_exception(reply)
            self._queue = again + self._queue
            if again:
                if not delay:
                    why = next(reply for reply in replies if isinstance(reply, Exception))
                    log.warning("redis does not answer; trying until it does: %r", why)
                delay = wait
                await asyncio.sleep(delay)
            elif delay:
                log.warning("redis answers again")
                delay = 0.0

    async def _exchange(self, commands: list[tuple[Any, ...]], patience: float) -> list[Any]:
        """The replies, a refused command's error among them. TimeoutError if none comes for about
        `patience` seconds, and one more for each MB sent. Packed and sent in one go, which costs a
        worker a sixth less than a pipeline of redis-py."""
        known = self._connection.is_connected
        loads = [] if known else [("SCRIPT", "LOAD", script.text) for script in SCRIPTS]
        packed = b"".join(map(hiredis.pack_command, [*loads, *commands]))
        patience += len(packed) / 1_000_000
        replies, clock = list[Any](), asyncio.get_running_loop().time
        latest = clock()
        try:
            async with asyncio.timeout(patience) as limit:
                await self._connection.send_packed_command(packed)
                while len(replies) < len(loads) + len(commands):
                    try:
                        replies.append(await self._connection.read_response())
                    except exceptions.ResponseError as refusal:
                        outage = OUTAGE.search(f"{refusal.status_code} {refusal}")
                        if outage or len(replies) < len(loads):  # or a script is refused
                            raise
                        replies.append(refusal)
                    if clock() > latest + 1:  # a new timer for each reply would cost more
                        latest = clock()
                        limit.reschedule(latest + patience)
        except BaseException:
            await self._connection.disconnect(nowait=True)  # what still comes is nobody's reply
            raise
        return replies[len(loads) :]


def as_dict(flat: Any) -> dict[str, str]:
    """A hash, in whichever form Redis gave it."""
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


class RedisExecutor:
    """Starts runs for the workers on a Redis; this process is then needed no more."""

    def __init__(self, url: str = "redis://localhost:6379", namespace: str = "agentflow") -> None:
        self.link = Link(url)
        self.send = self.link.send
        self.prefix = f"{{{namespace}}}:"  # one hash tag, and so one slot of a Redis Cluster
        self.name = "client"  # or that of a worker; a client never has a job

    def key(self, *parts: str) -> str:
        """A key's name."""
        return self.prefix + ":".join(parts)

    def keys(self, job: str, worker: str = "") -> list[str]:
        """The keys of a run, or of a job's run, and of custody, in the order that scripts know."""
        key, worker = self.key("run", job.partition("/")[0]), worker or self.name
        custody = [self.key("processing", worker), self.key("worker", worker)]
        return [key, f"{key}:context", f"{key}:parked", self.key("ready"), *custody]

    async def open(self) -> None:
        """Find out at once whether Redis is there, writable and 6.2 or newer: RedisError if not."""
        await self.link.client.getdel(self.key("probe"))  # which a full Redis does not refuse

    async def run(self, flow: Flow, inputs: Mapping[str, Any], dry_run: bool = False) -> RedisRun:
        """Queue the start nodes of a new run. RunError where an input is missing or not JSON."""
        digest, graph = flow.bundle
        id = new_id()
        run = RedisRun(self, id, Origin(flow.id, digest, id, dry_run))
        await run.start(flow, flow.new_context(inputs), text=graph)
        return run

    async def find(self, id: str) -> RedisRun | None:
        """The run with this id, as it stands now, if there is one."""
        key = self.key("run", id)
        origin = await self.send("HGET", key, "origin") if SAFE_ID.fullmatch(id) else None
        if not origin:
            return None
        run = RedisRun(self, id, Origin(**json.loads(origin)))
        await run.read()
        return run


class RedisRun(Run):
    """A run on a Redis: what a client does with it, and a worker, too."""

    def __init__(self, executor: RedisExecutor, id: str, origin: Origin) -> None:
        self.executor, self.id, self.origin = executor, id, origin
        key, parent_id = executor.key, origin.parent.partition("/")[0] or id
        root, parent = key("run", origin.root), key("run", parent_id)
        self.keys = [*executor.keys(id), f"{root}:events", root, key("graph", origin.graph)]
        self.keys += [parent, f"{parent}:parked", key("runs"), f"{root}:events:copy"]
        self.turn = asyncio.Lock()  # of a worker's commits
        self.update({}, {})

    def change(self, script: Script, values: dict[str, str] = {}, **a: Any) -> asyncio.Future[Any]:
        """Have a script change the run; its `version` is a new id, also of the command."""
        parent, index = self.origin.parent, self.origin.index
        a = {"run": self.id, "version": new_id(), "parent": parent, "index": index} | a
        return self.executor.send(*script.on(self.keys, values, **a))

    def event(self, event: str, **more: Any) -> str:
        """An event of this run, for its root's stream, in which no id means the root's own."""
        id = self.id if self.id != self.origin.root else ""
        return encode(event_of(event, id, self.origin.flow, **more))

    def record(self, event: str, **more: Any) -> None:
        """Record an event of a node, if the stream is still there (I5); nobody waits for it."""
        trim, text = ("NOMKSTREAM", "MAXLEN", "~", 10000), self.event(event, **more)
        self.executor.send("XADD", self.keys[EVENTS], *trim, "*", "event", text)

    def ending(self, status: str, error: str = "", result: str = "") -> dict[str, Any]:
        """What a script that ends the run is given: among it what a parent is told."""
        told = result or encode(failure_of(self.id, self.origin.flow, status, error))
        event = self.event(status, error=error)
        return {"status": status, "error": error, "event": event, "told": f'["{status}",{told}]'}

    def active(self) -> dict[str, str]:
        """The jobs of its active nodes, by node."""
        tokens = self.state.tokens.items()
        return {node: f"{self.id}/{node}/{mark}" for node, mark in tokens if mark not in IDLE}

    def start(self, flow: Flow, values: dict[str, str], **more: Any) -> asyncio.Future[Any]:
        """Make the run: a user's with its graph's `text`, or a child with its parent's `count`."""
        self.version = new_id()
        self.state, _ = flow.first(self.version)
        origin = {k: v for k, v in vars(self.origin).items() if v not in ("", 0, None)}
        more |= {"version": self.version, "state": encode(self.state._asdict())}
        more |= {"origin": encode(origin), "event": self.event("started")}
        more |= {"jobs": [*self.active().values()]}
        return self.change(START, values, **more)

    def update(self, fields: Any, context: Any) -> None:
        """Take over what READ, or a COMMIT that came too late, has found."""
        self.fields, self.context = as_dict(fields), as_dict(context)
        self.version, self.phase = self.fields.get("version", ""), self.fields.get("status", "")
        self.state = State(**json.loads(self.fields.get("state", '{"tokens":{},"visits":{}}')))

    async def read(self) -> None:
        """Find out where the run stands. RunError where it is gone."""
        fields, context, *_ = await self.executor.send(*READ.on(self.keys, job=""))
        if not fields:
            raise RunError(f"run {self.id} is no longer on this Redis")
        self.update(fields, context)

    async def status(self) -> Status:
        """Where the run stands now. RunError where it is gone."""
        await self.read()
        usage = {k[6:]: int(count) for k, count in self.fields.items() if k.startswith("usage ")}
        more = {"error": self.fields.get("error", ""), "usage": usage, "tokens": self.state.tokens}
        return Status.of(self, self.origin.flow, self.phase, self.context, **more)

    async def events(self, follow: bool = True) -> AsyncIterator[Event]:
        """What has happened, from the start; to follow it, also what happens until the end."""
        last, send = "-", self.executor.send
        while True:  # the status first: all events up to the run's end are then there to be read
            status = await send("HGET", self.keys[RUN], "status")
            found = await send("XRANGE", self.keys[EVENTS], last, "+", "COUNT", 1000)
            for id, fields in found:
                last, at = f"({id}", {"at": int(id.split("-")[0]) / 1000, "run": self.origin.root}
                yield at | json.loads(as_dict(fields)["event"])
            if not found and (status != RUNNING or not follow):
                return
            if not found:
                await asyncio.sleep(0.1)

    async def children(self) -> list[RedisRun]:
        """The children that its jobs have started so far, also those that were not waited for."""
        found = list[RedisRun]()
        for name, count in as_dict(await self.executor.send("HGETALL", self.keys[PARKED])).items():
            if name.endswith(" count"):
                job = name.removesuffix(" count")
                ids = [child_id(job, i) for i in range(int(count))]
                found += filter(None, await asyncio.gather(*map(self.executor.find, ids)))
        return found

    async def cancel(self, why: str = "by request") -> None:
        """End the run and its children for good, their nodes within about a second. Should this
        process die meanwhile, say it again: the children are looked for each time. RunError if the
        run is completed or cancelled already."""
        if (found := await self._cancel(why)) not in (RUNNING, FAILED):
            raise RunError(f"run {self.id} is {found or 'gone'} already")

    async def _cancel(self, why: str) -> str:
        found = await self.change(END, **self.ending(CANCELLED, why))
        children = await self.children()  # no more can come: START asks for the parent's status
        await asyncio.gather(*(child._cancel("with its parent") for child in children))
        return str(found or "")

    async def resume(self, inputs: Mapping[str, Any] = {}) -> None:
        """Go on from exactly where the run, and children that it waits for, failed, with these
        inputs over its context; a map goes on with the list that it began with. RunError if the
        run has not failed."""
        ctx, resumed = Context({}), 0
        for name, value in inputs.items():
            ctx[name] = value
        while not resumed:
            await self.read()
            if self.phase != FAILED:
                raise RunError(f"run {self.id} is {self.phase}; only a failed run can be resumed")
            seen, jobs = self.version, [*self.active().values()]
            state = encode(self.state._replace(steps=0)._asdict())
            for child in await self.children():  # if the run moves meanwhile, RESUME refuses
                if child.origin.parent in jobs and child.phase == FAILED:
                    with suppress(RunError):  # somebody else has resumed it
                        await child.resume()
            a = {"seen": seen, "state": state, "jobs": jobs, "event": self.event("resumed")}
            resumed = await self.change(RESUME, ctx.changes, **a)

    async def answer(self, node: str, value: Any) -> None:
        """Answer what a node asks. The first answer wins. RunError if it asks nothing, ValueError
        if the answer is not JSON."""
        await self.read()
        job = f"{self.id}/{node}/{self.state.tokens.get(node)}"
        told = f'["{COMPLETED}",{to_json(value, "the answer")}]'
        event = self.event("answered", node=node)
        if not await self.change(ANSWER, job=job, told=told, event=event):
            raise RunError(f'run {self.id}: the node "{node}" does not wait for an answer')


# ── 8. Redis: the worker ─────────────────────────────────────────────────────────────────────
# Takes jobs, runs them and commits what came of them; and once a second shows that it lives, and
# looks for jobs that somebody lost (I3). The task of a job that is no longer held is cancelled,
# wherever it is: what it has sent travels on (see Link), and safety comes from the processing list.

CRASHES = 5  # a run fails when so many workers died or erred with one job; 1 if it has no retries


@dataclass
class Held:
    """A job that this worker takes for its own; the list in Redis may differ: see _audit."""

    task: asyncio.Task[None]  # works on it
    since: float = field(default_factory=time.monotonic)
    no_repeat: bool = False  # it has begun, and must not begin again
    outcome: Outcome | None = None  # is to be committed


class Worker:
    """Runs jobs until it is told to stop. Times are in seconds."""

    def __init__(
        self, url: str = "redis://localhost:6379", namespace: str = "agentflow",
        concurrency: int = 10, grace: float = 30.0, lease: float = 6.0, beat: float = 1.0,
    ) -> None:  # fmt: skip
        self.executor = RedisExecutor(url, namespace)
        self.key, self.send = self.executor.key, self.executor.send
        self.id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
        self.executor.name = self.id
        self.processing = self.key("processing", self.id)
        self.concurrency, self.grace, self.lease, self.beat = concurrency, grace, lease, beat
        self.stopping = self._leaving = False
        self.held: dict[str, Held] = {}  # by job
        self.counts = Counter(dict.fromkeys(("done", "refused", "audited", "lost", "reaped"), 0))
        self._runs = WeakValueDictionary[str, RedisRun]()  # by id, while somebody works on it
        self._registries: dict[str, Registry] = {}  # by graph
        self._tasks: set[asyncio.Task[Any]] = set()
        self._freed = asyncio.Event()
        self._taking = False  # jobs may yet come by a command that is under way
        self._suspect = ""  # a job that two workers died with: it runs when no other is held
        self._odd: set[str] = set()  # jobs listed but not held, or held but not listed, last time

    async def run(self) -> None:
        """Work until `stop` is called. RedisError where Redis is not there or will not do."""
        # For nodes that use asyncio.to_thread: a call that has timed out keeps its thread, and
        # without a free one not even the name of Redis can be looked up.
        threads = ThreadPoolExecutor(self.concurrency + 1000)
        asyncio.get_running_loop().set_default_executor(threads)
        await self.executor.open()
        await self._beat()
        tick = asyncio.create_task(self._tick())
        try:
            while not self.stopping:
                self._freed.clear()
                if self._room():
                    await self._take()
                else:
                    await self._freed.wait()
            deadline = time.monotonic() + self.grace
            while self.held and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:
            self.stopping = True
            leave = asyncio.create_task(self._leave(tick))
            await asyncio.wait([leave], timeout=5)  # or Redis is away
            await self.executor.link.close()

    def stop(self) -> None:
        """Take no more; end when what is held has ended, at the latest after the grace period."""
        self.stopping = True
        self._freed.set()

    async def _leave(self, tick: asyncio.Task[Any]) -> None:
        self._leaving = True
        await tick
        listed = await self.send("LRANGE", self.processing, 0, -1)
        await asyncio.gather(*map(self._give_back, {*listed, *self.held}))
        await self.send("DEL", self.key("worker", self.id))

    # A job's way: taken, claimed (what it needs is read), executed, and committed, parked, failed
    # or given back. This worker forgets it before Redis ends its custody, for it may come back at
    # once; only a committed job cannot, and is forgotten after.

    def _room(self, ended: int = 0) -> int:
        """For how many more jobs there is room, when so many of those held have ended."""
        free = self.concurrency - len(self.held) + ended
        return 0 if self.stopping or self._suspect else max(0, free)

    async def _take(self) -> None:
        """Take as many jobs as there is room for; if there are none, wait a second for one."""
        ends, client = (self.key("ready"), self.processing), self.executor.link.client
        self._taking = True
        try:
            take = self.send(*TAKE.on([*ends], size=self.concurrency))
            while not take.done() and not self.stopping:  # a stop must not wait for Redis
                await asyncio.wait([take], timeout=1)
            take.cancel()  # unless it is done; what it moves all the same, _leave finds
            jobs = [] if take.cancelled() else take.result()
            if not jobs and self._room():
                jobs = filter(None, [await client.blmove(*ends, 1, "RIGHT", "LEFT")])
        except Exception as error:  # what was moved without our hearing of it, the audit finds
            if not transient(error):
                raise
            with suppress(exceptions.TimeoutError):  # as in Link.close
                await client.aclose()  # a new one may lead to the new master
            return await asyncio.sleep(0.2)
        finally:
            self._taking = False
        for job in jobs:
            if job not in self.held:  # else it was taken from us, and has come back
                self._begin(job)

    def _begin(self, job: str, run: RedisRun | None = None) -> None:
        if not self._room():  # it was there when this job was asked for
            self._give_back(job)
            return
        task = asyncio.create_task(self._work(job, run))
        self.held[job] = Held(task)
        self._tasks.add(task)  # once it is not held, nothing else refers to it
        task.add_done_callback(self._tasks.discard)

    async def _work(self, job: str, run: RedisRun | None) -> None:
        """One delivery of a job; one that a commit of this worker has kept comes with its run."""
        held = self.held[job]
        try:
            claimed = (run, []) if run else await self._claim(job)
            if not claimed:
                await self._give_back(job)  # RELEASE knows where to
                return
            run, told = claimed
            ctx = self._context(job, run, told)
            try:
                node = await self._node(job, run)
                held.no_repeat = not node.retries
                outcome = await execute(node, ctx, run.record)
                if isinstance(outcome, Park):
                    await self._park(job, run, node, outcome)
                else:
                    held.outcome = outcome
                    await self._commit(job, run, node.flow)
            except RunError as error:
                log.warning("failed %s", job)
                self._forget(job)
                if not await run.change(END, job=job, **run.ending(FAILED, str(error))):
                    self.counts["refused"] += 1
        except Exception:  # charged, so that it does not come again for ever
            log.exception("giving back %s, as if we had crashed", job)
            await asyncio.sleep(1)  # lest it come again at once
            await self._give_back(job, crashed=True)

    async def _claim(self, job: str) -> tuple[RedisRun, list[Any]] | None:
        """Read a job's run, and what the job was told; None if it must not run, or not now."""
        id, name, mark = job.split("/")
        while True:
            read = READ.on(self.executor.keys(job), job=job)
            fields, context, texts, place = await self.send(*read)
            if not fields:
                log.warning("run %s has expired; dropping %s", id, job)
                return None
            origin = Origin(**json.loads(as_dict(fields)["origin"]))
            run = self._runs.get(id) or RedisRun(self.executor, id, origin)
            self._runs[id] = run
            run.update(fields, context)  # at once, for this is soon out of date
            if place is None or run.phase != RUNNING or run.state.tokens.get(name) != mark:
                return None
            crashes = int(run.fields.get(f"crashes {job}", 0))
            if 1 < crashes < CRASHES and not self._suspect:
                self._suspect = job  # lest it take other jobs down with it once more
            if self._suspect not in ("", job):
                return None
            if not self._suspect or len(self.held) + self._taking == 1:
                return run, [json.loads(text) for text in texts]
            while len(self.held) + self._taking > 1:  # until it is alone; what was read is then old
                await asyncio.sleep(0.05)

    def _context(self, job: str, run: RedisRun, told: list[Any]) -> Context:
        """What a node sees. It is given its results when all have come, and a failure at once."""
        failure = next((text for status, text in filter(None, told) if status != COMPLETED), "")
        results = [result for _, result in told] if told and all(told) else None
        visit, origin = run.state.visits.get(job.split("/")[1], 1), run.origin
        return Context(run.context, job, visit, origin.dry_run, origin.depth, results, failure)

    async def _node(self, job: str, run: RedisRun) -> Node:
        """The node of a job. RunError if it has crashed too often, in which case it is not even
        built, for that may be what kills its workers; or if it cannot be built."""
        name, crashes = job.split("/")[1], int(run.fields.get(f"crashes {job}", 0))
        if crashes < CRASHES:
            node = (await self._flow(run.origin)).nodes[name]
            if node.retries or not crashes:
                return node
        raise RunError(f'node "{name}": {crashes} workers ended or erred with it; see their logs')

    async def _flow(self, origin: Origin) -> Flow:
        if origin.graph not in self._registries:
            if not (graph := await self.send("GET", self.key("graph", origin.graph))):
                raise RunError(f"its graph {origin.graph} is not in Redis")
            self._registries = dict([*self._registries.items()][-99:])  # the 99 last built
            self._registries[origin.graph] = Registry(json.loads(graph))
        try:
            return self._registries[origin.graph][origin.flow]
        except BaseException as error:  # whatever its nodes raise
            why = f"worker {self.id} cannot build its flow: {str(error) or repr(error)}"
            raise RunError(as_unicode(why)) from None

    async def _commit(self, job: str, run: RedisRun, flow: Flow) -> None:
        """Record what a job came to, and with it the other held jobs of its run that have ended by
        now; decided anew whenever the run has moved. The commits of a run take turns."""
        async with run.turn:
            if len(run.state.tokens) > 1:
                await asyncio.sleep(0)  # so that what ends at the same time shares the commit
            while decision := self._decide(job, run, flow):
                ended, state, ready, a = decision
                keep = ready[: self._room(len(ended))] if run.phase == RUNNING else []
                # Refused: the run has moved; or this was sent twice, and _audit finds what it kept.
                if found := await run.change(COMMIT, keep=keep, queue=ready[len(keep) :], **a):
                    run.update(*found)
                    continue
                run.version, run.state = a["version"], state
                run.context = run.context | a["values"]
                self.counts["done"] += len(ended)
                for each, outcome in ended.items():
                    seconds = outcome.event["seconds"]
                    log.info("done %s -> %s in %.3f s", each, outcome.action, seconds)
                    self._forget(each)
                for other in keep:
                    self._begin(other, run)
                return
        self.counts["refused"] += 1
        await self._give_back(job)

    def _decide(
        self, job: str, run: RedisRun, flow: Flow
    ) -> tuple[dict[str, Outcome], State, list[str], dict[str, Any]] | None:
        """Of the held jobs of a run that have ended: their outcomes, the state after them, the jobs
        that may then run, and what `change` is given; None if `job` must not be committed."""
        state, version, changes = run.state, new_id(), dict[str, str]()
        ready, done, usage = list[str](), list[str](), Counter[str]()
        jobs = run.active().values() if run.phase != CANCELLED else ()
        ended = {j: held.outcome for j in jobs if (held := self.held.get(j)) and held.outcome}
        for each, outcome in ended.items():
            state, nodes = flow.advance(state, each.split("/")[1], outcome.action, version)
            ready += [f"{run.id}/{node}/{version}" for node in nodes]
            done.append(run.event("done", **outcome.event))
            usage.update(outcome.usage)
            changes |= outcome.changes
        if job not in ended or (run.phase == FAILED and not state.tokens):
            return None  # its token is gone; or the run failed of it, and a resume goes on there
        a: dict[str, Any] = {"seen": run.version, "version": version, "jobs": [*ended]}
        a |= {"state": encode(state._asdict()), "usage": usage, "done": done, "values": changes}
        if not state.tokens:
            values = run.context | changes if run.origin.parent else {}  # a root tells nobody
            a |= run.ending(COMPLETED, result=result_of(values, run.origin.gives))
        return ended, state, ready, a

    async def _park(self, job: str, run: RedisRun, node: Node, park: Park) -> None:
        """Start the children and free the slot, until they have ended or a person has answered."""
        origin = replace(run.origin, parent=job, depth=run.origin.depth + 1)
        count, starts = len(park.children) or 1, list[asyncio.Future[Any]]()
        for i, child in enumerate(park.children):
            theirs = replace(origin, flow=child.flow, index=i, gives=child.gives)
            started = RedisRun(self.executor, child_id(job, i), theirs)
            starts.append(started.start(node.flow.registry[child.flow], child.context, count=count))
            if i % 10 == 9:  # few at a time, for others want to be served, too
                await starts[-1]
        await asyncio.gather(*starts)
        event = run.event("parked", node=node.id, question=park.question)
        self._forget(job)
        a: dict[str, Any] = {"count": count, "question": park.question, "event": event}
        if await run.change(RELEASE, job=job, **a) < 0:
            why = f"its prep now gives {count}, and not all that it gave at first were started"
            raise RunError(f'node "{node.id}": children are missing: {why}')

    def _give_back(self, job: str, crashed: bool = False) -> asyncio.Future[Any]:
        """Put a job back, or drop it if nothing is left to do. It is charged with a crash also if
        it has begun and must not begin again."""
        crashed |= self._forget(job)
        return self.send(*RELEASE.on(self.executor.keys(job), job=job, crashed=crashed))

    def _forget(self, job: str) -> bool:
        """Hold a job no longer; what works on it is cancelled, unless it calls this. Gives whether
        it has begun and must not begin again."""
        held = self.held.pop(job, None)
        if held and held.task is not asyncio.current_task():
            held.task.cancel()
        if job == self._suspect:
            self._suspect = ""
        self._freed.set()
        return held is not None and held.no_repeat

    # Once a second.

    async def _tick(self) -> None:
        while not self._leaving:
            due = time.monotonic() + self.beat
            await asyncio.sleep(self.beat)
            if (late := time.monotonic() - due) > self.beat:
                jobs = ", ".join(self.held)
                log.warning("a node blocked the event loop for %.1f s, one of: %s", late, jobs)
            try:
                await asyncio.gather(self._beat(), self._audit(), self._watch(), self._reap())
            except Exception as error:  # the next beat is to come all the same
                log.error("Redis refused a command, perhaps for want of a permission: %s", error)

    async def _beat(self) -> None:
        now = time.monotonic()
        doing = encode({job: round(now - held.since, 1) for job, held in self.held.items()})
        keys = [self.key("worker", self.id), self.key("workers")]
        lease, link = int(self.lease * 1000), self.executor.link
        if not await self.send(*BEAT.on(keys, worker=self.id, lease=lease, doing=doing)):
            link.settled_at = max(link.settled_at, time.monotonic())  # others' have expired, too

    async def _audit(self) -> None:
        """Compare what this worker holds with its list, and let go of what is in only one of them
        two times in a row: in the list, as a reply was lost, or here, as we seemed dead (I3)."""
        listed = await self.send("LRANGE", self.processing, 0, -1)
        odd, moves = {*listed} ^ self.held.keys(), list[asyncio.Future[Any]]()
        for job in odd & self._odd:
            what = "audited" if job in listed else "lost"
            why = "we did not know that we had it" if job in listed else "it was taken from us"
            log.warning("letting go of %s: %s", job, why)
            self.counts[what] += 1
            moves.append(self._give_back(job))
        self._odd = odd
        await asyncio.gather(*moves)

    async def _watch(self) -> None:
        """Stop working on runs that were cancelled."""
        busy = [*self.held]
        replies = [self.send("HGET", self.executor.keys(job)[RUN], "status") for job in busy]
        found = zip(busy, await asyncio.gather(*replies), strict=True)
        await asyncio.gather(*(self._give_back(job) for job, phase in found if phase == CANCELLED))

    async def _reap(self) -> None:
        """Give back what dead workers had taken (I3). A worker is remembered for a day: what it had
        asked for may still come into its list."""
        now, crew = int((await self.send("TIME"))[0]), self.key("workers")
        workers = [id for id in await self.send("ZRANGE", crew, 0, -1) if id != self.id]
        beats = [self.send("EXISTS", self.key("worker", worker)) for worker in workers]
        lists = [self.send("LRANGE", self.key("processing", worker), 0, -1) for worker in workers]
        alive, found = await asyncio.gather(*beats), await asyncio.gather(*lists)
        if time.monotonic() - self.executor.link.settled_at < self.lease:
            return  # after an outage all may beat again first
        moves = list[asyncio.Future[Any]]()  # sent in one go, for `beside` is of them all
        for worker, lives, listed in zip(workers, alive, found, strict=True):
            if listed and not lives:
                log.warning("worker %s is dead; giving back %d jobs", worker, len(listed))
                for job in listed:
                    keys, beside = self.executor.keys(job, worker), len(listed) > 1
                    move = RELEASE.on(keys, job=job, dead=True, crashed=True, beside=beside)
                    moves.append(self.send(*move))
        self.counts["reaped"] += sum(await asyncio.gather(*moves))
        await self.send("ZREMRANGEBYSCORE", crew, "-inf", now - 24 * 3600)
