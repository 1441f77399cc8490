"""What may stand in a graph file. A graph is checked before it can run: every finding at once,
each with its file, place and mend.

First its parts, each by itself; then the flow that they make. Above all, two nodes that may run at
the same time must not use one key that one of them writes: that makes I4 of agentflow.py true.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agentflow import DEFAULT, ERROR, SAFE_ID, Flow, GraphError, Loop, Registry, encode

MAX_NODES = 2_000  # in a graph, and five times as many edges
Finding = tuple[str, str]  # a place in a graph file, and what is wrong there


class Field(NamedTuple):
    """A field in a graph file."""

    kind: str  # what it must be: a key of KINDS
    about: str = ""
    required: bool = False


# ── 1. Files ─────────────────────────────────────────────────────────────────────────────────


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError also for NaN, for a key that stands twice, for deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {max(keys, key=keys.count)!r:.80} stands twice in an object")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text:.40} is not JSON: no finite number")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load(folder: str | Path) -> Registry:
    """The graphs in a folder; a file's stem is its flow's id. GraphError without a folder."""
    if not os.path.isdir(folder):
        raise GraphError(f"{folder}: $: is not a folder; name the one with the graphs")
    graphs: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.json")):
        try:
            graphs[file.stem] = parse_json(file.read_text("utf-8-sig"))
        except (ValueError, OSError) as error:
            graphs[file.stem] = error  # a finding for who asks for this flow
    return Registry(graphs, f"{folder}/")


# ── 2. Parts ─────────────────────────────────────────────────────────────────────────────────


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != "" and "/" not in value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and _is_key(value.partition("/")[0])


def _paths(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(map(_is_path, values))


def _safe_id(value: Any) -> bool:
    return type(value) in (str, int) and SAFE_ID.fullmatch(str(value)) is not None


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id": ("1 to 128 letters, digits, dots, dashes or underscores", _safe_id),
    "text": ("a string that is not empty", lambda v: isinstance(v, str) and v != ""),
    "inputs": (
        "an object of name: key, or name: list of keys",
        lambda v: isinstance(v, dict) and all(map(_paths, v.values())),
    ),
    "keys": (
        "an object of key: key",
        lambda v: isinstance(v, dict) and all(map(_is_key, [*v, *v.values()])),
    ),
    "path": ("a context key, printable, or a path that begins with one", _is_path),
    "defaults": (
        "an object, its keys printable and without a slash",
        lambda v: isinstance(v, dict) and all(map(_is_key, v)),
    ),
    "object": ("an object", lambda v: isinstance(v, dict)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "count": ("a whole number from 0 to 1000", lambda v: type(v) is int and 0 <= v <= 1000),
    "seconds": ("seconds, at most 86400", lambda v: type(v) in (int, float) and 0 < v <= 86400),
    "any": ("a JSON value", lambda v: True),
}
GRAPH = {"nodes": Field("list", required=True), "edges": Field("list")}
GRAPH |= {"description": Field("text"), "inputs": Field("defaults"), "expect": Field("object")}
NODE = {"id": Field("id", required=True), "type": Field("text", required=True)}
NODE |= {"data": Field("object"), "config": Field("object")}
EDGE = {"source": Field("id", required=True), "target": Field("id", required=True)}
EDGE |= {"action": Field("text")}
CONFIG = {"retries": Field("count"), "timeout": Field("seconds")}
DATA = {"inputs": Field("inputs"), "example": Field("any")}


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest one, else all that there are."""
    near = difflib.get_close_matches(str(name), known := sorted(known), 1)
    return f'did you mean "{near[0]}"?' if near else f"there is {', '.join(known) or 'none'}"


def check_fields(place: str, given: Any, fields: Mapping[str, Field]) -> Iterator[Finding]:
    """What is wrong with one object in a graph file, by the table of its fields."""
    if not isinstance(given, dict):
        yield place, f"must be an object, not {encode(given):.80}"
        return
    for name in sorted(given.keys() - fields.keys()):
        yield f"{place}.{name:.80}", f"is not a field here; {nearest(name, fields)}"
    for name, (kind, _, required) in fields.items():
        what, fits = KINDS[kind]
        if name in given and not fits(given[name]):
            yield f"{place}.{name}", f"must be {what}, not {encode(given[name]):.80}"
        elif required and name not in given:
            yield f"{place}.{name}", f"is missing; it must be {what}"


