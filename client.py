"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    --usecase NAME     starts a run of NAME.json: --wait, --local, --dry-run, --input; --draw
    --run ID           --status, --wait, --explain, --draw, --cancel, --resume, --answer NODE=VALUE
    --input KEY=VALUE  is JSON if it parses, else text; KEY=@FILE reads a file

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What could steer a terminal is escaped; in a result
only on a terminal, newlines and tabs excepted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from redis.exceptions import RedisError

import agentflow as af
from agentflow import Event, Flow, GraphError, RedisExecutor, RedisRun, Registry, Run, RunError

MARKS = ("waiting", "returned")  # of tokens that are not active
STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "running": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}
NEEDED = (
    "start a redis-server (6.2 or newer) here, or name one that can be written to with --redis "
    "redis://[USER:PASSWORD@]HOST[:PORT][/DB]; --local needs none, --local --dry-run no key either"
)


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    return escape(re.sub(r"(?<=//).*@|\?.*", "", url))


def say(text: object) -> None:
    """Print lines on stderr."""
    if sys.stderr:
        print(escape(text, "\n"), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout."""
    if sys.stdout:
        print(escape(text, "\n\t") if sys.stdout.isatty() else text, flush=True)


def line_of(event: Event, root: str) -> str:
    """An event in a line: time, node, what, and the rest by name; of a child also its flow."""
    rest = {"node": "", **event, **event.get("usage", {})}
    at, what, node = time.ctime(rest.pop("at"))[11:19], rest.pop("event"), rest.pop("node")
    where = node if event["run"] == root else f"{event['flow']}/{node}"
    hidden = ("run", "flow", "usage", "question")
    more = "".join(f"  {name} {value}" for name, value in rest.items() if name not in hidden)
    return escape(f"{at}  {where:<28} {what:<10}{more}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ends with exit code 2 and a line that says why where it makes no sense."""
    usage = "client.py --usecase NAME | --run ID | --list | --runs | --workers  (see --help)"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("client.py", usage, __doc__, formatter_class=raw)
    for name in "usecase run answer graphs redis".split():
        parser.add_argument(f"--{name}")
    for name in "input import".split():
        parser.add_argument(f"--{name}", action="append", default=[])
    for (
        name
    ) in "list runs workers status explain draw cancel resume wait local dry-run json".split():
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(argv)
    args.acts = args.explain or args.cancel or args.resume or args.answer
    if sum(map(bool, (args.usecase, args.run, args.list, args.runs, args.workers))) != 1:
        parser.error("give one of --usecase NAME, --run ID, --list, --runs, --workers")
    if not args.run and (args.acts or args.status):
        parser.error("--status, --explain, --cancel, --resume and --answer go with --run ID")
    if not args.usecase and (args.local or args.dry_run or (args.input and not args.resume)):
        parser.error("--local, --dry-run and --input go with --usecase NAME")
    return args


def values(flag: str, given: Iterable[str]) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give; RunError, with every finding."""
    found, findings = af.Context({}), list[str]()
    for key, equals, text in (item.partition("=") for item in given):
        try:
            if not equals:
                raise ValueError("must be like KEY=VALUE or KEY=@FILE")
            value = Path(text[1:]).read_text("utf-8") if text.startswith("@") else text
            with contextlib.suppress(ValueError):  # it is text
                value = af.parse_json(value)
            found[key] = value
        except (OSError, ValueError) as error:
            findings.append(f"{flag} {key}: {error}")
    if findings:
        raise RunError("\n".join(findings))
    return {key: json.loads(text) for key, text in found.changes.items()}


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
    except ValueError:  # its text may hold a part of a password
        raise RunError(f"--redis is not the URL of a Redis; {NEEDED}") from None
    except (RedisError, OSError) as error:
        raise RunError(f"Redis at {public(url)}: {error}; {NEEDED}") from None
    return executor


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; what is wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs or Path(__file__).resolve().parent / "graphs")
    if args.list:
        for id, graph in registry.graphs.items():
            show(f"{id:<24} {graph.get('description', '') if isinstance(graph, dict) else graph}")
        return 0
    if args.usecase not in registry:
        raise RunError(f'no use case "{args.usecase}"; there is {", ".join(registry) or "none"}')
    flow, inputs = registry[args.usecase], values("--input", args.input)
    if args.draw:
        show(mermaid(flow, {}))
        return 0
    known = set(flow.inputs).union(*(node.reads() for node in flow.nodes.values()))
    for key in sorted(inputs.keys() - known):
        say(f'--input {key}: no node of "{flow.id}" reads it; {af.nearest(key, known)}')
    flow.begin(inputs)
    run = await flow.run(inputs, None if args.local else await reach(args.redis), args.dry_run)
    if args.local or args.wait or args.json:
        return await follow(args, run)
    show(run.id)
    say(f"queued; to follow it, type: python client.py --run {run.id} --wait{args.at}")
    return 0


async def follow(args: argparse.Namespace, run: Run, wait: bool = True) -> int:
    """Print a run's events, to its end or so far, and what came of it; gives the exit code."""
    out = say if wait or args.json else show
    if wait and isinstance(run, RedisRun):
        await look(run.executor)
    try:
        async for event in run.events() if wait else recorded(run):
            out(line_of(event, run.id))
            if question := event.get("question"):
                out("    | " + question.replace("\n", "\n    | "))
            if question and isinstance(run, af.MemoryRun):
                await run.answer(event["node"], await ask(), event["run"])
            elif question and wait:
                say(f"to answer, type: {answer(event['run'], event['node'])}{args.at}")
    except asyncio.CancelledError:
        more = f"goes on; to follow it, type: python client.py --run {run.id} --wait{args.at}"
        say(f"run {run.id} {'ends here' if args.local else more}")
        raise
    status = await run.status()
    out(f"run {run.id} of {status.flow} is {status.status}; tokens used: {status.usage}")
    if args.json:
        show(json.dumps({k: v for k, v in vars(status).items() if k != "tokens"}, indent=2))
    elif wait and status.status == af.COMPLETED:
        text = status.result
        show(text if isinstance(text, str) else json.dumps(text, indent=2, ensure_ascii=False))
    return int(status.status in (af.FAILED, af.CANCELLED))


async def ask() -> Any:
    """A person's answer, from the terminal; RunError without one."""
    typed, loop = asyncio.Event(), asyncio.get_running_loop()
    if sys.stdin and sys.stdin.isatty():
        say("your answer:")
        loop.add_reader(0, typed.set)  # no thread: that would survive Ctrl-C
        await typed.wait()
        loop.remove_reader(0)
        if text := os.read(0, 65536).decode(errors="replace").strip():
            return values("the answer", [f"it={text}"])["it"]
    raise RunError("a person is asked, and nobody answers here; use Redis, or --dry-run")


async def steer(args: argparse.Namespace) -> int:
    """Look at a run that exists, or change its course; gives the exit code."""
    run = await (await reach(args.redis)).find(args.run)
    events = [event async for event in recorded(run)]
    if args.explain:
        last = {(event["run"], event.get("node", "")): event for event in events}
        show(escape("\n".join(await explain(run, last, args.at)), "\n"))
    elif args.draw:
        status = await run.status()
        states = {e["node"]: "done" for e in events if e["event"] == "done" and e["run"] == run.id}
        states |= {n: "waiting" if m in MARKS else "running" for n, m in status.tokens.items()}
        failed = re.match('node "(.*?)"', status.error)
        states |= {failed[1]: "failed"} if failed else {}
        show(mermaid(await flow_of(run), states))
    elif args.cancel:
        await run.cancel()
        say(f"run {run.id} is cancelled")
    elif args.resume:
        await run.resume(values("--input", args.input))
        say(f"run {run.id} goes on")
    elif args.answer:
        for node, value in values("--answer", [args.answer]).items():
            await run.answer(node, value)
        say(f"run {run.id} has the answer")
    return await follow(args, run, args.wait) if args.wait or not args.acts and not args.draw else 0


async def look(executor: RedisExecutor, jobs: Collection[str] = ()) -> dict[str, str]:
    """Who is alive, and where each job is that a worker has or, of these, that is queued."""
    send, key, ready, found = executor.send, executor.key, executor.key("ready"), dict[str, str]()
    crew = [w for name in ("workers", "buried") for w in await send("ZRANGE", key(name), 0, -1)]
    async with executor.link.client.pipeline() as pipe:  # all at one instant
        pipe.llen(ready).lindex(ready, -1)
        for worker in crew:
            pipe.get(key("worker", worker)).pttl(key("worker", worker))
            pipe.lrange(key("processing", worker), 0, -1)
        for job in jobs:
            pipe.lpos(ready, job)
        depth, oldest, *replies = await pipe.execute()
    rest = iter(replies)
    for worker, beat, left, held in zip(crew, rest, rest, rest, strict=False):
        since, age = json.loads(beat or "{}"), f"(heartbeat {6 - left / 1000:.0f} s ago)"
        if beat:
            found[f"worker {worker}"] = f"lives and has {len(held)} jobs {age}"
        for job in held:
            found[job] = f"was with worker {worker}, which is dead; a living one takes it over"
            if beat:
                found[job] = f"runs on worker {worker} since {since.get(job, 0):.0f} s {age}"
    nobody = "" if any(replies[: 3 * len(crew) : 3]) else "no worker is alive"
    if nobody and not jobs:
        say(f"{nobody}; in another terminal, type: python worker.py")
    for job, index in zip(jobs, rest, strict=True):
        if index is not None:
            place = f"is queued at place {depth - index} of {depth}"
            found[job] = f"{place}, and {nobody}" if nobody else place
    return found | {"queue": f"has {depth} jobs, the oldest is {oldest}"}


async def recorded(run: RedisRun) -> AsyncIterator[Event]:
    """What has happened so far in a run and its children."""
    for id, row in await run.executor.send("XRANGE", run.keys[3], "-", "+"):
        yield {"at": int(id.split("-")[0]) / 1000, **json.loads(af.pairs(row)["event"])}


async def explain(run: RedisRun, last: Mapping[Any, Event], at: str, indent: str = "") -> list[str]:
    """A line for a run, and one for each token: where it is, and why; likewise its children."""
    send, flow, hash = run.executor.send, await flow_of(run), dict[str, str]()
    while hash != (now := af.pairs(await send("HGETALL", run.keys[0]))):  # it moved meanwhile
        hash, status = now, now["status"]
        tokens = json.loads(hash["tokens"]) if status in (af.RUNNING, af.FAILED) else {}
        jobs = {n: f"{run.id}/{n}/{mark}" for n, mark in tokens.items() if mark not in MARKS}
        places = await look(run.executor, jobs.values())
        parked = af.pairs(await send("HGETALL", run.keys[2]))
    where = dict.fromkeys(tokens, "waits, too")
    for node, job in jobs.items():
        lost = "is NOWHERE: not queued, not with a worker, not parked; please report it"
        still = "stands still, as its run failed; --resume runs it again"
        where[node] = places.get(job, still if status == af.FAILED else lost)
        if f"{job} is parked" in parked:
            left, count = parked[f"{job} left"], parked[f"{job} count"]
            question = f"a person: {parked[job]} (to answer, type: {answer(run.id, node)}{at})"
            where[node] = (
                f"waits for {question if parked[job] else f'{left} of {count} child runs'}"
            )
        elif job in places:
            where[node] += f", delivery {int(hash.get(f'crashes {job}', 0)) + 1}"
        retry = last.get((run.id, node), {})
        until = retry["at"] + retry.get("delay", 0) if retry else 0
        if until > time.time():
            where[node] += f", backs off until {time.ctime(until)[11:19]} after {retry['error']}"
    lines = [f"{indent}run {run.id} of {flow.id} is {status} {hash.get('error', '')}"]
    for node in tokens:
        others = [f"{other}, which {where[other]}" for other in flow.blockers(tokens, node)]
        why = where[node] if node in jobs else f"waits for {'; and for '.join(others)}"
        lines.append(f"{indent}  {node} {why}")
    for child in await run.children():
        if await send("HGET", child.keys[0], "status") in (af.RUNNING, af.FAILED):
            lines += await explain(child, last, at, indent + "    ")
    return lines


async def overview(args: argparse.Namespace) -> int:
    """Print the use cases, what the workers do and what waits, or the recent runs."""
    executor = await reach(args.redis)
    for what, place in (await look(executor)).items() if args.workers else ():
        show(f"{what} {place}")
    send, key = executor.send, executor.key
    for id in await send("ZRANGE", key("runs"), 0, 19, "REV") if args.runs else ():
        if run := af.pairs(await send("HGETALL", key("run", id))):
            age, flow = time.time() - int(run["created"]), json.loads(run["origin"])["flow"]
            nodes = ", ".join(json.loads(run["tokens"]))
            show(f"{id}  {flow:<20} {run['status']:<10} {age:>7.0f} s  {nodes}")
    return 0


async def flow_of(run: RedisRun) -> Flow:
    """The flow of a run, from the graph that it was started with."""
    text = await run.executor.send("GET", run.executor.key("graph", run.origin.graph))
    return Registry(json.loads(text or "{}"))[run.origin.flow]


def mermaid(flow: Flow, states: Mapping[str, str]) -> str:
    """A flow as Mermaid; `states` says which nodes are done, running, waiting or failed."""
    names = {node: f"n{i}" for i, node in enumerate(flow.nodes)}
    lines = ["flowchart TD"]
    for node, name in names.items():
        lines.append(f'    {name}["{node}"]' + (f":::{states[node]}" if node in states else ""))
    for source, by_action in flow.targets.items():
        for action, targets in by_action.items():
            label = re.sub(r'[#"<>&|]', lambda c: f"#{ord(c[0])};", escape(action))
            arrow = "-->" if action == af.DEFAULT else f'-->|"{label}"|'
            lines += [f"    {names[source]} {arrow} {names[target]}" for target in targets]
    lines += [f"    classDef {s} fill:{FILLS[s]},color:#000" for s in sorted({*states.values()})]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The whole command; gives the exit code."""
    try:
        args = parse(argv)
        if sys.stdout:
            getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
        set_up(args)
        does = steer if args.run else overview if args.runs or args.workers else start
        return asyncio.run(does(args))
    except (GraphError, RunError, RedisError) as error:
        say(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on; at exit Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
