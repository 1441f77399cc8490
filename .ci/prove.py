"""Heavy proofs of the engine: random graphs, random orders, random faults; all from a seed.

    python .ci/prove.py rule --from 0 --count 50000          the rule alone, as a pure function
    python .ci/prove.py differential --from 0 --count 5000   memory against Redis
    python .ci/prove.py gate --from 0 --count 10000          chosen interleavings and faults

Each prints its figures and the seeds that failed, and exits with 1 if there are some. A failing
graph of `rule` is made as small as it still fails. test_agentflow.py calls the same functions in
small doses.

Sections: 1 Test nodes, 2 Random graphs, 3 The rule alone, 4 Two executors, 5 The gate, 6 Command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import redis.asyncio
import redis.exceptions
from redis._parsers.base import BaseParser
from redis.exceptions import NoScriptError

import agentflow
import graphs.nodes  # noqa: F401, for sub-workflow and map
from agentflow import (
    DEFAULT,
    ERROR,
    Context,
    Flow,
    GraphError,
    Node,
    Permanent,
    RedisExecutor,
    RedisRun,
    Registry,
    Run,
    RunError,
    Script,
    Worker,
)
from graphs.check import Field, may_overlap

Graph = dict[str, Any]
Proved = tuple[Counter[str], dict[int, str]]  # figures, and what is wrong with which seed

# ── 1. Test nodes ────────────────────────────────────────────────────────────────────────────
# Pure: what one writes is a hash of its id, its visit and what it read. So a node that ran too
# early, too late, twice or not at all shows in the final context.


def choose(data: dict[str, Any], labels: list[str], visit: int, number: int) -> str:
    """A node's action: one of its labels by this number; past its limit its exit, so that each
    loop ends; and if that leads back into it, nothing."""
    limit = data.get("limit", 3)
    if visit > limit:
        return data["exit"] if visit < 2 * limit + 3 and data.get("exit") in labels else DEFAULT
    return labels[number % len(labels)] if labels else DEFAULT


async def no_pause() -> None:
    """Let others go on."""
    await asyncio.sleep(0)


PAUSE: ContextVar[Callable[[], Awaitable[Any]]] = ContextVar("PAUSE", default=no_pause)  # in exec


class Pure(Node):
    """Writes a hash. In each activation it first fails `fails` times; where it `breaks`, it fails
    for good at every third visit or so; and it fails for good before its `mend` is true."""

    fields = {
        "limit": Field("count"),
        "exit": Field("text"),
        "key": Field("id"),
        "fails": Field("count"),
        "breaks": Field("any"),
        "mend": Field("any"),
    }
    backoff = 0.001

    def writes(self) -> set[str]:
        return {str(self.data.get("key", self.id))}

    async def prep(self, ctx: Context) -> Any:
        seen = [self.id, ctx.visit, sorted(self.values(ctx).items())]
        digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
        mended = "mend" not in self.data or ctx["mend"]
        return {"digest": digest, "visit": ctx.visit, "attempts": 0, "mended": mended}

    async def exec(self, prepared: Any) -> Any:
        prepared["attempts"] += 1
        if not prepared["mended"]:
            raise Permanent("not mended yet")
        if "breaks" in self.data and ERROR in self.actions and int(prepared["digest"], 16) % 3 == 0:
            raise Permanent("broken")
        if prepared["attempts"] <= self.data.get("fails", 0):
            raise ValueError("fails at first")
        await PAUSE.get()()
        return prepared

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        for key in self.writes():
            ctx[key] = prepared["digest"]
        labels = [action for action in self.actions if action != ERROR]
        return choose(self.data, labels, ctx.visit, int(prepared["digest"], 16))


Registry.add("hash", Pure)


# ── 2. Random graphs ─────────────────────────────────────────────────────────────────────────
# Blocks within blocks, with some edges thrown in; or nodes and edges without any plan.

Edge = tuple[str, str, str]  # source, target, action
End = tuple[str, str]  # a node and an action that leads nowhere yet


class Builder:
    """Makes one graph of blocks. A block has an entry and open ends, which the next one joins."""

    def __init__(self, rng: random.Random, children: list[str], size: int) -> None:
        self.rng, self.children, self.left = rng, children, size
        # Where edges are thrown in, a plain edge is named: then each node can end its branch.
        self.wild = rng.random() < 0.5
        self.plain = "go" if self.wild else DEFAULT
        self.nodes: dict[str, Graph] = {}
        self.edges: dict[Edge, None] = {}
        self.breaks: list[list[End]] = []  # the ends that leave each loop around

    def graph(self) -> Graph:
        """The whole."""
        for _ in range(self.rng.choice([1, 1, 1, 2])):  # starts; they may join
            _, ends = self.block(0)
            if self.rng.random() < 0.5:
                self.join(ends, self.node())
        for _ in range(self.rng.randrange(4) if self.wild else 0):
            source, target = self.rng.choices([*self.nodes], k=2)
            actions = {"x": None} | {a: None for s, _, a in self.edges if s == source}
            action = self.rng.choice([*actions])
            types = {self.nodes[source]["type"], self.nodes[target]["type"]}
            if types == {"hash"} and action != "done":  # a loop ends by that
                self.edges[source, target, action] = None
        return as_graph(self.rng, [*self.nodes.values()], self.edges, self.wild)

    def node(self, type: str = "hash", **data: Any) -> str:
        self.left -= 1
        id = f"n{len(self.nodes)}"
        self.nodes[id] = {"id": id, "type": type, "data": data, "config": {"timeout": 86400}}
        return id

    def join(self, ends: list[End], target: str) -> None:
        self.edges |= {(source, target, action): None for source, action in ends}

    def block(self, depth: int) -> tuple[str, list[End]]:
        kinds = [self.step, self.sequence, self.split, self.choice, self.loop, self.some]
        weights = [2, 3, 2, 2, 3, 1]
        if depth > 3 or self.left <= 0:
            return self.step(depth)
        return self.rng.choices(kinds, weights)[0](depth + 1)

    def step(self, depth: int) -> tuple[str, list[End]]:
        rng = self.rng
        data: Graph = {}
        if self.children and rng.random() < 0.2:
            child = rng.choice(self.children)
            if rng.random() < 0.5:
                id = self.node("sub-workflow", workflowId=child, inputs={"seed": "seed"})
            else:
                over = f"list{rng.randrange(6)}"
                data = {"workflowId": child, "over": over, "as": "item"}
                id = self.node("map", inputs={"seed": "seed"}, **data)
            return id, [(id, DEFAULT)]
        if rng.random() < 0.15:
            data["fails"] = rng.randrange(1, 3)
        id = self.node(**data)
        ends = [(id, self.plain)]
        if rng.random() < 0.1:
            self.nodes[id]["data"]["breaks"] = True
            ends.append((id, ERROR))
        return id, ends

    def sequence(self, depth: int) -> tuple[str, list[End]]:
        entry, ends = self.block(depth)
        for _ in range(self.rng.randrange(1, 3)):
            target, more = self.block(depth)
            self.join(ends, target)
            ends = more
        return entry, ends

    def branches(self, entry: str, labels: list[list[str]], depth: int) -> list[End]:
        """A branch for each list of labels; all its labels lead to it."""
        ends: list[End] = []
        for names in labels:
            if self.rng.random() < 0.15:
                ends += [(entry, name) for name in names]
            else:
                target, more = self.block(depth)
                self.join([(entry, name) for name in names], target)
                ends += more if self.rng.random() < 0.85 else []
        if self.breaks and self.rng.random() < 0.3:
            self.breaks[-1].append((entry, self.rng.choice(labels)[0]))
        return ends

    def split(self, depth: int) -> tuple[str, list[End]]:
        entry = self.node()
        return entry, self.branches(entry, [[self.plain]] * self.rng.randrange(2, 4), depth)

    def choice(self, depth: int) -> tuple[str, list[End]]:
        entry = self.node()
        labels = [["a"], ["b"], ["c"]][: self.rng.randrange(2, 4)]
        return entry, self.branches(entry, labels, depth)

    def some(self, depth: int) -> tuple[str, list[End]]:
        entry = self.node()
        labels = [self.rng.sample("abc", self.rng.randrange(1, 4)) for _ in range(3)]
        return entry, self.branches(entry, labels, depth)

    def loop(self, depth: int) -> tuple[str, list[End]]:
        rng = self.rng
        self.breaks.append([])
        if rng.random() < 0.3:  # tested first
            test = self.node(limit=rng.randrange(1, 4), exit="done")
            entry, ends = self.block(depth)
            self.join([(test, "again")], entry)
            self.join(ends or [(entry, "x")], test)
            entry = test
        else:
            entry, ends = self.block(depth)
            test = self.node(limit=rng.randrange(1, 4), exit="done")
            self.join(ends or [(entry, "x")], test)
            self.join([(test, "again")], entry)
        while rng.random() < 0.3:  # side work
            self.join([(test, "again")], self.block(depth)[0])
        return entry, [(test, "done"), *self.breaks.pop()]


def unplanned(rng: random.Random) -> Graph:
    """Nodes and edges without any plan."""
    ids = [f"n{i}" for i in range(rng.randrange(2, 9))]
    labels = rng.choice(["aab", "aaa", "ab", "abc"])
    nodes = [{"id": id, "type": "hash", "data": {"limit": rng.randrange(1, 4)}} for id in ids]
    edges: dict[Edge, None] = {}
    for _ in range(rng.randrange(len(ids) - 1, 2 * len(ids) + 2)):
        source, target = rng.choices(range(len(ids)), k=2)
        if source > target and rng.random() < 0.5:
            source, target = target, source
        edges[ids[source], ids[target], rng.choice(labels)] = None
    return as_graph(rng, nodes, edges, True)


def as_graph(rng: random.Random, nodes: list[Any], edges: Iterable[Edge], wild: bool) -> Graph:
    """A graph; its starts and the heads of its loops go by the order of its nodes."""
    if wild and rng.random() < 0.5 and all(node["type"] == "hash" for node in nodes):
        rng.shuffle(nodes)
    return {
        "nodes": nodes,
        "edges": [{"source": s, "target": t, "action": a} for s, t, a in edges],
    }


def random_flows(rng: random.Random, size: int = 12, children: int = 0) -> dict[str, Graph]:
    """Graphs by id: "main", and the sub-flows that it may run. The loader may refuse them."""
    names = [f"child{i}" for i in range(children)]
    flows = {name: Builder(rng, names[:i], 4).graph() for i, name in enumerate(names)}
    if rng.random() < 0.3 and not children:
        flows["main"] = unplanned(rng)
    else:
        flows["main"] = Builder(rng, names, rng.randrange(2, size)).graph()
    for graph in flows.values():
        add_inputs(rng, graph)
    return flows


def add_inputs(rng: random.Random, graph: Graph) -> None:
    """Let nodes read what others write, and share keys, wherever the loader allows it (I4)."""
    graph["inputs"] = {"seed": rng.randrange(1000), "item": 0}
    graph["inputs"] |= {f"list{n}": [*range(n)] for n in range(6)}
    bare = [{"id": node["id"], "type": "hash"} for node in graph["nodes"]]
    flow = Flow("", {"nodes": bare, "edges": graph["edges"]}, Registry({}))
    writers: dict[str, list[str]] = {node["id"]: [node["id"]] for node in bare}

    def free(node: str, key: str) -> bool:
        return not any(may_overlap(flow, node, other) for other in writers[key] if other != node)

    pure = [node for node in graph["nodes"] if node["type"] == "hash"]
    for node in pure:
        key = rng.choice([*writers])
        if rng.random() < 0.15 and key != node["id"] and free(node["id"], key):
            del writers[node["id"]]
            writers[key].append(node["id"])
            node["data"]["key"] = key
            break
    for node in pure:
        keys = rng.sample([*writers], min(3, len(writers)))
        reads = {key: [key, "seed"] for key in keys if free(node["id"], key)}
        node["data"]["inputs"] = reads | {"seed": "seed", "item": "item"}


# ── 3. The rule alone ────────────────────────────────────────────────────────────────────────
# Flow.first and Flow.advance as pure functions: whatever order the active nodes end in, a run
# ends, with the same activations and the same context.

Trace = tuple[Any, ...]  # the multiset of (node, visit, action), and the context


class Wrong(Exception):
    """What was proved wrong."""


def build(flows: dict[str, Graph]) -> Flow:
    """The main flow; GraphError where the loader refuses it."""
    return Registry(flows)["main"]


class Model:
    """A flow whose nodes are table entries: fast enough for a million runs."""

    def __init__(self, flow: Flow, seed: int) -> None:
        self.flow, self.seed = flow, seed
        self.reads = {id: sorted(node.reads()) for id, node in flow.nodes.items()}
        self.key = {id: min(node.writes()) for id, node in flow.nodes.items()}
        self.labels = {id: node.actions for id, node in flow.nodes.items()}
        self.hashes: dict[tuple[str, int], int] = {}

    def hash(self, node: str, visit: int) -> int:
        if (node, visit) not in self.hashes:
            text = f"{self.seed}/{node}/{visit}".encode()
            self.hashes[node, visit] = zlib.crc32(text) >> 3
        return self.hashes[node, visit]

    def run(self, order: random.Random) -> Trace:
        """One run, its nodes ending in an order of this generator's choice."""
        flow, context, done = self.flow, dict[str, int](), Counter[tuple[str, int, str]]()
        state, ready = flow.first("0")
        active: dict[str, tuple[int, int]] = {}  # node: its visit, and what it read
        rank = {node: order.random() for node in flow.nodes} if order.random() < 0.6 else {}
        early = order.random() < 0.5
        while True:
            for node in ready:
                visit = state.visits.get(node, 1)
                active[node] = visit, self.read(node, context) if early else 0
            if not active:
                break
            node = min(active, key=rank.__getitem__) if rank else order.choice([*active])
            visit, read = active.pop(node)
            if state.visits.get(node, 1) != visit:
                raise Wrong(f"the visit of {node} changed while it was active")
            read = read if early else self.read(node, context)
            number = self.hash(node, visit)
            action = choose(flow.nodes[node].data, self.labels[node], visit, number)
            context[self.key[node]] = hash((number, visit, read))
            done[node, visit, action] += 1
            if len(done) > 2000:
                raise Wrong("it goes on for ever")
            state, ready = flow.advance(state, node, action, "1")
        if state.tokens:
            raise Wrong(f"stuck: {state.tokens}")
        return sorted(done.items()), sorted(context.items())

    def read(self, node: str, context: dict[str, int]) -> int:
        return hash(tuple([context.get(key, 0) for key in self.reads[node]]))


