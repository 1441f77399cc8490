"""Draw a flow, or a run of it, as Mermaid text, which GitHub and others show as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping

from agentflow import DEFAULT, RETURNED, RUNNING, WAITING, Flow, Run

FILLS = {"done": "#d5f5d5", "running": "#fff3b0", "waiting": "#e8e8e8", "failed": "#f8d0d0"}


def mermaid(flow: Flow, states: Mapping[str, str] = {}) -> str:
    """A flow as Mermaid; `states` says which nodes are done, running, waiting or failed."""
    names = {node: f"n{i}" for i, node in enumerate(flow.nodes)}
    lines = ["flowchart TD"]
    for node, name in names.items():
        lines.append(f'    {name}["{node}"]' + (f":::{states[node]}" if node in states else ""))
    for source, by_action in flow.targets.items():
        for action, targets in by_action.items():
            label = re.sub(r'[#"<>&|\r\n]', lambda c: f"#{ord(c[0])};", action)
            arrow = "-->" if action == DEFAULT else f'-->|"{label}"|'
            lines += [f"    {names[source]} {arrow} {names[target]}" for target in targets]
    lines += [f"    classDef {s} fill:{FILLS[s]},color:#000" for s in sorted({*states.values()})]
    return "\n".join(lines)


async def draw(run: Run, flow: Flow) -> str:
    """The graph of a run as Mermaid, coloured by state."""
    status = await run.status()
    events = [event async for event in run.events(follow=False) if event["run"] == run.id]
    states = {event["node"]: "done" for event in events if event["event"] == "done"}
    active = "running" if status.status == RUNNING else "failed"
    for node, mark in status.tokens.items():
        states[node] = "waiting" if mark in (WAITING, RETURNED) else active
    return mermaid(flow, states)
