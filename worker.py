"""Take jobs and run them, until SIGTERM or Ctrl-C; a second signal exits at once.

    python worker.py [--concurrency 10] [--import MODULE] [--redis URL] [--grace 30]

The log has ids and times, but no prompts and no answers.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

from redis.exceptions import RedisError

from agentflow import RedisExecutor, RunError, Worker
from client import escape, public, reach, set_up

log = logging.getLogger("agentflow")


class OneLine(logging.Formatter):
    """Keeps a record in one line, and what could steer a terminal out of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return escape(super().format(record))


async def look_around(executor: RedisExecutor) -> None:
    """Warn where this Redis may lose runs; one that forbids CONFIG is not asked."""
    try:
        settings: dict[str, str] = {}
        for name in ("maxmemory-policy", "save", "appendonly"):
            settings |= await executor.link.client.config_get(name)
    except RedisError:
        return
    if settings.get("maxmemory-policy", "noeviction") != "noeviction":
        log.warning(
            "this Redis may evict runs; type: redis-cli CONFIG SET maxmemory-policy noeviction"
        )
    if settings.get("save") == "" and settings.get("appendonly") == "no":
        log.warning(
            "this Redis forgets all at a restart; type: redis-cli CONFIG SET appendonly yes"
        )


async def work(args: argparse.Namespace) -> None:
    """Work until a signal comes. RunError where Redis is not there or will not do."""
    set_up(args)
    import graphs.nodes as nodes  # not at the top: set_up says where it is

    executor = await reach(args.redis)
    await look_around(executor)
    await executor.close()
    worker = Worker(args.redis, concurrency=args.concurrency, grace=args.grace)

    def stop(number: int) -> None:
        if worker.stopping:
            os._exit(128 + number)
        log.info("stopping: finishing %d jobs; a second signal exits at once", len(worker.held))
        worker.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    log.info("worker %s at %s, %d jobs at once", worker.id, public(args.redis), args.concurrency)
    log.info("%s", nodes.model_status())
    await worker.run()
    log.info("stopped after %d jobs", worker.counts["done"])


def main() -> int:
    """The whole command; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(";")[0])
    parser.add_argument("--concurrency", type=int, default=10, help="jobs at once (10)")
    parser.add_argument("--import", metavar="MODULE", action="append", default=[])
    parser.add_argument("--redis", metavar="URL")
    parser.add_argument("--grace", type=float, default=30, help="seconds to finish in (30)")
    args = parser.parse_args()
    if args.concurrency < 1 or args.grace < 0:
        parser.error("--concurrency is at least 1, and --grace at least 0")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    try:
        asyncio.run(work(args))
    except (RunError, RedisError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