def check_orders(flow: Flow, seed: int, orders: int) -> int:
    """Run a flow in so many orders; Wrong unless all are the same. Gives the activations."""
    model = Model(flow, seed)
    order = random.Random(seed)
    try:
        one = model.run(order)
        for _ in range(orders - 1):
            other = model.run(order)
            if one != other:
                what = "context" if one[0] == other[0] else "activations"
                raise Wrong(f"the {what} depend on the order")
    except RunError as error:
        raise Wrong(str(error)) from None
    return sum(count for _, count in one[0])


REFUSALS = {
    "leads into the loop": "a loop is entered elsewhere than at its head",
    "has no way out": "a loop has no way out",
    "may run at the same time": "two nodes conflict over a key",
}


def reason(error: GraphError) -> str:
    """Why the loader refused a graph, in a few words."""
    return next((why for text, why in REFUSALS.items() if text in str(error)), str(error))


def rule(seed: int, orders: int = 10) -> dict[str, int]:
    """The rule on one random graph, in so many orders. Wrong, or figures."""
    flows = random_flows(random.Random(seed))
    try:
        flow = build(flows)
    except GraphError as error:
        return {f"refused: {reason(error)}": 1}
    try:
        steps = check_orders(flow, seed, orders)
    except Wrong as error:
        raise Wrong(f"{error}\n{smallest(flows['main'], seed)}") from None
    return {"accepted": 1, "orders": orders, "activations": steps, "with loops": bool(flow.loops)}