def check_parts(graph: Any) -> Iterator[Finding]:
    """What is wrong with a graph's parts, each by itself; without findings, Flow can be built."""
    if bad := [*check_fields("$", graph, GRAPH)]:
        yield from bad
        return
    nodes, edges = graph["nodes"], graph.get("edges", [])
    if not 1 <= len(nodes) <= MAX_NODES or len(edges) > 5 * MAX_NODES:
        yield "$.nodes", f"must be 1 to {MAX_NODES}, with at most {5 * MAX_NODES} edges"
    ids: set[str] = set()
    for i, node in enumerate(nodes):
        place = f"$.nodes[{i}]"
        if bad := [*check_fields(place, node, NODE)]:
            yield from bad
            continue
        if str(node["id"]) in ids:
            yield f"{place}.id", f'"{node["id"]}" is the id of another node, too; choose a new one'
        ids.add(str(node["id"]))
        yield from check_fields(f"{place}.config", node.get("config", {}), CONFIG)
        if node["type"] in Registry.types:
            fields = DATA | Registry.types[node["type"]].fields
            yield from check_fields(f"{place}.data", node.get("data", {}), fields)
        else:
            hint = f"{nearest(node['type'], Registry.types)} (--import adds more)"
            yield f"{place}.type", f'there is no node type "{node["type"]:.80}"; {hint}'
    for i, edge in enumerate(edges):
        place = f"$.edges[{i}]"
        bad = [*check_fields(place, edge, EDGE)]
        yield from bad
        for end in () if bad else ("source", "target"):
            if str(edge[end]) not in ids:
                yield f"{place}.{end}", f'"{edge[end]}" is not a node; {nearest(edge[end], ids)}'


# ── 3. Flows ─────────────────────────────────────────────────────────────────────────────────


def forks(flow: Flow, nodes: Iterable[str]) -> list[list[str]]:
    """The targets of each action of these nodes."""
    return [targets for node in nodes for targets in flow.targets[node].values()]


def one_token_in(flow: Flow, loop: Loop) -> bool:
    """Whether only one token can ever be in a loop, which may then be entered anywhere."""
    leads = {*loop.members, *flow.nodes_in(flow.ancestors[loop.head])}
    return len(flow.starts) == 1 and all(
        len(leads.intersection(targets)) < 2 for targets in forks(flow, leads)
    )


def reached(flow: Flow, sources: Iterable[str], stop: str) -> set[str]:
    """These nodes and what they lead to, without going on behind `stop`."""
    found = dict.fromkeys(sources)
    for node in (queue := [*found]):
        if node != stop:
            queue += [target for target in flow.leads_to(node) if target not in found]
            found |= dict.fromkeys(flow.leads_to(node))
    return {*found}


class Chooser(NamedTuple):
    """A node with several actions, and what is reached without going on behind it."""

    node: str
    before: set[str]  # from the starts
    behind: list[set[str]]  # by each action


@functools.lru_cache(maxsize=1)  # for all pairs of the flow that is being checked
def choosers(flow: Flow) -> list[Chooser]:
    """The nodes that may choose what runs."""
    return [
        Chooser(
            node,
            reached(flow, flow.starts, node),
            [reached(flow, targets, node) for targets in forks(flow, [node])],
        )
        for node in flow.nodes
        if len(flow.targets[node]) > 1
    ]


def chooses(flow: Flow, by: Chooser, ends: set[str]) -> bool:
    """Whether both ends are reached through this node only, and by different actions of it."""
    if by.node in ends or ends & by.before:
        return False
    for loop in flow.loops:
        if by.node in loop.body and ends - loop.body:
            # One end is behind a loop that the node is in. If its token can be there while the
            # loop goes on, the other's may come in a later round.
            if any(by.node in found and ends & found for found in by.behind):
                return False
            if any(len(loop.body.intersection(ts)) > 1 for ts in forks(flow, loop.body)):
                return False
    return all(len(ends & found) < 2 for found in by.behind)


def may_overlap(flow: Flow, one: str, other: str) -> bool:
    """Whether two nodes may be active at the same time: neither is upstream of the other, and no
    node chooses between them."""
    if flow.bit[one] & flow.upstream[other] or flow.bit[other] & flow.upstream[one]:
        return False
    return not any(chooses(flow, by, {one, other}) for by in choosers(flow))


