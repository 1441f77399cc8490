"""Faults on real processes: workers and redis-servers that are killed, frozen, cut off, cut short.

Each fault is a function of its dose. It runs random flows of pure nodes (see prove.py) while it
does harm, compares each with its run in memory, sees that nothing is left, and gives its figures;
AssertionError or Wrong where something is wrong, and where the fault did not happen.
test_agentflow.py does it in DOSES; .ci/soak, for hours.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import patch

import redis

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from agentflow import CANCELLED, COMPLETED, EVENTS, RUNNING, Context, Flow, Node, Park
from agentflow import RedisExecutor, RedisRun, Registry, RunError, Worker
from graphs.check import Field
from prove import Pure, Result, Wrong, compare, ended, flows_of

LEASE = 1.0
COUNTS = [*Worker().counts]
LIMITS = {"lease": LEASE, "beat": 0.2, "grace": 10.0}
UNLUCKY = "5 workers ended or erred with it; see their logs"  # of a job that was killed so often
Harm = Callable[[], Coroutine[Any, Any, None]]

# ── Nodes ────────────────────────────────────────────────────────────────────────────────────


class Slow(Pure):
    """A pure node that takes its time, in a worker."""

    pause = 0.0

    async def exec(self, prepared: Any) -> Any:
        await asyncio.sleep(random.uniform(0, 2 * self.pause))
        return await super().exec(prepared)


class Asking(Slow):
    """A pure node that asks a person first."""

    async def prep(self, ctx: Context) -> Any:
        if ctx.results is None:
            return Park(question=f"{self.id}?")
        prepared = await super().prep(ctx)
        text = f"{prepared['digest']} {ctx.results}"
        return prepared | {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


class Bad(Node):
    """Exits, hangs, blocks the event loop (once), gives no JSON, or notes when it begins."""

    fields = {"how": Field("text"), "mark": Field("text")}

    async def exec(self, prepared: Any) -> Any:
        how, mark = self.data["how"], Path(self.data["mark"])
        if how == "exits":
            os._exit(3)
        elif how == "hangs":
            await asyncio.Event().wait()
        elif how == "blocks" and not mark.exists():
            mark.touch()
            time.sleep(2 * LEASE)
        elif how == "begins":
            with mark.open("a") as file:
                print(time.time(), file=file)
            await asyncio.sleep(1)
        return {1} if how == "no JSON" else how


TYPES = {"hash": Slow, "asking": Asking, "bad": Bad}


def bad_flow(how: str, mark: Path, **config: Any) -> Flow:
    """A flow of one bad node."""
    data = {"how": how, "mark": str(mark)}
    node = {"id": "a", "type": "bad", "data": data, "config": config}
    return Registry({"main": {"nodes": [node]}})["main"]


def asking(flow: Flow, rng: random.Random) -> Flow:
    """The same with two nodes that ask a person first, and none that waits to be mended."""
    graphs = copy.deepcopy(dict(flow.registry.graphs))
    pure = [node for node in graphs["main"]["nodes"] if node["type"] == "hash"]
    for node in pure:
        node["data"].pop("mend", None)
    for node in rng.sample(pure, min(2, len(pure))):
        node["type"] = "asking"
    return Registry(graphs)["main"]


async def answer(run: Any) -> int:
    """Answer what a run asks until it has completed; gives how often."""
    count = 0
    while (await run.status()).status not in (COMPLETED, CANCELLED):
        async for event in run.events():
            if event["event"] == "parked" and event.get("question") and event["run"] == run.id:
                with contextlib.suppress(RunError):  # it was answered, or does not ask any more
                    await run.answer(event["node"], "yes")
                    count += 1
        await asyncio.sleep(0.01)
    return count


async def right_of(flow: Flow) -> Result:
    """What is right: the run in memory."""
    run: Any = await flow.run({"mend": True})
    answering = asyncio.ensure_future(answer(run))
    try:
        await run.result()
    finally:
        answering.cancel()
    return await ended(run)


# ── Server, workers, network ─────────────────────────────────────────────────────────────────


async def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + seconds
    while not (await found if isinstance(found := condition(), Awaitable) else found):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


class Server:
    """A redis-server with an append-only file, on a port of its own, which it keeps.

    With `appendfsync always`: by default Redis acknowledges what is not yet in the file while it
    syncs, so that already SIGKILL makes it forget a run that it has acknowledged."""

    def __init__(self, aof: bytes = b"") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.url = f"redis://127.0.0.1:{self.port}"
        self.admin = redis.Redis(port=self.port, decode_responses=True)
        self.start()
        self.aof = next(self.folder.glob("**/*.incr.aof"), self.folder / "appendonly.aof")
        if aof:
            self.restart(aof)

    def start(self) -> None:
        """Start with what the file has."""
        command = [
            os.environ.get("REDIS_SERVER", "redis-server"),
            "--port",
            str(self.port),
            "--dir",
            str(self.folder),
        ]
        command += ["--save", "", "--appendonly", "yes", "--aof-use-rdb-preamble", "no"]
        command += ["--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(redis.RedisError):
                assert self.admin.info("server")["process_id"] == self.process.pid
                self.admin.exists("key")  # INFO is answered by a cluster that is down, too
                return
            assert self.process.poll() is None, "redis-server does not start"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def restart(self, aof: bytes) -> None:
        """Power loss: it comes back with this file."""
        self.kill()
        self.aof.write_bytes(aof)
        self.start()

    def transactions(self) -> list[int]:
        """Where in the file each of them ends. A script is one: it is there as a whole or not."""
        aof, ends, at, inside = self.aof.read_bytes(), list[int](), 0, False
        with contextlib.suppress(ValueError):  # the last one is being written
            while at < len(aof):
                words, line = list[bytes](), aof.index(b"\r\n", at)
                count, at = int(aof[at + 1 : line]), line + 2
                for _ in range(count):
                    line = aof.index(b"\r\n", at)
                    size = int(aof[at + 1 : line])
                    words.append(aof[line + 2 : line + 2 + size])
                    at = line + size + 4
                inside = words[0] == b"MULTI" or inside and words[0] != b"EXEC"
                ends += [] if inside or at > len(aof) else [at]
        return ends


class Tally(dict[str, int]):
    """A worker's counts, in memory that outlives its process."""

    cells: Any

    def __setitem__(self, name: str, count: int) -> None:
        super().__setitem__(name, count)
        self.cells[COUNTS.index(name)] = count


