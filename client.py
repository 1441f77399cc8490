"""Start runs of the graphs, follow them, steer them, and see why one does not move.

    python client.py --usecase research --local --dry-run      # needs no Redis, key or network
    python client.py --usecase research --wait                 # needs a Redis and a worker.py

Results go to stdout, all else to stderr. Exit code: 0 completed or queued, 1 failed or cancelled,
2 bad input or nothing reachable, 130 Ctrl-C. What could steer a terminal is escaped: everywhere
but in a result, which keeps newlines and tabs, and keeps all of it where stdout is no terminal.
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

from agentflow import CANCELLED, COMPLETED, FAILED, RETURNED, WAITING, Event, Flow, GraphError
from agentflow import MemoryRun, RedisExecutor, RedisRun, Registry, Run, RunError, Status
from agentflow import child_id, pairs, parse_json

HERE = Path(__file__).resolve().parent
STEERING = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
FILLS = {"done": "#d5f5d5", "active": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}

# ── 1. What reaches a terminal ───────────────────────────────────────────────────────────────


def escape(text: object, keep: str = "") -> str:
    """A text with the characters that could steer a terminal made visible, but those to keep."""
    return re.sub(STEERING, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


def public(url: str) -> str:
    """A URL that was understood, without password and options."""
    return escape(re.sub(r"(?<=//)[^?]*@|\?.*", "", url))


def say(text: object) -> None:
    """Print a line on stderr."""
    print(escape(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result on stdout."""
    print(escape(text, keep="\n\t") if sys.stdout.isatty() else text, flush=True)


def clock(at: float) -> str:
    """A time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def tell(event: Event, root: str) -> None:
    """Print an event: time, node, what, and the rest by name; then what a person is asked."""
    rest = {**event, "question": ""}
    place = rest.pop("node", "")
    if rest.pop("run") != root:
        place = f"{event['flow']}/{place}"
    said = f"{clock(rest.pop('at', time.time()))}  {place:<28} {rest.pop('event'):<10}"
    del rest["flow"]
    say(said + "".join(f" {name} {value} " for name, value in rest.items() if value))
    for line in (event.get("question") or "").splitlines():
        say(f"          | {line}")


# ── 2. The command line ──────────────────────────────────────────────────────────────────────

FLAGS = {  # by what they go with: the flag and its value, what it does
    "": {
        "usecase NAME": "start a run of the graph NAME.json",
        "run ID": "look at a run that exists, or steer it",
        "list": "show the use cases",
        "runs": "show recent runs",
        "workers": "show who is alive, and what waits",
        "graphs DIR": "where the graphs are",
        "redis URL": "default: REDIS_URL, else redis://localhost:6379",
        "import MODULE": "more node types",
    },
}