def is_wrong(graph: Graph, seed: int) -> bool:
    """Whether a graph is accepted and depends on the order, for some choice of actions."""
    try:
        flow = build({"main": graph})
        for i in range(30):
            check_orders(flow, seed + i, 30)
    except GraphError:
        return False
    except Wrong:
        return True
    return False


def smallest(graph: Graph, seed: int) -> str:
    """A failing graph without all that it does not need to fail, as text."""
    shrinking = True
    while shrinking:
        shrinking = False
        for less in [*smaller(graph)]:
            if is_wrong(less, seed):
                graph, shrinking = less, True
                break
    kinds = [f"{n['id']} {json.dumps(n['data'])}" for n in graph["nodes"]]
    edges = [f"{e['source']} --{e['action']}--> {e['target']}" for e in graph["edges"]]
    return "\n".join([*kinds, *edges])


def smaller(graph: Graph) -> Iterator[Graph]:
    """Graphs with one thing less."""
    nodes, edges = graph["nodes"], graph["edges"]
    for node in nodes:
        rest = [e for e in edges if node["id"] not in (e["source"], e["target"])]
        yield graph | {"nodes": [n for n in nodes if n is not node], "edges": rest}
    for node in nodes:  # bridged over
        into = [e for e in edges if e["target"] == node["id"] != e["source"]]
        out = [e["target"] for e in edges if e["source"] == node["id"] != e["target"]]
        bridges = [e | {"target": target} for e in into for target in out]
        rest = [e for e in edges if node["id"] not in (e["source"], e["target"])]
        yield graph | {"nodes": [n for n in nodes if n is not node], "edges": rest + bridges}
    for edge in edges:
        yield graph | {"edges": [e for e in edges if e is not edge]}
    for node in nodes:
        for name in node["data"]:
            data = {k: v for k, v in node["data"].items() if k != name}
            yield graph | {"nodes": [n | {"data": data} if n is node else n for n in nodes]}


