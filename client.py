"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    python client.py --usecase research --local --dry-run      # needs no Redis, key or network
    python client.py --usecase research --wait                 # needs a Redis and a worker.py
    python client.py --run ID --explain                        # where it is, and why

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What models, people and servers have said reaches a
terminal with its control characters escaped; a result keeps its newlines and tabs, and every
character where stdout is no terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), os.curdir]  # where graphs.nodes is, and what --import names
try:
    from dotenv import find_dotenv, load_dotenv
    from redis import exceptions

    import graphs.nodes  # noqa: F401  registers the node types
    from agentflow import CANCELLED, COMPLETED, DEFAULT, FAILED, RETURNED, RUNNING, WAITING
    from agentflow import Event, Flow, GraphError, RedisExecutor, RedisRun, Registry, Run, RunError
    from agentflow import MemoryRun, Status, child_id, nearest, parse_json
except ModuleNotFoundError as error:
    print(f"{error}; type: pip install -r {HERE / 'requirements.txt'}", file=sys.stderr)
    sys.exit(2)

# ── 1. What reaches a terminal ───────────────────────────────────────────────────────────────

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOURS = {"done": 32, "completed": 32, "failed": 31, "cancelled": 31, "retrying": 33, "parked": 36}
LEASE = 6.0  # seconds that a heartbeat lasts, so that what is left of it gives its age


class Problem(Exception):
    """Bad input, or nothing reachable: a line for each finding, and exit code 2."""


