"""Start runs of the graphs, follow them, steer them, and see why one does not move.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from redis.exceptions import RedisError

from agentflow import CANCELLED, COMPLETED, DEFAULT, FAILED, RETURNED, RUNNING, WAITING
from agentflow import Context, Event, Flow, GraphError, MemoryRun, RedisExecutor, RedisRun
from agentflow import Registry, Run, RunError, pairs, parse_json
from graphs.check import nearest

STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "active": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}
MENDS = {  # by what Redis says; the last one where nothing fits
    "unknown command": "it is too old; use Redis 6.2 or newer, or valkey",
    "username|password|authenticat": "name both with --redis redis://USER:PASSWORD@HOST:PORT",
    "permission": "its ACL must let this user do more; the README has the rule",
    "read.only": "name the primary instead with --redis URL",
    "": "start redis-server, or name another with --redis URL",
}


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    return escape(re.sub(r"(?<=//).*@|\?.*", "", url))


def say(text: object) -> None:
    """Print a line on stderr."""
    if sys.stderr:
        print(escape(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout."""
    if sys.stdout:
        print(escape(text, "\n\t") if sys.stdout.isatty() else text, flush=True)


def line_of(event: Event, root: str) -> str:
    """An event in a line: time, node, what, and the rest by name; of a child also its flow."""
    node = event.get("node", "")
    where = node if event["run"] == root else f"{event['flow']}/{node}"
    rest = {k: v for k, v in event.items() if k not in ("at", "event", "run", "flow", "node")}
    rest |= rest.pop("usage", {})
    more = "  ".join(f"{name} {value}" for name, value in rest.items())
    return escape(
        f"{time.ctime(event['at'])[11:19]}  {where:<28} {event['event']:<10} {more}".rstrip()
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends with exit code 2 and a line that says why where it makes no sense."""
    parser = argparse.ArgumentParser("client.py", description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    how = parser.add_mutually_exclusive_group()
    flag, many = {"action": "store_true"}, {"action": "append", "default": []}
    what.add_argument("--usecase", metavar="NAME", help="start a run of NAME.json, and go")
    what.add_argument("--run", metavar="ID", help="look at a run, or steer it")
    what.add_argument("--list", help="the use cases", **flag)
    what.add_argument("--runs", help="the recent runs", **flag)
    what.add_argument("--workers", help="who works, at what, and what waits", **flag)
    how.add_argument("--status", help="what has happened in the run", **flag)
    how.add_argument("--explain", help="where each token of the run is, and why", **flag)
    how.add_argument("--draw", help="Mermaid of the use case, or of the run by state", **flag)
    how.add_argument("--cancel", help="end the run for good", **flag)
    how.add_argument("--resume", help="go on from where the run failed", **flag)
    how.add_argument("--answer", metavar="NODE=VALUE", help="answer what a node asks")
    text = "an input; VALUE is JSON if it parses, else text; KEY=@FILE reads a file"
    parser.add_argument("--input", metavar="KEY=VALUE", help=text, **many)
    parser.add_argument("--wait", help="follow the run, and print its result", **flag)
    parser.add_argument("--local", help="run it in this process, without Redis", **flag)
    parser.add_argument("--dry-run", help="take examples for answers: no key, no network", **flag)
    parser.add_argument("--json", help="the result, and all about it, as JSON", **flag)
    parser.add_argument(
        "--graphs", metavar="DIR", default=Path(__file__).resolve().parent / "graphs"
    )
    parser.add_argument("--redis", metavar="URL", help="REDIS_URL, else redis://localhost:6379")
    parser.add_argument("--import", metavar="MODULE", help="more node types", **many)
    args = parser.parse_args(argv)
    if not args.run and (args.status or args.explain or args.cancel or args.resume or args.answer):
        parser.error("--status, --explain, --cancel, --resume and --answer go with --run ID")
    if not args.usecase and (args.local or args.dry_run or args.input and not args.resume):
        parser.error("--local, --dry-run and --input go with --usecase NAME")
    return args


def as_json(text: str) -> Any:
    """The value of a JSON text; of any other the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def values(flag: str, given: list[str]) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give; RunError, with every finding."""
    found: dict[str, Any] = {}
    findings: list[str] = []
    for text in given:
        key, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError("it must be like KEY=VALUE or KEY=@FILE")
            if value.startswith("@"):
                value = Path(value[1:]).read_text("utf-8")
            Context({})[key] = found[key] = as_json(value)
        except (OSError, ValueError) as error:
            findings.append(f"{flag} {key}: {error}")
    if findings:
        raise RunError("\n".join(findings))
    return found


def set_up(args: argparse.Namespace) -> None:
    """Read .env, import the node types, and find out which Redis is meant."""
    load_dotenv(find_dotenv(usecwd=True))
    args.at = f" --redis {public(args.redis)}" if args.redis else ""
    args.redis = args.redis or os.environ.get("REDIS_URL") or "redis://localhost:6379"
    sys.path.append(os.curdir)
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
        mend = next(MENDS[said] for said in MENDS if re.search(said, str(error).lower()))
        less = "--local needs no Redis, --local --dry-run nothing at all"
        raise RunError(f"Redis at {public(url)}: {error}; {mend}; {less}") from None


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; what is wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs)
    for id, graph in registry.graphs.items() if args.list else ():
        show(f"{id:<24} {graph.get('description', '') if isinstance(graph, dict) else graph}")
    if args.list:
        return 0
    if args.usecase not in registry:
        raise RunError(f'no use case "{args.usecase}"; there is {", ".join(registry)}')
    flow, inputs = registry[args.usecase], values("--input", args.input)
    if args.draw:
        show(mermaid(flow, {}))
        return 0
    known = flow.inputs.keys() | {key for node in flow.nodes.values() for key in node.reads()}
    for key in inputs.keys() - known:
        say(f'--input {key}: no node of "{flow.id}" reads it; {nearest(key, known)}')
    flow.begin(inputs)
    executor = None if args.local else await reach(args.redis)
    run = await flow.run(inputs, executor, args.dry_run)
    if args.local or args.wait or args.json:
        return await follow(args, run)
    show(run.id)
    say(f"queued; to follow it, type: python client.py --run {run.id} --wait{args.at}")
    return 0


async def follow(args: argparse.Namespace, run: Run) -> int:
    """Print a run's events until it has ended, then its result; gives the exit code."""
    if isinstance(run, RedisRun):
        await look(run.executor)
    try:
        async for event in run.events():
            question = event.get("question", "")
            say(line_of(event, run.id))
            for line in question.splitlines():
                say(f"          | {line}")
            if question and isinstance(run, MemoryRun):
                await run.answer(event["node"], await ask(), event["run"])
            elif question:
                what = f"--run {event['run']} --answer {event['node']}=VALUE{args.at}"
                say(f"to answer, type: python client.py {what}")
    except asyncio.CancelledError:
        more = f"goes on; to follow it, type: python client.py --run {run.id} --wait{args.at}"
        say(f"run {run.id} {'ends here' if args.local else more}")
        raise
    return await report(args, run)


async def report(args: argparse.Namespace, run: Run) -> int:
    """Print the result of a run, or with --json all about it; gives the exit code."""
    status = await run.status()
    if args.json:
        show(json.dumps({k: v for k, v in vars(status).items() if k != "tokens"}, indent=2))
    elif status.status == COMPLETED and isinstance(status.result, str):
        show(status.result)
    elif status.status == COMPLETED:
        show(json.dumps(status.result, indent=2, ensure_ascii=False))
    elif status.status == FAILED and not args.local:
        say(f"to go on, type: python client.py --run {run.id} --resume --wait{args.at}")
    return int(status.status in (FAILED, CANCELLED))


async def ask() -> Any:
    """A person's answer, from the terminal; RunError without one."""
    while sys.stdin and sys.stdin.isatty():
        say("your answer:")
        typed = asyncio.Event()  # no thread: that would survive Ctrl-C
        asyncio.get_running_loop().add_reader(0, typed.set)
        await typed.wait()
        asyncio.get_running_loop().remove_reader(0)
        if not (line := os.read(0, 65536)):
            break
        if text := line.decode(errors="replace").strip():
            return as_json(text)
    raise RunError("a person is asked, and nobody answers here; use Redis, or --dry-run")


async def steer(args: argparse.Namespace) -> int:
    """Look at a run that exists, or change its course; gives the exit code."""
    run = await (await reach(args.redis)).find(args.run)
    if args.draw:
        show(await draw(run))
    elif args.explain:
        last = {(event["run"], event.get("node")): event for event in await recorded(run)}
        show("\n".join(map(escape, await explain(run, last, args.at))))
    elif args.cancel:
        await run.cancel()
        say(f"run {run.id} is cancelled")
    elif args.resume:
        await run.resume(values("--input", args.input))
        say(f"run {run.id} goes on")
    elif args.answer:
        for node, value in values("--answer", [args.answer]).items():
            await run.answer(node, value)
            say(f"run {run.id}: {node} has its answer")
    elif args.json and not args.wait:
        return await report(args, run)
    elif not args.wait:
        events, status = await recorded(run), await run.status()
        for event in events:
            show(line_of(event, run.id))
        used = ", ".join(f"{count} {kind}" for kind, count in status.usage.items()) or "none"
        took = f"{events[-1]['at'] - events[0]['at']:.1f} s"
        show(f"run {run.id} of {status.flow} is {status.status}; {took}; tokens used: {used}")
        return int(status.status in (FAILED, CANCELLED))
    return await follow(args, run) if args.wait else 0


async def look(executor: RedisExecutor, run: str = "") -> tuple[dict[str, str], Any, Any]:
    """At one instant: where each job is that a worker has or, of this run, that is queued; the
    run's hash; and what its jobs wait for. Says so if no worker is alive."""
    key, ready = executor.key, executor.key("ready")
    names = [key("run", run), key("workers"), key("buried")]
    jobs: list[str] = []
    workers: list[str] = []

    async def read(pipe: Any) -> None:
        tokens = json.loads(await pipe.hget(names[0], "tokens") or "{}")
        jobs[:] = [f"{run}/{node}/{mark}" for node, mark in tokens.items()]
        workers[:] = [worker for name in names[1:] for worker in await pipe.zrange(name, 0, -1)]
        pipe.multi()
        pipe.hgetall(names[0]).hgetall(key("run", run, "parked")).llen(ready).lindex(ready, -1)
        for job in jobs:
            pipe.lpos(ready, job)
        for worker in workers:
            pipe.get(key("worker", worker)).pttl(key("worker", worker))
            pipe.lrange(key("processing", worker), 0, -1)

    hash, parked, depth, oldest, *rest = await executor.link.client.transaction(read, *names)
    places, found = dict[str, str](), iter(rest[len(jobs) :])
    for worker, beat, left, held in zip(workers, found, found, found, strict=True):
        age, since = f"(heartbeat {6 - left / 1000:.0f} s ago)", json.loads(beat or "{}")
        if beat:
            places[f"worker {worker}"] = f"is alive and has {len(held)} jobs {age}"
        for job in held:
            places[job] = f"was with worker {worker}, which is dead; a living one takes it over"
            if beat:
                places[job] = f"runs on worker {worker} since {since.get(job, 0):.0f} s {age}"
    nobody = "" if any(name.startswith("worker ") for name in places) else "no worker is alive"
    for job, index in zip(jobs, rest, strict=False):
        if index is not None:
            place = f"is queued at place {depth - index} of {depth}"
            places[job] = f"{place}, and {nobody}" if nobody else place
    if nobody:
        say(f"{nobody}; in another terminal, type: python worker.py")
    places["queue"] = f"has {depth} jobs" + (f", the oldest is {oldest}" if oldest else "")
    return places, hash, parked


async def recorded(run: RedisRun) -> list[Event]:
    """What has happened so far in a run and its children."""
    rows = await run.executor.send("XRANGE", run.keys[3], "-", "+")
    return [
        {"at": int(id.split("-")[0]) / 1000, **json.loads(pairs(row)["event"])} for id, row in rows
    ]


async def explain(
    run: RedisRun, last: Mapping[tuple[str, str], Event], at: str, indent: str = ""
) -> list[str]:
    """A line for a run, and one for each token: where it is, and why; likewise its children."""
    flow, (places, hash, parked) = await flow_of(run), await look(run.executor, run.id)
    lines = [f"{indent}run {run.id} of {flow.id} is {hash['status']} {hash.get('error', '')}"]
    tokens = json.loads(hash["tokens"]) if hash["status"] in (RUNNING, FAILED) else {}
    where = {node: "waits, too" for node in tokens}
    for node, mark in tokens.items():
        job, event = f"{run.id}/{node}/{mark}", last.get((run.id, node), {})
        if mark in (WAITING, RETURNED):
            continue
        if job in places:
            where[node] = f"{places[job]}, delivery {int(hash.get(f'crashes {job}', 0)) + 1}"
            if event.get("event") == "retrying" and event["at"] + event["delay"] > time.time():
                until = time.ctime(event["at"] + event["delay"])[11:19]
                where[node] += f", backs off until {until} after {event['error']}"
        elif f"{job} is parked" in parked and parked[job]:
            command = f"python client.py --run {run.id} --answer {node}=VALUE{at}"
            where[node] = f"waits for a person: {parked[job]} (to answer, type: {command})"
        elif f"{job} is parked" in parked:
            count = f"{parked[f'{job} left']} of {parked[f'{job} count']}"
            where[node] = f"waits for {count} child runs"
        elif hash["status"] == FAILED:
            where[node] = "stands still, as its run failed; --resume runs it again"
        else:
            where[node] = "is NOWHERE: not queued, not with a worker, not parked; please report it"
    for node, mark in tokens.items():
        if mark in (WAITING, RETURNED):
            upstream = [f"{n}, which {where[n]}" for n in flow.blockers(tokens, node)]
            lines.append(f"{indent}  {node} waits for {'; and for '.join(upstream)}")
        else:
            lines.append(f"{indent}  {node} {where[node]}")
    for child in await run.children():
        if await run.executor.send("HGET", child.keys[0], "status") in (RUNNING, FAILED):
            lines += await explain(child, last, at, f"{indent}    ")
    return lines


async def overview(args: argparse.Namespace) -> int:
    """Print what the workers do and what waits, or the recent runs."""
    executor = await reach(args.redis)
    if args.workers:
        for what, place in (await look(executor))[0].items():
            show(f"{what} {place}")
        return 0
    for id in await executor.send("ZRANGE", executor.key("runs"), 0, 19, "REV"):
        run = pairs(await executor.send("HGETALL", executor.key("run", id)))
        if run:
            flow, age = json.loads(run["origin"])["flow"], time.time() - int(run["created"])
            nodes = ", ".join(json.loads(run["tokens"]))
            show(f"{id}  {flow:<20} {run['status']:<10} {age:>7.0f} s  {nodes}")
    return 0


async def flow_of(run: RedisRun) -> Flow:
    """The flow of a run, from the graph that it was started with."""
    text = await run.executor.send("GET", run.executor.key("graph", run.origin.graph))
    return Registry(json.loads(text or "{}"))[run.origin.flow]


async def draw(run: RedisRun) -> str:
    """The graph of a run as Mermaid, coloured by state."""
    status = await run.status()
    events = [event for event in await recorded(run) if event["run"] == run.id]
    states = {event["node"]: "done" for event in events if event["event"] == "done"}
    for node, mark in status.tokens.items():
        states[node] = "waiting" if mark in (WAITING, RETURNED) else "active"
        if status.error.startswith(f'node "{node}"'):
            states[node] = "failed"
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