# ── 4. Two executors ─────────────────────────────────────────────────────────────────────────
# The run in memory says what is right; the one on Redis must agree.

Result = tuple[str, Counter[str]]  # the final context, and the multiset of what was committed


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """A Redis of our own; gives its URL."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        url = f"unix://{path}"
        command = [os.environ.get("REDIS_SERVER", "redis-server"), "--port", "0"]
        command += ["--unixsocket", path, "--save", "", *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            while process.poll() is None:
                with contextlib.suppress(redis.RedisError), redis.Redis.from_url(url) as db:
                    db.exists("key")
                    break
                time.sleep(0.01)
            else:
                raise RuntimeError("redis-server does not start")
            yield url
        finally:
            process.kill()
            process.wait()


def flows_of(seed: int, size: int = 12) -> tuple[Flow, bool] | None:
    """A random flow with sub-flows, and whether it first fails; None if the loader refuses it."""
    rng = random.Random(seed)
    flows = random_flows(rng, size, children=rng.randrange(1, 3))
    sources = {e["source"] for e in flows["main"]["edges"] if e.get("action") == ERROR}
    pure = [n for n in flows["main"]["nodes"] if n["type"] == "hash" and n["id"] not in sources]
    if fails := bool(pure) and rng.random() < 0.3:
        rng.choice(pure)["data"]["mend"] = True
    try:
        return build(flows), fails
    except GraphError as error:
        reason(error)
        return None


async def ended(run: Run) -> Result:
    """What has come of a run that has ended."""
    done: Counter[str] = Counter()
    async for event in run.events():
        if event["event"] == "done":
            done[f"{event['flow']}/{event['node']}/{event['visit']}/{event['action']}"] += 1
    context = (await run.status()).context
    return json.dumps(context | {"mend": 0}, sort_keys=True), done


async def in_memory(flow: Flow) -> Result:
    """What is right."""
    run = await flow.run({"mend": True})
    await run.result()
    return await ended(run)


async def on_redis(flow: Flow, executor: RedisExecutor, mend: bool) -> Result:
    """The same by workers; a run that fails on the way is resumed."""
    run = await executor.run(flow, {"mend": not mend})
    try:
        await run.result()
    except RunError:
        if (await run.status()).error.endswith("not mended yet"):
            await run.resume({"mend": True})
            await run.result()
    return await ended(run)


def compare(right: Result, found: Result) -> None:
    """Wrong, where they differ."""
    if more := found[1] - right[1]:
        raise Wrong(f"was committed, but should not: {dict(more)}")
    if less := right[1] - found[1]:
        raise Wrong(f"should have been committed: {dict(less)}")
    if right[0] != found[0]:
        raise Wrong(f"another context: {found[0]} instead of {right[0]}")


async def differ(seed: int, executor: RedisExecutor) -> dict[str, int]:
    """One random flow in memory and on Redis. Wrong, or figures."""
    if not (found := flows_of(seed)):
        return {"refused": 1}
    flow, mend = found
    try:
        right = await in_memory(flow)
    except RunError as error:
        return {f"in memory: {str(error).rpartition('; ')[2]}": 1}
    try:
        compare(right, await asyncio.wait_for(on_redis(flow, executor, mend), 300))
    except TimeoutError:
        raise Wrong("has not ended within 300 seconds") from None
    except RunError as error:
        raise Wrong(str(error)) from None
    kinds = {node["type"] for node in flow.graph["nodes"]}
    figures = {"graphs": 1, "activations": sum(right[1].values()), "with a failure": mend}
    return figures | {f"with {kind}": 1 for kind in kinds}


async def differ_all(url: str, seeds: Iterable[int], workers: int, at_once: int) -> Proved:
    """All these seeds on one server, so many at once. Their figures and failures."""
    space = f"differential-{min(seeds)}"
    crew = [Worker(url, space) for _ in range(workers)]
    tasks = [asyncio.create_task(worker.run()) for worker in crew]
    executor = RedisExecutor(url, space)
    await executor.open()
    figures, failures = Counter[str](), dict[int, str]()
    left = iter(seeds)

    async def some() -> None:
        for seed in left:
            try:
                figures.update(await differ(seed, executor))
            except Wrong as error:
                failures[seed] = str(error)
                print(f"seed {seed}: {error}", flush=True)

    await asyncio.gather(*(some() for _ in range(at_once)))
    lists = [executor.key("ready"), *(worker.processing for worker in crew)]
    if any([await executor.send("LLEN", name) for name in lists]):
        failures[-1] = "jobs are left"
    for worker in crew:
        worker.stop()
    await asyncio.gather(*tasks)
    await executor.link.close()
    return figures, failures


def differential(seeds: Iterable[int], workers: int = 2, at_once: int = 40) -> Proved:
    """Both executors on random flows, on a server of our own."""
    with server() as url:
        return asyncio.run(differ_all(url, seeds, workers, at_once))


# ── 5. The gate ──────────────────────────────────────────────────────────────────────────────
# Real workers and a client on a real server, in one process. Before each Redis command, and while
# a node executes, each waits at a gate; a seed decides who goes on, when time passes and what
# breaks. Time is virtual: it goes on only when the seed says so.

STEPS = 150  # with faults; then all is healed
DRAIN = 40_000  # steps in which it must come to rest after that


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still until it is set."""

    now = 0.0

    def time(self) -> float:
        return self.now

    async def settle(self) -> None:
        """Wait until nothing can go on by itself."""
        await asyncio.sleep(0)
        while self._ready:  # type: ignore[attr-defined]
            await asyncio.sleep(0)

    def skip(self) -> None:
        """Go to the time of the next timer, or half a second on."""
        timers = [t.when() for t in self._scheduled if not t.cancelled()]  # type: ignore[attr-defined]
        self.now = max(self.now, min([*timers, self.now + 0.5]))


