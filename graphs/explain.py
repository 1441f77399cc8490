"""Say where each job is, and why a run stands where it stands."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from agentflow import FAILED, PARKED, RUNNING, Event, Flow, RedisExecutor, RedisRun, as_dict

ANSWER = "to answer, type: python client.py --run {} --answer {}=VALUE"


async def look(executor: RedisExecutor, jobs: list[str] = []) -> dict[str, str]:
    """Who works, and where each job is that a worker has or, of these, that is queued."""
    key, ready = executor.key, executor.key("ready")
    crew = await executor.send("ZRANGE", key("workers"), 0, -1)
    pipe: Any = executor.link.client.pipeline()  # all at one instant
    pipe.llen(ready).lindex(ready, -1)
    for worker in crew:
        heartbeat = key("worker", worker)
        pipe.get(heartbeat).pttl(heartbeat).lrange(key("processing", worker), 0, -1)
    for job in jobs:
        pipe.lpos(ready, job)
    depth, oldest, *rest = await pipe.execute()
    found, replies = {"queue": f"has {depth} jobs; the oldest: {oldest or 'none'}"}, iter(rest)
    nobody = ", and no worker is alive"
    for worker, doing, left, held in zip(crew, replies, replies, replies, strict=False):
        if doing:
            nobody = ""
            ages, beat = json.loads(doing), f"(heartbeat {6 - left / 1000:.0f} s ago)"
            found[f"worker {worker}"] = f"has {len(held)} jobs {beat}"
        for job in held:
            found[job] = f"was with worker {worker}, which is dead; a living one takes it over"
            if doing:
                found[job] = f"is running on worker {worker} since {ages.get(job, 0):.0f} s {beat}"
    for job, index in zip(jobs, replies, strict=True):
        if index is not None:
            found[job] = f"is queued at place {depth - index} of {depth}{nobody}"
    return found


async def explain(run: RedisRun, flow: Flow, last: dict[Any, Event], at: str) -> AsyncIterator[str]:
    """A line for a run and for each token: where it is, and why; likewise its children. `last` has
    the last event by run and node, `at` is what the command line says of the Redis."""
    version, indent = "", "    " * run.origin.depth
    while version != run.version:  # it moved meanwhile
        version, jobs = run.version, run.active()
        tokens = run.state.tokens if run.phase in (RUNNING, FAILED) else {}
        # Before and after the queue: what goes from one to the other meanwhile is not NOWHERE.
        parked = as_dict(await run.executor.send("HGETALL", run.keys[PARKED]))
        found = await look(run.executor, [*jobs.values()])
        parked |= as_dict(await run.executor.send("HGETALL", run.keys[PARKED]))
        await run.read()
    where = dict.fromkeys(tokens, "waits, too")
    for node, job in jobs.items() if tokens else ():
        if job in found:
            where[node] = f"{found[job]}, delivery {int(run.fields.get(f'crashes {job}', 0)) + 1}"
        elif f"{job} is parked" not in parked:
            where[node] = "is NOWHERE: not queued, not with a worker, not parked; please report it"
        elif run.phase == FAILED:
            where[node] = "stands still, as its run failed; --resume runs it again"
        elif parked[job]:
            where[node] = f"waits for a person: {parked[job]} ({ANSWER.format(run.id, node)}{at})"
        else:
            left, count = parked[f"{job} left"], parked[f"{job} count"]
            where[node] = f"waits for {left} of {count} child runs"
        event = last.get((run.id, node), {})
        if (until := event.get("at", 0) + event.get("delay", 0)) > time.time():
            where[node] += f", backs off until {time.ctime(until)[11:19]} after {event['error']}"
    for node, mask in flow.blockers(tokens).items():
        others = [f"{other}, which {where[other]}" for other in flow.nodes_in(mask)]
        where[node] = "waits for " + "; and for ".join(others)
    yield f"{indent}run {run.id} of {flow.id} is {run.phase} {run.fields.get('error', '')}"
    for node, why in where.items():
        yield f"{indent}  {node} {why}"
    for child in await run.children():
        if child.phase in (RUNNING, FAILED):
            async for line in explain(child, flow.registry[child.origin.flow], last, at):
                yield line