def escape(text: object, keep: str = "") -> str:
    """A text without characters that steer a terminal, except those to keep."""


    def visible(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return CONTROL.sub(visible, str(text))


def public(url: str) -> str:
    """A URL without password and options, fit to be shown."""
    try:
        parts = urlsplit(url)
        if parts.port == 0 or "@" in parts.path + parts.query + parts.fragment:
            raise ValueError
    except ValueError:
        return "the address given"  # what of it is a password, nobody knows
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    return escape(bare.geturl())


def say(text: str) -> None:
    """Print a line on stderr."""
    print(escape(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout."""
    print(escape(text, keep="\n\t") if sys.stdout.isatty() else text, flush=True)


def ago(seconds: float) -> str:
    """A duration, in the unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def clock(at: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def tell(event: Event, root: str) -> None:
    """Print an event on stderr: time, node, what, visit, seconds."""
    name = event["event"]
    place = event.get("node", "") if event["run"] == root else event["flow"]
    if event["run"] != root and "node" in event:
        place += f"/{event['node']}"
    what = name if event.get("action", DEFAULT) == DEFAULT else f"{name}: {event['action']}"
    if "error" in event:
        what += f": {event['error']}"
    if "delay" in event:
        what += f"; again in {event['delay']:.1f} s"
    if "visit" in event:
        what = f"{what:<18} visit {event['visit']}  {event['seconds']:.2f} s"
    if name == "parked":
        what += " until a person answers" if event.get("question") else " until its runs have ended"
    what = escape(what)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        what = what.replace(name, f"\033[{COLOURS.get(name, 0)}m{name}\033[0m", 1)
    at = clock(event.get("at", time.time()))
    print(f"{at}  {escape(place):<32} {what}", file=sys.stderr, flush=True)
    for line in (event.get("question") or "").splitlines():
        say(f"          | {line}")


# ── 2. The command line ──────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise Problem(f"{message}; --help shows all flags, --list the use cases")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line as it was given; Problem where it makes no sense."""
    parser = Parser(prog="client.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    what = parser.add_argument_group("what to look at").add_mutually_exclusive_group(required=True)
    what.add_argument("--usecase", metavar="NAME", help="start a run of the graph NAME.json")
    what.add_argument("--run", metavar="ID", help="a run that exists; shows its status")
    what.add_argument("--list", action="store_true", help="the use cases")
    what.add_argument("--runs", action="store_true", help="recent runs")
    what.add_argument("--workers", action="store_true", help="who is alive, and what waits")
    add = parser.add_argument
    add("--input", metavar="KEY=VALUE", action="append", default=[], help="JSON, text, or @FILE")
    add("--wait", action="store_true", help="follow the run and print its result")
    add("--local", action="store_true", help="run it in this process, without Redis")
    add("--dry-run", action="store_true", help="models and HTTP calls give their examples")
    add("--json", action="store_true", help="print one JSON document")
    add("--draw", action="store_true", help="print Mermaid of the graph, or of the run")
    add("--status", action="store_true", help="what the run has done")
    add("--explain", action="store_true", help="where each of its tokens is, and why")
    add("--cancel", action="store_true", help="end it for good")
    add("--resume", action="store_true", help="go on from where it failed")
    add("--answer", metavar="NODE=VALUE", help="answer what a node asks")
    add("--graphs", metavar="DIR", default=HERE / "graphs", help="where the graphs are")
    add("--redis", metavar="URL", help="default: REDIS_URL, else redis://localhost:6379")
    add("--import", metavar="MODULE", dest="modules", action="append", default=[], help="node types")
    args, unknown = parser.parse_known_args(argv)
    flags = parser._option_string_actions
    problems = [f"{flag}: no such flag; {nearest(flag, flags)}" for flag in unknown]
    for given, fits, mend in (
        (args.local or args.dry_run, args.usecase, "--local and --dry-run go with --usecase"),
        (args.wait or args.draw, args.usecase or args.run, "--wait and --draw go with --usecase or --run"),
        (args.input, args.usecase or args.resume, "--input goes with --usecase or --resume"),
        (args.json, args.wait or args.local or args.status, "--json goes with --wait, --local or --status"),
        (args.status or args.explain or args.cancel or args.resume or args.answer, args.run,
         "--status, --explain, --cancel, --resume and --answer go with --run"),
    ):  # fmt: skip
        problems += [mend] if given and not fits else []
    if sum(map(bool, (args.status, args.explain, args.draw, args.cancel, args.resume, args.answer))) > 1:
        problems += ["one thing at a time: --status, --explain, --draw, --cancel, --resume or --answer"]
    if problems:
        raise Problem("\n".join(problems))
    return args


def pair(flag: str, text: str) -> tuple[str, Any]:
    """KEY=VALUE as a key and a value: JSON if it parses, else text; from a file after @."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Problem(f"{flag} {text}: must be like KEY=VALUE or KEY=@FILE")
    if value.startswith("@"):
        try:
            value = Path(value[1:]).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise Problem(f"{flag} {key}: cannot read {value[1:]}: {error}") from None
    return key, value_of(value)


def value_of(text: str) -> Any:
    """What somebody typed: JSON if it parses, else text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def set_up(modules: Iterable[str]) -> None:
    """Read .env and import modules with more node types; Problem where that fails."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    load_dotenv(find_dotenv(usecwd=True))
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise Problem(f"--import {module}: {type(error).__name__}: {error}") from None


def no_redis(error: Exception, url: str) -> Problem:
    """What to say, and what to type next, where Redis is not there or will not do."""
    text, where = str(error), f"Redis at {public(url)}"
    if isinstance(error, exceptions.AuthenticationError):
        text = f"{where} wants another password; use --redis redis://:PASSWORD@HOST:PORT"
    elif "unknown command" in text:
        text = f"{where} is too old; use Redis 6.2 or newer, or valkey"
    elif isinstance(error, exceptions.NoPermissionError):
        text = f"{where} does not let this user do that: {text}"
    elif isinstance(error, ValueError):
        text = f"{public(url)} is no Redis URL; use --redis redis://[:PASSWORD@]HOST:PORT[/DB]"
    elif isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError):
        text = f"no {where} ({text}); start redis-server, or use --redis URL"
    else:
        text = f"{where} will not do: {text}"
    return Problem(f"{text}; --local runs without Redis, --local --dry-run without anything")


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[RedisExecutor]:
    """The executor on this Redis; Problem where it is not there or will not do."""
    try:
        executor = RedisExecutor(url)
    except ValueError as error:
        raise no_redis(error, url) from None
    try:
        await executor.open()
        yield executor
    except exceptions.RedisError as error:
        raise no_redis(error, url) from None
    finally:
        await executor.close()


# ── 3. Starting, following, steering ─────────────────────────────────────────────────────────


async def start(args: argparse.Namespace) -> int:
    """Start a run of a use case; all that can be wrong with it is found before Redis is asked."""
    registry = Registry.load(args.graphs)
    if args.usecase not in registry:
        hint = nearest(args.usecase, registry)
        raise Problem(f'no use case "{args.usecase}"; {hint}; there is {", ".join(registry)}')
    flow = registry[args.usecase]
    if args.draw:
        show(mermaid(registry.graphs[flow.id], {}))
        return 0
    inputs = dict(pairs("--input", args.input))
    flow.begin(inputs)
    known = flow.inputs.keys() | {key for node in flow.nodes.values() for key in node.reads()}
    for key in inputs.keys() - known:
        say(f'note: no node of "{flow.id}" reads the input "{key}"; {nearest(key, known)}')
    if args.local:
        return await follow(args, await flow.run(inputs, dry_run=args.dry_run))
    async with connected(args.url) as executor:
        run = await executor.run(flow, inputs, args.dry_run)
        if args.wait:
            say(f"run {run.id} is queued")
            return await follow(args, run)
        show(run.id)
        say(f"queued; to follow it, type: {args.me} --run {run.id} --wait")
        await warn_without_workers(args, executor)
        return 0


async def steer(args: argparse.Namespace) -> int:
    """Do what is to be done with a run that exists."""
    async with connected(args.url) as executor:
        run = await executor.find(args.run)
        if args.cancel:
            await run.cancel()
            say(f"run {run.id} is cancelled")
        elif args.resume:
            await run.resume(dict(pairs("--input", args.input)))
            say(f"run {run.id} goes on")
        elif args.answer:
            [(node, value)] = pairs("--answer", [args.answer])
            await run.answer(node, value)
            say(f'"{node}" has its answer')
        elif args.explain:
            async for line in Explanation(executor, args.me).of(run.id):
                show(escape(line))
        elif args.draw:
            show(await draw(executor, run))
        elif not args.wait:
            return await report(args, run)
        return await follow(args, run) if args.wait else 0


async def follow(args: argparse.Namespace, run: Run) -> int:
    """Print a run's events until it has ended, then its result."""
    watch = isinstance(run, RedisRun) and asyncio.create_task(watch_workers(args, run.executor))
    try:
        async for event in run.events():
            tell(event, run.id)
            if event["event"] == "parked" and event.get("question") is not None:
                command = f"{args.me} --run {event['run']} --answer {event['node']}=VALUE"
                if isinstance(run, MemoryRun):
                    await run.answer(event["node"], await ask(event))
                else:
                    say(f"to answer, type: {command}")
    except asyncio.CancelledError:
        more = f"goes on; to follow it, type: {args.me} --run {run.id} --wait"
        say(f"run {run.id} {'ends here' if args.local else more}")
        raise
    finally:
        if watch:
            watch.cancel()
    return await report(args, run)


async def ask(event: Event) -> Any:
    """A person's answer, from the terminal; Problem without one."""
    if not sys.stdin.isatty():
        mend = "run it on a Redis and use --answer, or use --dry-run"
        raise Problem(f'"{event["node"]}" asks a person, and here is no terminal; {mend}')
    print("your answer: ", end="", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    typed: asyncio.Future[bytes] = loop.create_future()
    # No thread: one that waits for the keyboard would keep Ctrl-C from ending the process.
    loop.add_reader(0, lambda: typed.done() or typed.set_result(os.read(0, 65536)))
    try:
        line = await typed
    finally:
        loop.remove_reader(0)
    if not line:
        raise Problem(f'"{event["node"]}" got no answer')
    return value_of(line.decode(errors="replace").strip())


async def report(args: argparse.Namespace, run: Run) -> int:
    """Print a run's result, or its status where that is asked for; gives the exit code."""
    status = await run.status()
    if args.json:
        document = {name: value for name, value in vars(status).items() if name != "tokens"}
        show(json.dumps(document, indent=2))
    elif isinstance(run, RedisRun) and not args.wait:
        show(await life(run, status))
    elif status.status == COMPLETED:
        result = status.result
        show(result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False))
    if status.status == FAILED and not args.local:
        say(f"to go on from where it failed, type: {args.me} --run {run.id} --resume --wait")
    return int(status.status in (FAILED, CANCELLED))


# ── 4. Looking ───────────────────────────────────────────────────────────────────────────────


async def alive(executor: RedisExecutor) -> dict[str, tuple[float, dict[str, float | None]]]:
    """The living workers: how old their heartbeat is, and since how many seconds they run what."""
    send, key = executor.link.send, executor.key
    names = await send("ZRANGE", key("workers"), 0, -1)
    beats = await asyncio.gather(*(send("GET", key("worker", name)) for name in names))
    left = await asyncio.gather(*(send("PTTL", key("worker", name)) for name in names))
    found = zip(names, beats, left, strict=True)
    return {name: (max(0.0, LEASE - ms / 1000), json.loads(beat)) for name, beat, ms in found if beat}


async def warn_without_workers(args: argparse.Namespace, executor: RedisExecutor) -> bool:
    """Say what to type where no worker is alive; whether one is."""
    if there := await alive(executor):
        return bool(there)
    say(f"no worker is alive; in another terminal, type: {args.me.replace('client', 'worker', 1)}")
    return False


async def watch_workers(args: argparse.Namespace, executor: RedisExecutor) -> None:
    """While a run is followed, say when no worker is alive, once each time."""
    there = True
    while True:
        now = bool(await alive(executor))
        if there and not now:
            await warn_without_workers(args, executor)
        there = now
        await asyncio.sleep(2)


class Explanation:
    """Where the tokens of a run and of its children are, and why."""

    def __init__(self, executor: RedisExecutor, me: str) -> None:
        self.executor, self.me = executor, me
        self.send, self.key = executor.link.send, executor.key
        self.told: dict[tuple[str, str], tuple[float, Event]] = {}  # the last event of each node

    async def of(self, id: str, indent: str = "") -> AsyncIterator[str]:
        """A line for the run, and one for each token; those of children indented below it."""
        run = await self.executor.find(id)
        if not indent:
            self.now = int((await self.send("TIME"))[0])
            self.workers = await alive(self.executor)
            async for at, event in recorded(run):
                self.told[event["run"], event.get("node", "")] = at, event
        status = await run.status()
        error = f": {status.error}" if status.error else ""
        yield f"{indent}run {id} of {status.flow} is {status.status}{error}"
        if status.status not in (RUNNING, FAILED):
            return
        flow = (await graph_of(run))[status.flow]
        places = {n: await self.place(run, n) for n, mark in status.tokens.items() if active(mark)}
        for node, mark in status.tokens.items():
            text = places.get(node) or "waits for " + ", ".join(
                f"{other}, which {places.get(other, 'waits, too')}"
                for other in blockers(flow, status.tokens, node)
            )
            yield f"{indent}  {node} {text}"
            if active(mark):
                for child in await self.children(run, node, mark):
                    async for line in self.of(child, indent + "    "):
                        yield line