def work(url: str, cells: Any, pause: float, options: dict[str, Any]) -> None:
    """What a worker process does; SIGTERM stops it."""

    async def main() -> None:
        worker = Worker(url, "faults", **options)
        worker.counts = Tally(worker.counts)
        worker.counts.cells = cells
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked since its birth
        await worker.run()

    logging.disable(logging.CRITICAL)
    Slow.pause = pause
    asyncio.run(main())


class Crew:
    """Worker processes."""

    def __init__(self, size: int, *args: Any) -> None:
        self.size, self.args = size, args
        self.cells: list[Any] = []  # the counts of each that ever was
        self.alive: list[Any] = []
        self.fill()

    def fill(self) -> int:
        """Replace those that have ended; gives how many had."""
        self.alive = [process for process in self.alive if process.exitcode is None]
        missing = self.size - len(self.alive)
        for _ in range(missing):
            self.cells.append(multiprocessing.Array("q", 20, lock=False))
            args = (self.args[0], self.cells[-1], *self.args[1:])
            self.alive.append(multiprocessing.get_context("fork").Process(target=work, args=args))
            # A SIGTERM that comes before the child has a handler waits for it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            self.alive[-1].start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return missing

    def kill(self, process: Any) -> int:
        """SIGKILL one, and start another; gives how many died."""
        process.kill()
        process.join()
        return self.fill()

    def counts(self) -> Counter[str]:
        """What they have counted."""
        return Counter({name: sum(c[i] for c in self.cells) for i, name in enumerate(COUNTS)})

    async def stop(self, killed: int = 0) -> None:
        """SIGTERM all but so many, which get SIGKILL; each ends as it should."""
        numbers = [signal.SIGKILL] * killed + [signal.SIGTERM] * (len(self.alive) - killed)
        for process, number in zip(self.alive, numbers, strict=True):
            os.kill(process.pid, number)
        await wait_until(lambda: all(p.exitcode is not None for p in self.alive), "all end")
        codes = [process.exitcode for process in self.alive]
        assert codes == [-9] * killed + [0] * (len(codes) - killed), f"they ended with {codes}"

    def cpu(self) -> float:
        """Seconds of processor time that those who live have used."""
        stats = [Path(f"/proc/{p.pid}/stat").read_text().split() for p in self.alive]
        return sum(int(stat[13]) + int(stat[14]) for stat in stats) / os.sysconf("SC_CLK_TCK")


