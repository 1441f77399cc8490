"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    --usecase NAME  [--wait | --local | --draw] [--dry-run] [--json] [--graphs DIR]
                    [--input KEY=VALUE ...]: VALUE is JSON if it parses, else text; @FILE is read
    --run ID        [--status | --explain | --draw | --cancel | --resume | --answer NODE=VALUE]
                    [--wait] [--json]
    --list | --runs | --workers         anywhere: [--redis URL] [--import MODULE ...]

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
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from redis.exceptions import RedisError

from agentflow import CANCELLED, COMPLETED, DEFAULT, FAILED, RUNNING
from agentflow import Context, Event, Flow, GraphError, MemoryRun, RedisExecutor, RedisRun
from agentflow import Registry, Run, RunError, pairs, parse_json
from graphs.check import nearest

STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "running": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}
ANSWER = "python client.py --run {} --answer {}=VALUE"
MARKS = ("waiting", "returned")  # of the tokens that are not active
NEEDED = (
    "start redis-server, 6.2 or newer, or name one that can be written to with --redis "
    "redis://[USER:PASSWORD@]HOST[:PORT][/DB]; --local needs none, --local --dry-run no key either"
)


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    return escape(re.sub(r":(/*).*@|\?.*", lambda m: f":{m[1]}" if m[0][0] == ":" else "", url))


def say(text: str, to: Any = sys.stderr) -> None:
    """Print what is only for eyes, or to stdout a result."""
    if to:
        plain = to is sys.stdout and not to.isatty()
        print(text if plain else escape(text, "\n\t"), file=to, flush=True)


