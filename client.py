"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    --usecase NAME    start a run of NAME.json, print its id and go, or --wait for its result;
                      --local: here, without Redis; --dry-run: no key, no network; --draw: Mermaid
    --run ID          --status, --wait, --explain, --draw, --cancel, --resume, --answer NODE=VALUE
    --input KEY=VALUE is JSON if it parses, else text; KEY=@FILE reads a file

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What could steer a terminal is escaped; in a result
only on a terminal, newlines and tabs excepted.
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

from agentflow import (
    CANCELLED, COMPLETED, DEFAULT, FAILED, RETURNED, WAITING, Event, Flow, GraphError, MemoryRun,
    RedisExecutor, RedisRun, Registry, Run, RunError, child_id, parse_json,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "active": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}


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
        print(escape(text, "\n\t") if sys.stdout.isatty() else text, flush=True)


def line_of(event: Event, root: str) -> str:
    """An event in a line: time, node, what, visit, seconds, and the rest by name."""
    rest = {"at": time.time(), "node": "", **event}
    flow = "" if rest.pop("run") == root else rest["flow"] + "/"
    what = f"{flow}{rest.pop('node'):<{28 - len(flow)}} {rest.pop('event'):<10}"
    start = f"{time.ctime(rest.pop('at'))[11:19]}  {what}"
    del rest["flow"]
    return escape(start + "".join(f" {k} {v} " for k, v in rest.items() if v not in ("", None)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends with exit code 2 and a line that says why where it makes no sense."""
    usage = "client.py --usecase NAME | --run ID | --list | --runs | --workers  (see --help)"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "client.py", usage, __doc__, formatter_class=raw, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    how = parser.add_mutually_exclusive_group()
    flag, many = {"action": "store_true"}, {"action": "append", "default": []}
    for group, names, more in (
        (what, "usecase run", {}), (what, "list runs workers", flag), (parser, "input import", many),
        (how, "answer", {}), (how, "status explain draw cancel resume", flag),
        (parser, "graphs redis", {}), (parser, "wait local dry-run json", flag),
    ):  # fmt: skip
        for name in names.split():
            group.add_argument(f"--{name}", **more)
    args = parser.parse_args(argv)
    if not args.run and (args.status or args.explain or args.cancel or args.resume or args.answer):
        parser.error("--status, --explain, --cancel, --resume and --answer go with --run ID")
    if not args.usecase and (args.local or args.dry_run or args.input and not args.resume):
        parser.error("--local, --dry-run and --input go with --usecase NAME")
    return args


def values(given: Iterable[str]) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give: JSON if it parses, else text."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise RunError(f"{text}: must be like KEY=VALUE or KEY=@FILE")
        try:
            found[key] = Path(value[1:]).read_text("utf-8") if value.startswith("@") else value
            found[key] = parse_json(found[key])
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{key}: cannot read {value[1:]}: {error}") from None
        except ValueError:
            continue  # text
    return found


def set_up(args: argparse.Namespace) -> None:
    """Read .env, import the node types, and find out which Redis is meant."""
    load_dotenv(find_dotenv(usecwd=True))
    args.at = f" --redis {public(args.redis)}" if args.redis else ""
    args.redis = args.redis or os.environ.get("REDIS_URL") or "redis://localhost:6379"
    sys.path += [str(HERE), os.curdir]
    for module in ["graphs.nodes", *vars(args)["import"]]:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise RunError(f"cannot import {module}: {type(error).__name__}: {error}") from None


async def reach(url: str) -> RedisExecutor:
    """The executor on this Redis; RunError, which says what to type, where it will not do."""
    try:
        executor = RedisExecutor(url)
        await executor.open()
        return executor
    except ValueError:  # its text may hold a part of a password
        raise RunError("--redis must be like redis://[:PASSWORD@]HOST[:PORT][/DB]") from None
    except (RedisError, OSError) as error:
        mend = "start redis-server, or name another with --redis URL"
        if "unknown command" in str(error):
            mend = "it is too old; use Redis 6.2 or newer, or valkey"
        elif "auth" in f"{type(error)} {error}".lower():
            error, mend = PermissionError("wrong password"), "--redis redis://:PASSWORD@HOST:PORT"
        less = "--local needs no Redis, --local --dry-run nothing at all"
        raise RunError(f"Redis at {public(url)}: {error}; {mend}; {less}") from None


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; what is wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs or HERE / "graphs")
    if args.list:
        for id, graph in registry.graphs.items():
            show(f"{id:<24} {graph.get('description', '') if isinstance(graph, dict) else graph}")
        return 0
    if args.usecase not in registry:
        raise RunError(f'no use case "{args.usecase}"; there is {", ".join(registry) or "none"}')
    flow, inputs = registry[args.usecase], values(args.input)
    if args.draw:
        show(mermaid(flow, {}))
        return 0
    flow.begin(inputs)
    if args.local:
        return await follow(args, await flow.run(inputs, dry_run=args.dry_run))
    run = await flow.run(inputs, await reach(args.redis), args.dry_run)
    if args.wait or args.json:
        return await follow(args, run)
    show(run.id)
    say(f"queued; to follow it, type: python client.py{args.at} --run {run.id} --wait")
    return 0


async def follow(args: argparse.Namespace, run: Run) -> int:
    """Print a run's events until it has ended, then its result; gives the exit code."""
    me = f"python client.py{args.at} --run"
    if isinstance(run, RedisRun):
        await look(run.executor)
    try:
        async for event in run.events():
            say(line_of({**event, "question": ""}, run.id))
            for line in (event.get("question") or "").splitlines():
                say(f"          | {line}")
            if event.get("question") and isinstance(run, MemoryRun):
                await run.answer(event["node"], await ask())
            elif event.get("question"):
                say(f"to answer, type: {me} {event['run']} --answer {event['node']}=VALUE")
    except asyncio.CancelledError:
        goes_on = f"goes on; to follow it, type: {me} {run.id} --wait"
        say(f"run {run.id} {'ends here' if args.local else goes_on}")
        raise
    status = await run.status()
    if args.json:
        show(json.dumps({k: v for k, v in vars(status).items() if k != "tokens"}, indent=2))
    elif status.status == COMPLETED:
        text = status.result
        show(text if isinstance(text, str) else json.dumps(text, indent=2, ensure_ascii=False))
    elif status.status == FAILED and not args.local:
        say(f"to go on from there, type: {me} {run.id} --resume --wait")
    return int(status.status != COMPLETED)


async def ask() -> str:
    """A person's answer, from the terminal; RunError without one."""
    if sys.stdin and sys.stdin.isatty():
        say("your answer:")
        typed = asyncio.Event()  # no thread: that would survive Ctrl-C
        asyncio.get_running_loop().add_reader(0, typed.set)
        await typed.wait()
        asyncio.get_running_loop().remove_reader(0)
        if answer := os.read(0, 65536).decode(errors="replace").strip():
            return answer
    raise RunError("a person is asked, and nobody answers here; use Redis, or --dry-run")


async def steer(args: argparse.Namespace) -> int:
    """Look at a run that exists, or change its course; gives the exit code."""
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
        lines = [line async for line in explain(run, await look(run.executor))]
        if any("NOWHERE" in line for line in lines):  # it may have moved while we looked
            lines = [line async for line in explain(run, await look(run.executor))]
        show("\n".join(map(escape, lines)))
    elif not (args.wait or args.json):
        for event in await recorded(run):
            show(line_of(event, run.id))
        status = await run.status()
        show(f"run {run.id} of {status.flow} is {status.status}; tokens used {status.usage}")
        return int(status.status in (FAILED, CANCELLED))
    return await follow(args, run) if args.wait or args.json else 0


async def look(executor: RedisExecutor) -> dict[str, str]:
    """Where each job is that is queued or with a worker; says what to type without a worker."""
    send, key, found, alive = executor.send, executor.key, dict[str, str](), 0
    workers = [w for name in ("workers", "buried") for w in await send("ZRANGE", key(name), 0, -1)]
    async with executor.link.client.pipeline() as pipe:  # all at one instant
        pipe.lrange(key("ready"), 0, -1)
        for worker in workers:
            pipe.get(key("worker", worker))
            pipe.pttl(key("worker", worker))
            pipe.lrange(key("processing", worker), 0, -1)
        ready, *rest = await pipe.execute()
    for worker, beat, left, jobs in zip(workers, rest[::3], rest[1::3], rest[2::3], strict=True):
        since, age = json.loads(beat or "{}"), f"(heartbeat {6 - left / 1000:.0f} s ago)"
        if beat:
            alive += 1
            found[f"worker {worker}"] = f"is alive and has {len(jobs)} jobs {age}"
        for job in jobs:
            found[job] = f"was with worker {worker}, which is dead; a living one takes it over"
            if beat:
                found[job] = f"is running on worker {worker} since {since.get(job, 0):.0f} s {age}"
    for i, job in enumerate(ready):
        nobody = "" if alive else ", and no worker is alive"
        found[job] = f"is queued at place {len(ready) - i} of {len(ready)}{nobody}"
    if not alive:
        say("no worker is alive; in another terminal, type: python worker.py")
    return found


async def recorded(run: RedisRun) -> list[Event]:
    """What has happened in a run and its children so far, each event with its time `at`."""
    rows = await run.executor.send("XRANGE", run.keys[3], "-", "+")
    return [json.loads(row["event"]) | {"at": int(id.split("-")[0]) / 1000} for id, row in rows]


async def explain(run: RedisRun, jobs: dict[str, str], indent: str = "") -> AsyncIterator[str]:
    """A line for a run, and one for each token: where it is, and why; likewise its children."""
    status, flow, places = await run.status(), await flow_of(run), dict[str, str]()
    last = {(event["run"], event.get("node")): event for event in await recorded(run)}
    hash, parked = [await run.executor.send("HGETALL", key) for key in (run.keys[0], run.keys[2])]
    yield f"{indent}run {run.id} of {flow.id} is {status.status} {status.error}".rstrip()
    tokens = {} if status.status in (COMPLETED, CANCELLED) else status.tokens
    for node, mark in tokens.items():
        job, event = f"{run.id}/{node}/{mark}", last.get((run.id, node), {})
        if mark in (WAITING, RETURNED):
            continue
        places[node] = "is NOWHERE: not queued, not with a worker, not parked; please report it"
        if job in jobs:
            places[node] = f"{jobs[job]}, delivery {int(hash.get(f'crashes {job}', 0)) + 1}"
            if event.get("event") == "retrying" and event["at"] + event["delay"] > time.time():
                until = time.ctime(event["at"] + event["delay"])[11:19]
                places[node] += f", backs off until {until} after {event['error']}"
        elif parked.get(f"{job} is parked") and parked[job]:
            command = f"--run {run.id} --answer {node}=VALUE"
            places[node] = f"waits for a person: {parked[job]} (to answer, type: {command})"
        elif parked.get(f"{job} is parked"):
            places[node] = (
                f"waits for {parked[f'{job} left']} of {parked[f'{job} count']} child runs"
            )
        elif status.status == FAILED:
            places[node] = "stands still, as its run failed; --resume runs it again"
    for node, mark in tokens.items():
        why = [f"{n}, which {places.get(n, 'waits, too')}" for n in blockers(flow, tokens, node)]
        yield f"{indent}  {node} {places.get(node) or 'waits for ' + '; and for '.join(why)}"
        job = f"{run.id}/{node}/{mark}"
        for i in range(0 if parked.get(job) else int(parked.get(f"{job} count", 0))):
            child = await run.executor.look_for(child_id(job, i))
            if child and not parked.get(f"{job} {i}", "").startswith(f'["{COMPLETED}'):
                async for line in explain(child, jobs, indent + "    "):
                    yield line


def blockers(flow: Flow, tokens: Mapping[str, str], node: str) -> list[str]:
    """The nodes whose tokens keep a waiting one from running, by the rule in Flow."""
    before = flow._upstream[node] | (flow._body.get(node, 0) if tokens[node] == RETURNED else 0)
    back = {head for head in flow.members(flow._heads[node]) if tokens.get(head) == RETURNED}
    return [other for other in flow.members(before) if other in tokens.keys() - back - {node}]


async def overview(args: argparse.Namespace) -> int:
    """Print the recent runs, or what the workers do and what waits."""
    executor = await reach(args.redis)
    for job, place in (await look(executor)).items() if args.workers else ():
        show(f"{job} {place}")
    for id in (
        await executor.send("ZRANGE", executor.key("runs"), 0, 19, "REV") if args.runs else ()
    ):
        fields = ("status", "origin", "created", "tokens")
        status, origin, at, tokens = await executor.send("HMGET", executor.key("run", id), *fields)
        if status:
            age, nodes = time.time() - int(at), ", ".join(json.loads(tokens))
            show(f"{id}  {json.loads(origin)['flow']:<20} {status:<10} {age:>7.0f} s  {nodes}")
    return 0


async def flow_of(run: RedisRun) -> Flow:
    """The flow of a run, from the graph that it was started with."""
    text = await run.executor.send("GET", run.executor.key("graph", run.origin.graph))
    return Registry(json.loads(text or "{}"))[run.origin.flow]


async def draw(run: RedisRun) -> str:
    """The graph of a run as Mermaid, coloured by state."""
    status = await run.status()
    here = [event for event in await recorded(run) if event["run"] == run.id]
    states = {event["node"]: "done" for event in here if event["event"] == "done"}
    for node, mark in status.tokens.items():
        failed = status.error.startswith(f'node "{node}"')
        states[node] = (
            "failed" if failed else "waiting" if mark in (WAITING, RETURNED) else "active"
        )
    return mermaid(await flow_of(run), states)


def mermaid(flow: Flow, states: Mapping[str, str]) -> str:
    """A flow as Mermaid; `states` says which nodes are done, active, waiting or failed."""
    names = {node: f"n{i}" for i, node in enumerate(flow.nodes)}
    lines = ["flowchart TD"]
    for node, name in names.items():
        lines.append(f'    {name}["{node}"]' + (f":::{states[node]}" if node in states else ""))
    for source, by_action in flow.targets.items():
        for action, targets in by_action.items():
            label = re.sub(r'[#"<>&|]', lambda c: f"#{ord(c[0])};", escape(action))
            arrow = "-->" if action == DEFAULT else f'-->|"{label}"|'
            lines += [f"    {names[source]} {arrow} {names[target]}" for target in targets]
    lines += [f"    classDef {s} fill:{FILLS[s]},color:#000" for s in sorted({*states.values()})]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The whole command; gives the exit code."""
    try:
        args = parse(argv)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            getattr(stream, "reconfigure", dict)(errors="backslashreplace")
        set_up(args)
        does = steer if args.run else overview if args.runs or args.workers else start
        return asyncio.run(does(args))
    except (GraphError, RunError, RedisError) as error:
        for line in str(error).splitlines():
            say(line)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on; at exit Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