class Proxy:
    """The network. A connection can be cut, lose a reply, be slow for a second, fall silent."""

    def __init__(self, port: int, figures: Counter[str]) -> None:
        self.port, self.figures = port, figures
        self.modes: dict[Any, str] = {}  # of each connection, which is the writers of its ends

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.modes[wire := (writer, up_writer)] = ""
        await asyncio.gather(self.pump(wire, reader, up_writer), self.pump(wire, up_reader, writer))

    async def pump(self, wire: Any, source: Any, sink: Any) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if self.modes[wire] == "swallow" and sink is wire[0]:  # what it answers was done
                    self.figures["swallowed"] += 1
                    break
                if self.modes[wire] == "delay":
                    await asyncio.sleep(0.2)
                if self.modes[wire] != "silent":
                    sink.write(data)
                    await sink.drain()
        self.cut(wire)

    def cut(self, wire: Any) -> None:
        for writer in wire:
            writer.transport.abort()

    def strike(self, rng: random.Random) -> None:
        """Do something to one of the connections that are well."""
        live = {wire: mode for wire, mode in self.modes.items() if not wire[0].is_closing()}
        modes = ["cut"] * 8 + ["swallow"] * 8 + ["delay"] * 2
        modes += [] if "silent" in live.values() else ["silent"]  # it costs seconds
        new = [mode for mode in modes if not self.figures[mode]]
        if wires := [wire for wire, mode in live.items() if not mode]:
            wire, mode = rng.choice(wires), rng.choice(new or modes)
            self.modes[wire] = mode
            self.figures[mode] += 1
            if mode == "cut":
                self.cut(wire)
            elif mode == "delay":
                asyncio.get_running_loop().call_later(1, self.modes.update, {wire: ""})


# ── The stage ────────────────────────────────────────────────────────────────────────────────


