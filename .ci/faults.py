"""Faults on real processes: workers and redis-servers that are killed, frozen, cut off, cut short.

Each fault is a function of its dose. It runs random flows of pure nodes (see prove.py) while it
does harm, compares each with its run in memory, sees that nothing is left, and gives its figures;
AssertionError or Wrong where something is wrong, and where the fault did not happen.
test_agentflow.py calls them in DOSES, .ci/soak in larger ones.

Sections: 1 Nodes, 2 Server, workers, proxy, 3 The stage, 4 Faults, 5 Power loss, 6 Table.
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
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import redis

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from agentflow import (
    CANCELLED,
    COMPLETED,
    RUNNING,
    Context,
    Field,
    Flow,
    Node,
    Park,
    RedisExecutor,
    RedisRun,
    Registry,
    Run,
    RunError,
    Worker,
)
from prove import Pure, Result, Wrong, compare, ended, flows_of

Figures = dict[str, float]
LEASE, BEAT = 1.0, 0.2

# ── 1. Nodes ─────────────────────────────────────────────────────────────────────────────────


class Slow(Pure):
    """A pure node that takes its time, in a worker."""

    pause: ClassVar[float] = 0.0

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
    """Exits, hangs, blocks the event loop (once), returns what is no JSON, or notes its begin."""

    fields = {"how": Field("text", required=True), "mark": Field("text")}

    async def exec(self, prepared: Any) -> Any:
        how, mark = self.data["how"], Path(self.data.get("mark", "/dev/null"))
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
            await asyncio.sleep(3)
        return {1} if how == "no JSON" else how


TYPES = {"pure": Slow, "asking": Asking, "bad": Bad}


# ── 2. Server, workers, proxy ────────────────────────────────────────────────────────────────


async def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + seconds
    while not (await found if isinstance(found := condition(), Awaitable) else found):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


class Server:
    """A redis-server with an append-only file, on a port of its own, which it keeps."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.url = f"redis://127.0.0.1:{self.port}"
        self.admin = redis.Redis(port=self.port, decode_responses=True)
        self.aof = self.folder / "appendonlydir/appendonly.aof.1.incr.aof"

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def start(self) -> Server:
        """Start, or start again with what the file has."""
        command = ["redis-server", "--port", str(self.port), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--aof-use-rdb-preamble", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(redis.ConnectionError):
                self.admin.ping()
                return self
            assert self.process.poll() is None, "redis-server does not start"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Tally(dict[str, int]):
    """A worker's counts, in memory that outlives its process."""

    def __init__(self, counts: dict[str, int], cells: Any) -> None:
        super().__init__(counts)
        self.cells, self.places = cells, [*counts]

    def __setitem__(self, name: str, count: int) -> None:
        super().__setitem__(name, count)
        self.cells[self.places.index(name)] = count


def work(url: str, cells: Any, pause: float, options: dict[str, Any]) -> None:
    """What a worker process does; SIGTERM stops it."""

    async def main() -> None:
        worker = Worker(url, "faults", **options)
        worker.counts = Tally(worker.counts, cells)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()

    if log := os.environ.get("FAULTS_LOG"):
        logging.basicConfig(filename=log, force=True, format="%(asctime)s %(process)d %(message)s")
    else:
        logging.disable(logging.CRITICAL)
    Slow.pause = pause
    asyncio.run(main())


class Crew:
    """Worker processes."""

    def __init__(self, url: str, size: int, pause: float, options: dict[str, Any]) -> None:
        self.url, self.size, self.pause, self.options = url, size, pause, options
        self.cells: dict[Any, Any] = {}  # of each process that ever was, its counts
        self.alive: list[Any] = []
        self.fill()

    def fill(self) -> int:
        """Replace those that are dead; gives how many were."""
        self.alive = [process for process in self.alive if process.exitcode is None]
        missing = self.size - len(self.alive)
        for _ in range(missing):
            cells = multiprocessing.Array("q", 20, lock=False)
            args = (self.url, cells, self.pause, self.options)
            process = multiprocessing.get_context("fork").Process(target=work, args=args)
            process.start()
            self.cells[process] = cells
            self.alive.append(process)
        return missing

    def signal(self, number: int, process: Any) -> None:
        """Send a signal; SIGKILL also waits for the end."""
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.join()

    def counts(self) -> Counter[str]:
        """What they have counted, dead or alive."""
        places = [*Worker().counts]
        return Counter({p: sum(c[i] for c in self.cells.values()) for i, p in enumerate(places)})

    async def stop(self) -> None:
        """SIGTERM all; each ends well."""
        for process in self.alive:
            self.signal(signal.SIGTERM, process)
        await wait_until(lambda: all(p.exitcode is not None for p in self.alive), "all end")
        codes = [process.exitcode for process in self.alive]
        assert not any(codes), f"workers ended with {codes}"

    def cpu(self) -> float:
        """Seconds of processor time that those who live have used."""
        stats = [Path(f"/proc/{p.pid}/stat").read_text().split() for p in self.alive]
        return sum(int(s[13]) + int(s[14]) for s in stats) / os.sysconf("SC_CLK_TCK")


class Proxy:
    """Between workers and Redis. A connection can be cut, lose a reply, be delayed, fall silent."""

    def __init__(self, port: int, figures: Counter[str]) -> None:
        self.port, self.figures = port, figures
        self.wires: list[dict[str, Any]] = []

    async def open(self) -> str:
        """Begin to listen; gives the URL."""
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, up = await asyncio.open_connection("127.0.0.1", self.port)
        wire = {"mode": "", "writers": (writer, up)}
        self.wires.append(wire)
        pumps = self.pump(wire, reader, up, False), self.pump(wire, upstream, writer, True)
        await asyncio.gather(*pumps)
        self.wires.remove(wire)

    async def pump(self, wire: dict[str, Any], source: Any, sink: Any, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if wire["mode"] == "silent":
                    continue
                if wire["mode"] == "swallow" and replies:  # what it answers was done
                    self.figures["swallow"] += 1
                    break
                if wire["mode"] == "delay":
                    await asyncio.sleep(0.3)
                sink.write(data)
                await sink.drain()
        self.cut(wire)

    def cut(self, wire: dict[str, Any]) -> None:
        for writer in wire["writers"]:
            writer.transport.abort()

    def strike(self, rng: random.Random, mode: str) -> None:
        """Do this to one of the connections that are well."""
        if mode == "silent" and any(wire["mode"] == mode for wire in self.wires):
            return  # that takes five seconds; one at a time
        if wires := [wire for wire in self.wires if not wire["mode"]]:
            wire = rng.choice(wires)
            wire["mode"] = mode
            self.figures[mode] += mode != "swallow"
            if mode == "cut":
                self.cut(wire)


# ── 3. The stage ─────────────────────────────────────────────────────────────────────────────


class Stage:
    """A server, workers, and random flows that run on them, again and again."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.seeds, self.rng = server, itertools.count(seed), random.Random(seed)
        self.executor = RedisExecutor(server.url, "faults")
        self.figures = Counter[str]()
        self.over = False  # the harm ends
        self.crew: Crew

    async def load(self, enough: Callable[[], bool], harm: Awaitable[None], at_once: int = 8):
        """Run flows until it is enough, while harm is done; each ends as it does in memory."""

        async def some() -> None:
            while not enough() and not harming.done():
                if found := flows_of(next(self.seeds)):
                    await self.one(*found)

        harming = asyncio.ensure_future(harm)
        try:
            await asyncio.gather(*(some() for _ in range(at_once)))
        finally:
            self.over = True
            await harming

    async def one(self, flow: Flow, mend: bool = False, asks: bool = False) -> None:
        """One run of a flow."""
        right = await right_of(flow)
        run = await self.executor.run(flow, {"mend": not mend})
        answering = asyncio.ensure_future(answer(run)) if asks else None
        compare(right, await self.ended(run))
        if answering:
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
                raise Wrong(f"has not ended within {seconds} s: {await self.picture(run)}")
            if not (error := task.exception()):
                return await ended(run)
            if "workers died" in str(error):
                self.figures["unlucky"] += 1  # five kills of five workers with the same job
            elif not str(error).endswith("not mended yet"):
                raise error
            self.figures["resumed"] += 1
            with contextlib.suppress(RunError):  # the reply was lost, and it runs already
                await run.resume({"mend": True})

    async def picture(self, run: RedisRun) -> str:
        """Where a run and the queue stand, for who looks for a bug."""
        hashes = [self.server.admin.hgetall(key) for key in (run.keys[0], run.keys[2])]
        lists = {key: self.server.admin.lrange(key, 0, -1) for key in self.lists()}
        return f"{hashes} {lists} {self.server.admin.xrange(run.keys[3])}"

    def lists(self) -> list[str]:
        """The names of the lists that have jobs. (SCAN is for tests only.)"""
        names = [*self.server.admin.scan_iter("{faults}:*", 1000, "list")]
        return [name for name in names if re.search(":(ready|processing:.*)$", name)]

    async def at_rest(self) -> None:
        """Nothing is left: no job, no worker, no key without an end."""
        admin, crew = self.server.admin, self.crew
        await wait_until(
            lambda: admin.zcard("{faults}:workers") == len(crew.alive), "the dead are buried"
        )
        await wait_until(lambda: not self.lists(), "no job is left")
        await crew.stop()
        assert not admin.zcard("{faults}:workers"), "a worker is left"
        for key in admin.scan_iter("{faults}:*", 1000):
            if key not in ("{faults}:runs", "{faults}:buried", "{faults}:workers"):
                assert admin.ttl(key) > 0, f"{key} never expires: {admin.hgetall(key)}"
        self.figures.update(crew.counts())

    def happened(self, *names: str) -> Figures:
        """The figures, when each of these is more than nothing."""
        assert all(self.figures[name] for name in names), f"{names} in {dict(self.figures)}"
        return dict(self.figures)


@contextlib.asynccontextmanager
async def on_stage(
    seed: int, size: int = 4, pause: float = 0.03, proxied: bool = False, **options: Any
) -> AsyncIterator[Stage]:
    """A stage with its crew, which is at rest in the end."""
    options = {"lease": LEASE, "beat": BEAT, "grace": 10.0} | options
    with patch.dict(Registry.types, TYPES), Server() as server:
        stage = Stage(server, seed)
        stage.proxy = Proxy(server.port, stage.figures)
        url = await stage.proxy.open() if proxied else server.url
        stage.crew = Crew(url, size, pause, options)
        try:
            yield stage
            await stage.at_rest()
        finally:
            for process in stage.crew.alive:
                process.kill()
            await stage.executor.close()


async def answer(run: Any) -> int:
    """Answer what a run asks until it ends; gives how often."""
    count = 0
    while True:
        async for event in run.events():
            if event["event"] == "parked" and event.get("question") and event["run"] == run.id:
                with contextlib.suppress(RunError):  # it was answered, or does not ask any more
                    await run.answer(event["node"], "yes")
                    count += 1
        if (await run.status()).status in (COMPLETED, CANCELLED):
            return count
        await asyncio.sleep(0.05)  # it has failed, and will be resumed


async def right_of(flow: Flow) -> Result:
    """What is right: the run in memory."""
    run: Run = await flow.run({"mend": True})
    await asyncio.gather(answer(run), run.result())
    return await ended(run)


# ── 4. Faults ────────────────────────────────────────────────────────────────────────────────


async def kill_some(stage: Stage) -> None:
    """SIGKILL a random worker every 150 to 400 ms, and start another."""
    while not stage.over:
        await asyncio.sleep(stage.rng.uniform(0.15, 0.4))
        stage.crew.signal(signal.SIGKILL, stage.rng.choice(stage.crew.alive))
        stage.figures["kills"] += stage.crew.fill()


async def f1(runs: int, kills: int, seed: int = 0) -> Figures:
    """Workers are killed all the time."""
    async with on_stage(seed) as stage:
        figures = stage.figures
        enough = lambda: figures["runs"] >= runs and figures["kills"] >= kills  # noqa: E731
        await stage.load(enough, kill_some(stage))
    return stage.happened("kills", "reaped")


async def f2(zombies: int, seed: int = 0) -> Figures:
    """Workers freeze until they are taken for dead, and then go on."""
    async with on_stage(seed, size=5, pause=0.1) as stage:
        free = [*stage.crew.alive]

        async def freeze() -> None:
            while not stage.over:
                process = free.pop(stage.rng.randrange(len(free)))
                stage.crew.signal(signal.SIGSTOP, process)
                await asyncio.sleep(stage.rng.uniform(1.5, 3) * LEASE)
                stage.crew.signal(signal.SIGCONT, process)
                stage.figures["zombies"] += 1
                free.append(process)
                await asyncio.sleep(stage.rng.uniform(0, LEASE))

        async def some() -> None:
            await asyncio.gather(freeze(), freeze(), freeze())

        await stage.load(lambda: stage.figures["zombies"] >= zombies, some())
    return stage.happened("zombies", "reaped", "buried", "refused")


async def f3(rounds: int, seed: int = 0) -> Figures:
    """Redis goes away, comes back, forgets its scripts, hangs up, is read-only, is full."""
    async with on_stage(seed, pause=0.05) as stage:
        server, crew, rng, figures = stage.server, stage.crew, stage.rng, stage.figures

        async def restart(seconds: float) -> None:
            server.kill()
            await asyncio.sleep(0.5)  # until what was at work has ended
            before, since = crew.cpu(), time.monotonic()
            await asyncio.sleep(seconds)
            used = (crew.cpu() - before) / (time.monotonic() - since) / crew.size
            figures["percent of CPU while away"] = max(
                100 * used, figures["percent of CPU while away"]
            )
            server.start()
            figures["restarts"] += 1

        async def strike(what: str) -> None:
            figures[what] += 1
            if what == "short":
                await restart(0.5)
            elif what == "long":
                await restart(3.3 * LEASE)
            elif what == "scripts":
                server.admin.script_flush()
            elif what == "hang up":
                server.admin.execute_command("CLIENT", "KILL", "TYPE", "normal")
            elif what == "read-only":
                server.admin.replicaof("127.0.0.1", 1)
                await asyncio.sleep(1.5 * LEASE)
                server.admin.replicaof("NO", "ONE")
            elif what == "full":
                server.admin.config_set("maxmemory", 1)
                await asyncio.sleep(1.5 * LEASE)
                server.admin.config_set("maxmemory", 0)

        async def harm() -> None:
            kinds = ["long", "short", "scripts", "hang up", "read-only", "full"]
            for i in range(rounds):
                done = figures["runs"]
                await strike(kinds[i] if i < len(kinds) else rng.choice(kinds[i % 2 :]))
                await wait_until(lambda: figures["runs"] > done, "it goes on", 60)  # noqa: B023
                assert all(p.exitcode is None for p in crew.alive), "a worker has exited"

        await stage.load(lambda: False, harm())
    assert figures["percent of CPU while away"] < 5, figures
    return stage.happened("restarts")


async def f4(cuts: int, seed: int = 0) -> Figures:
    """The network: connections are cut, lose a reply, are slow, fall silent."""
    async with on_stage(seed, proxied=True, lease=3.0) as stage:
        figures = stage.figures

        async def harm() -> None:
            while not stage.over:
                await asyncio.sleep(stage.rng.uniform(0.02, 0.2))
                weights = {"cut": 8, "swallow": 8, "delay": 2, "silent": 1}
                mode = stage.rng.choices([*weights], [*weights.values()])[0]
                stage.proxy.strike(stage.rng, mode)

        await stage.load(lambda: figures["cut"] + figures["swallow"] >= cuts, harm())
        for wire in stage.proxy.wires:
            stage.proxy.cut(wire)
    return stage.happened("cut", "swallow", "delay", "silent", "audited")


async def f5(runs: int, seed: int = 0) -> Figures:
    """Nodes that exit, hang, block and give no JSON, beside this many good runs."""
    async with on_stage(seed) as stage:
        figures, mark = stage.figures, str(stage.server.folder / "mark")
        ends = {
            "exits": 'node "a": 5 workers died while they ran it',
            "hangs": 'node "a": TimeoutError: no result within 0.3 seconds',
            "no JSON": """node "a": ValueError: the value of 'a' is not JSON""",
            "blocks": "",
        }

        async def bad(how: str) -> None:
            node = {"id": "a", "type": "bad", "data": {"how": how, "mark": mark}}
            config = {"retries": 1, "timeout": 0.3 if how == "hangs" else 120}
            config |= {"retries": 5} if how == "exits" else {}
            flow = Registry({"bad": {"nodes": [node | {"config": config}]}})["bad"]
            run = await stage.executor.run(flow, {})
            with contextlib.suppress(RunError):
                await run.result()
            status = await run.status()
            assert status.error.startswith(ends[how]), f"{how}: {status}"
            assert bool(status.error) == bool(ends[how]), f"{how}: {status}"
            figures[how] += 1

        async def harm() -> None:
            all_bad = asyncio.gather(*map(bad, ends))
            while not all_bad.done() or not stage.over:
                figures["exits of workers"] += stage.crew.fill()
                await asyncio.sleep(0.05)
            await all_bad

        await stage.load(lambda: figures["runs"] >= runs, harm())
    return stage.happened(*ends, "exits of workers", "buried")


async def f7(jobs: int, seed: int = 0) -> Figures:
    """At half-time half of the workers are asked to stop, and the other half is killed."""
    async with on_stage(seed, size=6) as stage:
        figures, crew = stage.figures, stage.crew

        async def harm() -> None:
            await wait_until(lambda: figures["jobs"] >= jobs / 2, "half-time", 600)
            asked, killed = crew.alive[::2], crew.alive[1::2]
            for number, processes in ((signal.SIGTERM, asked), (signal.SIGKILL, killed)):
                for process in processes:
                    os.kill(process.pid, number)
            await wait_until(lambda: all(p.exitcode is not None for p in asked + killed), "all end")
            assert [p.exitcode for p in asked + killed] == [0] * 3 + [-signal.SIGKILL] * 3
            figures["kills"] += len(killed)
            crew.fill()

        await stage.load(lambda: figures["jobs"] >= jobs, harm_and_wait(stage, harm()))
    return stage.happened("kills", "reaped")


async def harm_and_wait(stage: Stage, harm: Awaitable[None]) -> None:
    """Do it once; the load goes on until it is enough."""
    await harm
    while not stage.over:
        await asyncio.sleep(0.05)


async def steer(runs: int, seed: int = 0) -> Figures:
    """Runs are answered, resumed and cancelled at random, while workers are killed."""
    async with on_stage(seed) as stage:
        figures, rng = stage.figures, stage.rng

        async def cancelled(flow: Flow, mend: bool) -> None:
            run = await stage.executor.run(flow, {"mend": not mend})
            await asyncio.sleep(rng.uniform(0, 0.3))
            with contextlib.suppress(RunError):  # it has ended already, or is cancelled twice
                await run.cancel()
            if (await run.status()).status != CANCELLED:
                return
            figures["cancelled"] += 1
            await wait_until(lambda: children_ended(stage, run), "children end with their parent")
            events = [event async for event in run.events() if event["run"] == run.id]
            names = [event["event"] for event in events]
            assert "done" not in names[names.index(CANCELLED) :], names

        async def harm() -> None:
            killing = asyncio.ensure_future(kill_some(stage))
            while not stage.over:
                if not (found := flows_of(next(stage.seeds))):
                    continue
                flow, mend = found
                if rng.random() < 0.5:
                    await cancelled(flow, mend)
                else:
                    await stage.one(asking(flow, rng), asks=True)
            await killing

        await stage.load(lambda: figures["runs"] >= runs, harm(), 6)
    return stage.happened("answered", "resumed", "cancelled", "kills", "reaped")


async def children_ended(stage: Stage, run: RedisRun) -> bool:
    """Whether no run that belongs to this one goes on."""
    ids = {event["run"] async for event in run.events()}
    found = [await stage.executor.look_for(id) for id in ids]
    return all([(await run.status()).status != RUNNING for run in found if run])


def asking(flow: Flow, rng: random.Random) -> Flow:
    """The same with two nodes that ask a person first, and none that waits to be mended."""
    graphs = copy.deepcopy(dict(flow.registry.graphs))
    pure = [node for node in graphs["main"]["nodes"] if node["type"] == "pure"]
    for node in pure:
        node["data"].pop("mend", None)
    for node in rng.sample(pure, min(2, len(pure))):
        node["type"] = "asking"
    return Registry(graphs)["main"]


async def recovery(times: int, seed: int = 0) -> Figures:
    """With the usual settings: seconds from the kill of the only worker until a new one, started
    at once, executes the interrupted job."""
    seconds = []
    async with on_stage(seed, size=1, lease=6.0, beat=1.0) as stage:
        for i in range(times):
            mark = stage.server.folder / f"mark{i}"
            node = {"id": "a", "type": "bad", "data": {"how": "begins", "mark": str(mark)}}
            run = await stage.executor.run(Registry({"main": {"nodes": [node]}})["main"], {})
            await wait_until(mark.exists, "it begins")
            stage.crew.signal(signal.SIGKILL, stage.crew.alive[0])
            killed = time.time()
            stage.figures["kills"] += stage.crew.fill()
            await run.result()
            begins = [float(line) for line in mark.read_text().split()]
            assert len(begins) == 2, begins
            seconds.append(begins[1] - killed)
    stage.figures["seconds at most"] = max(seconds)
    return stage.happened("kills", "reaped")


# ── 5. Power loss ────────────────────────────────────────────────────────────────────────────
# Redis loses its last seconds. A script is one transaction in its file: all of it or nothing.


def transactions(aof: bytes) -> list[int]:
    """Where each of them ends."""
    ends, at, inside = list[int](), 0, False
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


@contextlib.asynccontextmanager
async def workers(server: Server, count: int) -> AsyncIterator[list[Worker]]:
    """Workers in this process, which live on whatever happens to Redis."""
    crew = [Worker(server.url, "faults", lease=0.4, beat=0.1) for _ in range(count)]
    tasks = [asyncio.ensure_future(worker.run()) for worker in crew]
    try:
        yield crew
    finally:
        for worker in crew:
            worker.stop()
        await asyncio.gather(*tasks)


async def drained(server: Server, run: RedisRun, right: Result, figures: Counter[str]) -> None:
    """The run ends as it should, and nothing is left."""
    stage = Stage(server, 0)
    compare(right, await stage.ended(run))
    await wait_until(lambda: not stage.lists(), "no job is left")
    figures["resumed"] += stage.figures["resumed"]
    await stage.executor.close()


async def record(flow: Flow, mend: bool) -> tuple[bytes, int, RedisRun]:
    """A run's whole append-only file, and how much of it there was when it had begun."""
    with Server() as server:
        stage = Stage(server, 0)
        run = await stage.executor.run(flow, {"mend": not mend})
        begun = server.aof.stat().st_size
        async with workers(server, 1):
            await stage.ended(run)
        await stage.executor.close()
        return server.aof.read_bytes(), begun, run


async def cut(aof: bytes, run: RedisRun, right: Result, figures: Counter[str]) -> None:
    """A fresh server has this much of a run; a fresh worker ends it."""
    with Server() as server:
        server.kill()
        server.aof.write_bytes(aof)
        server.start()
        executor = RedisExecutor(server.url, "faults")
        async with workers(server, 1) as crew:
            await drained(server, RedisRun(executor, run.id, run.origin), right, figures)
        figures.update(crew[0].counts)
        figures["cuts"] += 1
        await executor.close()


async def cut_alive(
    flow: Flow, mend: bool, after: int, rng: random.Random, right: Result, figures: Counter[str]
) -> None:
    """Redis loses what came after so many transactions of a run; its workers live on, and still
    hold the jobs and the decisions of a future that is lost."""
    with Server() as server:
        executor = RedisExecutor(server.url, "faults")
        async with workers(server, 2) as crew:
            run = await executor.run(flow, {"mend": not mend})
            begun = len(transactions(server.aof.read_bytes()))
            following = asyncio.ensure_future(run.result())
            more = after + rng.randrange(1, 12)

            def far() -> bool:
                return len(transactions(server.aof.read_bytes())) >= begun + more

            await wait_until(lambda: far() or following.done(), "it goes on")
            server.kill()
            aof = server.aof.read_bytes()
            ends = transactions(aof)[begun - 1 :]
            figures["transactions lost"] += max(0, len(ends) - 1 - after)
            server.aof.write_bytes(aof[: ends[min(after, len(ends) - 1)]])
            server.start()
            following.cancel()
            await drained(server, run, right, figures)
        for worker in crew:
            figures.update(worker.counts)
        figures["cuts with workers alive"] += 1
        await executor.close()


async def f6(graphs: int, seed: int = 0, size: int = 8, at_once: int = 6) -> Figures:
    """Power loss after each transaction of so many runs; then the same with workers that live."""
    figures, rng, seeds = Counter[str](), random.Random(seed), itertools.count(seed)
    slots = asyncio.Semaphore(at_once)

    async def one(trial: Any) -> None:
        async with slots:
            await trial

    with patch.dict(Registry.types, TYPES), patch.object(Slow, "pause", 0.01):
        while figures["graphs"] < graphs:
            if not (found := flows_of(next(seeds), size)):
                continue
            flow, mend = found
            right = await right_of(flow)
            if not 4 <= sum(right[1].values()) <= 5 * size:
                continue
            figures["graphs"] += 1
            aof, begun, run = await record(flow, mend)
            ends = [end for end in transactions(aof) if end >= begun]
            trials = [cut(aof[:end], run, right, figures) for end in ends]
            trials += [cut_alive(flow, mend, i, rng, right, figures) for i, _ in enumerate(ends)]
            await asyncio.gather(*map(one, trials))
    assert all(figures[name] for name in ("cuts", "transactions lost", "reaped")), figures
    return dict(figures)


# ── 6. Table ─────────────────────────────────────────────────────────────────────────────────

FAULTS: dict[str, Callable[..., Any]] = {
    "F1": f1, "F2": f2, "F3": f3, "F4": f4, "F5": f5, "F6": f6, "F7": f7,
    "steer": steer, "recovery": recovery,
}  # fmt: skip
DOSES: dict[str, dict[str, int]] = {  # in CI
    "F1": {"runs": 50, "kills": 20},
    "F2": {"zombies": 10},
    "F3": {"rounds": 6},
    "F4": {"cuts": 30},
    "F5": {"runs": 50},
    "F6": {"graphs": 2},
    "F7": {"jobs": 1000},
    "steer": {"runs": 20},
}


def prove(name: str, **dose: int) -> Figures:
    """Do it; gives the figures, with the seconds that it took."""
    started = time.monotonic()
    figures = asyncio.run(FAULTS[name](**dose))
    return {"seconds": round(time.monotonic() - started, 1), **figures}


if __name__ == "__main__":
    for name in sys.argv[1:] or DOSES:
        print(name, prove(name, **DOSES.get(name, {"times": 1})), flush=True)