class GatedClient(redis.asyncio.Redis):
    """A client whose commands wait at the gate, each by itself, in a pipeline too."""

    gate: Gate
    actor: str

    @classmethod
    def at(cls, gate: Gate, actor: str) -> GatedClient:
        """A client of this actor."""
        client = cls(decode_responses=True)
        client.gate, client.actor = gate, actor
        return client

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] != "BLMOVE":
            return await self.gate.send(self.actor, args)
        args = ("LMOVE", *args[1:-1])  # it blocks by the virtual clock
        if (found := await self.gate.send(self.actor, args)) is None:
            await asyncio.sleep(1)
            found = await self.gate.send(self.actor, args)
        return found

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> GatedPipeline:
        pipe = GatedPipeline(self.connection_pool, self.response_callbacks, False, None)
        pipe.owner = self
        return pipe


class GatedPipeline(redis.asyncio.client.Pipeline):
    """Between its commands those of others may come, as on a real server."""

    owner: GatedClient

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        replies: list[Any] = []
        commands, self.command_stack = self.command_stack, []
        for args, _ in commands:
            try:
                replies.append(await self.owner.execute_command(*args))
            except redis.exceptions.ResponseError as error:
                if raise_on_error:
                    raise
                replies.append(error)
        return replies


def route(link: Any, client: GatedClient) -> None:
    """Let all that a link sends pass the gate."""

    async def exchange(commands: list[tuple[Any, ...]], patience: float) -> list[Any]:
        async with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies: list[Any] = await pipe.execute(raise_on_error=False)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            load()
        return replies

    def load() -> None:  # which is not worth a step
        for script in agentflow.SCRIPTS:
            client.gate.redis.script_load(script.text)

    load()
    link.client, link._exchange = client, exchange