def check_nodes(flow: Flow, places: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with nodes among their edges, and with the flows that they run."""
    graphs = flow.registry.graphs
    for node in flow.nodes.values():
        data = f"{places[node.id]}.data"
        for name in node.names():
            if name not in node.inputs:
                yield data, f'"{name}" is not among its inputs; {nearest(name, node.inputs)}'
        for action in {str(node.data.get("otherwise", DEFAULT))} - {DEFAULT, *node.actions}:
            hint = nearest(action, node.actions)
            yield f"{data}.otherwise", f'no edge carries "{action}"; {hint}'
        for child in node.runs():
            if child not in graphs:
                yield f"{data}.workflowId", f'no flow "{child}"; {nearest(child, graphs)}'
        yield from ((f"{data}{place}", text) for place, text in node.check())


def check_loops(flow: Flow, places: Mapping[str, str]) -> Iterator[Finding]:
    """Loops that cannot be left, or that are entered elsewhere than at their head."""
    for loop in flow.loops:
        ends_here = any(DEFAULT not in flow.targets[node] for node in loop.members)
        if not ends_here and all(map(loop.members.intersection, forks(flow, loop.members))):
            yield places[loop.head], f'the loop of "{loop.head}" has no way out; give it one'
        for i, edge in enumerate(flow.graph.get("edges", [])):
            ends = (str(edge["source"]), str(edge["target"]))
            enters = ends[0] not in loop.members and ends[1] in loop.members - {loop.head}
            if enters and not one_token_in(flow, loop):
                where = f'the loop of "{loop.head}" elsewhere than at its head'
                mend = f'let it lead to a node of its own instead of "{ends[1]}"'
                yield f"$.edges[{i}]", f'"{ends[0]}" leads into {where}; {mend}'


def check_keys(flow: Flow, places: Mapping[str, str]) -> Iterator[Finding]:
    """Nodes that may run at the same time and use one key that one of them writes (I4)."""
    writes = {id: flow.writes(id) for id in flow.nodes}
    users: dict[str, list[str]] = {}
    for id, node in flow.nodes.items():
        for key in node.reads() | writes[id]:
            users.setdefault(key, []).append(id)
    for key, nodes in users.items():
        for one, other in itertools.combinations(nodes, 2):
            if (key in writes[one] or key in writes[other]) and may_overlap(flow, one, other):
                both = f'"{one}" and "{other}" may run at the same time, and one writes'
                yield places[other], f'{both} the key "{key}", which the other one uses (I4)'


def unavoidable(flow: Flow) -> set[str]:
    """The flows that it runs as children whatever its nodes choose."""
    nodes = [*flow.starts]
    for node in nodes:
        if flow.targets[node].keys() - {ERROR} == {DEFAULT}:
            nodes += [target for target in flow.leads_to(node) if target not in nodes]
    runs = [run for node in nodes for run in flow.nodes[node].runs().items()]
    return {child for child, always in runs if always}


def check(registry: Registry, id: str) -> list[str]:
    """Every finding in a flow and in those that it runs."""
    found: list[tuple[str, Finding]] = []
    flows: dict[str, Flow] = {}
    for flow_id in (wanted := [id]):
        missing = KeyError(f"no such file; {nearest(flow_id, registry.graphs)}")
        graph = registry.graphs.get(flow_id, missing)
        if isinstance(graph, Exception):
            found.append((flow_id, ("$", f"cannot be read as JSON: {graph}")))
        elif bad := [*check_parts(graph)]:
            found += [(flow_id, finding) for finding in bad]
        else:
            flow = flows[flow_id] = Flow(flow_id, graph, registry)
            places = {node: f"$.nodes[{i}]" for i, node in enumerate(flow.nodes)}
            for part in (check_nodes, check_loops, check_keys):
                found += [(flow_id, finding) for finding in part(flow, places)]
            children = {child for node in flow.nodes.values() for child in node.runs()}
            wanted += sorted(children & (registry.graphs.keys() - {*wanted}))
    for flow_id in flows:
        for child in (certain := [flow_id]):
            more = unavoidable(flows[child]) if child in flows else set()
            certain += [c for c in more if c not in certain[1:]]
        if flow_id in certain[1:]:
            found.append((flow_id, ("$", "it runs itself for ever; let a node choose")))
    lines = [f"{registry.folder}{file}.json: {place}: {text}" for file, (place, text) in found]
    return [line.replace("\n", "\\n") for line in lines]


Registry.checks.append(check)
