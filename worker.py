"""Take jobs and run them, until SIGTERM or Ctrl-C; a second signal exits at once."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import logging
import os
import signal
import sys

from redis.exceptions import RedisError

from agentflow import RunError, Worker
from client import Parser, escape, public, reach, set_up

log = logging.getLogger("agentflow")


class OneLine(logging.Formatter):
    """Keeps a record in one line, and what could steer a terminal out of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return escape(super().format(record))


async def work(args: argparse.Namespace) -> None:
    """Work until a signal comes. RunError where Redis is not there or will not do."""
    set_up(args)
    if args.concurrency < 1:
        raise RunError("--concurrency must be at least 1")
    executor = await reach(args.redis)
    worker = Worker(args.redis, concurrency=args.concurrency, grace=args.grace)

    def stop(number: int) -> None:
        if worker.stopping:
            os._exit(128 + number)
        log.info("stopping: %d jobs to finish; a second signal exits at once", len(worker.held))
        worker.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    log.info("worker %s at %s, %d jobs at once", worker.id, public(args.redis), args.concurrency)
    log.info("%s", sys.modules["graphs.calls"].model_status())  # imported by set_up
    config: dict[str | None, str | None] = {"maxmemory-policy": "noeviction"}
    try:
        for name in ("maxmemory-policy", "save", "appendonly"):
            config |= await executor.link.client.config_get(name)
    except RedisError:
        log.info("this Redis does not tell its CONFIG; see that it persists and does not evict")
    if config["maxmemory-policy"] != "noeviction":
        log.warning("Redis may evict runs; type: redis-cli config set maxmemory-policy noeviction")
    if config.get("save") == "" and config.get("appendonly") == "no":
        log.warning("Redis forgets all when restarted; type: redis-cli config set appendonly yes")
    await executor.link.close()
    await worker.run()
    atexit._run_exitfuncs()  # all that an ordinary exit does, but to wait for threads of nodes
    print(end="", flush=True)  # what nodes have printed
    os._exit(0)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=10, metavar="N")
    parser.add_argument("--import", metavar="MODULE", action="append", default=[])
    parser.add_argument("--redis", metavar="URL", help="REDIS_URL, else redis://localhost:6379")
    parser.add_argument("--grace", type=float, default=30, help="seconds to finish in (30)")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    try:
        asyncio.run(work(parser.parse_args()))
    except (RunError, RedisError) as error:
        log.error("%s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