@dataclass
class Waiting:
    """Somebody at the gate."""

    actor: str
    what: str
    passes: asyncio.Future[str]


NAMES = {s.digest: name for name, s in vars(agentflow).items() if isinstance(s, Script)}
ERRORS = [
    "READONLY You can't write against a read only replica.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script.",
    "MASTERDOWN Link with MASTER is down",
]
NET = "net"  # the actor of commands that arrive when their sender has given up


class Gate:
    """One seed's schedule: who waits, who is dead, what breaks."""

    def __init__(self, rng: random.Random, redis: redis.Redis, loop: VirtualLoop) -> None:
        self.rng, self.redis, self.loop = rng, redis, loop
        self.waiting: list[Waiting] = []
        self.dead: set[str] = set()
        self.paused: dict[str, int] = {}  # actor: steps
        self.speed: dict[str, float] = {}
        self.open = self.closed = False
        self.counts: Counter[str] = Counter()
        self.log: list[str] = []  # what happened, in its order
        self.tasks: set[asyncio.Task[Any]] = set()
        self.begun: set[str] = set()  # whose first command is through: it may raise, by contract

    async def enter(self, actor: str, what: str) -> str:
        """Wait to be let through; gives what is to happen to a command."""
        if self.open:
            return "go"
        if self.closed:
            raise asyncio.CancelledError
        passes = self.loop.create_future()
        if actor not in self.dead:
            self.waiting.append(Waiting(actor, what, passes))
        return await passes

    async def send(self, actor: str, args: tuple[Any, ...]) -> Any:
        """A command, as this actor's client sees it."""
        what = NAMES[args[1]] if args[0] == "EVALSHA" else " ".join(map(str, args[:2]))
        verdict = await self.enter(actor, what)
        if verdict == "lost request":
            raise redis.exceptions.ConnectionError(verdict)
        if verdict == "error reply":  # parsed as from a server
            raise BaseParser.parse_error(ERRORS[zlib.crc32(what.encode()) % len(ERRORS)])
        if verdict == "late":
            self.spawn(self.arrive_late(args))
            raise redis.exceptions.TimeoutError(verdict)
        reply = self.redis.execute_command(*args)
        if verdict == "lost reply":
            raise redis.exceptions.ConnectionError(verdict)
        return reply

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start a task that is kept until it ends."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def arrive_late(self, args: tuple[Any, ...]) -> None:
        """A command whose reply nobody waits for."""
        with contextlib.suppress(redis.exceptions.ResponseError):
            await self.send(NET, args)

    def step(self, verdict: str) -> bool:
        """Let one through; False if nobody can go on."""
        able = [w for w in self.waiting if w.actor not in self.paused]
        if not able:
            return False
        if self.rng.random() < 0.03:
            self.speed.clear()
        weights = [self.speed.setdefault(w.actor, 10 ** self.rng.uniform(-2, 0)) for w in able]
        chosen = self.rng.choices(able, weights)[0]
        self.waiting.remove(chosen)
        if chosen.what == "node" or chosen.actor not in self.begun - {NET}:
            verdict = "go"
        self.begun.add(chosen.actor)
        self.counts[verdict] += 1
        self.log.append(f"{chosen.actor:8} {verdict:12} {chosen.what}")
        if not chosen.passes.done():
            chosen.passes.set_result(verdict)
        return True

    def tire(self) -> None:
        """Bring the end of pauses nearer."""
        self.paused = {actor: left - 1 for actor, left in self.paused.items() if left > 1}

    def kill(self, actor: str) -> None:
        """Nothing of this actor goes on, ever."""
        self.dead.add(actor)
        self.waiting = [w for w in self.waiting if w.actor != actor]


