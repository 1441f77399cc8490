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
import hashlib
import json
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import agentflow
from agentflow import DEFAULT, ERROR, Context, Field, Flow, GraphError, Node, Permanent, Registry

Graph = dict[str, Any]

# ── 1. Test nodes ────────────────────────────────────────────────────────────────────────────
# Pure: what one writes is a hash of its id, its visit and what it read. So a node that ran too
# early, too late, twice or not at all shows in the final context.


def choose(data: Graph, labels: list[str], visit: int, number: int) -> str:
    """A node's action: one of its labels by this number; past its limit its exit, so that each
    run ends."""
    if visit > data.get("limit", 3):
        return str(data.get("exit", DEFAULT))
    return labels[number % len(labels)] if labels else DEFAULT


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
        if self.data.get("breaks") and int(prepared["digest"], 16) % 3 == 0:
            raise Permanent("broken")
        if prepared["attempts"] <= self.data.get("fails", 0):
            raise ValueError("fails at first")
        await asyncio.sleep(0)
        return prepared

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        for key in self.writes():
            ctx[key] = prepared["digest"]
        labels = [action for action in self.actions if action != ERROR]
        return choose(self.data, labels, ctx.visit, int(prepared["digest"], 16))


Registry.add("pure", Pure)


# ── 2. Random graphs ─────────────────────────────────────────────────────────────────────────
# Blocks within blocks, with some edges thrown in; or nodes and edges without any plan.

End = tuple[str, str]  # a node and an action that leads nowhere yet


class Builder:
    """Makes one graph of blocks. A block has an entry and open ends, which the next one joins."""

    def __init__(self, rng: random.Random, children: list[str], size: int) -> None:
        self.rng, self.children, self.left = rng, children, size
        # Where edges are thrown in, a plain edge is named: then each node can end its branch.
        self.wild = rng.random() < 0.5
        self.plain = "go" if self.wild else DEFAULT
        self.nodes: dict[str, Graph] = {}
        self.edges: dict[tuple[str, str, str], None] = {}
        self.breaks: list[list[End]] = []  # the ends that leave each loop around

    def graph(self) -> Graph:
        """The whole."""
        for _ in range(self.rng.choice([1, 1, 1, 2])):  # starts; they may join
            entry, ends = self.block(0)
            if self.rng.random() < 0.5:
                self.join(ends, last := self.node())
        for _ in range(self.rng.randrange(4) if self.wild else 0):
            source, target = self.rng.choices([*self.nodes], k=2)
            actions = {"x": None} | {a: None for s, _, a in self.edges if s == source}
            action = self.rng.choice([*actions])
            if self.nodes[source]["type"] == "pure" and action != "done":  # a loop ends by that
                self.edges[source, target, action] = None
        edges = [{"source": s, "target": t, "action": a} for s, t, a in self.edges]
        return {"nodes": [*self.nodes.values()], "edges": edges}

    def node(self, type: str = "pure", **data: Any) -> str:
        self.left -= 1
        id = f"n{len(self.nodes)}"
        self.nodes[id] = {"id": id, "type": type, "data": data}
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
        rng, data = self.rng, {}
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
    nodes = [{"id": id, "type": "pure", "data": {"limit": rng.randrange(1, 4)}} for id in ids]
    edges = {}
    for _ in range(rng.randrange(len(ids) - 1, 2 * len(ids) + 2)):
        source, target = rng.choices(range(len(ids)), k=2)
        if source > target and rng.random() < 0.5:
            source, target = target, source
        edges[ids[source], ids[target], rng.choice("aab")] = None
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
    bare = [{"id": node["id"], "type": "pure"} for node in graph["nodes"]]
    flow = Flow("", {"nodes": bare, "edges": graph["edges"]}, Registry({}))
    writers: dict[str, list[str]] = {node["id"]: [node["id"]] for node in bare}

    def free(node: str, key: str) -> bool:
        return not any(flow.may_overlap(node, other) for other in writers[key] if other != node)

    pure = [node for node in graph["nodes"] if node["type"] == "pure"]
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
            if rank:
                node = min(active, key=rank.__getitem__)
            else:
                node = order.choice([*active])
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
    except agentflow.RunError as error:
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


# ── 6. Command ───────────────────────────────────────────────────────────────────────────────


def many(prove: Any, seeds: range) -> tuple[Counter[str], dict[int, str]]:
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
    started = time.monotonic()
    figures, failures = PROOFS[args.proof](range(args.first, args.first + args.count))
    seconds = time.monotonic() - started
    print(f"{args.count} seeds in {seconds:.1f} s, {len(failures)} failed: {[*failures]}")
    for name, count in sorted(figures.items()):
        print(f"{count:10,}  {name}")
    return bool(failures)


PROOFS = {"rule": lambda seeds: many(rule, seeds)}

if __name__ == "__main__":
    sys.exit(main())
