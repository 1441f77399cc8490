"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    --usecase NAME  [--wait | --local | --draw] [--dry-run] [--json] [--graphs DIR]
                    [--input KEY=VALUE ...]: VALUE is JSON if it parses, else text; @FILE is read
    --run ID        [--status | --explain | --draw | --cancel | --resume | --answer NODE=VALUE]
                    [--wait] [--json]; with --resume also [--input KEY=VALUE ...]
    --list [--graphs DIR] | --runs | --workers      anywhere: [--redis URL] [--import MODULE ...]

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What could steer a terminal is escaped.
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
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dotenv import find_dotenv, load_dotenv
from redis.exceptions import RedisError

from agentflow import CANCELLED, COMPLETED, FAILED, RUNNING, Context, Event, GraphError, MemoryRun
from agentflow import RedisExecutor, RedisRun, Registry, Run, RunError
from graphs.check import load, nearest, parse_json
from graphs.draw import draw, mermaid
from graphs.explain import ANSWER, explain, look

STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    shown, _, options = url.partition("?")
    if "@" in options:  # nobody can tell where a password begins
        return escape(shown.partition(":")[0] + "://...")
    return escape(re.sub(r"(?s):(/*).*@", r":\1", shown))


def say(text: str, to: Any = sys.stderr) -> None:
    """Print what is only for eyes; or to stdout a result, as it is unless that is a terminal."""
    if to:
        plain = to is sys.stdout and not to.isatty()
        print(text if plain else escape(text, "\n\t"), file=to, flush=True)


def line_of(event: Event, root: str) -> str:
    """An event in a line: time, node, what, and the rest by name; of a child also its flow."""
    where = ("" if event["run"] == root else f"{event['flow']}/") + event.get("node", "")
    hidden = ("at", "event", "run", "flow", "node", "question")
    rest = "".join(f"  {name} {value}" for name, value in event.items() if name not in hidden)
    return escape(f"{time.ctime(event['at'])[11:19]}  {where:<28} {event['event']:<10}{rest}")


