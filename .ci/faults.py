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
        return f"{hashes} {lists} {[event async for event in run.events()]}"

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
    async for event in run.events():
        if event["event"] == "parked" and event.get("question") and event["run"] == run.id:
            with contextlib.suppress(RunError):
                await run.answer(event["node"], "yes")
                count += 1
    return count


async def right_of(flow: Flow) -> Result:
    """What is right: the run in memory."""
    run: Run = await flow.run({"mend": True})
    await asyncio.gather(answer(run), run.result())
    return await ended(run)
