"""Redraw README.md: `python graphs/patterns/draw.py`.

Below each link to a graph it puts the graph's drawing, and what its `expect` says.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # as a script, it finds agentflow.py from anywhere

import graphs.nodes  # noqa: E402, F401
from graphs.check import load  # noqa: E402
from graphs.draw import mermaid  # noqa: E402

BELOW = re.compile(  # a link to a graph, text, a drawing, and what runs
    r"(\]\(([^()]+)\.json\)(?:(?!```).)*?\n\n)```mermaid\n.*?\n```\n(?:\nRuns [^\n]*\n)?", re.DOTALL
)


def drawn(text: str) -> str:
    """The page with every drawing, and every line of what runs, made anew."""
    flows = load(HERE)

    def below(match: re.Match[str]) -> str:
        flow = flows[match[2]]
        expect = flow.graph.get("expect", {})
        counts = [f"{node} {count}" for node, count in expect.get("nodes", {}).items()]
        runs = f"\nRuns `{' · '.join(counts)}`" if counts else ""
        if isinstance(expect.get("result"), str):
            runs += f" and gives `{expect['result']}`"
        return f"{match[1]}```mermaid\n{mermaid(flow)}\n```\n" + (f"{runs}\n" if runs else "")

    return BELOW.sub(below, text)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(drawn(page.read_text("utf-8")), "utf-8")
