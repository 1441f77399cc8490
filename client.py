"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    python client.py --usecase research --local --dry-run      # needs no Redis, key or network
    python client.py --usecase research --wait                 # needs a Redis and a worker.py

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What could steer a terminal is escaped: everywhere
but in a result, which keeps newlines and tabs, and keeps all of it where stdout is no terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from redis.exceptions import RedisError

from agentflow import CANCELLED, COMPLETED, FAILED, RETURNED, WAITING, Event, Flow, GraphError
from agentflow import MemoryRun, RedisExecutor, RedisRun, Registry, Run, RunError, Status
from agentflow import child_id, parse_json

HERE = Path(__file__).resolve().parent
STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "active": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}

# ── 1. What reaches a terminal ───────────────────────────────────────────────────────────────


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    return escape(re.sub(r"(?<=//)[^?]*@|\?.*", "", url))


def say(text: object) -> None:
    """Print a line on stderr."""
    if sys.stderr:
        print(escape(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout."""
    if sys.stdout:
        print(escape(text, keep="\n\t") if sys.stdout.isatty() else text, flush=True)


def clock(at: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def tell(event: Event, root: str) -> None:
    """Print an event: time, node, what, and the rest by name; then what a person is asked."""
    rest = {**event, "question": ""}
    place = rest.pop("node", "")
    if rest.pop("run") != root:
        place = f"{event['flow']}/{place}"
    said = f"{clock(rest.pop('at', time.time()))}  {place:<28} {rest.pop('event'):<10}"
    del rest["flow"]
    say(said + "".join(f" {name} {value} " for name, value in rest.items() if value))
    for line in (event.get("question") or "").splitlines():
        say(f"          | {line}")


# ── 2. The command line ──────────────────────────────────────────────────────────────────────

FLAGS = (  # flag, its value, what it goes with, what it does
    ("--usecase", "NAME", "", "start a run of the graph NAME.json"),
    ("--run", "ID", "", "look at a run that exists, or steer it"),
    ("--list", "", "", "show the use cases"),
    ("--runs", "", "", "show recent runs"),
    ("--workers", "", "", "show who is alive, and what waits"),
    ("--input", "KEY=VALUE", "usecase resume", "JSON if it parses, else text; KEY=@FILE reads a file"),
    ("--wait", "", "usecase run", "follow the run and print its result"),
    ("--local", "", "usecase", "run it in this process, without Redis"),
    ("--dry-run", "", "usecase", "models and HTTP calls give their examples; no key, no network"),
    ("--json", "", "wait local status", "print one JSON document"),
    ("--draw", "", "usecase run", "print Mermaid of the graph, or of the run"),
    ("--status", "", "run", "show what the run has done"),
    ("--explain", "", "run", "show where each of its tokens is, and why"),
    ("--cancel", "", "run", "end it for good"),
    ("--resume", "", "run", "go on from exactly where it failed"),
    ("--answer", "NODE=VALUE", "run", "answer what a node asks"),
    ("--graphs", "DIR", "", "where the graphs are"),
    ("--redis", "URL", "", "default: REDIS_URL, else redis://localhost:6379"),
    ("--import", "MODULE", "", "a module with more node types"),
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends with exit code 2 and a line that says why where it makes no sense."""
    usage = "client.py --usecase NAME | --run ID | --list | --runs | --workers  (--help for more)"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    for flag, value, _, about in FLAGS:
        how: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
        if flag in ("--input", "--import"):
            how |= {"action": "append", "default": []}
        parser.add_argument(flag, help=about, **how)
    args = parser.parse_args(argv)
    given = {flag[2:] for flag, *_ in FLAGS if getattr(args, flag[2:].replace("-", "_"))}
    if len(given & {"usecase", "run", "list", "runs", "workers"}) != 1:
        parser.error("say one of these; for example --usecase research --local --dry-run")
    if len(given & {"status", "explain", "draw", "cancel", "resume", "answer"}) > 1:
        parser.error("one at a time: --status, --explain, --draw, --cancel, --resume, --answer")
    for flag, _, fits, _ in FLAGS:
        if flag[2:] in given and fits and not given.intersection(fits.split()):
            parser.error(f"{flag} goes with --{fits.replace(' ', ' or --')}")
    return args


def values(given: Iterable[str]) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give: JSON if it parses, else text."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise RunError(f"{text}: must be like KEY=VALUE or KEY=@FILE")
        try:
            value = Path(value[1:]).read_text("utf-8") if value.startswith("@") else value
        except (OSError, ValueError) as error:
            raise RunError(f"{key}: cannot read {value[1:]}: {error}") from None
        try:
            found[key] = parse_json(value)
        except ValueError:
            found[key] = value
    return found


def set_up(args: argparse.Namespace) -> None:
    """Read .env, import what is to be imported, and find out which Redis is meant."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    load_dotenv(find_dotenv(usecwd=True))
    args.redis = args.redis or os.environ.get("REDIS_URL") or "redis://localhost:6379"
    sys.path += [str(HERE), os.curdir]
    for module in ["graphs.nodes", *vars(args)["import"]]:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001
            raise RunError(f"cannot import {module}: {type(error).__name__}: {error}") from None


async def reach(url: str) -> RedisExecutor:
    """The executor on this Redis; RunError, which says what to type, where it will not do."""
    try:
        executor = RedisExecutor(url)
    except ValueError:  # its text may hold a part of a password
        raise RunError("a Redis URL is like redis://[:PASSWORD@]HOST[:PORT][/DB]") from None
    try:
        await executor.open()
    except (RedisError, OSError) as error:
        mend = "start redis-server, or name another with --redis URL"
        if "unknown command" in str(error):
            mend = "it is too old; use Redis 6.2 or newer, or valkey"
        elif "auth" in f"{type(error)} {error}".lower():
            mend = "give the right password: --redis redis://:PASSWORD@HOST:PORT"
        less = "--local needs no Redis, --local --dry-run nothing at all"
        raise RunError(f"Redis at {public(url)}: {error}; {mend}; {less}") from None
    return executor


# ── 3. Starting, steering, following ─────────────────────────────────────────────────────────


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; what is wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs or HERE / "graphs")
    if args.usecase not in registry:
        raise RunError(f'no use case "{args.usecase}"; there is {", ".join(registry) or "none"}')
    flow, inputs = registry[args.usecase], values(args.input)
    if args.draw:
        show(mermaid(registry.graphs[flow.id], {}))
        return 0
    flow.begin(inputs)
    if args.local:
        return await follow(args, await flow.run(inputs, dry_run=args.dry_run))
    executor = await reach(args.redis)
    run = await flow.run(inputs, executor, args.dry_run)
    if args.wait:
        return await follow(args, run)
    show(run.id)
    say(f"queued; to follow it, type: {args.me} --run {run.id} --wait")
    return 0


async def steer(args: argparse.Namespace) -> int:
    """Look at a run that exists, or change its course; and then follow it, if that is asked."""
    run = await (await reach(args.redis)).find(args.run)
    if args.cancel:
        await run.cancel()
    elif args.resume:
        await run.resume(values(args.input))
    elif args.answer:
        for node, value in values([args.answer]).items():
            await run.answer(node, value)
    elif args.draw:
        show(await draw(run))
    elif args.explain:
        async for line in Explanation(run.executor, args.me).of(run.id):
            show(escape(line))
    elif not args.wait:
        return await report(args, run)
    return await follow(args, run) if args.wait else 0


async def follow(args: argparse.Namespace, run: Run) -> int:
    """Print a run's events until it has ended, then its result."""
    if isinstance(run, RedisRun):
        args.watch = asyncio.create_task(watch(run.executor))
    try:
        async for event in run.events():
            tell(event, run.id)
            if event.get("question") and isinstance(run, MemoryRun):
                await run.answer(event["node"], await ask())
            elif event.get("question"):
                say(f"type: {args.me} --run {event['run']} --answer {event['node']}=VALUE")
    except asyncio.CancelledError:
        more = f"goes on; to follow it, type: {args.me} --run {run.id} --wait"
        say(f"run {run.id} {'ends here' if args.local else more}")
        raise
    return await report(args, run)


async def ask() -> str:
    """A person's answer, from the terminal; RunError without one."""
    typed = asyncio.Event()
    if sys.stdin and sys.stdin.isatty():
        say("your answer:")  # not in a thread, which would survive Ctrl-C
        asyncio.get_running_loop().add_reader(0, typed.set)
        await typed.wait()
        asyncio.get_running_loop().remove_reader(0)
        if answer := os.read(0, 65536).decode(errors="replace").strip():
            return answer
    raise RunError("a person is asked, and there is no terminal to answer; use Redis or --dry-run")


async def report(args: argparse.Namespace, run: Run) -> int:
    """Print a run's result, or what it has done; gives the exit code."""
    status = await run.status()
    if args.json:
        show(json.dumps({k: v for k, v in vars(status).items() if k != "tokens"}, indent=2))
    elif isinstance(run, RedisRun) and not args.wait:
        await print_life(run, status)
    elif isinstance(status.result, str):
        show(status.result)
    elif status.status == COMPLETED:
        show(json.dumps(status.result, indent=2, ensure_ascii=False))
    if status.status == FAILED and not args.local:
        say(f"to go on from there, type: {args.me} --run {run.id} --resume --wait")
    return int(status.status in (FAILED, CANCELLED))


# ── 4. Looking ───────────────────────────────────────────────────────────────────────────────


async def alive(executor: RedisExecutor) -> dict[str, tuple[float, dict[str, Any]]]:
    """The living workers: the age of the heartbeat, and since when each runs which job; without
    any, says what to type."""
    send, key = executor.send, executor.key
    found = {}
    for worker in await send("ZRANGE", key("workers"), 0, -1):
        beat, left = await asyncio.gather(
            *(send(c, key("worker", worker)) for c in ("GET", "PTTL"))
        )
        if beat:
            found[worker] = (6 - left / 1000, json.loads(beat))
    if not found:
        say("no worker is alive; in another terminal, type: python worker.py")
    return found


async def watch(executor: RedisExecutor) -> None:
    """Say so when no worker is alive, every ten seconds, as long as this process lives."""
    while True:
        await alive(executor)
        await asyncio.sleep(10)


async def recorded(run: RedisRun) -> list[Event]:
    """What has happened in a run and its children so far, each event with its time `at`."""
    rows = await run.executor.send("XRANGE", run.keys[3], "-", "+")
    return [json.loads(row["event"]) | {"at": int(id.split("-")[0]) / 1000} for id, row in rows]


async def print_life(run: RedisRun, status: Status) -> None:
    """Print what a run has done: a line for each node."""
    hash = await run.executor.send("HGETALL", run.keys[0])
    show(f"run {run.id} of {status.flow} is {status.status} {escape(status.error)}".strip())
    show(f"{'node':<32} visits  deliveries  retries  seconds  tokens used")
    lives: dict[str, list[Event]] = {}
    for event in await recorded(run):
        if "node" in event and run.id in (event["run"], run.origin.root):
            place = "" if event["run"] == run.id else f"{event['flow']}/"
            lives.setdefault(place + event["node"], []).append(event)
    for place, events in lives.items():
        done = [event for event in events if event["event"] == "done"]
        retries = sum(event["event"] == "retrying" for event in events)
        crashes = sum(
            int(n) for job, n in hash.items() if job.startswith(f"crashes {run.id}/{place}/")
        )
        seconds = sum(event["seconds"] for event in done)
        used = sum(sum(event.get("usage", {}).values()) for event in done)
        visits = len(done)
        show(
            f"{place:<32} {visits:>6} {visits + crashes:>11} {retries:>8} {seconds:>8.2f} {used:>12}"
        )


class Explanation:
    """Where the tokens of a run and of its children are, and why."""

    def __init__(self, executor: RedisExecutor, me: str) -> None:
        self.executor, self.me = executor, me
        self.send, self.key = executor.send, executor.key

    async def of(self, id: str, indent: str = "") -> AsyncIterator[str]:
        """A line for the run, and one for each token; those of its children below it."""
        run = await self.executor.find(id)
        if not indent:
            self.workers = await alive(self.executor)
            self.last = {(e["run"], e.get("node")): e for e in await recorded(run)}
        status = await run.status()
        yield f"{indent}run {id} of {status.flow} is {status.status} {status.error}".rstrip()
        if status.status in (COMPLETED, CANCELLED):
            return
        flow = Registry(await graphs_of(run))[status.flow]
        jobs = {
            n: f"{id}/{n}/{m}" for n, m in status.tokens.items() if m not in (WAITING, RETURNED)
        }
        places = {node: await self.place(run, status, job) for node, job in jobs.items()}
        for node in status.tokens:
            why = [
                f"{n}, which {places.get(n, 'waits, too')}" for n in blockers(flow, status, node)
            ]
            yield f"{indent}  {node} {places.get(node) or 'waits for ' + '; and for '.join(why)}"
            for child in await self.children(run, jobs.get(node, "")):
                async for line in self.of(child, indent + "    "):
                    yield line

    async def place(self, run: RedisRun, status: Status, job: str) -> str:
        """Where an active token is."""
        node, mark = job.split("/")[1:]
        for _ in range(3):  # it may move between two looks
            if found := await self.custody(run, job, node):
                return found
            if status.status == FAILED:
                return "stands still; --resume runs it again"
            if (await run.status()).tokens.get(node) != mark:
                return "has just moved on"
        return "is NOWHERE: not queued, not with a worker, not parked; please report it (I2)"

    async def custody(self, run: RedisRun, job: str, node: str) -> str:
        """Who has a job, and what it waits for; empty where nobody has it."""
        send, key = self.send, self.key
        crashes = await send("HGET", run.keys[0], f"crashes {job}")
        delivery = f"delivery {int(crashes or 0) + 1}"
        length, place = await asyncio.gather(
            send("LLEN", key("ready")), send("LPOS", key("ready"), job)
        )
        if place is not None:
            nobody = "" if self.workers else ", and no worker is alive"
            return f"is queued at place {length - place} of {length}, {delivery}{nobody}"
        listed = [
            w for name in ("workers", "buried") for w in await send("ZRANGE", key(name), 0, -1)
        ]
        for worker in listed:
            if await send("LPOS", key("processing", worker), job) is None:
                continue
            if worker not in self.workers:
                return f"was with worker {worker}, which is dead; a living one will take it over"
            age, doing = self.workers[worker]
            event = self.last.get((run.id, node), {})
            until = event["at"] + event["delay"] if event.get("event") == "retrying" else 0
            what = f"is running since {doing.get(job) or 0:.0f} s"
            if until > time.time():
                what = f"backs off until {clock(until)} after {event['error']}"
            return f"{what}, on worker {worker}, {delivery} (heartbeat {age:.0f} s ago)"
        fields = (job, f"{job} left", f"{job} count", f"{job} is parked")
        question, left, count, parked = await send("HMGET", run.keys[2], *fields)
        if parked and question:
            return f"asks: {question}; type: {self.me} --run {run.id} --answer {node}=VALUE"
        return f"waits for {left} of {count} child runs" if parked else ""

    async def children(self, run: RedisRun, job: str) -> list[str]:
        """The child runs of a job that have not completed."""
        parked = await self.send("HGETALL", run.keys[2])
        count = 0 if parked.get(job) else int(parked.get(f"{job} count", 0))
        told = [parked.get(f"{job} {i}", "") for i in range(count)]
        return [child_id(job, i) for i in range(count) if not told[i].startswith(f'["{COMPLETED}')]


def blockers(flow: Flow, status: Status, node: str) -> list[str]:
    """The nodes whose tokens keep a waiting one from running, by the rule in Flow."""
    tokens = status.tokens
    before = flow._upstream[node] | (flow._body[node] if tokens[node] == RETURNED else 0)
    back = {head for head in flow.members(flow._heads[node]) if tokens.get(head) == RETURNED}
    return [other for other in flow.members(before) if other in tokens.keys() - back - {node}]


async def print_runs(executor: RedisExecutor) -> None:
    """Print the recent runs, newest first: id, flow, status, age, where their tokens are."""
    for id in await executor.send("ZRANGE", executor.key("runs"), 0, 19, "REV"):
        key, fields = executor.key("run", id), ("status", "origin", "created", "tokens")
        status, origin, created, tokens = await executor.send("HMGET", key, *fields)
        if status:
            flow, age = json.loads(origin)["flow"], time.time() - int(created)
            show(f"{id}  {flow:<20} {status:<10} {age:>7.0f} s  {', '.join(json.loads(tokens))}")


async def print_workers(executor: RedisExecutor) -> None:
    """Print who is alive and doing what, how many jobs wait, and which is next."""
    for worker, (age, doing) in (await alive(executor)).items():
        show(f"{worker}  {len(doing)} jobs, heartbeat {age:.0f} s ago")
        for job, since in doing.items():
            show(f"    {job}  since {since or 0:.0f} s")
    ready, send = executor.key("ready"), executor.send
    show(f"{await send('LLEN', ready)} jobs wait; the oldest: {await send('LINDEX', ready, -1)}")


# ── 5. Drawing ───────────────────────────────────────────────────────────────────────────────


async def graphs_of(run: RedisRun) -> dict[str, Any]:
    """The graphs that a run was started with, by id."""
    text = await run.executor.send("GET", run.executor.key("graph", run.origin.graph))
    return dict(json.loads(text or "{}"))


async def draw(run: RedisRun) -> str:
    """The graph of a run as Mermaid, coloured by state."""
    status = await run.status()
    done = [e for e in await recorded(run) if e["event"] == "done" and e["run"] == run.id]
    states = {event["node"]: "done" for event in done}
    for node, mark in status.tokens.items():
        failed = status.error.startswith(f'node "{node}"')
        states[node] = (
            "failed" if failed else "waiting" if mark in (WAITING, RETURNED) else "active"
        )
    return mermaid((await graphs_of(run))[status.flow], states)


def mermaid(graph: Mapping[str, Any], states: Mapping[str, str]) -> str:
    """A graph as Mermaid; `states` says which nodes are done, active, waiting or failed."""

    def label(text: object) -> str:
        return re.sub(r'[#"<>&|]', lambda c: f"#{ord(c[0])};", escape(text))

    names = {str(node["id"]): f"n{i}" for i, node in enumerate(graph["nodes"])}
    lines = ["flowchart TD"]
    for node in graph["nodes"]:
        state = f":::{states[str(node['id'])]}" if str(node["id"]) in states else ""
        text = f"{label(node['id'])}<br/>{label(node['type'])}"
        lines.append(f'    {names[str(node["id"])]}["{text}"]{state}')
    for edge in graph.get("edges", []):
        arrow = f'-->|"{label(edge["action"])}"|' if edge.get("action") else "-->"
        lines.append(f"    {names[str(edge['source'])]} {arrow} {names[str(edge['target'])]}")
    for state in sorted({*states.values()}):
        lines.append(f"    classDef {state} fill:{FILLS[state]},color:#000")
    return "\n".join(lines)


# ── 6. All of it ─────────────────────────────────────────────────────────────────────────────


async def command(args: argparse.Namespace) -> int:
    """Do what the command line says; gives the exit code."""
    set_up(args)
    if args.usecase or args.run:
        return await (start(args) if args.usecase else steer(args))
    if args.runs or args.workers:
        executor = await reach(args.redis)
        await (print_runs(executor) if args.runs else print_workers(executor))
        return 0
    for id, graph in Registry.load(args.graphs or HERE / "graphs").graphs.items():
        show(f"{id:<24} {graph.get('description', '') if isinstance(graph, dict) else graph}")
    return 0


def main(argv: list[str]) -> int:
    """The whole command; gives the exit code."""
    try:
        args = parse(argv)
        args.me = "python client.py" + (f" --redis {public(args.redis)}" if args.redis else "")
        return asyncio.run(command(args))
    except (GraphError, RunError, RedisError) as error:
        for line in str(error).splitlines():
            say(line)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # nobody reads on; at exit Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