def line_of(event: Event, root: str) -> str:
    """An event in a line: time, node, what, and the rest by name; of a child also its flow."""
    hidden = ("at", "event", "run", "flow", "node", "usage", "question")
    rest = {k: v for k, v in event.items() if k not in hidden} | event.get("usage", {})
    where = ("" if event["run"] == root else f"{event['flow']}/") + event.get("node", "")
    more = "".join(f"  {name} {value}" for name, value in rest.items())
    return escape(f"{time.ctime(event['at'])[11:19]}  {where:<28} {event['event']:<10}{more}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, with the flags named above; ends with exit code 2 where it is wrong."""
    parser = argparse.ArgumentParser("client.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subject = parser.add_mutually_exclusive_group(required=True)
    for name, value in dict(re.findall(r"--([a-z-]+)( [A-Z=]+)?", f"{__doc__}")).items():
        group = subject if name in ("usecase", "run", "list", "runs", "workers") else parser
        many = "append" if name in ("input", "answer", "import") else "store"
        group.add_argument(f"--{name}", action=many if value else "store_true")
    args = parser.parse_args(argv)
    args.acts = args.explain or args.cancel or args.resume or args.answer
    if (args.acts or args.status) and not args.run:
        parser.error("--status, --explain, --cancel, --resume and --answer go with --run ID")
    return args


def as_json(text: str) -> Any:
    """The value of a text that is JSON, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def values(flag: str, given: Iterable[str] | None) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give; RunError, with every finding."""
    ctx, findings = Context({}), list[str]()
    for key, equals, text in (item.partition("=") for item in given or ()):
        try:
            if not equals:
                raise ValueError("it must be like KEY=VALUE or KEY=@FILE")
            ctx[key] = as_json(Path(text[1:]).read_text("utf-8") if text.startswith("@") else text)
        except (OSError, ValueError) as error:
            findings.append(f"{flag} {key}: {error}")
    if findings:
        raise RunError("\n".join(findings))
    return {key: ctx[key] for key in ctx.changes}


def set_up(args: argparse.Namespace) -> None:
    """Read .env, import the node types, and find out which Redis is meant."""
    load_dotenv(find_dotenv(usecwd=True))
    args.at = f" --redis {public(args.redis)}" if args.redis else ""
    args.redis = args.redis or os.environ.get("REDIS_URL") or "redis://localhost:6379"
    sys.path.append(os.curdir)
    for module in ["graphs.nodes", *(vars(args)["import"] or ())]:
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
    except (ValueError, OSError, RedisError) as error:
        found = f"Redis at {public(url)}: {error}"
        if isinstance(error, ValueError):  # its text may hold a part of a password
            found = "that is not the URL of a Redis"
        raise RunError(f"{found}; {NEEDED}") from None


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; what is wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs or Path(__file__).resolve().parent / "graphs")
    if args.list:
        for id, graph in registry.graphs.items():
            say(
                f"{id:<24} {graph.get('description', '') if isinstance(graph, dict) else graph}",
                sys.stdout,
            )
        return 0
    if args.usecase not in registry:
        raise RunError(f'no use case "{args.usecase}"; there is {", ".join(registry) or "none"}')
    flow, inputs = registry[args.usecase], values("--input", args.input)
    if args.draw:
        say(mermaid(flow, {}), sys.stdout)
        return 0
    known = set(flow.inputs).union(*(node.reads() for node in flow.nodes.values()))
    for key in sorted(inputs.keys() - known):
        say(f'--input {key}: no node of "{flow.id}" reads it; {nearest(key, known)}')
    flow.begin(inputs)
    if args.local:
        return await follow(args, await flow.run(inputs, dry_run=args.dry_run))
    run = await flow.run(inputs, await reach(args.redis), args.dry_run)
    say(f"queued; to follow it, type: python client.py --run {run.id} --wait{args.at}")
    if args.wait or args.json:
        return await follow(args, run)
    say(run.id, sys.stdout)
    return 0


async def follow(args: argparse.Namespace, run: Run) -> int:
    """Print a run's events, to its end or so far, and what came of it; gives the exit code."""
    wait = args.wait or not args.run
    out = sys.stderr if wait or args.json else sys.stdout
    if wait and isinstance(run, RedisRun):
        await look(run.executor)
    async for event in run.events(follow=wait):
        say(line_of(event, run.id), out)
        if question := event.get("question"):
            say("    | " + escape(question, "\n").replace("\n", "\n    | "), out)
        if question and isinstance(run, MemoryRun):
            await run.answer(event["node"], await ask(), event["run"])
        elif question and wait:
            say(f"to answer, type: {ANSWER.format(event['run'], event['node'])}{args.at}")
    status = await run.status()
    used = ", ".join(f"{count} {kind}" for kind, count in status.usage.items()) or "none"
    say(f"run {run.id} of {status.flow} is {status.status}; tokens used: {used}", out)
    if args.json:
        document = {key: value for key, value in vars(status).items() if key != "tokens"}
        say(json.dumps(document, indent=2), sys.stdout)
    elif wait and status.status == COMPLETED:
        text = status.result
        text = text if isinstance(text, str) else json.dumps(text, indent=2, ensure_ascii=False)
        say(text, sys.stdout)
    return int(status.status in (FAILED, CANCELLED))


async def ask() -> Any:
    """A person's answer, from the terminal; RunError without one."""
    typed, loop = asyncio.Event(), asyncio.get_running_loop()
    if sys.stdin and sys.stdin.isatty():
        loop.add_reader(0, typed.set)  # no thread: that would survive Ctrl-C
        await typed.wait()
        loop.remove_reader(0)
        if text := os.read(0, 65536).decode(errors="replace").strip():
            return as_json(text)
    raise RunError("a person is asked, and nobody answers here; use Redis, or --dry-run")


async def steer(args: argparse.Namespace) -> int:
    """Look at a run that exists, or change its course; gives the exit code."""
    if not (run := await (await reach(args.redis)).find(args.run)):
        raise RunError(f"there is no run {args.run!r:.140} on this Redis; it may have expired")
    if args.cancel:
        await run.cancel()
    elif args.resume:
        await run.resume(values("--input", args.input))
    for node, value in values("--answer", args.answer).items():
        await run.answer(node, value)
    if args.cancel or args.resume or args.answer:
        say(f"run {run.id} {'is cancelled' if args.cancel else 'goes on'}")
    if args.explain:
        lines = await explain(run, [event async for event in run.events(follow=False)], args.at)
        say("\n".join(map(escape, lines)), sys.stdout)
    elif args.draw:
        say(await draw(run), sys.stdout)
    return await follow(args, run) if args.wait or not (args.acts or args.draw) else 0


async def look(executor: RedisExecutor, jobs: Collection[str] = ()) -> dict[str, str]:
    """Who works, and where each job is that a worker has or, of these, that is queued."""
    send, key, ready = executor.send, executor.key, executor.key("ready")
    crew = await send("ZRANGE", key("workers"), 0, -1)
    pipe: Any = executor.link.client.pipeline()  # all at one instant
    pipe.llen(ready).lindex(ready, -1)
    for worker in crew:
        pipe.get(key("worker", worker)).pttl(key("worker", worker))
        pipe.lrange(key("processing", worker), 0, -1)
    for job in jobs:
        pipe.lpos(ready, job)
    depth, oldest, *rest = await pipe.execute()
    found, replies, alive = dict[str, str](), iter(rest), any(rest[: 3 * len(crew) : 3])
    for worker, beat, left, held in zip(crew, replies, replies, replies, strict=False):
        since, age = json.loads(beat or "{}"), f"heartbeat {6 - left / 1000:.0f} s ago"
        if beat:
            found[f"worker {worker}"] = f"has {len(held)} jobs ({age})"
        for job in held:
            found[job] = f"was with worker {worker}, which is dead; a living one takes it over"
            if beat:
                found[job] = (
                    f"is running on worker {worker} since {since.get(job, 0):.0f} s ({age})"
                )
    nobody = "" if alive else ", and no worker is alive"
    for job, index in zip(jobs, replies, strict=True):
        if index is not None:
            found[job] = f"is queued at place {depth - index} of {depth}{nobody}"
    if nobody and not jobs:
        say("no worker is alive; in another terminal, type: python worker.py")
    return found | {"queue": f"has {depth} jobs; the oldest: {oldest or 'none'}"}


async def explain(run: RedisRun, events: list[Event], at: str, indent: str = "") -> list[str]:
    """A line for a run, and one for each token: where it is, and why; likewise its children."""
    send, flow, hash = run.executor.send, await flow_of(run), dict[str, str]()
    while hash != (now := pairs(await send("HGETALL", run.keys[0]))):  # it moved meanwhile
        hash, status = now, now["status"]
        tokens = json.loads(hash["tokens"]) if status in (RUNNING, FAILED) else {}
        jobs = {n: f"{run.id}/{n}/{mark}" for n, mark in tokens.items() if mark not in MARKS}
        places = await look(run.executor, jobs.values())
        parked = pairs(await send("HGETALL", run.keys[2]))
    last = {event.get("node"): event for event in events if event["run"] == run.id}
    where = dict.fromkeys(tokens, "waits, too")
    for node, job in jobs.items():
        retry = last[node] if "delay" in last.get(node, {}) else {"at": 0, "delay": 0}
        until = retry["at"] + retry["delay"]
        if f"{job} is parked" in parked and parked[job]:
            command = ANSWER.format(run.id, node) + at
            where[node] = f"waits for a person: {parked[job]} (to answer, type: {command})"
        elif f"{job} is parked" in parked:
            left, count = parked[f"{job} left"], parked[f"{job} count"]
            where[node] = f"waits for {left} of {count} child runs"
        elif job in places:
            where[node] = f"{places[job]}, delivery {int(hash.get(f'crashes {job}', 0)) + 1}"
        elif status == FAILED:
            where[node] = "stands still, as its run failed; --resume runs it again"
        else:
            where[node] = "is NOWHERE: not queued, not with a worker, not parked; please report it"
        if until > time.time():
            then = time.ctime(until)[11:19]
            where[node] += f", backs off until {then} after {retry['error']}"
    for node in tokens.keys() - jobs:
        others = [f"{other}, which {where[other]}" for other in flow.blockers(tokens, node)]
        where[node] = "waits for " + "; and for ".join(others)
    lines = [f"{indent}run {run.id} of {flow.id} is {status} {hash.get('error', '')}"]
    lines += [f"{indent}  {node} {why}" for node, why in where.items()]
    for child in await run.children():
        if await send("HGET", child.keys[0], "status") in (RUNNING, FAILED):
            lines += await explain(child, events, at, indent + "    ")
    return lines


async def overview(args: argparse.Namespace) -> int:
    """Print what the workers do and what waits, or the recent runs."""
    executor = await reach(args.redis)
    for what, place in (await look(executor)).items() if args.workers else ():
        say(f"{what} {place}", sys.stdout)
    send, key = executor.send, executor.key
    for id in await send("ZRANGE", key("runs"), 0, 19, "REV") if args.runs else ():
        if run := pairs(await send("HGETALL", key("run", id))):
            age, flow = time.time() - int(run["created"]), json.loads(run["origin"])["flow"]
            nodes = ", ".join(json.loads(run["tokens"]))
            say(f"{id}  {flow:<20} {run['status']:<10} {age:>7.0f} s  {nodes}", sys.stdout)
    return 0


async def flow_of(run: RedisRun) -> Flow:
    """The flow of a run, from the graph that it was started with."""
    text = await run.executor.send("GET", run.executor.key("graph", run.origin.graph))
    return Registry(json.loads(text or "{}"))[run.origin.flow]


async def draw(run: RedisRun) -> str:
    """The graph of a run as Mermaid, coloured by state."""
    status, events = await run.status(), [event async for event in run.events(follow=False)]
    here = [event for event in events if event["run"] == run.id and event["event"] == "done"]
    states = {event["node"]: "done" for event in here}
    active = "running" if status.status == RUNNING else "failed"
    states |= {n: "waiting" if mark in MARKS else active for n, mark in status.tokens.items()}
    return mermaid(await flow_of(run), states)


def mermaid(flow: Flow, states: Mapping[str, str]) -> str:
    """A flow as Mermaid; `states` says which nodes are done, running, waiting or failed."""
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
    args = parse(argv)
    try:
        if sys.stdout:
            getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
        set_up(args)
        does = steer if args.run else overview if args.runs or args.workers else start
        return asyncio.run(does(args))
    except (GraphError, RunError, RedisError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say(
            "the run ends here"
            if args.local
            else "the run goes on; --run ID --wait follows it again"
        )
        return 130
    except BrokenPipeError:  # nobody reads on; at exit Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