class Stage:
    """A server, workers, and random flows that run on them."""

    crew: Crew
    proxy: Proxy

    def __init__(self, server: Server, seed: int, figures: Counter[str]) -> None:
        self.server, self.seeds, self.rng = server, itertools.count(seed), random.Random(seed)
        self.executor = RedisExecutor(server.url, "faults")
        self.figures = figures
        self.over = False  # no more harm is to be done

    async def load(
        self, enough: Callable[[], bool], harm: Harm, *names: str, at_once: int = 8
    ) -> None:
        """Run flows while harm is done, until it is enough and these figures are not nothing (or a
        minute more); each ends as it does in memory."""
        deadline = float("inf")

        async def some() -> None:
            nonlocal deadline
            while not self.over:
                await self.one(*await self.flow())
                if harming.done() or enough():
                    deadline = min(deadline, time.monotonic() + 60)
                    figures = self.figures + self.crew.counts()
                    happened = all(figures[name] for name in names)
                    self.over = harming.done() or happened or time.monotonic() > deadline

        harming = asyncio.ensure_future(harm())
        try:
            await asyncio.gather(*(some() for _ in range(at_once)))
        except BaseException:
            harming.cancel()  # what it would say of this hides the cause
            raise
        await harming

    async def flow(self, least: int = 1, most: int = 80) -> tuple[Flow, bool, Result]:
        """A random flow with so many jobs, whether it fails at first, and what is right."""
        while True:
            if found := flows_of(next(self.seeds)):
                with contextlib.suppress(RunError):  # a loop without an end
                    right = await right_of(found[0])
                    if least <= sum(right[1].values()) <= most:
                        return *found, right

    async def one(self, flow: Flow, mend: bool, right: Result) -> None:
        """One run of a flow."""
        run = await self.executor.run(flow, {"mend": not mend})
        answering = asyncio.ensure_future(answer(run))
        compare(right, await self.ended(run))
        self.figures["answered"] += await answering
        self.figures["runs"] += 1
        self.figures["jobs"] += sum(right[1].values())

    async def ended(self, run: RedisRun, seconds: float = 90) -> Result:
        """What has come of a run; one that fails on the way is resumed."""
        deadline = time.monotonic() + seconds
        while True:
            task = asyncio.ensure_future(run.result())
            await asyncio.wait([task], timeout=deadline - time.monotonic())
            if not task.done():
                stands = [self.server.admin.hgetall(key) for key in (run.keys[0], run.keys[2])]
                stands += [self.lists(), self.server.admin.xrange(run.keys[EVENTS])]
                raise Wrong(f"run {run.id} has not ended within {seconds} s: {stands}")
            if not (error := task.exception()):
                return await ended(run)
            if str(error).endswith(UNLUCKY):
                self.figures["unlucky"] += 1
            elif not str(error).endswith("not mended yet"):
                raise error
            self.figures["resumed"] += 1
            with contextlib.suppress(RunError):  # the reply was lost, and it runs already
                await run.resume({"mend": True})

    def lists(self) -> dict[str, Any]:
        """The lists that have jobs. (SCAN is for tests only.)"""
        names = self.server.admin.scan_iter("{faults}:*", 1000, "list")
        return {name: self.server.admin.lrange(name, 0, -1) for name in names}

    async def at_rest(self) -> None:
        """Nothing is left: no job, no worker, no key without an end."""
        admin = self.server.admin
        await wait_until(lambda: not self.lists(), "no job is left")
        await self.crew.stop()
        for key in admin.scan_iter("{faults}:*", 1000):
            if admin.type(key) != "zset":
                assert admin.pttl(key) != -1, f"{key}, a {admin.type(key)}, never expires"
        self.figures.update(self.crew.counts())

    def happened(self, *names: str) -> Counter[str]:
        """The figures, when none of these is nothing."""
        assert all(self.figures[name] for name in names), f"{names} in {self.figures}"
        return self.figures


@contextlib.asynccontextmanager
async def on_stage(
    seed: int, size: int = 4, pause: float = 0.03, proxied: bool = False, aof: bytes = b"",
    figures: Counter[str] | None = None, **limits: float,
) -> AsyncIterator[Stage]:  # fmt: skip
    """A stage with so many workers; in the end it is at rest."""
    with patch.dict(Registry.types, TYPES):
        stage = Stage(server := Server(aof), seed, Counter() if figures is None else figures)
        url, stage.proxy = server.url, Proxy(server.port, stage.figures)
        if proxied:
            listening = await asyncio.start_server(stage.proxy.serve, "127.0.0.1", 0)
            url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        stage.crew = Crew(size, url, pause, LIMITS | limits)
        try:
            await wait_until(lambda: server.admin.zcard("{faults}:workers") >= size, "all begin")
            yield stage
            await stage.at_rest()
        finally:
            for process in stage.crew.alive:
                process.kill()
            await stage.executor.link.close()
            server.kill()
            shutil.rmtree(server.folder)


# ── Faults ───────────────────────────────────────────────────────────────────────────────────


async def kill_some(stage: Stage) -> None:
    """SIGKILL a random worker every 150 to 400 ms, and start another."""
    while not stage.over:
        await asyncio.sleep(stage.rng.uniform(0.15, 0.4))
        stage.figures["kills"] += stage.crew.kill(stage.rng.choice(stage.crew.alive))