class Parser(argparse.ArgumentParser):
    """A parser that repeats no password, and nothing that could steer a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(escape(re.sub(r"//\S*@", "//", message)))


FITS = {  # what each subject goes with, but for --redis and --import, which go with all
    "usecase": "graphs input wait local draw dry_run json",
    "run": "status explain draw cancel resume answer input wait json",
    "list": "graphs",
    "runs": "",
    "workers": "",
}
COURSES = ("status", "explain", "draw", "cancel", "resume", "answer")


def parse() -> argparse.Namespace:
    """The command line, its flags found in this file's docstring; exit code 2 where it is wrong."""
    parser = Parser("client.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subject = parser.add_mutually_exclusive_group(required=True)
    for name, value in dict(re.findall(r"--([a-z-]+)( [A-Z=]+)?", f"{__doc__}")).items():
        group = subject if name in ("usecase", "run", "list", "runs", "workers") else parser
        many = "append" if name in ("input", "answer", "import") else "store"
        group.add_argument(f"--{name}", action=many if value else "store_true")
    args = parser.parse_args()
    given = [name for name, value in vars(args).items() if value not in (None, False)]
    [args.about] = (name for name in FITS if name in given)
    for name in given:
        if name not in (args.about, "redis", "import", *FITS[args.about].split()):
            parser.error(f"--{name.replace('_', '-')} does not go with --{args.about}; see --help")
    if len([name for name in COURSES if name in given] + (args.answer or [])[1:]) > 1:
        parser.error(f"--{', --'.join(COURSES)}: one at a time")
    if args.json and (args.draw or args.explain):
        parser.error("--draw and --explain give a text, and no JSON")
    if args.about == "run" and args.input and not args.resume:
        parser.error("--input goes with --usecase or --resume")
    args.wait |= args.local or (args.json and args.about == "usecase")
    return args


def as_json(text: str) -> Any:
    """The value of a text that is JSON, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def values(flag: str, given: list[str] | None) -> dict[str, Any]:
    """What KEY=VALUE and KEY=@FILE give; RunError, with every finding."""
    ctx, findings = Context({}), list[str]()
    for item in given or ():
        key, equals, text = item.partition("=")
        try:
            if not equals:
                raise ValueError("it must be like KEY=VALUE or KEY=@FILE")
            if text.startswith("@"):
                text = Path(text[1:]).read_text("utf-8-sig")
            ctx[key] = as_json(text)
        except (OSError, ValueError) as error:
            findings.append(f"{flag} {key}: {error}")
    if findings:
        raise RunError("\n".join(findings))
    return {key: ctx[key] for key in ctx.changes}


def set_up(args: argparse.Namespace) -> None:
    """Read .env, import the node types, and find out which Redis is meant."""
    try:
        load_dotenv(find_dotenv(usecwd=True))
    except (OSError, ValueError) as error:
        raise RunError(f".env, here or above, cannot be read: {error}") from None
    args.at = f" --redis {public(args.redis)}" if args.redis else ""  # ends what it says to type
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
    except (OSError, RedisError) as error:
        found = f"Redis at {public(url)}: {error}"
    except Exception:  # redis-py does not take it; the text may hold a part of a password
        found = "that is not the URL of a Redis"
    raise RunError(
        f"{found}; start redis-server, 6.2 or newer, or name one that takes writes with --redis "
        "redis://[USER:PASSWORD@]HOST[:PORT][/DB]; --local needs none, with --dry-run no key either"
    )


async def start(args: argparse.Namespace) -> None:
    """Start a run of a use case, unless they are to be listed or one to be drawn."""
    registry = load(args.graphs or Path(__file__).resolve().parent / "graphs")
    if args.list:
        for id, graph in registry.graphs.items():
            about = graph.get("description", "") if isinstance(graph, dict) else graph
            say(f"{id:<24} {about}", sys.stdout)
        return
    if args.usecase not in registry.graphs:
        ids = ", ".join(registry.graphs) or "none"
        raise RunError(f'no use case "{args.usecase}"; there is {ids}')
    flow, inputs = registry[args.usecase], values("--input", args.input)
    if args.draw:
        say(escape(mermaid(flow), "\n"), sys.stdout)
        return
    known = set(flow.inputs).union(*(node.reads() for node in flow.nodes.values()))
    for key in sorted(inputs.keys() - known):
        say(f'--input {key}: no node of "{flow.id}" reads it; {nearest(key, known)}')
    flow.new_context(inputs)  # so that what is wrong with them is found before Redis is asked
    run = await flow.run(inputs, None if args.local else await reach(args.redis), args.dry_run)
    if not args.local:
        say(f"queued; to follow it, type: python client.py --run {run.id} --wait{args.at}")
    if args.wait:
        await follow(args, run)
    else:
        say(run.id, sys.stdout)


async def follow(args: argparse.Namespace, run: Run) -> None:
    """Print a run's events, to its end or so far, and what came of it; then exit by that."""
    out = sys.stderr if args.wait or args.json else sys.stdout
    over = (await run.status()).status != RUNNING
    if args.wait and isinstance(run, RedisRun) and not over:
        await workers(run.executor, args.at)
    async for event in run.events(follow=args.wait):
        say(line_of(event, run.id), out)
        if question := event.get("question"):
            say("    | " + escape(question, "\n").replace("\n", "\n    | "), out)
            if isinstance(run, MemoryRun):
                answer = await ask()
                with suppress(RunError):  # the run has failed meanwhile
                    await run.answer(event["node"], answer, event["run"])
            elif args.wait and not over:
                say(f"{ANSWER.format(event['run'], event['node'])}{args.at}")
    status = await run.status()
    used = ", ".join(f"{count} {kind}" for kind, count in sorted(status.usage.items())) or "none"
    say(f"run {run.id} of {status.flow} is {status.status}; tokens used: {used}", out)
    if args.json:
        document = {key: value for key, value in vars(status).items() if key != "tokens"}
        say(json.dumps(document, indent=2), sys.stdout)
    elif args.wait and status.status == COMPLETED:
        text = json.dumps(status.result, indent=2, ensure_ascii=False)
        say(status.result if isinstance(status.result, str) else text, sys.stdout)
    sys.exit(1 if status.status in (FAILED, CANCELLED) else 0)


async def ask() -> Any:
    """A person's answer, from the terminal; RunError without one."""
    typed, loop = asyncio.Event(), asyncio.get_running_loop()
    if sys.stdin and sys.stdin.isatty():
        loop.add_reader(0, typed.set)  # no thread: that would survive Ctrl-C
        await typed.wait()
        loop.remove_reader(0)
        if text := os.read(0, 65536).decode(errors="replace"):
            return as_json(text.strip()) if text.strip() else await ask()
    raise RunError("a person is asked, and nobody answers here; use Redis, or --dry-run")


async def steer(args: argparse.Namespace) -> None:
    """Look at a run that exists, or change its course; then follow it, if that is asked."""
    executor = await reach(args.redis)
    if not (run := await executor.find(args.run)):
        raise RunError(f"there is no run {args.run!r:.140} on this Redis; it may have expired")
    if args.explain or args.draw:
        graph = await executor.send("GET", executor.key("graph", run.origin.graph))
        flow = Registry(json.loads(graph or "{}"))[run.origin.flow]
        if args.draw:
            say(escape(await draw(run, flow), "\n"), sys.stdout)
        else:
            last = {(e["run"], e.get("node")): e async for e in run.events(follow=False)}
            async for line in explain(run, flow, last, args.at):
                say(escape(line), sys.stdout)
        return
    if args.cancel:
        await run.cancel()
    if args.resume:
        await run.resume(values("--input", args.input))
    for node, value in values("--answer", args.answer).items():
        await run.answer(node, value)
    if changed := args.cancel or args.resume or args.answer:
        say(f"run {run.id} {'is cancelled' if args.cancel else 'goes on'}")
    if args.wait or args.json or not changed:
        await follow(args, run)


async def workers(executor: RedisExecutor, at: str) -> dict[str, str]:
    """Who works, and at what; says so if it is nobody."""
    found = await look(executor)
    if not any(what.startswith("worker ") for what in found):
        say(f"no worker is alive; in another terminal, type: python worker.py{at}")
    return found


async def overview(args: argparse.Namespace) -> None:
    """Print what the workers do and what waits, or the recent runs: a line each."""
    executor = await reach(args.redis)
    if args.workers:
        for what, place in (await workers(executor, args.at)).items():
            say(f"{what} {place}", sys.stdout)
        return
    newest: Any = executor.link.client.zrevrange(executor.key("runs"), 0, 19, withscores=True)
    for id, began in await newest:
        if run := await executor.find(id):
            about = f"{run.origin.flow:<20} {run.phase:<10} {time.time() - began:>7.0f} s"
            say(f"{id}  {about}  {', '.join(run.state.tokens)}", sys.stdout)


if __name__ == "__main__":
    args = parse()
    try:
        getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # closed: None
        set_up(args)
        does = {"usecase": start, "list": start, "run": steer}.get(args.about, overview)
        asyncio.run(does(args))
    except (GraphError, RunError, RedisError) as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        say("the run ends here" if args.local else "what is queued goes on; see --run ID --wait")
        sys.exit(130)
    except OSError as error:  # of stdout; an ordinary exit would try once more, and complain
        if not isinstance(error, BrokenPipeError):  # else nobody wants to read on
            say(f"cannot go on: {error}")
        os._exit(1)