class Story:
    """One seed: a flow, a crew, a client, and what befalls them."""

    VERDICTS = ("lost reply", "lost request", "late", "error reply")

    def __init__(self, seed: int, flow: Flow, mend: bool, right: Result, gate: Gate) -> None:
        self.flow, self.mend, self.right, self.gate, self.rng = flow, mend, right, gate, gate.rng
        self.space = f"gate-{seed}"
        self.executor = RedisExecutor("redis://gate", self.space)
        route(self.executor.link, GatedClient.at(gate, "client"))
        self.crew: dict[str, Worker] = {}  # all that ever were
        self.cancels = self.rng.random() < 0.15
        self.crashes = 4  # as many as a job survives
        self.faults = self.rng.randrange(10)
        self.run_: RedisRun | None = None
        self.client_done = False
        self.broken = ""

    def hire(self) -> None:
        """Start one more worker."""
        name = f"worker{len(self.crew)}"
        worker = Worker(
            "redis://gate", self.space, concurrency=self.rng.choice([1, 2, 5]), lease=3600,
            grace=self.rng.choice([0, 30]),
        )  # fmt: skip
        route(worker.executor.link, GatedClient.at(self.gate, name))
        self.crew[name] = worker

        async def work() -> None:
            PAUSE.set(lambda: self.gate.enter(name, "node"))
            try:
                await worker.run()
            except Exception as error:
                self.broken = f"{name} ended by itself: {error!r}"

        self.gate.spawn(work())

    @property
    def living(self) -> list[str]:
        """Who works."""
        return [n for n, w in self.crew.items() if n not in self.gate.dead and not w.stopping]

    async def client(self) -> None:
        """Start the run, and cancel it or resume it."""
        self.run_ = await self.executor.run(self.flow, {"mend": not self.mend})
        if self.cancels:
            await asyncio.sleep(self.rng.uniform(0, 3))
            with contextlib.suppress(RunError):
                await self.run_.cancel()
        while (status := await self.run_.status()).status in ("running", "failed"):
            if status.status == "failed" and not status.error.endswith("not mended yet"):
                self.broken = status.error
                return
            if status.status == "failed":
                with contextlib.suppress(RunError):
                    await self.run_.resume({"mend": True})
            await asyncio.sleep(1)
        self.client_done = True

    def strike(self) -> str:
        """A fault; gives what is to happen to the next command."""
        gate, kind = self.gate, self.rng.randrange(9)
        if kind < 4:
            return self.VERDICTS[kind]
        actor = self.rng.choice(self.living)
        worker = self.crew[actor]
        if kind in (4, 5) and self.crashes:
            self.crashes -= 1
            if kind == 4:
                gate.kill(actor)
                self.hire()
            if kind == 5 or self.rng.random() < 0.7:
                self.forget(worker)
            if kind == 5 and self.rng.random() < 0.7:
                gate.paused[actor] = self.rng.randrange(20, 120)
        elif kind == 6:
            gate.paused[actor] = self.rng.randrange(5, 80)
        elif kind == 7:
            gate.redis.script_flush()
        elif kind == 8:
            worker.stop()
            self.hire()
        names = {4: "kill", 5: "heartbeat lost", 6: "pause", 7: "script flush", 8: "stop"}
        gate.counts[names[kind]] += 1
        gate.log.append(f"{actor:8} {names[kind]}")
        return "go"

    def forget(self, worker: Worker) -> None:
        """A heartbeat expires."""
        self.gate.redis.delete(worker.key("worker", worker.id))

    async def play(self) -> dict[str, int]:
        """The whole story. Wrong, or figures."""
        for _ in range(self.rng.choice([2, 2, 3])):
            self.hire()
        client = asyncio.create_task(self.client())
        for _ in range(STEPS):
            fault = self.faults and not self.client_done and self.rng.random() < 0.08
            self.faults -= bool(fault)
            await self.turn(self.strike() if fault else "go")
        self.gate.paused.clear()
        self.hire()
        for i in range(DRAIN):
            for name in self.gate.dead:
                self.forget(self.crew[name])
            await self.turn("go")
            if client.done() and i % 20 == 0 and not self.left():
                break
        if client.done() and client.exception():
            self.broken = repr(client.exception())
        if self.broken:
            raise Wrong(self.broken)
        if left := self.left():
            raise Wrong(f"has not come to rest: {left}")
        await self.judge()
        counts = Counter[str]()
        for worker in self.crew.values():
            counts.update(worker.counts)
        return {**self.gate.counts, **counts}

    async def turn(self, verdict: str) -> None:
        """Somebody goes on, or time does."""
        for worker in self.crew.values():
            worker.executor.link.settled_at = -1e9  # the clock of that is not virtual
        await self.gate.loop.settle()
        self.gate.tire()
        if self.rng.random() < 0.05 or not self.gate.step(verdict):
            self.gate.counts["seconds"] += 1
            self.gate.loop.skip()
        self.gate.counts["steps"] += 1

    def left(self) -> dict[str, Any]:
        """What there should not be at rest."""
        db: Any = self.gate.redis
        left: Graph = {}
        for name in [*db.keys(f"{{{self.space}}}:processing:*"), self.executor.key("ready")]:
            if jobs := db.lrange(name, 0, -1):
                left[name] = jobs
        if any(w.actor == NET for w in self.gate.waiting):
            left[NET] = "commands under way"
        held = {name: [*w.held] for name, w in self.crew.items() if name not in self.gate.dead}
        left |= {name: jobs for name, jobs in held.items() if jobs}
        if not self.client_done and self.run_:
            left["run"] = db.hgetall(self.run_.keys[0])
        return left

    async def judge(self) -> None:
        """Wrong, unless the run is as it should be."""
        assert self.run_
        self.gate.open = True
        found = await ended(self.run_)
        status = (await self.run_.status()).status
        if status == "completed":
            compare(self.right, found)
        elif not self.cancels or status != "cancelled":
            raise Wrong(f"the run is {status}")
        elif more := found[1] - self.right[1]:
            raise Wrong(f"was committed, but should not: {dict(more)}")
        db: Any = self.gate.redis
        for key in db.keys(f"{{{self.space}}}:run:*"):
            if db.type(key) == "hash" and db.hget(key, "status") == "running":
                raise Wrong(f"{key} still runs")
            if db.ttl(key) < 0:
                raise Wrong(f"{key} has no TTL")