async def f1(runs: int, kills: int, seed: int = 0) -> Counter[str]:
    """Workers are killed all the time."""
    async with on_stage(seed) as stage:
        figures = stage.figures
        await stage.load(
            lambda: figures["runs"] >= runs and figures["kills"] >= kills,
            lambda: kill_some(stage),
            "reaped",
        )
    return stage.happened("kills", "reaped")


async def f2(zombies: int, seed: int = 0) -> Counter[str]:
    """Workers freeze until they are taken for dead, and then go on."""
    async with on_stage(seed, 5, 0.1) as stage:
        free = [*stage.crew.alive]

        async def freeze() -> None:
            while not stage.over:
                stage.figures["zombies"] += 1
                process = free.pop(stage.rng.randrange(len(free)))
                os.kill(process.pid, signal.SIGSTOP)
                await asyncio.sleep(stage.rng.uniform(1.5, 3) * LEASE)
                os.kill(process.pid, signal.SIGCONT)
                free.append(process)

        async def harm() -> None:
            await asyncio.gather(freeze(), freeze(), freeze())

        happens = "reaped", "refused"
        await stage.load(lambda: stage.figures["zombies"] >= zombies, harm, *happens)
    return stage.happened("zombies", "reaped", "refused")


async def f3(rounds: int, seed: int = 0) -> Counter[str]:
    """Redis goes away and comes back, forgets its scripts, hangs up, is read-only, is full."""
    async with on_stage(seed, pause=0.05) as stage:
        server, crew, figures = stage.server, stage.crew, stage.figures
        percent, send = "percent of CPU while away", server.admin.execute_command

        async def restart(seconds: float) -> None:
            server.kill()
            await asyncio.sleep(0.5)  # what is at work ends
            before, since = crew.cpu(), time.monotonic()
            await asyncio.sleep(seconds)
            used = 100 * (crew.cpu() - before) / (time.monotonic() - since) / crew.size
            figures[percent] = max(figures[percent], used)
            server.start()
            figures["restarts"] += 1

        async def between(*commands: str) -> None:
            send(*commands[0].split())
            await asyncio.sleep(1.5 * LEASE)
            send(*commands[1].split())

        refusing = ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE")
        if server.admin.info("cluster")["cluster_enabled"]:  # which knows no REPLICAOF
            refusing = ("CLUSTER DELSLOTSRANGE 0 16383", "CLUSTER ADDSLOTSRANGE 0 16383")
        kinds: dict[str, Harm] = {
            "away for long": lambda: restart(3.3 * LEASE),
            "away": lambda: restart(0.5),
            "scripts forgotten": lambda: between("SCRIPT FLUSH", "PING"),
            "hung up": lambda: between("CLIENT KILL TYPE normal", "PING"),
            "read-only": lambda: between(*refusing),
            "full": lambda: between("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        }

        async def harm() -> None:
            for i in range(rounds):
                runs, kind = figures["runs"], [*kinds][i % len(kinds)]
                figures[kind] += 1
                await kinds[kind]()
                await wait_until(lambda: figures["runs"] > runs, f"on after {kind}", 60)  # noqa: B023
                assert all(p.exitcode is None for p in crew.alive), f"workers exit when {kind}"

        await stage.load(lambda: False, harm)
        assert figures[percent] < 5, figures
    return stage.happened("restarts", *kinds)


async def f4(cuts: int, seed: int = 0) -> Counter[str]:
    """The network: connections are cut, lose a reply, are slow, fall silent."""
    async with on_stage(seed, proxied=True, lease=3.0) as stage:
        figures = stage.figures

        async def harm() -> None:
            while not stage.over:
                await asyncio.sleep(stage.rng.uniform(0.02, 0.2))
                stage.proxy.strike(stage.rng)

        await stage.load(lambda: figures["cut"] + figures["swallowed"] >= cuts, harm, "audited")
        for wire in [*stage.proxy.modes]:
            stage.proxy.cut(wire)
    return stage.happened("cut", "swallowed", "delay", "silent", "audited")


async def f5(runs: int, seed: int = 0) -> Counter[str]:
    """Nodes that exit, hang, block and give no JSON, beside this many good runs."""
    ends: dict[str, tuple[str, dict[str, Any]]] = {
        "exits": (UNLUCKY, {"retries": 5}),
        "hangs": ("no result within 0.3 seconds", {"retries": 1, "timeout": 0.3}),
        "no JSON": ("ValueError: the value of 'a' is not JSON", {}),
        "blocks": ("", {}),
    }
    async with on_stage(seed) as stage:
        figures = stage.figures

        async def bad(how: str) -> None:
            text, config = ends[how]
            flow = bad_flow(how, stage.server.folder / "mark", **config)
            run = await stage.executor.run(flow, {})
            with contextlib.suppress(RunError):
                await run.result()
            error = (await run.status()).error
            assert text in error and bool(text) == bool(error), f"{how}: {error}"
            figures[how] += 1

        async def harm() -> None:
            all_bad = asyncio.gather(*map(bad, ends))
            while not (all_bad.done() and stage.over):
                figures["exits of workers"] += stage.crew.fill()
                await asyncio.sleep(0.02)
            await all_bad

        await stage.load(lambda: figures["runs"] >= runs, harm)
    return stage.happened(*ends, "exits of workers")


async def f6(graphs: int, jobs: int = 24, seed: int = 0, at_once: int = 12) -> Counter[str]:
    """Power loss after each transaction of so many runs: a new worker ends it on a new server; and
    on the old one, workers that still hold jobs and decisions of the future that was lost."""
    figures, slots, rng = Counter[str](), asyncio.Semaphore(at_once), random.Random(seed)
    seeds, brief = itertools.count(seed), {"lease": 0.5, "beat": 0.1, "figures": figures}

    async def fresh(run: RedisRun, right: Result, aof: bytes) -> None:
        async with slots, on_stage(0, 1, 0, aof=aof, **brief) as stage:
            again = RedisRun(stage.executor, run.id, run.origin)
            compare(right, await stage.ended(again))
            figures["cuts"] += 1

    async def alive(flow: Flow, mend: bool, right: Result, after: int) -> None:
        async with slots, on_stage(0, 2, 0.01, **brief) as stage:
            server, more = stage.server, after + rng.randrange(1, 12)
            run = await stage.executor.run(flow, {"mend": not mend})
            begun = len(server.transactions())
            await wait_until(
                lambda: len(server.transactions()) >= begun + more
                or server.admin.hget(run.keys[0], "status") != RUNNING, "it runs",
            )  # fmt: skip
            server.kill()
            ends = server.transactions()[begun - 1 :]
            figures["transactions lost"] += max(0, len(ends) - 1 - after)
            server.restart(server.aof.read_bytes()[: ends[: after + 1][-1]])
            if rng.random() < 0.5:  # what only one of them remembers must not be lost with it
                figures["kills"] += stage.crew.kill(stage.crew.alive[0])
            values, done = await stage.ended(run)
            # Who remembers what a child gave goes on with it, while the child may be at work again.
            again = Counter(
                {k: n for k, n in (right[1] - done).items() if not k.startswith("main/")}
            )
            figures["activations of children under way"] += again.total()
            compare(right, (values, done + again))
            figures["cuts with workers alive"] += 1

    for _ in range(graphs):
        async with on_stage(next(seeds), 1, 0.01, **brief) as stage:
            stage.seeds = seeds
            flow, mend, right = await stage.flow(4, jobs)
            run = await stage.executor.run(flow, {"mend": not mend})
            begun = len(stage.server.transactions())
            await stage.ended(run)
            ends, aof = stage.server.transactions()[begun - 1 :], stage.server.aof.read_bytes()
        trials: list[Any] = [fresh(run, right, aof[:end]) for end in ends]
        trials += [alive(flow, mend, right, i) for i, _ in enumerate(ends)]
        await asyncio.gather(*trials)
        figures["graphs"] += 1
    return stage.happened("cuts", "transactions lost", "cuts with workers alive", "reaped")


async def f7(jobs: int, seed: int = 0) -> Counter[str]:
    """At half-time half of the workers are asked to stop, and the other half is killed."""
    async with on_stage(seed, 6) as stage:
        figures = stage.figures

        async def harm() -> None:
            await wait_until(lambda: figures["jobs"] >= jobs / 2, "half-time", 600)
            await stage.crew.stop(killed=3)
            figures["ended"] += stage.crew.fill()
            await wait_until(lambda: stage.over, "enough", 600)

        await stage.load(lambda: figures["jobs"] >= jobs, harm, at_once=24)
    return stage.happened("ended", "reaped")


async def steer(runs: int, seed: int = 0) -> Counter[str]:
    """Runs are answered, resumed and cancelled at random, while workers are killed."""
    async with on_stage(seed) as stage:
        figures, rng, executor = stage.figures, stage.rng, stage.executor

        async def cancel(flow: Flow, mend: bool) -> None:
            run = await executor.run(flow, {"mend": not mend})
            await asyncio.sleep(rng.uniform(0, 0.3))
            with contextlib.suppress(RunError):  # it has ended already
                await run.cancel()
                figures["cancelled"] += 1
                await wait_until(lambda: all_ended(run), "children end with their parent")
                names = [e["event"] async for e in run.events() if e["run"] == run.id]
                assert "done" not in names[names.index(CANCELLED) :], names

        async def all_ended(run: RedisRun) -> bool:
            ids = {event["run"] async for event in run.events()}
            found = [child for id in ids if (child := await executor.find(id))]
            return all([(await child.status()).status != RUNNING for child in found])

        async def harm() -> None:
            killing = asyncio.ensure_future(kill_some(stage))
            while not stage.over:
                flow, mend, _ = await stage.flow()
                if rng.random() < 0.5:
                    await cancel(flow, mend)
                else:
                    flow = asking(flow, rng)
                    await stage.one(flow, False, await right_of(flow))
            await killing

        happens = "answered", "resumed", "cancelled", "kills", "reaped"
        await stage.load(lambda: figures["runs"] >= runs, harm, *happens)
    return stage.happened(*happens)


async def recovery(times: int, seed: int = 0) -> Counter[str]:
    """With the usual settings: seconds from the kill of the only worker until a new one, started
    at once, executes the interrupted job."""
    async with on_stage(seed, 1, lease=6.0, beat=1.0) as stage:
        figures, longest = stage.figures, "seconds at most"
        for i in range(times):
            mark = stage.server.folder / f"mark{i}"
            run = await stage.executor.run(bad_flow("begins", mark), {})
            await wait_until(mark.exists, "it begins")
            killed = time.time()
            figures["kills"] += stage.crew.kill(stage.crew.alive[0])
            await run.result()
            again = float(mark.read_text().split()[1])
            figures[longest] = max(figures[longest], again - killed)
    return stage.happened("kills", "reaped")


FAULTS: dict[str, Callable[..., Any]] = {"F1": f1, "F2": f2, "F3": f3, "F4": f4, "F5": f5}
FAULTS |= {"F6": f6, "F7": f7, "steer": steer, "recovery": recovery}
DOSES: dict[str, dict[str, int]] = {  # in CI
    "F1": {"runs": 50, "kills": 15},
    "F2": {"zombies": 10},
    "F3": {"rounds": 6},
    "F4": {"cuts": 30},
    "F5": {"runs": 50},
    "F6": {"graphs": 2, "jobs": 12},
    "F7": {"jobs": 1000},
    "steer": {"runs": 15},
    "recovery": {"times": 1},
}


def prove(name: str, **dose: int) -> Counter[str]:
    """Do it; gives the figures."""
    return asyncio.run(FAULTS[name](**dose))