async def play(seed: int, db: redis.Redis) -> dict[str, int]:
    """One seed, on this server, in a virtual loop."""
    if not (found := flows_of(seed, 9)):
        return {"refused": 1}
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    rng = random.Random(f"gate {seed}")
    random.seed(seed)  # the jitter of retries
    gate = Gate(rng, db, loop)
    right = asyncio.ensure_future(in_memory(found[0]))
    while not right.done():
        await loop.settle()
        loop.skip()
    if right.exception():
        return {"endless": 1}
    story = Story(seed, *found, right.result(), gate)
    try:
        return {"played": 1} | await story.play()
    finally:
        gate.open, gate.closed = False, True
        for worker in story.crew.values():
            worker.held.clear()
        logs[seed] = gate.log
        for key in db.keys(f"{{{story.space}}}:*"):
            db.delete(key)


logs: dict[int, list[str]] = {}  # of each seed, what happened, in its order


def gate(seeds: Iterable[int]) -> Proved:
    """Chosen interleavings and faults, on a server of our own."""

    def prove(seed: int) -> dict[str, int]:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(play(seed, db))

    with server() as url, redis.Redis.from_url(url, decode_responses=True) as db:
        return many(prove, seeds)


# ── 6. Command ───────────────────────────────────────────────────────────────────────────────


def many(prove: Callable[[int], dict[str, int]], seeds: Iterable[int]) -> Proved:
    """The figures of these seeds, and what was wrong with those that failed."""
    figures, failures = Counter[str](), dict[int, str]()
    for seed in seeds:
        try:
            figures.update(prove(seed))
        except Wrong as error:
            failures[seed] = str(error)
            print(f"seed {seed}: {error}", flush=True)
    return figures, failures


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed (0)")
    parser.add_argument("--count", type=int, default=1000, help="how many seeds (1000)")
    args = parser.parse_args()
    logging.getLogger("agentflow").setLevel(logging.CRITICAL)
    started = time.monotonic()
    figures, failures = PROOFS[args.proof](range(args.first, args.first + args.count))
    seconds = time.monotonic() - started
    print(f"{args.count} seeds in {seconds:.1f} s, {len(failures)} failed: {[*failures]}")
    for name, count in sorted(figures.items()):
        print(f"{count:10,}  {name}")
    return bool(failures)


PROOFS: dict[str, Callable[[range], Proved]] = {
    "rule": lambda seeds: many(rule, seeds),
    "differential": differential,
    "gate": gate,
}

if __name__ == "__main__":
    sys.exit(main())
